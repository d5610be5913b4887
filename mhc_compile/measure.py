"""Measure the streams of a converted model on one batch: how far they separate, and how much each mix amplifies.

The model's forward is captured, widened into the `mhc` dialect and interpreted node by node in eval mode without
gradients, so the figures are those of the equations themselves, whatever compiles the model elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from mhc_compile.capture import capture, find_marks
from mhc_compile.config import Options
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels import measures
from mhc_compile.modes import in_mode
from mhc_compile.parameters import attention_of, owners, unwrapped
from mhc_compile.passes.base import Context, Mark, module_path, switches_gradients
from mhc_compile.passes.pipeline import WIDENING, Pipeline

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
    gains: tuple[float, ...]
    """Of each site's own H, the largest row or column sum of `|H|` over all tokens."""
    gain: CompositeGain
    """Of all sites together."""


def measure_streams(model: nn.Module, batch: Batch) -> dict[str, StreamMeasures]:
    """Return the measures of every stream owner of a converted model by the owner's module path.

    `batch` holds the inputs of one forward call: a tensor, positional inputs in a sequence, or keyword inputs in a
    mapping. Raises MHC410 for a model that is not converted, and what `convert` raises for a forward that cannot be
    captured in one graph.
    """
    return measuring(model, batch)()


def measuring(model: nn.Module, batch: Batch) -> Callable[[], dict[str, StreamMeasures]]:
    """Return a function that measures the streams of `model` on `batch` with the parameters at the time of its call.

    The forward is captured once, which takes most of the time of a measurement. Arguments and errors as for
    `measure_streams`.
    """
    model = unwrapped(model)
    if not owners(model):
        raise MHCError("MHC410", f"{type(model).__name__} holds no stream parameters")
    graph, inputs, _ = widened(model, batch)

    def measure() -> dict[str, StreamMeasures]:
        watch = StreamInterpreter(graph)
        with in_mode(model, training=False), torch.no_grad():
            watch.run(*inputs)
        return summarise(watch.parts)

    return measure


def widened(model: nn.Module, batch: Batch) -> tuple[GraphModule, list[Any], list[Mark]]:
    """Return the widened graph of one call of a converted model in evaluation mode, its inputs and its marks."""
    if isinstance(batch, Mapping):
        args, kwargs = (), dict(batch)
    else:
        args, kwargs = ((batch,) if isinstance(batch, Tensor) else tuple(batch)), {}
    with in_mode(model, training=False), torch.no_grad():
        captured = capture(model, args, kwargs)
        marks = find_marks(captured.graph)
        passes = Pipeline((*WIDENING, *Options(attention=attention_of(model.modules())).masking))
        return passes.run(captured.graph, Context(marks=marks)), captured.inputs, marks


@dataclass
class StreamPart:
    """The measures of a part of one pass through one stream; its tensors are float64."""

    begins: bool
    """Whether the stream's expand lies in this part; otherwise an earlier part holds what came before."""
    owner: str | None = None
    """Module path of the stream's owner; None as long as no site was seen."""
    sites: list[str] = field(default_factory=list)
    separations: list[Tensor] = field(default_factory=list)
    """Of every site, by token `[...]`."""
    gains: list[float] = field(default_factory=list)
    composite: Tensor | None = None
    """`H_l ... H_1` of the part's sites by token, `[..., n, n]`."""

    def add(self, owner: str, site: str, mix: Tensor, X: Tensor) -> None:
        """Record a site: its mix H `[..., n, n]` and the streams after it, `[..., n, C]`."""
        H = mix.double()
        self.owner = owner
        self.sites.append(site)
        self.separations.append(measures.separation(X.double()))
        self.gains.append(max(float(gain.max()) for gain in measures.gains(H)))
        self.composite = H if self.composite is None else H @ self.composite

    def continued(self, later: StreamPart) -> StreamPart:
        """Return this part and the `later` one that continues it, as one."""
        composites = [c for c in (later.composite, self.composite) if c is not None]
        return StreamPart(
            self.begins,
            self.owner or later.owner,
            self.sites + later.sites,
            self.separations + later.separations,
            self.gains + later.gains,
            composites[0] @ composites[1] if len(composites) == 2 else next(iter(composites), None),
        )


class StreamInterpreter(Interpreter):
    """Runs a widened graph, or a part of one, and follows each stream through its sites.

    A stream begins with its expand, or, in a part, with one of the placeholders named in `carried`: what earlier parts
    computed, the streams among it.
    """

    def __init__(self, graph: GraphModule, carried: Collection[str] = ()) -> None:
        super().__init__(graph)
        self._carried = frozenset(carried)
        self._parts: dict[Node, StreamPart] = {}
        """By where the stream begins in this graph, in the order of the graph."""
        self._begin: dict[Node, Node] = {}
        """Where the stream of each distribute begins."""
        self._shapes: dict[Node, torch.Size] = {}
        """The shapes of carried values: streams have the shape of the streams after them."""

    @property
    def parts(self) -> list[StreamPart]:
        """The measures of the run, in the order of the graph."""
        return list(self._parts.values())

    def run_node(self, n: Node) -> Any:
        """Run one node, and record a distribute with its mix. Gradients stay disabled."""
        if switches_gradients(n):
            return None
        out = super().run_node(n)
        if n.op == "placeholder" and n.name in self._carried:
            self._shapes[n] = out.shape
        elif n.target is torch.ops.mhc.expand.default:
            self._parts[n] = StreamPart(begins=True)
        elif n.target is torch.ops.mhc.distribute.default:
            carry, _, _, mix = n.args
            assert isinstance(carry, Node)
            assert isinstance(mix, Node)
            self._begin[n] = begin = self._above(carry, out.shape)
            part = self._parts.setdefault(begin, StreamPart(begins=False))
            name = str(n.meta["mhc_site"])
            owner = module_path(n).removesuffix(name.rpartition("#")[0]).strip(".")
            part.add(owner, name, self.env[mix], out)
        return out

    def _above(self, node: Node, shape: torch.Size) -> Node:
        """Return where the streams begin that reach `node` through earlier sites."""
        queue, seen = [node], {node}
        while queue:
            above = queue.pop(0)
            if above.target is torch.ops.mhc.expand.default or self._shapes.get(above) == shape:
                return above
            if above in self._begin:
                return self._begin[above]
            for operand in above.all_input_nodes:
                if operand not in seen and operand.target is not torch.ops.mhc.reduce.default:
                    seen.add(operand)
                    queue.append(operand)
        raise AssertionError(f"{node.name} carries no stream")


def summarise(parts: Sequence[StreamPart]) -> dict[str, StreamMeasures]:
    """Return the measures by owner from the parts of a whole forward, in its order.

    A part that does not begin its stream continues the last one of its owner.
    """
    calls: list[StreamPart] = []
    for part in parts:
        same_owner = (i for i in reversed(range(len(calls))) if calls[i].owner in (part.owner, None))
        before = None if part.begins else next(same_owner, None)
        if before is None:
            calls.append(part)
        else:
            calls[before] = calls[before].continued(part)
    by_owner: dict[str, list[StreamPart]] = {}
    for call in calls:
        if call.owner is not None:
            by_owner.setdefault(call.owner, []).append(call)
    return {owner: _summary(of_owner) for owner, of_owner in by_owner.items()}


def _summary(calls: list[StreamPart]) -> StreamMeasures:
    first = calls[0]
    composites = [measures.gains(c.composite) for c in calls if c.composite is not None]
    separations = [torch.cat([c.separations[i].flatten() for c in calls]) for i in range(len(first.sites))]
    sums = [torch.cat([g.flatten() for g in one]) for one in zip(*composites, strict=True)]
    (forward_mean, forward_max), (backward_mean, backward_max) = [(float(g.mean()), float(g.max())) for g in sums]
    return StreamMeasures(
        tuple(first.sites),
        tuple(float(s.mean()) for s in separations),
        tuple(max(c.gains[i] for c in calls) for i in range(len(first.sites))),
        CompositeGain(forward_mean, forward_max, backward_mean, backward_max),
    )
