"""The generated kernels: their code, what it moves between memory and processor, and what it must move at least.

Counted are passes over what has the size of the streams or of the hidden size: how often the generated code reads or
writes each such tensor from end to end, as if no cache held anything between two passes. The limit is every such value
once (`Chain.bytes_moved`); a kernel that finds in a cache what it reads again comes close to it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from mhc_compile.inspect.placement import Placement
from mhc_compile.kernels import signature
from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.cpp.build import Direction
from mhc_compile.kernels.engram.entry import Entry

if TYPE_CHECKING:
    from mhc_compile.inspect.inspection import KernelReport


def kernel_entries(kernels: Sequence[KernelReport], nodes: Sequence[Node], place: Placement) -> list[dict[str, Any]]:
    """`{name, kind, device, calls, forward, backward, bytes_token, limit_token, bytes_token_backward,
    limit_token_backward, elements}` of every kernel that the `nodes` call.

    `forward` and `backward` are code, None where PyTorch computes the chain. `elements` are those that use it: a
    boundary's are the sites in front of it and behind it.
    """
    used: dict[Chain | Entry, dict[int, None]] = {}
    for node in nodes:
        held = node.meta.get("mhc_chain", ())
        for chain in held if isinstance(held, tuple) else (held,):
            number = place(node)
            mixes = isinstance(chain, Chain) and chain.kind in ("boundary", "leave")
            around = [place.drawing.before.get(number, number), number] if mixes else [number]
            used.setdefault(chain, {}).update(dict.fromkeys(around))
    return [_entry(kernel, list(used.get(kernel.chain, ()))) for kernel in kernels]


def _entry(kernel: KernelReport, elements: list[int]) -> dict[str, Any]:
    chain = kernel.chain
    code: dict[str, str | None] = {}
    traffic: dict[str, int | None] = {}
    both: tuple[tuple[Direction, str], ...] = (("forward", ""), ("backward", "_backward"))
    for direction, suffix in both:
        code[direction] = source = _source(kernel, direction)
        moved = None
        if isinstance(chain, Chain) and source is not None:
            moved = bytes_as_written(chain, direction, source)
        traffic[f"bytes_token{suffix}"] = moved
        traffic[f"limit_token{suffix}"] = limit_of(chain, direction)
    return {
        "name": chain.name, "kind": chain.kind, "device": kernel.device, "calls": kernel.calls, **code, **traffic,
        "elements": elements,
    }  # fmt: skip


def _source(kernel: KernelReport, direction: Direction) -> str | None:
    try:
        return kernel.source(direction)
    except ValueError:  # no kernel for this device: plain PyTorch
        return None


def bytes_as_written(chain: Chain, direction: Direction, code: str) -> int:
    """Bytes a token that `code` reads and writes, were there no caches; small tensors as the limit has them."""
    again = sum((passes(code, name) - 1) * size for name, size in wide(chain, direction).items())
    return limit_of(chain, direction) + again


def limit_of(chain: Chain | Entry, direction: Direction) -> int:
    """Bytes that one token more must move; phi is read once, whatever their number."""
    back = direction == "backward"
    return chain.bytes_moved(2, backward=back) - chain.bytes_moved(1, backward=back)


def passes(code: str, name: str) -> int:
    """How often the generated `code` goes over the tensor `name` from end to end."""
    if "@triton.jit" in code:
        # Every loop over columns (or tokens, of a gradient that sums over them) is a pass over what it loads or stores.
        loops = re.split(r"\n    for ", code)[1:]
        return sum(f"tl.{verb}({name} " in loop for loop in loops for verb in ("load", "store"))
    body = code[code.index('extern "C"') :]
    return len(re.findall(rf"(?<![\w.]){name} \+ ", body))


def wide(chain: Chain, direction: Direction) -> dict[str, int]:
    """Bytes a token of every tensor that has the size of the streams or the hidden size, by its name in the code."""
    if direction == "forward":
        given = {*signature.inputs(chain), *signature.outputs(chain)}
    else:
        given = {*signature.saved(chain), *(f"d_{g}" for g in signature.gradients_in(chain))}
        given |= {f"d_{i}" for i in signature.inputs(chain)}
    of_token = {n for n in given if n.removeprefix("d_") in ("X", "next_X", "y", "h")}
    if direction == "backward" and not chain.reads_streams_backward:
        of_token.discard("X")
    sizes = {n: math.prod(signature.shape(chain, n.removeprefix("d_"), (1,))) for n in of_token}
    return {n: size * signature.dtype(chain, n.removeprefix("d_")).itemsize for n, size in sizes.items()}
