"""Judge every generated kernel of a graph by itself: forward and backward against plain PyTorch in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhc_compile.bisect.values import Difference, difference
from mhc_compile.kernels import targets
from mhc_compile.kernels.kernelspec import KernelSpec, Values
from mhc_compile.kernels.registration import registered

FACTOR = 10.0
"""How much larger than that of plain PyTorch in the same dtype the error of a kernel, a rewritten graph or the inner
compiler's code may be."""


@dataclass(frozen=True)
class Judged:
    """One result of one kernel."""

    spec: KernelSpec
    name: str
    """The value's name in the specification: `next_X`, `h`, ...; gradients are `d_X`, `d_phi`, ..."""
    kernel: Difference
    """From plain PyTorch in float64."""
    plain: Difference
    """The same of plain PyTorch in the kernel's own dtype."""
    allowed: float
    """What the kernel's error may be: see `allowed`."""

    @property
    def mixes(self) -> bool:
        """Whether it belongs to the site whose branch the chain adds, rather than to the one that it reads for."""
        return self.name in ("next_X", "d_X", "d_y", "d_post", "d_mix")

    @property
    def ratio(self) -> float:
        """The error over what it may be."""
        return self.kernel.error / max(self.allowed, 1e-300)


def allowed(error: Difference, dtype: torch.dtype, terms: int = 1) -> float:
    """Return what an error may be where that of plain PyTorch is `error`: `FACTOR` times it.

    Where it is smaller than half a unit in the last place of the largest value, that counts in its place, times the
    square root of the `terms` that each value sums: their roundings add up like a random walk.
    """
    floor = torch.finfo(dtype).eps / 2 if dtype.is_floating_point else 0.0
    return FACTOR * max(error.error, floor * error.scale * max(terms, 1) ** 0.5)


def judge(target: Any, args: Sequence[Any]) -> list[Judged]:
    """Judge every result of the kernels that a fused op calls on `args`, forward and backward from seeded gradients.

    Return nothing where they have no kernel on the arguments' device, or the arguments are not finite.
    """
    op = registered(target)
    assert op is not None
    values, specs = op.parse([a.detach() if isinstance(a, Tensor) else a for a in args])
    if not all(bool(t.isfinite().all()) for t in values.values()):
        return []
    judged: list[Judged] = []
    for spec in specs:
        judged += _judge(spec, values)
        with torch.no_grad(), targets.only("reference"):
            values |= targets.run(spec, "forward", values)
    return judged


def _judge(spec: KernelSpec, values: Values) -> list[Judged]:
    values = spec.call(values, "forward")
    first = _first(spec, values)
    name = targets.choose(spec, first.device.type)[0]
    if name == "reference":
        return []
    gradients = _seeded(spec, values)
    wide, wide_gradients = ({n: _widened(t) for n, t in each.items()} for each in (values, gradients))
    exact = _results("reference", spec.of_dtypes(wide), wide, wide_gradients)
    by_reference = _results("reference", spec, values, gradients)
    judged = []
    for result, t in _results(name, spec, values, gradients).items():
        if result == "z":
            continue  # the kernel's own note for its backward
        rounding = difference(exact[result], by_reference[result])
        terms = first.numel() // t.numel()
        limit = allowed(rounding, by_reference[result].dtype, terms)
        judged.append(Judged(spec, result, difference(exact[result], t), rounding, limit))
    return judged


def worst(judged: Sequence[Judged]) -> Judged:
    """Return the result furthest beyond its limit; the first where several are not finite."""
    return max(judged, key=lambda j: j.ratio)


def _results(name: str, spec: KernelSpec, values: Values, gradients: Values) -> dict[str, Tensor]:
    """Return all that one target computes, forward and backward, in order."""
    target = targets.TARGETS[name]
    with torch.no_grad():
        out = target.run(spec, "forward", values)
        every = {**values, **out, **gradients}
        return out | target.run(spec, "backward", {n: every[n] for n in spec.inputs("backward")})


def _first(spec: KernelSpec, values: Values) -> Tensor:
    """Return the streams that a kernel reads, or its first source."""
    return values[next(iter(spec.floats()))]


def _seeded(spec: KernelSpec, values: Values) -> dict[str, Tensor]:
    """Return random gradients of what the backward reads gradients of."""
    sizes, device = spec.sizes(values), _first(spec, values).device
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(spec.shape(name, sizes), generator=generator).to(device, spec.dtype(name))
        for name in spec.inputs("backward")
        if name.startswith("d_")
    }


def _widened(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t
