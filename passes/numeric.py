"""`debug="numeric"`: run a graph before and after a pass in float64 on the call's own inputs, and compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves, tree_map

from mhc_compile.diagnostics import MHCError
from mhc_compile.passes.base import op_name

TOLERANCE = 1e-5
"""Of the largest output: the start of eps conventions drifts by 1e-6 per site."""
KEEPS = "mhc_keeps_state"
"""Node metadata of what a pass writes into the state of cached calls, which is no result to be compared."""
RECORDED = "mhc_recorded"
"""Metadata of the output node: how many of its values, the last ones, a pass added to what the graph returns."""
_NARROW = (torch.float16, torch.bfloat16, torch.float32)


class Float64Interpreter(Interpreter):
    """Runs a graph with every floating-point value in float64, casts included, and dropout off."""

    def run_node(self, n: Node) -> Any:
        """Run one node; dropout, marks and writes of state pass their operand on, attention drops nothing."""
        if n.meta.get(KEEPS) or (op_name(n) in ("dropout", "mark") and n.op == "call_function"):
            return self.fetch_args_kwargs_from_env(n)[0][0]
        if op_name(n) in ("_enter_autocast", "_exit_autocast"):
            return None
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a function, its dtype arguments widened."""
        args, kwargs = tree_map(widen_dtype, (args, kwargs))
        if "dropout_p" in kwargs:
            kwargs = {**kwargs, "dropout_p": 0.0}
        return widen(super().call_function(target, args, kwargs))

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a method; `.float()` and its like become `.double()`."""
        if target in ("float", "half", "bfloat16"):
            target = "double"
        return widen(super().call_method(target, *tree_map(widen_dtype, (args, kwargs))))


def widen_dtype(x: Any) -> Any:
    """Return float64 for a narrower floating-point dtype; anything else as it is."""
    return torch.float64 if x in _NARROW and isinstance(x, torch.dtype) else x


def widen(x: Any) -> Any:
    """Return `x` with its tensors of narrower floating-point dtypes as float64."""
    return tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.dtype in _NARROW else t, x)


def run_float64(gm: GraphModule, inputs: Sequence[Any]) -> list[torch.Tensor]:
    """Return the floating-point outputs of `gm` on copies of `inputs`, computed in float64 without gradients."""
    copies = [widen(x.detach().clone()) if isinstance(x, torch.Tensor) else x for x in inputs]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        out = Float64Interpreter(gm).run(*copies)
    if recorded := gm.graph.output_node().meta.get(RECORDED, 0):
        out = out[:-recorded]
    return [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def compare(before: list[torch.Tensor], after: list[torch.Tensor], step: str) -> None:
    """Raise MHC110 if any output moved by more than `TOLERANCE` of its scale."""
    if len(before) != len(after):
        raise MHCError("MHC110", f"pass {step} changed the number of outputs from {len(before)} to {len(after)}")
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        if a.shape != b.shape:
            raise MHCError("MHC110", f"pass {step} changed output {i} from {list(a.shape)} to {list(b.shape)}")
        # Masks put infinities into outputs; an undefined value is no error of a pass that leaves it so.
        same = (a == b) | (a.isnan() & b.isnan())
        scale = float(a[a.isfinite()].abs().max()) if a.isfinite().any() else 0.0
        error = float((a - b)[~same].abs().max()) if not same.all() else 0.0
        if not error <= TOLERANCE * max(scale, 1e-30):
            raise MHCError("MHC110", f"pass {step} moved output {i} by {error:.3g} at a scale of {scale:.3g}")
