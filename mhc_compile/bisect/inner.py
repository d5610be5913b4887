"""What the inner compiler makes of a graph, against the graph in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from mhc_compile.backend import compile_inner
from mhc_compile.bisect.kernels import allowed
from mhc_compile.bisect.places import Place, Source, places_of
from mhc_compile.bisect.slices import nodes_of
from mhc_compile.bisect.values import Difference, Values, difference, run_as_it_is
from mhc_compile.capture import private_copy
from mhc_compile.config import Options
from mhc_compile.passes.base import op_name
from mhc_compile.passes.numeric import KEEPS


def compiled_values(gm: GraphModule, inputs: Sequence[Any], options: Options) -> list[Tensor]:
    """Return the output tensors of the compiled graph on copies of `inputs`, without gradients."""
    copies = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
    gm.recompile()
    with torch.no_grad():
        out = compile_inner(gm, copies, options)(*copies)
    return tensors(out)


def judge_outputs(
    gm: GraphModule, inputs: Sequence[Any], options: Options, exact: Values
) -> tuple[Difference, float, torch.dtype]:
    """Return the error of the compiled graph at the output furthest beyond its limit, the limit, and the dtype."""
    plain = tensors(run_as_it_is(gm, inputs, {})["output"])
    compiled = compiled_values(without_dropout(gm), inputs, options)
    return worst(tensors(exact["output"]), plain, compiled)


def judge_places(
    gm: GraphModule, inputs: Sequence[Any], options: Options, exact: Values
) -> tuple[Place, Source, Difference, float] | None:
    """Return the first place of a site at which the compiled graph leaves the tolerance, or None.

    The graph is compiled anew with the places as its outputs.
    """
    places = places_of(gm, []).of
    own_values = run_as_it_is(gm, inputs, {})
    graph = without_dropout(gm)
    named = {n.name: n for n in graph.graph.nodes}
    nodes = {p: nodes_of(graph, s)[0] for p, s in places.items() if s.node in named and nodes_of(graph, s)}
    output = graph.graph.output_node()
    output.args = (tuple(nodes.values()),)
    for (place, node), value in zip(nodes.items(), compiled_values(graph, inputs, options), strict=True):
        reference, plain = exact[node.name], own_values[node.name]
        d = difference(reference, value)
        limit = allowed(difference(reference, plain), plain.dtype)
        if not d.error <= limit:
            return place, places[place], d, limit
    return None


def worst(
    exact: Sequence[Tensor], plain: Sequence[Tensor], results: Sequence[Tensor]
) -> tuple[Difference, float, torch.dtype]:
    """Return the result furthest beyond its limit, the limit, and the dtype."""
    judged = []
    for w, p, f in zip(exact, plain, results, strict=True):
        if p.is_floating_point():
            judged.append((difference(w, f), allowed(difference(w, p), p.dtype), p.dtype))
    return max(judged, key=lambda j: j[0].error / max(j[1], 1e-300), default=(Difference(0, 0), 0.0, torch.float32))


def without_dropout(gm: GraphModule) -> GraphModule:
    """Return a copy whose results are the same at every run: without dropout and writes to cached state."""
    copy = private_copy(gm)
    for node in copy.graph.nodes:
        if node.meta.get(KEEPS) or (node.op == "call_function" and op_name(node) == "dropout"):
            assert isinstance(node.args[0], Node)
            node.replace_all_uses_with(node.args[0])
            copy.graph.erase_node(node)
        elif "dropout_p" in node.kwargs:
            node.update_kwarg("dropout_p", 0.0)
    return copy


def tensors(out: Any) -> list[Tensor]:
    """Return the tensors of an output."""
    return [t for t in tree_leaves(out) if isinstance(t, Tensor)]
