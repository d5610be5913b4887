"""The blocks of sites that are computed again, and the pipeline stages, that a dialect graph would be cut into."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch.fx import Graph, GraphModule, Node

from mhc_compile.config import Options
from mhc_compile.passes.base import is_tensor, value
from mhc_compile.passes.dialect_sites import stream_sites
from mhc_compile.passes.flops import by_site, first_places, node_flops
from mhc_compile.passes.ownership import is_owned
from mhc_compile.passes.recompute import plan_of, runs_of
from mhc_compile.passes.stages import balanced, coefficient_nodes, split_graph
from mhc_compile.report.lines import is_buffer


@dataclass(frozen=True)
class Block:
    """Sites whose streams are computed again together."""

    sites: tuple[Node, ...]
    """Their coefficients."""
    kept: int
    """Bytes kept for the backward pass."""
    again: int
    """Bytes made again just before the block's backward pass."""


@dataclass(frozen=True)
class Stage:
    """One pipeline stage."""

    sites: tuple[Node, ...]
    """Their coefficients."""
    nodes: frozenset[Node]
    """What is computed in it and in no stage before."""
    parameters: int
    """Elements of what of the model it reads."""


def blocks_of(graph: Graph, options: Options) -> list[Block]:
    """The blocks that the pass `recompute` will tag. Raises as it does."""
    if options.recompute == "off":
        return []
    runs = runs_of(graph, stream_sites(graph))
    plan = plan_of(graph, options.recompute, options.kinds)
    found = []
    for run, costs, sizes in zip(runs, plan.runs, plan.sizes, strict=True):
        for begin, end in pairwise(accumulate(sizes, initial=0)):
            block = costs[begin:end]
            found.append(
                Block(
                    sites=tuple(site.coefficients for site in run[begin:end]),
                    kept=int(sum(s.branch for s in block) + block[0].begin),
                    again=int(sum(s.made + s.state for s in block) - block[0].begin),
                )
            )
    return found


def stages_of(gm: GraphModule, count: int) -> list[Stage]:
    """The graph in `count` stages of about equal cost.

    Raises MHC620 for more stages than sites, MHC621 where the graph cannot be cut between them.
    """
    coefficient_calls = coefficient_nodes(gm.graph)
    starts = balanced(by_site(gm.graph, node_flops(gm)), count)
    place = first_places(gm.graph, starts)
    found = []
    for k, piece in enumerate(split_graph(gm, starts)):
        given = {n.name for n in piece.graph.graph.nodes if n.op == "placeholder"}
        owned = [n for n in gm.graph.nodes if n.op == "placeholder" and n.name in given and is_owned(n)]
        found.append(
            Stage(
                sites=tuple(coefficient_calls[i] for i in piece.sites),
                nodes=frozenset(n for n, at in place.items() if at == k),
                parameters=sum(value(n).numel() for n in owned if is_tensor(n) and not is_buffer(n)),
            )
        )
    return found
