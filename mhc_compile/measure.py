"""What the streams of a converted model do on one batch: how far they separate, and how much a site's mix amplifies.

The model's forward is captured, widened into the `mhc` dialect and interpreted node by node in eval mode without
gradients, so the figures are those of the equations themselves, whatever compiles the model elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from mhc_compile.capture import capture, find_marks
from mhc_compile.config import Options
from mhc_compile.diagnostics import MHCError
from mhc_compile.parameters import owners
from mhc_compile.passes.base import Context, module_path
from mhc_compile.passes.fuse import Fuse
from mhc_compile.passes.lower import Lower
from mhc_compile.pipeline import compile_passes, run_passes

WIDENING = tuple(step for step in compile_passes(Options()) if not isinstance(step, (Fuse, Lower)))
"""What a graph goes through before kernels hide the equations."""
Batch = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class CompositeGain:
    """How much the composite mapping `M = H_L ... H_1` of a stream amplifies, per token (arXiv 2512.24880).

    Forward gain: the largest row sum of `|M|`, backward gain: the largest column sum, each as the mean and the maximum
    over tokens. A product of doubly stochastic matrices is doubly stochastic: both are 1 as far as Sinkhorn converged.
    """

    forward_mean: float
    forward_max: float
    backward_mean: float
    backward_max: float


@dataclass(frozen=True)
class StreamMeasures:
    """The measures of one stream owner, over all its calls in one forward."""

    sites: tuple[str, ...]
    """Names of the sites in the order of the stream."""
    separation: tuple[float, ...]
    """After each site, the root mean square of the streams' deviation from their mean, relative to that mean."""
    gain: CompositeGain
    """Of all sites together."""


def measure_streams(model: nn.Module, batch: Batch) -> dict[str, StreamMeasures]:
    """All measures of every stream owner of a converted model by the owner's module path.

    `batch` holds the inputs of one forward call: a tensor, positional inputs in a sequence, or keyword inputs in a
    mapping. Raises MHC410 for a model that is not converted, and what `convert` raises for a forward that cannot be
    captured in one graph.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    if not owners(model):
        raise MHCError("MHC410", f"{type(model).__name__} holds no stream parameters")
    with evaluating(model):
        captured = capture(model, *arguments_of(batch))
        graph = run_passes(captured.graph, Context(marks=find_marks(captured.graph)), WIDENING, Options())
        watch = _StreamInterpreter(graph)
        watch.run(*captured.inputs)
    return watch.measures()


def stream_separation(model: nn.Module, batch: Batch) -> dict[str, float]:
    """How far the streams differ at the exit, by owner: 0 when all are equal, as they are in a model just converted.

    Per token, with X `[n, C]` the streams after the last site and `m` their mean: `|X - m|_F / (sqrt(n) |m|)`, averaged
    over tokens. Arguments and errors as for `measure_streams`.
    """
    return {owner: found.separation[-1] for owner, found in measure_streams(model, batch).items()}


def composite_gain(model: nn.Module, batch: Batch) -> dict[str, CompositeGain]:
    """The gain of `H_L ... H_1` by owner. Arguments and errors as for `measure_streams`."""
    return {owner: found.gain for owner, found in measure_streams(model, batch).items()}


def separation(X: Tensor) -> Tensor:
    """Per token, the streams' deviation from their mean relative to it: X `[..., n, C]` -> `[...]` in float64."""
    X = X.double()
    mean = X.mean(-2, keepdim=True)
    spread = (X - mean).square().sum((-2, -1)).div(X.shape[-2]).sqrt()
    return spread / torch.linalg.vector_norm(mean.squeeze(-2), dim=-1).clamp(min=torch.finfo(torch.float64).tiny)


def arguments_of(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword arguments of the call that `batch` describes."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return ((batch,) if isinstance(batch, Tensor) else tuple(batch)), {}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's own mode is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass
class _Call:
    """What one pass through one stream showed."""

    owner: str
    sites: list[str]
    separations: list[Tensor]
    composite: Tensor
    """`H_l ... H_1` per token, `[..., n, n]` in float64."""


class _StreamInterpreter(Interpreter):
    """Runs a widened graph and follows each stream from its expand through its sites."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.calls: dict[Node, _Call] = {}
        self._begin: dict[Node, Node] = {}
        """The expand of the stream that each distribute belongs to."""

    def run_node(self, n: Node) -> Any:
        """One node; a distribute is recorded with its mix."""
        out = super().run_node(n)
        if n.target is torch.ops.mhc.distribute.default:
            carry, _, _, mix = n.args
            assert isinstance(carry, Node)
            assert isinstance(mix, Node)
            self._record(n, self._expand_above(carry), self.env[mix].double(), out)
        return out

    def _record(self, node: Node, begin: Node, mix: Tensor, X: Tensor) -> None:
        self._begin[node] = begin
        name = str(node.meta["mhc_site"])
        if begin not in self.calls:
            owner = module_path(node).removesuffix(name.rpartition("#")[0]).strip(".")
            self.calls[begin] = _Call(owner, [name], [separation(X)], mix)
            return
        call = self.calls[begin]
        call.sites.append(name)
        call.separations.append(separation(X))
        call.composite = mix @ call.composite

    def _expand_above(self, node: Node) -> Node:
        """The expand whose streams reach `node` through earlier sites and what lies between them."""
        queue, seen = [node], {node}
        while queue:
            above = queue.pop(0)
            if above.target is torch.ops.mhc.expand.default:
                return above
            if above in self._begin:
                return self._begin[above]
            for operand in above.all_input_nodes:
                if operand not in seen and operand.target is not torch.ops.mhc.reduce.default:
                    seen.add(operand)
                    queue.append(operand)
        raise AssertionError(f"{node.name} carries no stream")

    def measures(self) -> dict[str, StreamMeasures]:
        """What the calls of every owner showed together, in the order of the graph."""
        by_owner: dict[str, list[_Call]] = {}
        for call in self.calls.values():
            by_owner.setdefault(call.owner, []).append(call)
        return {owner: _summary(calls) for owner, calls in by_owner.items()}


def _summary(calls: list[_Call]) -> StreamMeasures:
    first = calls[0]
    separations = [torch.cat([c.separations[i].flatten() for c in calls]) for i in range(len(first.sites))]
    gains = [torch.cat([c.composite.abs().sum(dim).amax(-1).flatten() for c in calls]) for dim in (-1, -2)]
    (forward_mean, forward_max), (backward_mean, backward_max) = [(float(g.mean()), float(g.max())) for g in gains]
    return StreamMeasures(
        tuple(first.sites),
        tuple(float(s.mean()) for s in separations),
        CompositeGain(forward_mean, forward_max, backward_mean, backward_max),
    )
