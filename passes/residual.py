"""Find the residual streams of a graph: sites that follow one another along their carries. Analysis only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch.fx import GraphModule, Node

from mhc_compile.passes.base import Context, module_calls, module_path, op_name, refuse, shape
from mhc_compile.passes.coverage import coverage
from mhc_compile.passes.dataflow import Dataflow, storage_root
from mhc_compile.passes.multistream import multistream, side_by_side
from mhc_compile.passes.native_depth import over_depth
from mhc_compile.passes.ownership import is_owned
from mhc_compile.passes.residual_sites import SiteSearch, branch_mask, branches_mask
from mhc_compile.passes.results import ResidualStream, Site

MAX_OUTER_MATMULS = 8
"""Parameter contractions allowed outside all branches: embedding projections, heads. More: the stream was missed."""


@dataclass(frozen=True)
class Residual:
    """Fills `context.streams` and `context.coverage`. Raises MHC101, 102, 103, 105, 106, 107, 108 or 112."""

    name: ClassVar[str] = "residual"
    requires: ClassVar[tuple[str, ...]] = ("normal-form",)
    provides: ClassVar[tuple[str, ...]] = ("streams",)

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        """Analyse `gm`; the graph is not changed."""
        flow = Dataflow(gm.graph, is_owned)
        analysis = StreamAnalysis(flow, context)
        context.streams = analysis.streams()
        context.coverage = coverage(flow, analysis.search, context.streams)
        context.notes.append(context.coverage.problem or str(context.coverage))
        return gm


class StreamAnalysis:
    """Links the sites of one graph into streams, checks them, and names them."""

    def __init__(self, flow: Dataflow, context: Context) -> None:
        self.flow = flow
        self.context = context
        self.search = SiteSearch(flow, context.notes)

    def streams(self) -> list[ResidualStream]:
        """Return all streams of the graph, in graph order."""
        sites = self.search.find()
        if (already := over_depth(self.flow) or multistream(self.flow) or side_by_side(self.flow, sites)) is not None:
            raise already
        self._refuse_kept_adds(sites)
        streams = self._link(sites)
        if not streams:
            raise refuse("MHC101", "no add of a carried value and a branch with parameters was found")
        self._check_coverage(streams)
        for stream in streams:
            self._check(stream)
        self._check_splits(streams)
        counts: dict[tuple[str, str], dict[str, int]] = {}
        streams = [self._named(stream, counts) for stream in self._with_reads(streams)]
        _check_names(streams)
        return streams

    def _link(self, kept: list[Site]) -> list[ResidualStream]:
        streams: list[list[Site]] = []
        tail: dict[Node, list[Site]] = {}
        heads: dict[Node, Site] = {}
        for site in kept:
            stream = tail.pop(site.previous, None)
            if stream is None:
                if site.previous in heads:
                    first = heads[site.previous].add.name
                    raise refuse("MHC102", f"{first} and {site.add.name} both continue {site.previous.name}", site.add)
                stream = []
                streams.append(stream)
            heads[site.previous] = site
            stream.append(site)
            tail[site.add] = stream
        return [ResidualStream(stream[0].previous, tuple(stream)) for stream in streams]

    def _refuse_kept_adds(self, sites: list[Site]) -> None:
        """Refuse `x += branch(x)` that `normalize` had to leave: other readers of `x` would not see it change."""
        flow = self.flow
        inside = branches_mask(flow, sites)
        for root, writes in flow.writes.items():
            for write in writes:
                if op_name(write) not in ("iadd", "add_") or flow.bit(write) & inside:
                    continue
                carry, branch = write.args[0], write.args[1] if len(write.args) > 1 else None
                if isinstance(carry, Node) and isinstance(branch, Node) and self.search.adds(carry, branch):
                    what = "an input of the model" if root.op == "placeholder" else "which is also read as a view"
                    raise refuse("MHC106", f"{write.name} adds to {carry.name}, {what}", write)

    # --- checks ------------------------------------------------------------------------------------------------

    def _check_coverage(self, streams: list[ResidualStream]) -> None:
        flow = self.flow
        covered = 0
        for stream in streams:
            below = flow.descendants[stream.entry]
            for site in stream.sites:
                covered |= branch_mask(flow, site) & below
        outside = flow.members(flow.matmuls & ~covered)
        # A stem of convolutions before the first stream (audio, images) is no missed layer.
        before = 0
        for stream in streams:
            before |= flow.ancestors[stream.entry]
        outside = [n for n in outside if not (op_name(n).startswith("conv") and flow.bit(n) & before)]
        self.context.notes.append(f"{len(outside)} parameter contractions outside all branches")
        if len(outside) > MAX_OUTER_MATMULS and len(outside) > len(flow.members(covered & flow.matmuls)) // 4:
            raise refuse(
                "MHC103",
                f"{len(outside)} parameter contractions lie outside all {sum(len(s.sites) for s in streams)} sites",
                outside[len(outside) // 2],
            )

    def _check(self, stream: ResidualStream) -> None:
        flow = self.flow
        size = shape(stream.entry)[-1]
        for site in stream.sites:
            if not isinstance(shape(site.add)[-1], int) or shape(site.add)[-1] != size:
                raise refuse("MHC105", f"last dimension {size} at the entry, {shape(site.add)[-1]} here", site.add)
            for node in (site.previous, *site.chain):
                for write in flow.writes.get(storage_root(node), []):
                    if write is not node and flow.depends(write, node):
                        raise refuse("MHC106", f"{write.name} writes into the stream value {node.name}", write)
            self._check_channels(site)

    def _check_channels(self, site: Site) -> None:
        """Refuse [B, C, S] layouts: a convolution reading the stream untransposed takes channels before tokens."""
        seen = {site.previous, *site.chain}
        queue = list(seen)
        while queue:
            node = queue.pop()
            for user in node.users:
                name = op_name(user)
                if name.startswith("conv") and user.args and user.args[0] is node:
                    raise refuse("MHC108", "the stream's channels are not its last dimension", user)
                if (
                    user not in seen
                    and self.search.up(user) is node
                    and name not in ("transpose", "permute", "view", "reshape")
                ):
                    seen.add(user)
                    queue.append(user)

    def _check_splits(self, streams: list[ResidualStream]) -> None:
        """Refuse a stream that is cut into parts which go on as streams of their own: chunked feed-forward."""
        flow = self.flow
        for stream in streams:
            cuts = []
            for other in streams:
                between = flow.between(stream.exit, other.entry) & ~flow.bit(stream.exit)
                if between and not between & flow.matmuls:
                    cuts.append(flow.members(between)[0])
            if len(cuts) > 1:
                raise refuse("MHC108", f"{stream.exit.name} goes on as {len(cuts)} streams", cuts[0])

    # --- reads -------------------------------------------------------------------------------------------------

    def _with_reads(self, streams: list[ResidualStream]) -> Iterator[ResidualStream]:
        """Yield the streams with their readers; one on the way into any branch reads at the site after the value.

        Other readers (outputs) are not listed.
        """
        flow = self.flow
        all_branches = 0
        for stream in streams:
            for site in stream.sites:
                all_branches |= branch_mask(flow, site)
        for stream in streams:
            members, sites = set(stream.values), list[Site]()
            for i, site in enumerate(stream.sites):
                inside = branch_mask(flow, site)
                reads: dict[Node, tuple[Node, ...]] = {}
                for v in (site.previous, *site.chain):
                    # What re-enters later layers from the stream's entry is the embedding itself, not the stream.
                    feeds = inside if i == 0 and v is stream.entry else inside | all_branches
                    # `zeros_like(v)` asks for its shape alone.
                    readers = (u for u in v.users if u not in members and flow.bit(u) & feeds and v in flow.inputs[u])
                    if (read_by := tuple(readers)) or v in site.branches:
                        reads[v] = read_by
                sites.append(replace(site, reads=reads))
            yield replace(stream, sites=tuple(sites))

    # --- names -------------------------------------------------------------------------------------------------

    def _named(self, stream: ResidualStream, counts: dict[tuple[str, str], dict[str, int]]) -> ResidualStream:
        """Return the stream with its owner and call, its size, and its sites with their names."""
        around = [site.add for site in stream.sites]
        call, _ = _common(around)
        if stream.entry.op != "placeholder":
            around.append(stream.entry)
        around += [u for u in stream.exit.users if u.op != "output"]
        _, owner = _common(around)
        # One call may hold several streams, one after the other.
        count = counts.setdefault((owner, call), {})
        sites = []
        for site in stream.sites:
            relative = module_path(site.add).removeprefix(owner).strip(".")
            ordinal = count.get(relative, 0)
            count[relative] = ordinal + 1
            sites.append(replace(site, name=f"{relative}#{ordinal}"))
        hidden = int(shape(stream.exit)[-1])
        return replace(stream, sites=tuple(sites), hidden=hidden, owner=owner, call=call)


def _common(nodes: list[Node]) -> tuple[str, str]:
    """Return the innermost module call around all `nodes`: its key and its path."""
    stacks = [module_calls(n) for n in nodes]
    depth = 1
    while all(len(s) > depth for s in stacks) and len({s[depth] for s in stacks}) == 1:
        depth += 1
    return stacks[0][depth - 1]


def _check_names(streams: list[ResidualStream]) -> None:
    """Raise MHC102 unless two calls of the module that holds the sites share all names or none."""
    calls: dict[str, dict[str, set[str]]] = {}
    for stream in streams:
        calls.setdefault(stream.owner, {}).setdefault(stream.call, set()).update(s.name for s in stream.sites)
    for stream in streams:
        names = calls[stream.owner][stream.call]
        for other in calls[stream.owner].values():
            if names & other and names != other:
                raise refuse(
                    "MHC102",
                    f"two streams of {stream.owner or 'the root'} share only some sites: {sorted(names & other)}",
                    stream.exit,
                )
