"""Choose blocks of sites whose streams are recomputed in the backward pass, and tag them for the partitioner.

    kept for the backward pass     every branch's output F, and what begins a block: the streams, and where one kernel
                                   computes them with the first site's coefficients and h, these
    recomputed, by kernels         other streams, coefficients, h and entry norms, block by block, just before use
    never recomputed               what lies inside a branch

In a depth form every site can be recomputed from the earlier outputs, which are its state and kept as they are: its
reads and entry norms are recomputed, and a block saves nothing but the recomputation of several sites at a time.

The tags are those of PyTorch's activation checkpointing (`meta["recompute"]`, `meta["ac_graph_id"]`): AOTAutograd's
partitioner cuts the joint graph by them, and `fuse` merges nothing across blocks. Sites that a user checkpoints with
`torch.utils.checkpoint` keep their own tags. Blocks never leave the graph: a pipeline stage is a graph of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar

import sympy
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from mhc_compile.diagnostics import MHCError
from mhc_compile.passes.base import Context, gradient_modes
from mhc_compile.passes.cost import Plan, SiteCost, bytes_text, choose_blocks, parse_blocks
from mhc_compile.passes.depth_sites import DepthSite, depth_sites
from mhc_compile.passes.dialect_sites import StreamSite, by_stream, size_hints, stream_sites
from mhc_compile.passes.fuse import KERNELS, Fused
from mhc_compile.passes.results import Block

_TAG, _BLOCK = "recompute", "ac_graph_id"
Run = list[StreamSite] | list[DepthSite]
"""Sites that may share blocks: of one stream, or of one list of outputs."""


@dataclass(frozen=True)
class Recompute:
    """Tags blocks of sites. Raises MHC626 where a budget cannot be kept, MHC627 where sizes are not known for one.

    `blocks`: `off`; `auto`, the blocks with the smallest peak (arXiv 2512.24880, Eq. 20, with the bytes of this graph);
    `stage`, all sites of the graph as one block; a number of sites; or a budget for the stream part ("2GiB"), for which
    the blocks are chosen that take the least time and fit. `kinds`: the kinds of chain that `fuse` will use.
    """

    blocks: str | int = "auto"
    kinds: tuple[Fused, ...] = KERNELS

    name: ClassVar[str] = "recompute"
    requires: ClassVar[tuple[str, ...]] = ("dialect",)
    provides: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        parse_blocks(self.blocks)

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        """Tag the nodes of `gm` in place."""
        if parse_blocks(self.blocks)[0] == "off":
            return gm
        sites = stream_sites(gm.graph)
        runs = _runs(gm.graph, sites)
        if not runs:
            context.notes.append("no site is there to be computed again")
            return gm
        plan = _plan(gm.graph, runs, self.blocks, self.kinds)
        context.blocks += _blocks(runs, plan)
        _tag(gm.graph, runs, plan, {site.state for site in sites})
        context.notes += _notes(plan)
        return gm


def plan_of(graph: Graph, blocks: str | int, kernels: tuple[str, ...] = KERNELS) -> Plan:
    """Return the blocks and what they cost for a dialect graph, which is not changed. Raises as the pass does."""
    return _plan(graph, _runs(graph, stream_sites(graph)), blocks, kernels)


def _runs(graph: Graph, sites: Iterable[StreamSite]) -> list[Run]:
    return [*runs_of(graph, sites), *_depth_runs(graph)]


def _plan(graph: Graph, runs: Sequence[Run], blocks: str | int, kernels: tuple[str, ...]) -> Plan:
    exact = parse_blocks(blocks)[0] == "bytes"
    hints = size_hints(graph)

    def cost(site: StreamSite | DepthSite, i: int) -> SiteCost:
        if isinstance(site, DepthSite):
            return site.cost(fused="attend" in kernels)
        return site.cost(joined="boundary" in kernels and i > 0 and site.is_boundary)

    def costs(run: Run) -> tuple[SiteCost, ...]:
        sites: Sequence[StreamSite | DepthSite] = run
        return tuple(_in_numbers(cost(site, i), hints, exact=exact) for i, site in enumerate(sites))

    return choose_blocks(tuple(map(costs, runs)), blocks)


def runs_of(graph: Graph, among: Iterable[StreamSite]) -> list[list[StreamSite]]:
    """Return the sites `among` those of the graph that may be recomputed, in runs through which one stream goes.

    Left out are sites that carry a user's tags, and those that compute without gradients.
    """
    modes = gradient_modes(graph)

    def may(site: StreamSite) -> bool:
        return not any(_TAG in n.meta or modes[n] is False for n in (*site.stream, *filter(None, [site.distribute])))

    return by_stream([site for site in among if may(site)])


def _depth_runs(graph: Graph) -> list[list[DepthSite]]:
    """Return the sites of depth forms that may be recomputed, as `runs_of` does."""
    modes = gradient_modes(graph)

    def may(site: DepthSite) -> bool:
        return not any(_TAG in n.meta for n in site.stream) and modes[site.reads[0]] is not False

    runs = ([site for site in run if may(site)] for run in depth_sites(graph))
    return [run for run in runs if run]


def is_tagged(graph: Graph) -> bool:
    """Return whether anything of the graph is to be recomputed."""
    return any(_TAG in n.meta for n in graph.nodes)


def _blocks(runs: Sequence[Run], plan: Plan) -> Iterator[Block]:
    for run, costs, sizes in zip(runs, plan.runs, plan.sizes, strict=True):
        for begin, end in pairwise(accumulate(sizes, initial=0)):
            block = costs[begin:end]
            yield Block(
                sites=tuple(s.reads[0] if isinstance(s, DepthSite) else s.coefficients for s in run[begin:end]),
                kept=int(sum(s.branch for s in block) + block[0].begin),
                recomputed=int(sum(s.made + s.state for s in block) - block[0].begin),
            )


def _tag(graph: Graph, runs: Sequence[Run], plan: Plan, states: set[Node]) -> None:
    """Tag the blocks of the plan; `states` are the streams with which any site of the graph begins."""
    block = max((int(n.meta[_BLOCK]) for n in graph.nodes if _BLOCK in n.meta), default=0)
    again: list[Node] = []
    for run, costs, sizes in zip(runs, plan.runs, plan.sizes, strict=True):
        for begin, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
            block += 1
            inside = run[begin : begin + size]
            if isinstance(inside[0], DepthSite):
                _tag_reads(inside, block)
            else:
                again += _tag_block(inside, block, joined=costs[begin].joined)
        done = sum(sizes)
        last = run[done - 1] if done else None
        end = last.distribute if isinstance(last, StreamSite) else None
        # Sites without tags that one kernel joins to the last block keep all its results, as they would anyway.
        if end is not None and end in states and not (done < len(run) and costs[done].joined):
            end.meta |= {_TAG: CheckpointPolicy.MUST_SAVE, _BLOCK: block}
    recomputed = set(again)
    for node in again:
        # An older state that a later block reads, too.
        if any(u in recomputed and u.meta[_BLOCK] != node.meta[_BLOCK] for u in node.users):
            node.meta[_TAG] = CheckpointPolicy.MUST_SAVE


def _tag_block(inside: list[StreamSite], block: int, *, joined: bool) -> list[Node]:
    """Tag the sites of one block; return what is to be recomputed."""
    first, *others = inside
    kept = [first.state, *first.stream] if joined else []
    again = [] if joined else list(first.stream)
    for site in others:
        again += [site.state, *site.stream]
    for nodes, policy in ((kept, CheckpointPolicy.MUST_SAVE), (again, CheckpointPolicy.MUST_RECOMPUTE)):
        for node in nodes:
            node.meta |= {_TAG: policy, _BLOCK: block}
    if first.state.op != "placeholder":
        first.state.meta[_TAG] = CheckpointPolicy.MUST_SAVE
    for node in (n for site in inside for n in site.branch if _TAG not in n.meta):
        node.meta[_TAG] = CheckpointPolicy.MUST_SAVE
    return again


def _tag_reads(inside: Iterable[DepthSite], block: int) -> None:
    """Tag the sites of one block of a depth form."""
    for site in inside:
        for node in site.stream:
            node.meta |= {_TAG: CheckpointPolicy.MUST_RECOMPUTE, _BLOCK: block}
        for node in site.sources:
            if node.op != "placeholder" and _TAG not in node.meta:
                node.meta[_TAG] = CheckpointPolicy.MUST_SAVE


def _in_numbers(cost: SiteCost, hints: dict[sympy.Symbol, int], *, exact: bool) -> SiteCost:
    """Return the costs at the current sizes; an unknown size may be 1, as blocks depend on the ratios of costs.

    Raises MHC627 for one, where they must be `exact`.
    """
    costs = [sympy.sympify(e).subs(hints) for e in (cost.state, cost.made, cost.branch, cost.parameters)]
    unknown = {symbol for e in costs for symbol in e.free_symbols}
    if unknown and exact:
        raise MHCError("MHC627", f"{', '.join(sorted(map(str, unknown)))} depend on data")
    state, recomputable, branch, parameters = (int(e.subs(dict.fromkeys(unknown, 1))) for e in costs)
    return SiteCost(state, recomputable, branch, parameters, cost.joined, cost.alone)


def _notes(plan: Plan) -> Iterable[str]:
    count = sum(map(sum, plan.sizes))
    whole, kept = bytes_text(plan.whole), bytes_text(plan.kept)
    yield f"{count} sites in {len(plan.blocks)} blocks of up to {plan.block}" + f", {plan.rest} sites keep all" * bool(
        plan.rest
    )
    yield f"the stream part keeps {kept} for the backward pass, without recomputation {whole}"
    yield f"{bytes_text(plan.transient)} are made again at a time, {bytes_text(plan.extra)} more are moved"
