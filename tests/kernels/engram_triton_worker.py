"""Run the generated Triton of memories under its interpreter on CPU tensors, in a process of its own.

Prints a line of JSON an entry: errors against the float64 reference with those of plain PyTorch, and what was seen.
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
from engram_entries import BF16, ENTRIES, F16, Values, backward_values, errors, name_of, random_flow, random_inputs
from torch import Tensor

from mhc_compile.kernels.engram import ops, providers
from mhc_compile.kernels.engram.entry import Entry, Sizes
from mhc_compile.kernels.engram.spec import FusionSpec
from mhc_compile.kernels.engram.triton import run as triton

MORE = [
    Entry(kind="inject", streams=2, width=70, spec=FusionSpec(dilation=4, taps=2), streams_dtype=F16, value_dtype=BF16),
    Entry(kind="gate", streams=2, width=300, spec=FusionSpec(), streams_dtype=BF16, keys_dtype=F16),
    Entry(kind="remember", streams=1, width=140, spec=FusionSpec(), value_dtype=F16),
]


def sizes_of(entry: Entry) -> Sizes:
    """Several blocks of tokens, the last one ragged; history in front where there can be one."""
    return Sizes(1, 9) if entry.gates else Sizes(2, 7, 2)


def both(entry: Entry, inputs: Values, flow: Values, sizes: Sizes) -> Values:
    out = triton.run(entry, "forward", inputs, sizes)
    return {**out, **triton.run(entry, "backward", backward_values(entry, inputs, flow), sizes)}


def equal(left: Values, right: Values) -> bool:
    return all(torch.equal(left[k], right[k]) for k in left)


def seen(entry: Entry) -> dict[str, bool]:
    """With every new tensor full of NaN: nothing is left of it, two runs are bit-equal, strides do not matter."""
    sizes = sizes_of(entry)
    inputs, flow = random_inputs(entry, sizes, 2), random_flow(entry, sizes, 3)
    first = both(entry, inputs, flow, sizes)
    fresh = Tensor.new_empty

    def poisoned(like: Tensor, *a: Any, **k: Any) -> Tensor:
        made = fresh(like, *a, **k)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    Tensor.new_empty = poisoned  # type: ignore[method-assign]
    try:
        second = both(entry, inputs, flow, sizes)
        apart = {k: torch.stack([v, v], -1)[..., 0] for k, v in inputs.items()}
        third = both(entry, apart, {k: torch.stack([v, v], -1)[..., 0] for k, v in flow.items()}, sizes)
    finally:
        Tensor.new_empty = fresh  # type: ignore[method-assign]
    none = Sizes(sizes.batch, 0, sizes.before)
    empty = both(entry, random_inputs(entry, none, 4), random_flow(entry, none, 5), none)
    return {
        "finite": all(bool(t.isfinite().all()) for t in second.values()),
        "bit-equal": equal(first, second),
        "strided": equal(first, third),
        "no tokens": all(not t.any() for t in empty.values()),
    }


def long_sequences() -> bool:
    """More steps than a program of the walk takes, and more blocks of tokens than programs that add up gains."""
    found = {}
    for entry, sizes in ((ENTRIES[2], Sizes(1, 140, 2)), (replace(MORE[2], width=8), Sizes(1, 30))):
        PROGRAMS, triton.PROGRAMS = triton.PROGRAMS, 3
        inputs, flow = random_inputs(entry, sizes, 0), random_flow(entry, sizes, 1)
        found |= errors(entry, both(entry, inputs, flow, sizes), inputs, flow, sizes)
        triton.PROGRAMS = PROGRAMS
    return all(ours <= max(1e-5 if "value" not in name else 5e-3, 2 * plain) for name, (ours, plain) in found.items())


def through_the_op() -> bool:
    """The registered op and its gradient arrive at Triton."""
    entry = ENTRIES[7]
    sizes = sizes_of(entry)
    inputs, flow = random_inputs(entry, sizes, 6), random_flow(entry, sizes, 7)
    leaves = [t.clone().requires_grad_() for t in inputs.values()]
    out = torch.ops.engram_kernels.remember(*leaves, str(entry.spec))
    grads = torch.autograd.grad(out, leaves, flow["d_next_X"])
    found = both(entry, inputs, flow, sizes)
    names = entry.outputs("backward")
    same = all(torch.equal(grad, found[name]) for name, grad in zip(names, grads, strict=True))
    return providers.choose(ops.entry_of("gate", leaves[0], str(entry.spec)), "cpu")[0] == "triton" and same


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(json.dumps({"through the op": through_the_op(), "long sequences": long_sequences()}))
    for entry in ENTRIES + MORE:
        sizes = sizes_of(entry)
        inputs, flow = random_inputs(entry, sizes, 0), random_flow(entry, sizes, 1)
        found = errors(entry, both(entry, inputs, flow, sizes), inputs, flow, sizes)
        more = seen(entry) if entry.streams <= 3 else {}  # more streams take the interpreter long
        print(json.dumps({"name": name_of(entry), "errors": found, "seen": more}), flush=True)
