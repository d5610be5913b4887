"""A fixed list of fused steps by which memories enter streams, their random inputs, and the float64 reference."""

from __future__ import annotations

import torch
from chains import error
from torch import Tensor

from mhc_compile.kernels.engram import plain
from mhc_compile.kernels.engram.entry import Entry, Sizes
from mhc_compile.kernels.engram.spec import FusionSpec

BF16, F16 = torch.bfloat16, torch.float16
# Each is compiled once: every n, C below, at and behind a vector's width, every kind, several dtypes.
ENTRIES = [
    Entry(kind="inject", streams=4, width=48, spec=FusionSpec(dilation=3)),
    Entry(kind="inject", streams=8, width=17, spec=FusionSpec(dilation=1, taps=3, eps=1e-3)),
    Entry(kind="inject", streams=1, width=5, spec=FusionSpec(dilation=2, taps=1)),
    Entry(kind="inject", streams=3, width=33, spec=FusionSpec(dilation=3), streams_dtype=BF16, value_dtype=BF16),
    Entry(kind="add", streams=2, width=20, spec=FusionSpec(), value_dtype=BF16),
    Entry(kind="gate", streams=5, width=31, spec=FusionSpec(signed_root=False), streams_dtype=F16),
    Entry(kind="gate", streams=4, width=21, spec=FusionSpec(), joins=True),
    Entry(kind="remember", streams=6, width=32, spec=FusionSpec()),
    Entry(
        kind="remember", streams=7, width=18, spec=FusionSpec(eps=1e-5),
        streams_dtype=BF16, keys_dtype=BF16, value_dtype=BF16,
    ),
]  # fmt: skip
Values = dict[str, Tensor]


def name_of(entry: Entry) -> str:
    """A test's name for the entry."""
    return f"{entry.name}-d{entry.spec.dilation}"


def random_inputs(entry: Entry, sizes: Sizes, seed: int, scale: float = 1.0) -> Values:
    """Inputs by name, those of a forward; `scale` multiplies streams, keys and values."""
    rng = torch.Generator().manual_seed(seed)
    values = {}
    for name in entry.arguments("forward"):
        shape = entry.shape(name, sizes)
        value = torch.randn(shape, generator=rng)
        if name in ("X", "keys", "value"):
            value *= scale
        elif name == "a":
            value = torch.sigmoid(value)
        elif name == "reach":  # of documents that begin anywhere
            value = torch.randint(0, 3 + 2 * max(1, entry.spec.history), shape, generator=rng)
        elif name.endswith("gain"):
            value = 1 + 0.3 * value
        if name == "keys":  # near their streams or opposite: the signed root's slope, infinite at 0, magnifies rounding
            value = value + torch.where(torch.rand(shape[:-1], generator=rng) < 0.5, -1.0, 1.0)[..., None] * values["X"]
        values[name] = value.to(entry.dtype(name))
    return values


def random_flow(entry: Entry, sizes: Sizes, seed: int) -> Values:
    """Gradients of outputs, by name."""
    rng = torch.Generator().manual_seed(seed)
    names = [name for name in entry.arguments("backward") if name.startswith("d_")]
    return {name: torch.randn(entry.shape(name, sizes), generator=rng).to(entry.dtype(name)) for name in names}


def backward_values(entry: Entry, inputs: Values, flow: Values) -> Values:
    """What the backward is called with, in its order."""
    both = {**inputs, **flow}
    return {name: both[name] for name in entry.arguments("backward")}


def exactly(entry: Entry, inputs: Values, flow: Values, sizes: Sizes) -> Values:
    """Output and gradients of the reference in float64."""
    wide = {k: v if k == "reach" else v.double() for k, v in inputs.items()}
    exact = Entry(**{**vars(entry), **dict.fromkeys(("streams_dtype", "keys_dtype", "value_dtype"), torch.float64)})
    out = plain.run(exact, "forward", wide, sizes)
    flow = {k: v.double() for k, v in flow.items()}
    return {**out, **plain.run(exact, "backward", backward_values(entry, wide, flow), sizes)}


def errors(entry: Entry, found: Values, inputs: Values, flow: Values, sizes: Sizes) -> dict[str, tuple[float, float]]:
    """By name: the error of what was found, and that of plain PyTorch in the entry's own dtypes."""
    exact = exactly(entry, inputs, flow, sizes)
    theirs = plain.run(entry, "forward", inputs, sizes)
    theirs |= plain.run(entry, "backward", backward_values(entry, inputs, flow), sizes)
    return {name: (error(found[name], want), error(theirs[name], want)) for name, want in exact.items()}
