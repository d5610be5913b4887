"""Run the generated Triton of memories under its interpreter on CPU tensors, in a process of its own.

Prints a line of JSON an step: errors against the float64 reference with those of plain PyTorch, and what was seen.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import memory_steps
from chains import error
from memory_steps import BF16, F16, STEPS, Values, errors, name_of, random_flow, random_inputs
from torch import Tensor

import mhc_compile.kernels.memory.ops  # noqa: F401  (registers the ops)
from mhc_compile.kernels import targets
from mhc_compile.kernels.kernelspec import Sizes
from mhc_compile.kernels.memory.spec import FusionSpec
from mhc_compile.kernels.memory.step import MemoryStep
from mhc_compile.kernels.memory.triton import steps as triton

MORE = [
    MemoryStep(
        kind="inject", streams=2, width=70, spec=FusionSpec(dilation=4, taps=2), streams_dtype=F16, value_dtype=BF16
    ),
    MemoryStep(kind="gate", streams=2, width=300, spec=FusionSpec(), streams_dtype=BF16, keys_dtype=F16),
    MemoryStep(kind="remember", streams=1, width=140, spec=FusionSpec(), value_dtype=F16),
]


def sizes_of(step: MemoryStep) -> Sizes:
    """Several blocks of tokens, the last one ragged; history in front where there can be one."""
    return (3, 3) if step.gates else (2, 7, 2)


def both(step: MemoryStep, inputs: Values, flow: Values) -> Values:
    return memory_steps.both(targets.TARGETS["triton"], step, inputs, flow)


def equal(left: Values, right: Values) -> bool:
    return all(torch.equal(left[k], right[k]) for k in left)


def seen(step: MemoryStep) -> dict[str, bool]:
    """With every new tensor full of NaN: nothing is left of it, two runs are bit-equal, strides do not matter."""
    sizes = sizes_of(step)
    inputs, flow = random_inputs(step, sizes, 2), random_flow(step, sizes, 3)
    first = both(step, inputs, flow)
    fresh = Tensor.new_empty

    def poisoned(like: Tensor, *a: Any, **k: Any) -> Tensor:
        made = fresh(like, *a, **k)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    Tensor.new_empty = poisoned  # type: ignore[method-assign]
    try:
        second = both(step, inputs, flow)
        apart = {k: torch.stack([v, v], -1)[..., 0] for k, v in inputs.items()}
        third = both(step, apart, {k: torch.stack([v, v], -1)[..., 0] for k, v in flow.items()})
    finally:
        Tensor.new_empty = fresh  # type: ignore[method-assign]
    none = (sizes[0], 0, *sizes[2:])
    empty = both(step, random_inputs(step, none, 4), random_flow(step, none, 5))
    return {
        "finite": all(bool(t.isfinite().all()) for t in second.values()),
        "bit-equal": equal(first, second),
        "strided": equal(first, third),
        "no tokens": all(not t.any() for t in empty.values()),
    }


def long_sequences() -> bool:
    """More steps than a program of the walk takes, and more blocks of tokens than programs that add up gains."""
    found = {}
    for step, sizes in ((STEPS[2], (1, 140, 2)), (replace(MORE[2], width=8), (1, 30))):
        PROGRAMS, triton.PROGRAMS = triton.PROGRAMS, 3
        inputs, flow = random_inputs(step, sizes, 0), random_flow(step, sizes, 1)
        found |= errors(step, both(step, inputs, flow), inputs, flow)
        triton.PROGRAMS = PROGRAMS
    return all(ours <= max(1e-5 if "value" not in name else 5e-3, 2 * plain) for name, (ours, plain) in found.items())


def any_tile() -> bool:
    """Every tile configuration that measuring tries gives the default's values but for the order of sums."""
    tiles = triton.StepLauncher.tiles
    right = []
    for step in (STEPS[2], replace(MORE[2], width=8)):
        sizes = sizes_of(step)
        inputs, flow = random_inputs(step, sizes, 0), random_flow(step, sizes, 1)
        expected = both(step, inputs, flow)
        for last in (-1, -5):
            triton.StepLauncher.tiles = lambda *a, last=last: [tiles(*a)[last]]  # type: ignore[method-assign]
            found = both(step, inputs, flow)
            triton.StepLauncher.tiles = tiles  # type: ignore[method-assign]
            right += [error(found[name], value) < 3e-3 for name, value in expected.items()]
    return all(right)


def through_the_op() -> bool:
    """The registered op and its gradient arrive at Triton."""
    step = STEPS[7]
    sizes = sizes_of(step)
    inputs, flow = random_inputs(step, sizes, 6), random_flow(step, sizes, 7)
    leaves = [t.clone().requires_grad_() for t in inputs.values()]
    out = torch.ops.engram_kernels.remember(*leaves, str(step.spec))
    grads = torch.autograd.grad(out, leaves, flow["d_next_X"])
    found = both(step, inputs, flow)
    names = step.outputs("backward")
    same = all(torch.equal(grad, found[name]) for name, grad in zip(names, grads, strict=True))
    return targets.choose(step, "cpu")[0] == "triton" and same


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(json.dumps({"through the op": through_the_op(), "long sequences": long_sequences(), "any tile": any_tile()}))
    for step in STEPS + MORE:
        sizes = sizes_of(step)
        inputs, flow = random_inputs(step, sizes, 0), random_flow(step, sizes, 1)
        found = errors(step, both(step, inputs, flow), inputs, flow)
        more = seen(step) if step.streams <= 3 else {}  # more streams take the interpreter long
        print(json.dumps({"name": name_of(step), "errors": found, "seen": more}), flush=True)
