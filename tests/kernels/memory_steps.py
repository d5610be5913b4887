"""A fixed list of fused steps by which memories enter streams, their random inputs, and the float64 reference."""

from __future__ import annotations

import torch
from chains import error
from torch import Tensor

from mhc_compile.kernels.kernelspec import Sizes
from mhc_compile.kernels.memory.spec import FusionSpec
from mhc_compile.kernels.memory.step import MemoryStep
from mhc_compile.kernels.target import Reference, Target

BF16, F16 = torch.bfloat16, torch.float16
# Each is compiled once: every n, C below, at and behind a vector's width, every kind, several dtypes.
STEPS = [
    MemoryStep(kind="inject", streams=4, width=48, spec=FusionSpec(dilation=3)),
    MemoryStep(kind="inject", streams=8, width=17, spec=FusionSpec(dilation=1, taps=3, eps=1e-3)),
    MemoryStep(kind="inject", streams=1, width=5, spec=FusionSpec(dilation=2, taps=1)),
    MemoryStep(kind="inject", streams=3, width=33, spec=FusionSpec(dilation=3), streams_dtype=BF16, value_dtype=BF16),
    MemoryStep(kind="add", streams=2, width=20, spec=FusionSpec(), value_dtype=BF16),
    MemoryStep(kind="gate", streams=5, width=31, spec=FusionSpec(signed_root=False), streams_dtype=F16),
    MemoryStep(kind="gate", streams=4, width=21, spec=FusionSpec(), joins=True),
    MemoryStep(kind="remember", streams=6, width=32, spec=FusionSpec()),
    MemoryStep(
        kind="remember", streams=7, width=18, spec=FusionSpec(eps=1e-5),
        streams_dtype=BF16, keys_dtype=BF16, value_dtype=BF16,
    ),
]  # fmt: skip
Values = dict[str, Tensor]


def name_of(step: MemoryStep) -> str:
    """A test's name for the step."""
    return f"{step.name}-d{step.spec.dilation}"


def random_inputs(step: MemoryStep, sizes: Sizes, seed: int, scale: float = 1.0) -> Values:
    """Inputs by name, those of a forward; `scale` multiplies streams, keys and values."""
    rng = torch.Generator().manual_seed(seed)
    values = {}
    for name in step.inputs():
        shape = step.shape(name, sizes)
        value = torch.randn(shape, generator=rng)
        if name in ("X", "keys", "value"):
            value *= scale
        elif name == "a":
            value = torch.sigmoid(value)
        elif name == "reach":  # of documents that begin anywhere
            value = torch.randint(0, 3 + 2 * max(1, step.spec.history), shape, generator=rng)
        elif name.endswith("gain"):
            value = 1 + 0.3 * value
        if name == "keys":  # near their streams or opposite: the signed root's slope, infinite at 0, magnifies rounding
            value = value + torch.where(torch.rand(shape[:-1], generator=rng) < 0.5, -1.0, 1.0)[..., None] * values["X"]
        values[name] = value.to(step.dtype(name))
    return values


def random_flow(step: MemoryStep, sizes: Sizes, seed: int) -> Values:
    """Gradients of outputs, by name."""
    rng = torch.Generator().manual_seed(seed)
    names = [name for name in step.inputs("backward") if name.startswith("d_")]
    return {name: torch.randn(step.shape(name, sizes), generator=rng).to(step.dtype(name)) for name in names}


def backward_values(step: MemoryStep, inputs: Values, flow: Values) -> Values:
    """What the backward is called with, in its order."""
    both = {**inputs, **flow}
    return {name: both[name] for name in step.inputs("backward")}


def both(target: Target, step: MemoryStep, inputs: Values, flow: Values) -> Values:
    """Output and gradients, as a target computes them."""
    out = target.run(step, "forward", inputs)
    return {**out, **target.run(step, "backward", backward_values(step, inputs, flow))}


def exactly(step: MemoryStep, inputs: Values, flow: Values) -> Values:
    """Output and gradients of the reference in float64."""
    wide = {k: v if k == "reach" else v.double() for k, v in inputs.items()}
    exact = MemoryStep(**{**vars(step), **dict.fromkeys(("streams_dtype", "keys_dtype", "value_dtype"), torch.float64)})
    flow = {k: v.double() for k, v in flow.items()}
    return both(Reference(), exact, wide, flow)


def errors(step: MemoryStep, found: Values, inputs: Values, flow: Values) -> dict[str, tuple[float, float]]:
    """By name: the error of what was found, and that of plain PyTorch in the step's own dtypes."""
    exact = exactly(step, inputs, flow)
    theirs = both(Reference(), step, inputs, flow)
    return {name: (error(found[name], want), error(theirs[name], want)) for name, want in exact.items()}
