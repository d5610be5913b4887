"""Every generated kernel against float64 on this device, values and gradients, at the shapes of real models."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from mhc_compile.kernels import targets
from mhc_compile.kernels.attend import Attend
from mhc_compile.kernels.chain import Chain, Norm
from mhc_compile.kernels.kernelspec import KernelSpec, Sizes
from mhc_compile.kernels.memory.spec import FusionSpec
from mhc_compile.kernels.memory.step import MemoryStep
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.target import Reference

_HALF: dict[str, Any] = {"streams_dtype": torch.bfloat16, "branch_dtype": torch.bfloat16}
_FULL: dict[str, Any] = {}
_NORMS: tuple[Norm, ...] = get_args(Norm)
LARGE = 4096.0
"""The scale of large gradients: a sum of squares of them still has to fit into float32."""


@dataclass(frozen=True)
class Gate:
    """One kernel on one call."""

    spec: KernelSpec
    sizes: Sizes
    scale: float = 1.0
    """The factor of the gradients."""

    def __str__(self) -> str:
        large = f", gradients times {self.scale:.0f}" if self.scale != 1 else ""
        manifold = f", {self.spec.stream.form}, {self.spec.stream.manifold}" if isinstance(self.spec, Chain) else ""
        return f"{self.spec.name}{manifold}{large}"


def gates(*, small: bool) -> Iterator[Gate]:
    """Return what is compared, ordered by worth: what most models run first."""
    widths, tokens = ((32,), 20) if small else ((4096, 7168, 1280), 250)
    streams = (4,) if small else (4, 2, 8)
    for n, width, norm, half in itertools.product(streams, widths, _NORMS[:1] if small else _NORMS, (True, False)):
        eps = 0.0 if norm == "none" else 1e-6
        dtypes, stream = _HALF if half else _FULL, StreamSpec(streams=n)
        chain = Chain(kind="boundary", stream=stream, width=width, norm=norm, norm_eps=eps, **dtypes)
        yield Gate(chain, (tokens,))
        if width == widths[0] and n == 4:
            yield Gate(chain, (tokens,), LARGE)
    width = widths[0]
    chain = Chain(kind="read", stream=StreamSpec(), width=width, **_HALF)
    for kind in ("read", "leave", "distribute", "reduce") if not small else ("distribute",):
        yield Gate(replace(chain, kind=kind), (tokens,))
    steps = [
        MemoryStep(kind="gate", streams=4, width=width, spec=FusionSpec()),
        MemoryStep(kind="remember", streams=4, width=width, spec=FusionSpec()),
        MemoryStep(kind="add", streams=4, width=width, spec=FusionSpec()),
        MemoryStep(kind="inject", streams=4, width=width, spec=FusionSpec(dilation=3)),
    ]
    for step in steps[:1] if small else steps:
        yield Gate(step, (2, tokens // 2) if step.gates else (2, tokens // 2, 0))
    yield Gate(Attend(sources=5, width=width, sources_dtype=torch.bfloat16), (tokens,))
    if small:
        return
    for manifold in ("unconstrained", "identity", "permutations", "transportation"):
        yield Gate(replace(chain, kind="boundary", stream=StreamSpec(manifold=manifold)), (tokens,))
    yield Gate(replace(chain, kind="boundary", stream=StreamSpec(form="hc")), (tokens,))


def measure(gate: Gate, device: torch.device, target: str) -> dict[str, tuple[float, float]]:
    """Return, by value and gradient, the error of a target relative to the largest value, and that of plain PyTorch."""
    values, flows = _inputs(gate, device), _flows(gate, device)
    exact = _both(gate.spec, _wide(values), _wide(flows), "reference")
    ours = _both(gate.spec, values, flows, target)
    plain = _both(gate.spec, values, flows, "reference")
    return {name: (_error(ours[name], e), _error(plain[name], e)) for name, e in exact.items()}


def failures(gate: Gate, errors: dict[str, tuple[float, float]], device: torch.device) -> list[str]:
    """Return the values that are worse than plain PyTorch's rounding explains, with both errors."""
    half = any(dtype != torch.float32 for dtype in gate.spec.floats().values())
    floor = (1.2e-2 if device.type == "cpu" else 6e-3) if half else 2e-5  # the interpreter cuts bfloat16 off
    return [
        f"{name} {ours:.1e} against {plain:.1e}"
        for name, (ours, plain) in errors.items()
        if not ours <= max(floor, 2 * plain)
    ]


def _wide(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in values.items()}


def _both(spec: KernelSpec, values: dict[str, Tensor], flows: dict[str, Tensor], target: str) -> dict[str, Tensor]:
    """Return the outputs and the gradients of the inputs; those of the reference in the dtypes of its inputs."""
    used = spec.of_dtypes(values) if target == "reference" else spec
    compute = Reference() if target == "reference" else targets.TARGETS[target]
    out = compute.run(used, "forward", used.call(values, "forward"))
    every = {**values, **out, **flows}
    arguments = used.call({name: every[name] for name in used.inputs("backward") if name in every}, "backward")
    return {**out, **compute.run(used, "backward", arguments)}


def _inputs(gate: Gate, device: torch.device) -> dict[str, Tensor]:
    """Draw the inputs at sizes that training sees."""
    spec, rng, values = gate.spec, torch.Generator(device).manual_seed(0), {}
    for name in spec.inputs():
        shape = spec.shape(name, gate.sizes)
        if not spec.dtype(name).is_floating_point:
            values[name] = torch.full(shape, 1 << 20, dtype=spec.dtype(name), device=device)
            continue
        value = torch.randn(shape, generator=rng, device=device)
        if name == "phi":
            value *= shape[-1] ** -0.5
        elif name == "mix":
            value = value.softmax(-1)
        elif name == "a":
            value = value.sigmoid()
        elif name.endswith(("gain", "weight")):
            value = 1 + 0.3 * value
        elif name == "keys":  # far from where the signed root's slope magnifies rounding
            value = value + values["X"].float()
        values[name] = value.to(spec.dtype(name))
    return values


def _flows(gate: Gate, device: torch.device) -> dict[str, Tensor]:
    spec, rng = gate.spec, torch.Generator(device).manual_seed(1)
    return {
        name: (gate.scale * torch.randn(spec.shape(name, gate.sizes), generator=rng, device=device)).to(
            spec.dtype(name)
        )
        for name in spec.inputs("backward")
        if name.startswith("d_")
    }


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))
