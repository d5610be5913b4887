"""What passes find out and hand on to later passes and to reports: frozen data about nodes of the graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from torch.fx import Node

NATIVE_CODES = ("MHC107", "MHC112")
"""Codes of models that have more than one residual stream by themselves: for the pass `native`."""
OVER_DEPTH = "attention over depth"
"""Topology of a `NativeRead` in reports."""
ENDS = 2
"""Sites of a stream at which H gets no gradient: the first and the last."""
_MAX_SHOWN = 3


@dataclass(frozen=True)
class Site:
    """One residual add. `previous` is the stream value it starts from: the site before, or the stream's entry."""

    add: Node
    carry: Node
    """The operand of the add that carries the stream (`previous` itself, or the end of `chain`)."""
    branches: tuple[Node, ...]
    """The other operands: one, or several for a tree of adds (parallel attention and MLP)."""
    previous: Node
    chain: tuple[Node, ...] = ()
    """Nodes between `previous` (excluded) and `carry` (included), in graph order: applied per stream."""
    inner_adds: tuple[Node, ...] = ()
    """Adds of a flattened tree that this site swallows."""
    older: tuple[Node, ...] = ()
    """Stream values from before `previous` from which branches start that do not read `previous`."""
    reads: Mapping[Node, tuple[Node, ...]] = field(default_factory=dict)
    """Stream values of this site (`previous`, then `chain`) with the nodes that read them on the way into a branch."""
    name: str = ""


@dataclass(frozen=True)
class ResidualStream:
    """One stream: where it starts, its sites in order, and the module whose forward holds it from end to end."""

    entry: Node
    sites: tuple[Site, ...]
    hidden: int = 0
    """C, the size of the stream's last dimension."""
    owner: str = ""
    """Module path of the stream owner in this graph."""
    call: str = ""
    """Tells the calls apart of the innermost module that holds all sites."""

    @property
    def values(self) -> list[Node]:
        """Every node that is the stream itself rather than a reader of it, in graph order."""
        return [self.entry, *(n for s in self.sites for n in (*s.chain, *reversed(s.inner_adds), s.add))]

    @property
    def exit(self) -> Node:
        """The last site's add."""
        return self.sites[-1].add

    def without(self, skipped: Collection[str]) -> list[ResidualStream]:
        """Return the streams that are left between the sites named in `skipped`, which stay residual adds."""
        runs = groupby(self.sites, key=lambda site: site.name in skipped)
        kept = [tuple(run) for is_skipped, run in runs if not is_skipped]
        return [replace(self, entry=run[0].previous, sites=run) for run in kept]


@dataclass(frozen=True)
class Coverage:
    """How many residual adds of one graph became sites."""

    sites: int = 0
    left: tuple[str, ...] = ()
    """The residual adds that are no sites: the operation, its module and source line."""
    why: tuple[str, ...] = ()
    """For each of them, what kept it from being a site."""
    restarts: tuple[str, ...] = ()
    """Where a stream ends and the next begins with nothing but an add that was left, or less, between them."""
    short: bool = False
    """Whether the streams are several, and none has a site whose H gets a gradient."""
    alone: int = 0
    """Sites of a graph that is one short stream from its input to its output: a layer's, if not a tiny model's."""
    skipped: int = 0
    """The adds that could be sites and were not chosen (`Options.sites`)."""

    def __str__(self) -> str:
        adds = f"{self.sites} of {self.sites + self.skipped + len(self.left)} adds"
        return f"{adds}, {self.skipped} not chosen" if self.skipped else adds

    @property
    def problem(self) -> str:
        """What is degenerate about the conversion; empty where nothing is."""
        parts = []
        if self.left:
            parts.append(f"{len(self.left)} left, which combine a value with its branch otherwise: {_few(self.left)}")
        if self.restarts:
            parts.append(f"the stream ends and begins again {len(self.restarts)} times: {_few(self.restarts)}")
        if self.alone:
            parts.append(f"the graph is one stream of {self.alone} sites, as of one layer compiled by itself")
        if self.short:
            parts.append(f"no stream has more than {ENDS} sites, and no H gets a gradient at the first and the last")
        return "; ".join([str(self), *parts]) if parts else ""


def _few(lines: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(lines))
    more = f", and {len(distinct) - _MAX_SHOWN} more places" if len(distinct) > _MAX_SHOWN else ""
    return ", ".join(distinct[:_MAX_SHOWN]) + more


@dataclass(frozen=True)
class NativeSite:
    """A hand-written site that was lifted into the dialect."""

    name: str
    """Module path and ordinal of the value that holds the next streams."""
    spec: str
    """The `StreamSpec` that computes what the model wrote, as text."""


@dataclass(frozen=True)
class NativeRead:
    """A hand-written read by attention over depth that was lifted into an op."""

    name: str
    """Module path and ordinal of the value read."""
    sources: int
    queries: int

    def __str__(self) -> str:
        return f"{self.queries} {'query' if self.queries == 1 else 'queries'} over {self.sources} sources"


@dataclass(frozen=True)
class Block:
    """Sites whose streams are recomputed together in the backward pass."""

    sites: tuple[Node, ...]
    """Their coefficients."""
    kept: int
    """Bytes kept for the backward pass."""
    recomputed: int
    """Bytes recomputed just before the backward pass of the block."""


@dataclass(frozen=True)
class Probed:
    """What is recorded of one owner in a graph."""

    slot: Node
    """`[sites, values]`: its gradient is what `watch` or `watch_one` gives for every name of `rows`."""
    rows: list[str] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)
    """The names of the calls of sites in the order of the graph, of which `figures` `[calls, values]` has a row."""
    layers: list[str] = field(default_factory=list)
    """The same of memories and `counts` `[calls, n, bins]`."""
    figures: list[Node] = field(default_factory=list)
    counts: list[Node] = field(default_factory=list)
    look_ups: list[str] = field(default_factory=list)
    """The names of the look-ups in tables, in the order of the graph."""
    found: list[Node] = field(default_factory=list)
    """The numbers of the rows of every look-up, int64."""
