"""What every site of a program computes, moves and keeps, from a trace of one site of each kind.

Sites whose graphs are equal but for their parameters' names are traced once: the branch of one of them, without the
stream part, goes through AOT autograd and the partitioner that Inductor uses, on fake tensors. From the two graphs
come the operations of the forward pass and of both halves of the backward pass, and what is kept between them. The
stream part is the fused kernels' (`mhc_compile.kernels.chain`) and the cost model's (`mhc_compile.passes.cost`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule, Node

from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.passes.base import is_tensor, op_name, value
from mhc_compile.passes.cost import SiteCost
from mhc_compile.passes.dialect_sites import StreamSite, stream_sites
from mhc_compile.passes.graphs import ancestors
from mhc_compile.passes.stages import places, split_graph
from mhc_compile.runtime.plan.attention import ATTEND
from mhc_compile.runtime.plan.count import Operation, operations, size_of, source
from mhc_compile.runtime.program import Program


@dataclass(frozen=True)
class BranchWork:
    """The branch of one site, with the embedding before the first and the head after the last."""

    forward: tuple[Operation, ...]
    input: tuple[Operation, ...]
    """Of the backward pass: what the gradient of the branch's input needs."""
    weight: tuple[Operation, ...]
    """The rest of it: the gradients of parameters."""
    kept: int
    """Bytes of the branch's own activations between the passes; its inputs and parameters not counted."""
    deferred: int
    """Bytes that the gradients of parameters still need when the rest of the backward pass is done."""


@dataclass(frozen=True)
class SiteWork:
    """One site."""

    name: str
    branch: BranchWork
    streams: SiteCost
    """What the stream part keeps, for a site at whose beginning a stage or a graph begins."""
    joined: SiteCost
    """The same after another site, with which it shares a kernel."""
    forward: Operation
    """Of the stream part: the boundary before the branch."""
    backward: Operation

    @property
    def operations(self) -> tuple[Operation, ...]:
        """All of them, in both passes."""
        return (*self.branch.forward, *self.branch.input, *self.branch.weight, self.forward, self.backward)


def site_works(program: Program, kinds: Sequence[int]) -> list[SiteWork]:
    """Return the work of every site, in order; `kinds` as the function of this name gives them."""
    first = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
    starts = sorted({k for i in first.values() for k in (i, i + 1) if 0 < k < len(kinds)})
    pieces = {p.sites[0]: p for p in split_graph(program.graph, starts)}
    works = {kind: _branch_work(program, pieces[i].graph) for kind, i in first.items()}
    return [
        SiteWork(
            site.name, works[kind], _whole(site.cost()), _whole(site.cost(joined=site.is_boundary)), *_stream_work(site)
        )
        for site, kind in zip(stream_sites(program.graph.graph), kinds, strict=True)
    ]


def _whole(cost: SiteCost) -> SiteCost:
    """Return the same with Python's integers, which are quicker than sympy's."""
    return SiteCost(int(cost.state), int(cost.made), int(cost.branch), int(cost.parameters), cost.joined)


def kinds(program: Program) -> list[int]:
    """Return a number for each site, equal for sites whose nodes compute the same from the same shapes."""
    graph, count = program.graph.graph, program.sites
    place = places(graph, range(1, count))
    lines: list[list[str]] = [[] for _ in range(count)]
    for node in graph.nodes:
        if node in place and node.op != "output":
            known = value(node)
            form = f"{tuple(known.shape)} {known.dtype}" if isinstance(known, Tensor) else ""
            reads = [f"{tuple(value(i).shape)}" for i in node.all_input_nodes if is_tensor(i)]
            lines[place[node]].append(f"{op_name(node)} {form} {reads}")
    lines[0].append("first")
    lines[-1].append("last")
    numbers: dict[tuple[str, ...], int] = {}
    return [numbers.setdefault(tuple(site), len(numbers)) for site in lines]


def _branch_work(program: Program, piece: GraphModule) -> BranchWork:
    region, inputs = _without_streams(piece)
    trained = [program.names.get(n.name) in program.parameters for n in inputs]
    args = [
        _example(n, learns=is_trained or not (n.name in program.names or n.name in program.inputs))
        for n, is_trained in zip(inputs, trained, strict=True)
    ]
    split = _split(region, args)
    return BranchWork((), (), (), 0, 0) if split is None else _count(*split, trained=trained)


def _without_streams(piece: GraphModule) -> tuple[GraphModule, list[Node]]:
    """Return the piece without the stream part of its site, and the nodes of the piece that its inputs stand for.

    What the stream part gives to the rest are inputs, in order, and what it takes are outputs.
    """
    streams: set[Node] = set()
    for site in stream_sites(piece.graph):
        streams |= {n for n in site.nodes if n not in site.branch}
    streams |= {n for n in piece.graph.nodes if getattr(n.target, "namespace", "") == "mhc"}
    streams |= {n for n in piece.graph.nodes if op_name(n) == "getitem" and set(n.all_input_nodes) <= streams}
    rest = [n for n in piece.graph.nodes if n not in streams and n.op not in ("placeholder", "output")]
    inside = set(rest)
    inputs = list(dict.fromkeys(i for n in rest for i in n.all_input_nodes if i not in inside))
    graph = Graph()
    copies = {n: graph.placeholder(n.name) for n in inputs}
    for node in rest:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        if op_name(node) == "scaled_dot_product_attention":
            _fuse_attention(graph, copies[node])
    outputs = [
        n for n in rest if any(u not in inside for u in n.users) and is_tensor(n) and value(n).is_floating_point()
    ]
    graph.output(tuple(copies[n] for n in outputs))
    return GraphModule(piece, graph), inputs


def _fuse_attention(graph: Graph, node: Node) -> None:
    named = dict(zip(("query", "key", "value"), node.args, strict=False)) | node.kwargs
    with graph.inserting_before(node):
        both = graph.call_function(ATTEND, (named["query"], named["key"], named["value"]))
    node.op, node.target, node.args, node.kwargs = "call_function", operator.getitem, (both, 0), {}


def _example(node: Node, *, learns: bool) -> Tensor:
    """Return a fake tensor like the value of `node`; parameters, and what comes from the streams, get gradients."""
    like: Tensor = value(node).detach()
    return like.requires_grad_(learns and like.is_floating_point())


_Split = tuple[GraphModule, GraphModule, int]


def _split(region: GraphModule, args: Sequence[Tensor]) -> _Split | None:
    """Return the forward and the backward graph, and how many results of the forward are the region's own."""
    splits: list[_Split] = []

    def partition(joint: GraphModule, inputs: Sequence[Any], *, num_fwd_outputs: int, **more: Any) -> Any:
        forward, backward = min_cut_rematerialization_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs, **more)
        splits.append((forward, backward, num_fwd_outputs))
        return forward, backward

    def keep(gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:  # noqa: ARG001
        return gm.forward

    if not region.graph.output_node().all_input_nodes:
        return None
    aot_module_simplified(
        region, args, fw_compiler=keep, bw_compiler=keep, partition_fn=partition, decompositions=select_decomp_table()
    )
    return splits[0] if splits else None


def _count(forward: GraphModule, backward: GraphModule, own_results: int, *, trained: Sequence[bool]) -> BranchWork:
    results = _outputs(forward)
    inputs = forward.graph.find_nodes(op="placeholder")
    weights = {n.name for n, is_trained in zip(inputs, trained, strict=False) if is_trained}
    saved = {source(n) for n in results[own_results:] if isinstance(n, Node)}
    depends: set[Node] = set()
    for node in forward.graph.nodes:
        is_activation = node.op == "placeholder" and node.name not in weights
        if is_activation or not depends.isdisjoint(node.all_input_nodes):
            depends.add(node)
    kept = sum(size_of(n) for n in saved if n.op != "placeholder" and n in depends)
    gradients = _outputs(backward)
    of_inputs = [g for g, is_trained in zip(gradients, trained, strict=False) if isinstance(g, Node) and not is_trained]
    needed = ancestors(of_inputs)
    computed = _computed(backward)
    first = [n for n in computed if n in needed]
    second = [n for n in computed if n not in needed]
    late = set(second)
    between = {source(i) for n in second for i in n.all_input_nodes if source(i) not in late}
    deferred = sum(size_of(n) for n in between if n.name not in weights)
    return BranchWork(
        forward=operations(_computed(forward), [n for n in results if isinstance(n, Node)]),
        input=operations(first, [*of_inputs, *(n for n in first if any(u in late for u in n.users))]),
        weight=operations(second, [g for g in gradients if isinstance(g, Node) and g in late]),
        kept=kept,
        deferred=deferred,
    )


def _computed(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op not in ("placeholder", "output")]


def _outputs(gm: GraphModule) -> list[Any]:
    return list(gm.graph.output_node().args[0])  # type: ignore[arg-type]


def _stream_work(site: StreamSite) -> tuple[Operation, Operation]:
    """Return one fused boundary, forward and backward."""
    state = value(site.state)
    branch = value(site.branch[0]).dtype if site.branch else state.dtype
    chain = Chain(
        kind="boundary",
        stream=StreamSpec.parse(str(site.coefficients.args[4])),
        width=int(state.shape[-1]),
        streams_dtype=state.dtype,
        branch_dtype=branch,
    )
    tokens = int(state.shape[:-2].numel())
    forward, backward = (
        Operation(chain.operations(tokens, backward=b), chain.bytes_moved(tokens, backward=b)) for b in (False, True)
    )
    return forward, backward


def parameters_of_sites(program: Program) -> list[set[str]]:
    """Return the names of the parameters that each site's piece of the graph reads; several read a tied one."""
    graph, count = program.graph.graph, program.sites
    place = places(graph, range(1, count))
    readers: dict[Node, int] = {}
    for node in reversed(graph.nodes):  # what no stream leads to belongs to the pieces of its readers
        mask = 1 << place[node] if node in place else 0
        for user in node.users if node not in place else ():
            mask |= readers.get(user, 0)
        readers[node] = mask
    parameters = {node: program.names.get(node.name, "") for node in graph.find_nodes(op="placeholder")}
    return [
        {name for node, name in parameters.items() if name in program.parameters and readers[node] >> i & 1}
        for i in range(count)
    ]


def crossing_bytes(program: Program, starts: Sequence[int]) -> list[int]:
    """Return the bytes that cross each cut."""
    place = places(program.graph.graph, starts)
    sizes = [0] * len(starts)
    for node, at in place.items():
        last = max((place[u] for u in node.users if u in place), default=at)
        for k in range(at, last):
            sizes[k] += size_of(node)
    return sizes
