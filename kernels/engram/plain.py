"""The fused steps in plain PyTorch: the provider for any device and dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mhc_compile.kernels.engram import fusion
from mhc_compile.kernels.engram.entry import Direction, Entry, Sizes
from mhc_compile.kernels.plain import autograd_inside_an_op


def run(entry: Entry, direction: Direction, values: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """One direction of `entry`, results by name."""
    if direction == "forward":
        (name,) = entry.outputs("forward")
        return {name: _forward(entry, values).to(entry.dtype(name)).contiguous()}
    names = [name.removeprefix("d_") for name in entry.outputs("backward")]
    given = values[f"d_{entry.outputs('forward')[0]}"]
    with autograd_inside_an_op(given.device.type):
        leaves = {name: values[name].detach().requires_grad_() for name in names}
        start = {"X": given.new_zeros(entry.shape("X", sizes))} if "X" not in leaves else {}
        out = _forward(entry, {**values, **start, **leaves})
        found = torch.autograd.grad(out, list(leaves.values()), given.to(out.dtype))
    if entry.joins:
        found = (found[0] + values["d_next_X"], *found[1:])
    return {f"d_{name}": g.to(entry.dtype(name)).contiguous() for name, g in zip(names, found, strict=True)}


def _forward(entry: Entry, values: Mapping[str, Tensor]) -> Tensor:
    spec, X = entry.spec, values["X"]
    if entry.gates:
        a = fusion.gate(X, values["keys"], values["query_gain"], values["key_gain"], spec)
    else:
        a = values["a"]
    if not entry.adds:
        return a
    reach, gain, conv = (values.get(name) for name in ("reach", "conv_gain", "conv"))
    return fusion.inject(X, a, values["value"], reach, gain, conv, spec)
