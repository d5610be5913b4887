"""What a model computes from seeded inputs, small enough to be kept beside a report and compared with another's.

    {"seed", "weights": digest, "runs": {which: run}}
    run = {"streams": digest of shapes, "dtype", "shape", "scale", "mean", "rms", "sample": numbers}

`which` says with what stream parameters: `own` for a converted model, else `start`, the function-preserving start, and
`moved`, seeded noise on it, because at the start all forms compute the same.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mhc_compile.bisect.subject import NOISE
from mhc_compile.conversion import convert
from mhc_compile.conversion.example_inputs import seeded_inputs
from mhc_compile.diagnostics import MHCError
from mhc_compile.modes import in_mode
from mhc_compile.parameters import owners, stream_parameters

SAMPLES = 64
"""Values of an output that are kept, at equal distances."""


def outputs_of(model: nn.Module, seed: int, **options: Any) -> dict[str, Any]:
    """Return the entry `outputs` of a report. A model that is not converted is converted, in place, with `options`.

    One that cannot be converted is run as it is. It runs uncompiled, with fused kernels where `options` name some.
    """
    inputs = seeded_inputs(model, seed)
    weights = _digest(p for name, p in sorted(model.named_parameters()) if name not in stream_parameters(model))
    which = "own"
    if not owners(model):
        with suppress(MHCError):
            # The other inner compilers are for speed, and what they round differently `bisect` judges.
            convert(model, example_kwargs=inputs, **{**options, "inner": "eager", "mode": None, "recompute": "off"})
            which = "start"
    runs = {which: _run(model, inputs)}
    if which == "start":
        with torch.no_grad():
            for name, p in stream_parameters(model).items():
                # The same noise for the same parameter, whatever others there are.
                generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
                p.add_((NOISE * torch.randn(p.shape, generator=generator)).to(p.device, p.dtype))
        runs["moved"] = _run(model, inputs)
    return {"seed": seed, "weights": weights, "runs": runs}


def _run(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    with in_mode(model, training=False), torch.no_grad():
        out = model(**inputs)
    output = getattr(out, "logits", None)
    if not isinstance(output, Tensor):
        output = next(t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point())
    values = output.detach().double().flatten()
    step = max(1, values.numel() // SAMPLES)
    shapes = [f"{name} {tuple(p.shape)}" for name, p in sorted(stream_parameters(model).items())]
    return {
        "streams": hashlib.sha256("\n".join(shapes).encode()).hexdigest()[:16],
        "dtype": str(output.dtype).removeprefix("torch."), "shape": list(output.shape),
        "scale": float(values.abs().max()), "mean": float(values.mean()), "rms": float(values.square().mean().sqrt()),
        "sample": [float(v) for v in values[::step][:SAMPLES]],
    }  # fmt: skip


def _digest(parameters: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for p in parameters:
        digest.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Numerics:
    """The outputs of two forms compared."""

    which: str
    """With what stream parameters each was computed: `start`, or `own and start`."""
    error: float | None
    """The largest difference between sampled values; None where they cannot be compared."""
    scale: float
    """The largest value of the outputs of A."""
    reason: str
    """Why they cannot be compared, nothing where they can."""

    @property
    def relative(self) -> float | None:
        """The error over the scale."""
        return None if self.error is None else self.error / max(self.scale, 1e-30)


def compare_outputs(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None, missing: str) -> list[Numerics]:
    """Compare the runs that both have, in order; `missing` says why one has none."""
    if a is None or b is None:
        return [Numerics("", None, 0.0, missing)]
    for key, what in (("seed", "other inputs: another seed"), ("weights", "other weights")):
        if a[key] != b[key]:
            return [Numerics("", None, 0.0, what)]
    both = [(which, which) for which in a["runs"] if which in b["runs"]]
    if not both:
        both = [(next(iter(a["runs"])), next(iter(b["runs"])))]
    return [_compared(x if x == y else f"{x} and {y}", a["runs"][x], b["runs"][y]) for x, y in both]


def _compared(which: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Numerics:
    if a["shape"] != b["shape"]:
        return Numerics(which, None, a["scale"], f"outputs of {a['shape']} and of {b['shape']}")
    if which == "moved" and a["streams"] != b["streams"]:
        return Numerics(which, None, a["scale"], "stream parameters of other shapes")
    pairs = [*zip(a["sample"], b["sample"], strict=True), (a["mean"], b["mean"]), (a["rms"], b["rms"])]
    # An undefined value is the same as another.
    error = max(0.0 if x == y or (x != x and y != y) else abs(x - y) for x, y in pairs)
    return Numerics(which, float("inf") if error != error else error, a["scale"], "")
