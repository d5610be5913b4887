"""The generated kernels: their code, what it moves between memory and processor, and what it must move at least.

Counted are passes over what has the size of the streams or of the hidden size: how often the generated code reads or
writes each such tensor from end to end, as if no cache held anything between two passes. The limit is every such value
once; a kernel that finds in a cache what it reads again comes close to it. Both are `KernelSpec.bytes_token`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from mhc_compile.kernels.kernelspec import DIRECTIONS, KernelSpec
from mhc_compile.passes.base import kernels_of
from mhc_compile.report.placement import Placement

if TYPE_CHECKING:
    from mhc_compile.report.inspection import KernelReport


def kernel_entries(kernels: Sequence[KernelReport], nodes: Sequence[Node], place: Placement) -> list[dict[str, Any]]:
    """`{name, kind, device, calls, forward, backward, bytes_token, limit_token, bytes_token_backward,
    limit_token_backward, elements}` of every kernel that the `nodes` call.

    `forward` and `backward` are code, None where PyTorch computes the kernel. `elements` are those that use it: a
    boundary's are the sites in front of it and behind it.
    """
    used: dict[KernelSpec, dict[int, None]] = {}
    for node in nodes:
        for spec in kernels_of(node):
            number = place(node)
            around = [place.drawing.before.get(number, number)] if spec.kind in ("boundary", "carry", "leave") else []
            used.setdefault(spec, {}).update(dict.fromkeys([*around, number]))
    return [_entry(kernel, list(used.get(kernel.spec, ()))) for kernel in kernels]


def _entry(kernel: KernelReport, elements: list[int]) -> dict[str, Any]:
    spec = kernel.spec
    code: dict[str, str | None] = {}
    traffic: dict[str, int] = {}
    for direction, suffix in zip(DIRECTIONS, ("", "_backward"), strict=True):
        source = kernel.source(direction)
        code[direction] = None if source is None else source.text
        traffic[f"bytes_token{suffix}"] = kernel.bytes_token(direction)
        traffic[f"limit_token{suffix}"] = spec.bytes_token(direction)
    return {
        "name": spec.name, "kind": spec.kind, "device": kernel.device, "calls": kernel.calls, **code, **traffic,
        "elements": elements,
    }  # fmt: skip
