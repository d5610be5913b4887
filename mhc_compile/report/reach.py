"""Follow the stream of a model that is not supported, and say where it was lost."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from mhc_compile.passes.base import is_tensor, module_path, op_name, source_line, value
from mhc_compile.passes.coverage import why_no_site
from mhc_compile.passes.dataflow import EMBEDDINGS, Dataflow
from mhc_compile.passes.ownership import is_owned
from mhc_compile.passes.residual_sites import SiteSearch
from mhc_compile.report.lines import input_name, short_path
from mhc_compile.report.report import Reach

MAX_ADDS = 5


def reach(gm: GraphModule) -> Reach | None:
    """Follow the stream of a normalised graph back from the output that leads furthest; None if none leads anywhere."""
    flow = Dataflow(gm.graph, is_owned)
    search = SiteSearch(flow, [])
    search.find()
    output = gm.graph.output_node()
    ends = [n for n in output.all_input_nodes if n in flow.hot and is_tensor(n) and value(n).is_floating_point()]
    if not ends:
        return None
    walks = [_walk(search, end) for end in ends]
    layers, sites, stop = max(walks, key=lambda walk: len(walk[1]))
    source = source_line(stop)
    return Reach(
        tuple(module_path(n) or n.name for n in layers),
        tuple(module_path(n) or "the model itself" for n in sites),
        input_name(stop) if stop.op == "placeholder" else stop.name,
        module_path(stop) or "the model itself",
        None if stop.op == "placeholder" or source is None else short_path(source),
        _why(flow, stop),
        () if sites else _dismissed(search),
    )


def _walk(search: SiteSearch, node: Node) -> tuple[list[Node], list[Node], Node]:
    """Return the contractions and site adds passed, and the node where the walk ends."""
    flow = search.flow
    layers: list[Node] = []
    sites: list[Node] = []
    while True:
        node = search.trace(node)[-1]
        if node in search.sites:
            sites.append(node)
            node = search.sites[node].carry
            continue
        hot = [n for n in flow.inputs[node] if n in flow.hot]
        if sites or not hot or op_name(node) in EMBEDDINGS:
            return layers, sites, node
        # Before the first site: the head, or a model without one.
        if flow.bit(node) & flow.matmuls:
            layers.append(node)
        node = hot[0]


def _why(flow: Dataflow, node: Node) -> str:
    if node.op == "placeholder":
        return "an input"
    if op_name(node) in EMBEDDINGS:
        return "the embedding"
    if flow.bit(node) & flow.matmuls:
        return "made by a layer with parameters; no add brings the stream past it"
    hot = [n for n in flow.inputs[node] if n in flow.hot]
    return f"made from {len(hot)} values, of which none is the stream" if len(hot) > 1 else "the stream ends here"


def _dismissed(search: SiteSearch) -> tuple[tuple[str, str], ...]:
    flow = search.flow
    adds = []
    for node in flow.nodes:
        operands = [a for a in node.args if isinstance(a, Node) and a in flow.hot]
        if op_name(node) != "add" or node in search.sites or len(operands) != 2 or not is_tensor(node):
            continue
        adds.append((short_path(source_line(node) or node.name), why_no_site(flow, node)))
    return tuple(dict.fromkeys(adds))[:MAX_ADDS]
