"""Run a graph on real values and keep what every node gave, in float64 or in the graph's own dtypes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves, tree_map

from mhc_compile.kernels import targets
from mhc_compile.passes.base import op_name
from mhc_compile.passes.dataflow import storage_root, writes_first_operand
from mhc_compile.passes.numeric import KEEPS, Float64Interpreter, widen

_UNWRITTEN = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
Values = dict[str, Any]
"""What the nodes of one run gave, by name; None for what lies inside a vmap."""


@dataclass(frozen=True)
class Difference:
    """How far one value is from what it should be."""

    error: float
    """The largest difference; infinite where one of the two is not finite, or they have other shapes."""
    scale: float
    """The largest finite value of what it should be."""

    @property
    def relative(self) -> float:
        """The error over the scale; 0 where both are 0."""
        return self.error / max(self.scale, 1e-30)


def difference(exact: Any, result: Any) -> Difference:
    """Return the difference of tensors or tuples; each of n streams `[..., n, C]` is compared with an exact `[..., C]`.

    Values that are equal, or undefined in both, do not differ: masks hold infinities.
    """
    pairs = (
        [t for t in tree_leaves(exact) if isinstance(t, Tensor)],
        [t for t in tree_leaves(result) if isinstance(t, Tensor)],
    )
    if len(pairs[0]) != len(pairs[1]):
        return Difference(float("inf"), 0.0)
    every = [_difference(a, b) for a, b in zip(*pairs, strict=True)]
    return max(every, key=lambda d: d.relative, default=Difference(0.0, 0.0))


def _difference(a: Tensor, b: Tensor) -> Difference:
    if b.ndim == a.ndim + 1 and a.ndim > 0:
        a = a.unsqueeze(-2).expand(*a.shape[:-1], b.shape[-2], a.shape[-1])
    if a.shape != b.shape:
        return Difference(float("inf"), 0.0)
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    finite = a[a.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    error = 0.0 if same.all() else float((a - b)[~same].abs().max())
    return Difference(error if error == error else float("inf"), scale)


def written(gm: GraphModule) -> set[str]:
    """Return the names of nodes whose storage another node writes into: their values change."""
    roots = {storage_root(n.args[0]) for n in gm.graph.nodes if writes_first_operand(n)}
    return {n.name for n in gm.graph.nodes if storage_root(n) in roots}


class _Recording64(Float64Interpreter):
    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.values: Values = {}
        self.written = written(gm)

    def run_node(self, n: Node) -> Any:
        out = _defined(n, super().run_node(n))
        self.values[n.name] = _recorded(out, copy=n.name in self.written)
        return out


def run_in_float64(gm: GraphModule, inputs: Sequence[Any]) -> Values:
    """Run `gm` on copies of `inputs` in float64, dropout off, other random numbers seeded; return every value."""
    copies = [widen(_kept(x)) for x in inputs]
    run = _Recording64(gm)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        run.run(*copies)
    return run.values


class _RecordingOwn(Interpreter):
    """Runs in the graph's own dtypes, dropout off; anchored values replace what was computed."""

    def __init__(self, gm: GraphModule, anchors: Mapping[str, Any]) -> None:
        super().__init__(gm)
        self.anchors = anchors
        self.values: Values = {}
        self.written = written(gm)

    def run_node(self, n: Node) -> Any:
        if n.meta.get(KEEPS) or (op_name(n) in ("dropout", "mark") and n.op == "call_function"):
            out = self.fetch_args_kwargs_from_env(n)[0][0]
        else:
            out = _defined(n, super().run_node(n))
        self.values[n.name] = _recorded(out, copy=n.name in self.written)
        if n.op == "output" or n.name in self.written or n.name not in self.anchors:
            return out
        return like(self.anchors[n.name], out)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if "dropout_p" in kwargs:
            kwargs = {**kwargs, "dropout_p": 0.0}
        return super().call_function(target, args, kwargs)


def run_as_it_is(gm: GraphModule, inputs: Sequence[Any], anchors: Mapping[str, Any]) -> Values:
    """Run `gm` in its own dtypes, each node on the values that `anchors` give its inputs; return every value.

    So errors do not add up along the graph, and each value shows the rounding of what lies between it and the anchors.
    Fused kernels are left to plain PyTorch: they are judged by themselves (`mhc_compile.bisect.kernels`).
    """
    run = _RecordingOwn(gm, anchors)
    with torch.no_grad(), torch.random.fork_rng(), targets.only("reference"):
        torch.manual_seed(0)
        run.run(*map(_kept, inputs))
    return run.values


def like(exact: Any, result: Any) -> Any:
    """Return the values of `exact` in the dtypes of `result`, for each stream where `result` has several."""
    if not isinstance(result, Tensor):
        if isinstance(result, (tuple, list)) and isinstance(exact, (tuple, list)) and len(result) == len(exact):
            return type(result)(like(w, f) for w, f in zip(exact, result, strict=True)) if _plain(result) else result
        return result
    if not isinstance(exact, Tensor):
        return result
    if result.ndim == exact.ndim + 1 and exact.ndim > 0:
        exact = exact.unsqueeze(-2).expand(result.shape)
    return exact.to(result.dtype).clone() if exact.shape == result.shape else result


def _plain(x: Any) -> bool:
    return type(x) in (tuple, list)


def _defined(node: Node, out: Any) -> Any:
    """Return the value of a node, uninitialised memory set to zero: it is written before it is read."""
    return torch.zeros_like(out) if op_name(node) in _UNWRITTEN else out


def _recorded(out: Any, *, copy: bool) -> Any:
    # Inside a vmap values are wrapped, and nothing can be computed with them outside of it.
    if any(isinstance(t, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tree_leaves(out)):
        return None
    return _kept(out) if copy else out


def _kept(x: Any) -> Any:
    return tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, x)
