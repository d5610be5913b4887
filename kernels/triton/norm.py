"""Triton for the branch's own norm of h, forward and backward: RMSNorm, or LayerNorm, which subtracts the mean first.

Both norm h as stored. The forward takes the statistics from what it has written, the backward from a recomputed h.
With `hidden` = h (less its mean), `inverse` = 1 / rms(hidden), d the result's gradient and g = d * norm_weight:

    dh   = inverse * (g - share * hidden - plain)      share = inverse^2 * mean(g * hidden), plain = mean(g) or 0
    dw_i = <dh, x_i> = inverse * (<g, x_i> - share * <hidden, x_i> - plain * <1, x_i>)

The second form needs no statistics before its sums: one loop over the streams computes both. Each program writes what
its tokens add to the gradients of weight and bias, and the programs' rows are added in one order.
"""

from __future__ import annotations

from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.triton import text

START = "norm_sum = tl.zeros([BT], tl.float32)"  # before the forward's loop that weighs


def weighed(chain: Chain, weight: str) -> str:
    """Return the text of h of a tile as it is stored; `weight` formats a stream's weight: `w_{}[:, None]`."""
    terms = (f"{weight.format(i)} * x_{i}" for i in range(chain.stream.streams))
    return text.rounded(chain, " + ".join(terms))


def add_up(chain: Chain) -> list[str]:
    """Emit, in that loop, the addition of `hidden`, a tile of h, to the squares of RMSNorm or the sum of LayerNorm."""
    return ["norm_sum += tl.sum(hidden, 1)"] if chain.norm == "layer" else _squares("norm_sum")


def normalise(chain: Chain) -> list[str]:
    """Emit what follows that loop: h is read again, normalised, and written in place."""
    layer = chain.norm == "layer"
    lines = ["tl.debug_barrier()"]  # threads read now what others of the program have written
    hidden = text.load("h + at_y")
    result = f"hidden * inverse * {_of_columns(chain, 'norm_weight')}"
    if layer:
        lines += [f"mean = (norm_sum * {1 / chain.width!r})[:, None]", START]
        hidden += " - mean"
        lines += text.loop(chain, [f"hidden = tl.where(inside, {hidden}, 0.0)", *_squares("norm_sum")])
        result += f" + {_of_columns(chain, 'norm_bias')}"
    lines.append(f"inverse = ({_inverse(chain, 'norm_sum')})[:, None]")
    body = [f"hidden = {hidden}", f"tl.store(h + at_y, {result}, inside)"]
    return lines + text.loop(chain, body, backwards=layer)


def weigh(chain: Chain) -> list[str]:
    """Emit the backward's first loops, from the weights `w_i` to their gradients `dw_i` and what `gradient` needs."""
    n, layer = chain.stream.streams, chain.norm == "layer"
    lines = []
    if layer:
        # Before all else: subtracted from a sum of squares, a large mean would leave nothing but rounding.
        lines.append("mean = tl.zeros([BT], tl.float32)")
        lines += text.loop(chain, [*text.stream_lines(chain), f"mean += tl.sum({weighed(chain, 'w_{}[:, None]')}, 1)"])
        lines.append(f"mean = mean * {1 / chain.width!r}")
    sums = {"norm_squares": "hidden * hidden", "along": "g * hidden"}
    for i in range(n):
        sums |= {f"dw_{i}": f"g * x_{i}", f"hidden_{i}": f"hidden * x_{i}"}
        if layer:
            sums[f"all_{i}"] = f"x_{i}"
    if layer:
        sums["plain"] = "g"
    lines += [f"{name} = tl.zeros([BT], tl.float32)" for name in sums]
    body = [*text.stream_lines(chain), _hidden(chain)]
    body.append(f"g = {text.load('d_h + at_y')} * {_of_columns(chain, 'norm_weight')}")
    body += [f"{name} += tl.sum({value}, 1)" for name, value in sums.items()]
    lines += text.loop(chain, body)
    # A token that is not there must add nothing to a sum over tokens, whatever eps is.
    lines.append(f"inverse = tl.where(live, {_inverse(chain, 'norm_squares')}, 0.0)")
    lines.append(f"share = inverse * inverse * along * {1 / chain.width!r}")
    if layer:
        lines.append(f"plain = plain * {1 / chain.width!r}")
    for i in range(n):
        lines.append(f"dw_{i} = inverse * (dw_{i} - share * hidden_{i}{f' - plain * all_{i}' if layer else ''})")
    return lines


def gradient(chain: Chain) -> list[str]:
    """Emit, in the backward's last loop, `dh` and what a block of tokens adds to the gradients of weight and bias."""
    layer, width = chain.norm == "layer", chain.width
    lines = [_hidden(chain), f"d = {text.load('d_h + at_y')}"]
    plain = " - plain[:, None]" if layer else ""
    weighted = f"d * {_of_columns(chain, 'norm_weight')}"
    lines.append(f"dh = inverse[:, None] * ({weighted} - share[:, None] * hidden{plain})")
    lines.append(f"at_norm = norm_sums + tl.program_id(0).to(tl.int64) * {gradients(chain) * width} + c")
    lines.append(f"tl.store(at_norm, tl.sum(d * hidden * inverse[:, None], 0), c < {width})")
    if layer:
        lines.append(f"tl.store(at_norm + {width}, tl.sum(d, 0), c < {width})")
    return lines


def gradients(chain: Chain) -> int:
    """Return the number of vectors of C values per block of tokens: of the weight, and of LayerNorm's bias."""
    return {"none": 0, "rms": 1, "layer": 2}[chain.norm]


def _hidden(chain: Chain) -> str:
    h = weighed(chain, "w_{}[:, None]")
    return f"hidden = tl.where(inside, {h} - mean[:, None], 0.0)" if chain.norm == "layer" else f"hidden = {h}"


def _squares(into: str) -> list[str]:
    return [f"{into} += tl.sum(hidden * hidden, 1)"]


def _inverse(chain: Chain, squares: str) -> str:
    return f"1.0 / tl.sqrt({squares} * {1 / chain.width!r} + {chain.norm_eps!r})"


def _of_columns(chain: Chain, name: str) -> str:
    return f"tl.load({name} + c, c < {chain.width}, other=0.0)[None, :]"
