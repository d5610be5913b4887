"""Run generated Triton under its interpreter on CPU tensors, in a process of its own: it must be asked for at import.

Prints a line of JSON per chain: errors against the float64 reference with those of plain PyTorch, and what else was
seen. The argument `all` is for every chain, with what was seen of those of few streams; `some` for chains of few
streams, with what was seen of one of each kind.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
import triton as tt
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parent))
from chains import (
    BF16,
    CHAINS,
    FEW,
    LATER,
    V4,
    backward_values,
    error,
    exactly,
    name_of,
    random_gradients,
    random_inputs,
)
from torch import Tensor

from mhc_compile.kernels import fused, targets
from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.in_triton import Triton, launcher_of
from mhc_compile.kernels.spec import Convention, StreamSpec
from mhc_compile.kernels.target import Reference

HALF = {"streams_dtype": torch.float16, "branch_dtype": torch.float16}
MORE = [
    Chain(kind="boundary", stream=StreamSpec(iterations=1), width=50, **HALF),
    Chain(kind="boundary", stream=StreamSpec(convention=Convention.DEEPSEEK_V4), width=24, **BF16),
    Chain(kind="leave", stream=V4, width=18, **BF16),
    # Norms without an eps, too: tokens that fill up a block are zero, and an inverse of nothing must not spread.
    Chain(kind="boundary", stream=StreamSpec(), width=45, norm="layer", norm_eps=1e-5),
    Chain(kind="boundary", stream=StreamSpec(streams=2), width=50, norm="layer", **HALF),
    Chain(kind="boundary", stream=StreamSpec(streams=3, convention=Convention.LIGER), width=40, norm="rms", **BF16),
    Chain(kind="read", stream=StreamSpec(streams=1), width=34, norm="rms", norm_eps=1e-6, **HALF),
    Chain(kind="read", stream=StreamSpec(streams=5, manifold="identity"), width=70, norm="rms"),
]
triton = Triton()
TRIED = [chain for chain in CHAINS + LATER if not triton.unsupported(chain)] + MORE
LEAD = (3, 7)  # 21 tokens: more than one block of the backward, and a ragged one
Values = dict[str, Tensor]


def both(chain: Chain, inputs: Values, gradients: Values) -> tuple[Values, Values]:
    out = triton.run(chain, "forward", inputs)
    return out, triton.run(chain, "backward", backward_values(chain, inputs, out, gradients))


def errors(chain: Chain, offset: float = 0.0) -> dict[str, tuple[float, float]]:
    inputs, gradients = random_inputs(chain, LEAD, 0), random_gradients(chain, LEAD, 1)
    inputs["X"] += offset
    exact_out, exact_grads = exactly(chain, inputs, gradients)
    out, grads = both(chain, inputs, gradients)
    plain_out = Reference().run(chain, "forward", inputs)
    plain_grads = Reference().run(chain, "backward", backward_values(chain, inputs, plain_out, gradients))
    return {
        name: (error(found[name], exact), error(theirs[name], exact))
        for found, theirs, exacts in ((out, plain_out, exact_out), (grads, plain_grads, exact_grads))
        for name, exact in exacts.items()
    }


def poisoned(chain: Chain) -> dict[str, bool]:
    """With every new tensor full of NaN: nothing is left of it, two runs are bit-equal, strides do not matter."""
    inputs, gradients = random_inputs(chain, LEAD, 2), random_gradients(chain, LEAD, 3)
    first = both(chain, inputs, gradients)
    fresh = Tensor.new_empty
    Tensor.new_empty = lambda like, *a, **k: fresh(like, *a, **k).fill_(torch.nan)  # type: ignore[method-assign]
    try:
        second = both(chain, inputs, gradients)
        # Not contiguous: every second value of a larger tensor, and streams that are expanded over the batch.
        apart = {k: torch.stack([v, v], -1)[..., 0] for k, v in inputs.items()}
        third = both(chain, apart, {k: torch.stack([v, v], -1)[..., 0] for k, v in gradients.items()})
        wide = {**inputs, "X": inputs["X"][:1].expand(LEAD[0], *inputs["X"].shape[1:])}
        expanded = both(chain, wide, gradients)
    finally:
        Tensor.new_empty = fresh  # type: ignore[method-assign]
    same = both(chain, {**wide, "X": wide["X"].contiguous()}, gradients)
    none = both(chain, random_inputs(chain, (0, 4), 4), random_gradients(chain, (0, 4), 5))
    return {
        "finite": all(bool(t.isfinite().all()) for part in second for t in part.values()),
        "bit-equal": equal(first, second),
        "strided": equal(first, third),
        "expanded": equal(expanded, same),
        "no tokens": all(not t.any() for part in none for t in part.values()),
    }


def equal(left: tuple[Values, Values], right: tuple[Values, Values]) -> bool:
    return all(torch.equal(a[k], b[k]) for a, b in zip(left, right, strict=True) for k in a)


def through_the_op(norm: str) -> bool:
    """The registered op and its gradient arrive at Triton."""
    chain = next(c for c in TRIED if c.kind == "read" and c.norm == norm)
    inputs = random_inputs(chain, LEAD, 6)
    leaves = [t.clone().requires_grad_() for t in inputs.values()]
    static = (str(chain.stream),) if norm == "none" else (str(chain.stream), chain.norm_eps)
    h, *_ = getattr(torch.ops.mhc_kernels, fused.op_of(chain))(*leaves, *static)
    h.sum().backward()
    gradients = {n: torch.zeros_like(t) for n, t in random_gradients(chain, LEAD, 7).items()}
    gradients["d_h"] += 1.0
    out, grads = both(chain, inputs, gradients)
    same = all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, grads.values(), strict=True))
    return targets.choose(chain, "cpu")[0] == "triton" and torch.equal(h, out["h"]) and same


HALVES = next(c for c in TRIED if c.projects and c.streams_dtype == torch.bfloat16)
split = launcher_of(HALVES).load(HALVES, "forward").parts


@tt.jit
def add_parts(x, out, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    high, middle, low = split(tl.load(x + tl.arange(0, COUNT)), "ieee")
    tl.store(out + tl.arange(0, COUNT), high.to(tl.float32) + (middle.to(tl.float32) + low.to(tl.float32)))


def three_parts() -> bool:
    """A float32 number is the sum of the three bfloat16 that tensor cores multiply by."""
    x = torch.randn(1024)
    out = torch.full_like(x, torch.nan)
    add_parts[(1,)](x, out, COUNT=1024)
    return torch.equal(x, out)


def large_mean() -> dict[str, tuple[float, float]]:
    """LayerNorm of streams that are far from zero."""
    return errors(Chain(kind="read", stream=StreamSpec(streams=2), width=40, norm="layer", norm_eps=1e-5), 300.0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ops = all(through_the_op(norm) for norm in ("none", "rms", "layer"))
    first = {"through the op": ops, "three parts": three_parts(), "large mean": large_mean()}
    print(json.dumps(first), flush=True)
    few = [chain for chain in TRIED if chain.stream.streams <= FEW]  # more streams take the interpreter long
    tried, watched = TRIED, few
    if "all" not in sys.argv:
        tried = [chain for chain in few if chain not in MORE]
        watched = list({chain.kind: chain for chain in sorted(tried, key=lambda c: -c.stream.streams)}.values())
    for chain in tried:
        seen = poisoned(chain) if chain in watched else {}
        print(json.dumps({"name": name_of(chain), "errors": errors(chain), "seen": seen}), flush=True)
