"""What the streams of a converted model do on one batch: how far they separate, and how much a site's mix amplifies.

The model's forward is captured, widened into the `mhc` dialect and interpreted node by node in eval mode without
gradients, so the figures are those of the equations themselves, whatever compiles the model elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from mhc_compile.capture import capture, find_marks
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels import measures
from mhc_compile.parameters import owners
from mhc_compile.passes.base import Context, module_path, switches_gradients
from mhc_compile.passes.pipeline import WIDENING

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
    """All measures of every stream owner of a converted model by the owner's module path.

    `batch` holds the inputs of one forward call: a tensor, positional inputs in a sequence, or keyword inputs in a
    mapping. Raises MHC410 for a model that is not converted, and what `convert` raises for a forward that cannot be
    captured in one graph.
    """
    return measuring(model, batch)()


def measuring(model: nn.Module, batch: Batch) -> Callable[[], dict[str, StreamMeasures]]:
    """What measures the streams of `model` on `batch` as often as it is called, with the parameters as they are then.

    The forward is captured once, which takes most of the time of a measurement. Arguments and errors as for
    `measure_streams`.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    if not owners(model):
        raise MHCError("MHC410", f"{type(model).__name__} holds no stream parameters")
    with evaluating(model):
        captured = capture(model, *arguments_of(batch))
        graph = WIDENING.run(captured.graph, Context(marks=find_marks(captured.graph)))

    def measure() -> dict[str, StreamMeasures]:
        watch = StreamInterpreter(graph)
        with evaluating(model):
            watch.run(*captured.inputs)
        return summarise(watch.parts)

    return measure


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
    return measures.separation(X.double())


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
class StreamPart:
    """What a part of one pass through one stream showed; its tensors are float64."""

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
        """Record a site: its mix H `[..., n, n]` and the streams behind it, `[..., n, C]`."""
        H = mix.double()
        self.owner = owner
        self.sites.append(site)
        self.separations.append(separation(X))
        self.gains.append(max(float(gain.max()) for gain in measures.gains(H)))
        self.composite = H if self.composite is None else H @ self.composite

    def continued(self, later: StreamPart) -> StreamPart:
        """This part and the `later` one that goes on from it, as one."""
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
        """Of what is carried: streams have the shape of the streams behind them."""

    @property
    def parts(self) -> list[StreamPart]:
        """What the streams showed in the run, in the order of the graph."""
        return list(self._parts.values())

    def run_node(self, n: Node) -> Any:
        """One node; a distribute is recorded with its mix. Gradients stay as they are, off."""
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
        """Where the streams begin that reach `node` through earlier sites and what lies between them."""
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
    """The measures by owner from the parts of a whole forward, in its order.

    A part that does not begin its stream goes on from the last one of its owner.
    """
    calls: list[StreamPart] = []
    for part in parts:
        before = None if part.begins else _last_of(part.owner, calls)
        if before is None:
            calls.append(part)
        else:
            calls[before] = calls[before].continued(part)
    by_owner: dict[str, list[StreamPart]] = {}
    for call in calls:
        if call.owner is not None:
            by_owner.setdefault(call.owner, []).append(call)
    return {owner: _summary(found) for owner, found in by_owner.items()}


def _last_of(owner: str | None, calls: Sequence[StreamPart]) -> int | None:
    return next((i for i in reversed(range(len(calls))) if calls[i].owner in (owner, None)), None)


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
