"""Ops that record what the streams do, registered with `torch.library` on import: opaque, and without gradients.

    mhc_probes::site(streams [..., n, C], branch [..., C], pre [..., n], post [..., n], mix [..., n, n],
                     earlier [..., n, n]?, mixed) -> figures [FIGURES of one site], composite [..., n, n]
    mhc_probes::pre(z, alpha, bias, width, spec) -> pre [..., n]
    mhc_probes::gates(streams [..., n, C], keys [..., n, C], query_gain [n, C], key_gain [n, C], spec) -> [n, BINS]
    mhc_probes::norms(d_streams [..., n, C], d_branch [..., C]) -> squares [n + 1]
    mhc_probes::depth(outputs [..., C][], places, parameters, read, output, columns, spec) -> figures of one site
    mhc_probes::square(gradient) -> square []

`site` reads the streams after the mix (`mixed`), or mixes those before it itself, where a fused exit writes none.
`pre` computes the weights that a fused kernel used from what it keeps for its backward. `watch` is the identity on what
a mix reads; the gradient of its third argument is `norms`. `depth` and `watch_one` are the same for what a site of a
depth form reads and for its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mhc_compile.kernels import hc, measures, reference
from mhc_compile.kernels.autocast import without_autocast
from mhc_compile.kernels.form import DepthForm
from mhc_compile.kernels.forms import form_of
from mhc_compile.kernels.memory import fusion
from mhc_compile.kernels.memory.spec import FusionSpec
from mhc_compile.kernels.sinkhorn import parse_spec
from mhc_compile.kernels.start import DEFAULT

LIBRARY = torch.library.Library("mhc_probes", "DEF")
BINS = 20
"""Of a histogram of gates, equal parts of 0 to 1."""
MEANS = ("gain_forward", "gain_backward", "composite_forward", "composite_backward", "distance")
"""Of which a site records the mean over tokens and the maximum."""
ENTROPIES = ("pre_entropy", "post_entropy")
CHUNK = 1 << 24
"""Stream values worked on at a time, so that what a site needs in between stays below 0.2 GB."""


def layout(n: int) -> dict[str, tuple[int, ...]]:
    """Return what `site` records of a call, in order: shapes by name.

    `tokens`; of each of `MEANS` `_mean` and `_max`; means over tokens of the entropies (in nats), the separation, pre,
    post and H; mean squares of the streams and of the branch's output.
    """
    figures = [f"{name}_{kind}" for kind in ("mean", "max") for name in MEANS]
    scalars = dict.fromkeys(("tokens", *figures, *ENTROPIES, "separation", "branch"), ())
    return {**scalars, "streams": (n,), "pre": (n,), "post": (n,), "mix": (n, n)}


def gradient_layout(n: int) -> dict[str, tuple[int, ...]]:
    """Return in order what `norms` gives."""
    return {"streams_gradient": (n,), "branch_gradient": ()}


def depth_layout(columns: int, *, weights: bool) -> dict[str, tuple[int, ...]]:
    """Return what `depth` records of a call, in order: shapes by name.

    `tokens`; mean squares of what the site reads, of the newest output before it, and of its own. Where the form tells
    `weights`, the mean over tokens of the entropy (in nats) of their shares, and their means by place.
    """
    of_weights: dict[str, tuple[int, ...]] = {"weights_entropy": (), "weights": (columns,)} if weights else {}
    return {**dict.fromkeys(("tokens", "read", "newest", "output"), ()), **of_weights}


DEPTH_GRADIENTS: dict[str, tuple[int, ...]] = {"read_gradient": (), "output_gradient": ()}
"""Shapes of the squared gradient norms that `watch_one` records of a site, by name."""


def size(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the number of values of a layout."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def watch(streams: Tensor, branch: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """Return `streams` and `branch` unchanged; the gradient of `slot` `[n + 1]` is their gradients' squared norms.

    Where neither requires a gradient, nothing is watched: `slot` must not add one.
    """
    if not (torch.is_grad_enabled() and (streams.requires_grad or branch.requires_grad)):
        return streams, branch
    watched: tuple[Tensor, Tensor] = _Watch.apply(streams, branch, slot)
    return watched


def watch_one(value: Tensor, slot: Tensor) -> Tensor:
    """Return `value` unchanged; the gradient of `slot` `[]` is its gradient's squared norm, as `watch` gives it."""
    if not (torch.is_grad_enabled() and value.requires_grad):
        return value
    watched: Tensor = _WatchOne.apply(value, slot)
    return watched


class _WatchOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, slot: Tensor) -> Tensor:  # noqa: ARG004
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        return gradient, torch.ops.mhc_probes.square(gradient)


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, branch: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        return streams.view_as(streams), branch.view_as(branch)

    @staticmethod
    def backward(ctx: Any, d_streams: Tensor, d_branch: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG004
        return d_streams, d_branch, torch.ops.mhc_probes.norms(d_streams, d_branch)


def _site(
    streams: Tensor, branch: Tensor, pre: Tensor, post: Tensor, mix: Tensor, earlier: Tensor | None, mixed: bool
) -> tuple[Tensor, Tensor]:
    with without_autocast(streams):
        # Streams may be flattened on the way from site to site.
        composite = mix.clone() if earlier is None else measures.composed(mix, earlier.reshape(mix.shape))
        both = {"gain": measures.gains(mix), "composite": measures.gains(composite)}
        values = {
            f"{k}_{d}": g for k, gains in both.items() for d, g in zip(("forward", "backward"), gains, strict=True)
        }
        values["distance"] = measures.distance(mix)
        figures = {"tokens": mix.new_tensor(float(mix.shape[:-2].numel()))}
        figures |= {f"{name}_mean": values[name].mean() for name in MEANS}
        figures |= {f"{name}_max": values[name].amax() for name in MEANS}
        figures |= {f"{k}_entropy": measures.entropy(w).mean() for k, w in (("pre", pre), ("post", post))}
        figures |= {"pre": _mean(pre, 1), "post": _mean(post, 1), "mix": _mean(mix, 2)}
        figures |= _of_streams(streams, branch, post, mix, mixed=mixed)
        kept = [figures[name].flatten().float() for name in layout(mix.shape[-1])]
        return torch.cat(kept), composite


def _mean(values: Tensor, rank: int) -> Tensor:
    """Average over tokens values of `rank` dimensions each."""
    return values.reshape(-1, *values.shape[values.ndim - rank :]).mean(0)


def _of_streams(X: Tensor, y: Tensor, post: Tensor, mix: Tensor, *, mixed: bool) -> dict[str, Tensor]:
    """Compute separation and mean squares, piece by piece."""
    dtype = reference.compute_dtype(X.dtype, y.dtype)
    n, C = X.shape[-2:]
    tokens = X.shape[:-2].numel()
    apart, streams, branch = (mix.new_zeros(shape) for shape in ((), (n,), ()))
    for X_, y_, post_, mix_ in _pieces(n * C, (X, 2), (y, 1), (post, 1), (mix, 2)):
        after = (X_ if mixed else reference.distribute(X_, y_, post_, mix_)).to(dtype)
        apart += measures.separation(after).sum()
        streams += after.square().sum((0, 2))
        branch += y_.to(dtype).square().sum()
    return {"separation": apart / tokens, "streams": streams / (tokens * C), "branch": branch / (tokens * C)}


def _pieces(width: int, *tensors: tuple[Tensor, int]) -> Iterator[Sequence[Tensor]]:
    """Split tensors, each given with the dimensions of one token, into pieces of at most `CHUNK` values.

    A token has `width` values.
    """
    flat = [t.reshape(-1, *t.shape[t.ndim - rank :]) for t, rank in tensors]
    return zip(*(t.split(max(1, CHUNK // width)) for t in flat), strict=True)


def _pre(z: Tensor, alpha: Tensor, bias: Tensor, width: int, spec: str) -> Tensor:
    parsed = parse_spec(spec)
    if parsed.form == "hc":
        return hc.weights(z, alpha, bias, width)
    fields = parsed.convention.fields
    mean = z[..., -1:] / (parsed.streams * width)
    scale = torch.rsqrt(mean + fields.rms_eps) if fields.rms_inside else 1.0 / (mean.sqrt() + fields.rms_eps)
    with without_autocast(z):
        return reference.branch_weights(z[..., :-1] * scale, alpha.to(z.dtype), bias.to(z.dtype), parsed)


def _gates(streams: Tensor, keys: Tensor, query_gain: Tensor, key_gain: Tensor, spec: str) -> Tensor:
    n, C = streams.shape[-2:]
    counts = torch.zeros(n, BINS, dtype=torch.int64, device=streams.device)
    bins = torch.arange(BINS, device=streams.device)
    with without_autocast(streams):
        for X, k in _pieces(n * C, (streams, 2), (keys, 2)):
            gate = fusion.gate(X, k, query_gain, key_gain, FusionSpec.parse(spec))
            places = (gate * BINS).long().clamp(max=BINS - 1)
            counts += (places.unsqueeze(-1) == bins).sum(0)
    return counts


def _depth(
    outputs: Sequence[Tensor], places: Sequence[int], parameters: Sequence[Tensor], read: Tensor, output: Tensor,
    columns: int, spec: str,
) -> Tensor:  # fmt: skip
    form, parsed = form_of(parse_spec(spec)), parse_spec(spec)
    assert isinstance(form, DepthForm)
    tokens = outputs[-1].shape[:-1].numel()
    values = {"read": read, "newest": outputs[-1], "output": output}
    figures = {name: _square(t) / t.numel() for name, t in values.items()}
    figures["tokens"] = figures["read"].new_tensor(float(tokens))
    if form.tells_weights:
        names = form.parameters(parsed, 0, 1, DEFAULT)
        named = dict(zip(names, parameters, strict=True))
        mean, entropy = figures["read"].new_zeros(len(outputs)), figures["read"].new_zeros(())
        with without_autocast(read):
            for piece in _pieces(len(outputs) * outputs[-1].shape[-1], *((output, 1) for output in outputs)):
                weights = form.weights(piece, places, parsed, **named)
                assert weights is not None
                of_tokens = weights.to(mean.dtype).expand(len(piece[0]), len(outputs))
                mean += of_tokens.sum(0) / tokens
                entropy += measures.entropy(of_tokens).sum() / tokens
        at = torch.tensor(places, device=mean.device)
        figures |= {"weights": mean.new_zeros(columns).index_copy(0, at, mean), "weights_entropy": entropy}
    shapes = depth_layout(columns, weights=form.tells_weights)
    return torch.cat([figures[name].flatten().float() for name in shapes])


def _square(values: Tensor) -> Tensor:
    """Compute the sum of squares in float64."""
    norm = torch.linalg.vector_norm(values, dtype=reference.compute_dtype(values.dtype))
    return norm.double().square()


def _norms(d_streams: Tensor, d_branch: Tensor) -> Tensor:
    dims = tuple(d for d in range(d_streams.ndim) if d != d_streams.ndim - 2)
    each = torch.linalg.vector_norm(d_streams, dim=dims, dtype=reference.compute_dtype(d_streams.dtype))
    branch = torch.linalg.vector_norm(d_branch, dtype=reference.compute_dtype(d_branch.dtype))
    return torch.cat([each.double(), branch.double().reshape(1)]).square()


def _site_fake(
    streams: Tensor, branch: Tensor, pre: Tensor, post: Tensor, mix: Tensor, earlier: Tensor | None, mixed: bool  # noqa: ARG001
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return mix.new_empty(size(layout(mix.shape[-1])), dtype=torch.float32), torch.empty_like(mix)


def _pre_fake(z: Tensor, alpha: Tensor, bias: Tensor, width: int, spec: str) -> Tensor:  # noqa: ARG001
    return z.new_empty((*z.shape[:-1], parse_spec(spec).streams))


def _gates_fake(streams: Tensor, keys: Tensor, query_gain: Tensor, key_gain: Tensor, spec: str) -> Tensor:  # noqa: ARG001
    return streams.new_empty((streams.shape[-2], BINS), dtype=torch.int64)


def _norms_fake(d_streams: Tensor, d_branch: Tensor) -> Tensor:  # noqa: ARG001
    return d_streams.new_empty(d_streams.shape[-2] + 1, dtype=torch.float64)


def _depth_fake(
    outputs: Sequence[Tensor], places: Sequence[int], parameters: Sequence[Tensor], read: Tensor, output: Tensor,  # noqa: ARG001
    columns: int, spec: str,
) -> Tensor:  # fmt: skip
    form = form_of(parse_spec(spec))
    assert isinstance(form, DepthForm)
    return read.new_empty(size(depth_layout(columns, weights=form.tells_weights)), dtype=torch.float32)


def _square_fake(values: Tensor) -> Tensor:
    return values.new_empty((), dtype=torch.float64)


def _below_autograd(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """Return the op as one that autograd does not see: what is recorded has no gradient."""

    def call(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def _register() -> None:
    gate = "Tensor streams, Tensor keys, Tensor query_gain, Tensor key_gain, str spec"
    site = "Tensor streams, Tensor branch, Tensor pre, Tensor post, Tensor mix, Tensor? earlier, bool mixed"
    depth = "Tensor[] outputs, int[] places, Tensor[] parameters, Tensor read, Tensor output, int columns, str spec"
    for schema, kernel, fake in (
        (f"site({site}) -> (Tensor, Tensor)", _site, _site_fake),
        ("pre(Tensor z, Tensor alpha, Tensor bias, int width, str spec) -> Tensor", _pre, _pre_fake),
        (f"gates({gate}) -> Tensor", _gates, _gates_fake),
        ("norms(Tensor d_streams, Tensor d_branch) -> Tensor", _norms, _norms_fake),
        (f"depth({depth}) -> Tensor", _depth, _depth_fake),
        ("square(Tensor values) -> Tensor", _square, _square_fake),
    ):
        name = schema.split("(", 1)[0]
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mhc_probes::{name}", fake, lib=LIBRARY)
        LIBRARY.impl(name, _below_autograd(getattr(torch.ops.mhc_probes, name).default), "Autograd")


_register()
