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
    """The tensors that the compiled graph gives, on copies of `inputs`, without gradients."""
    given = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
    gm.recompile()
    with torch.no_grad():
        out = compile_inner(gm, given, options)(*given)
    return tensors(out)


def judge_outputs(
    gm: GraphModule, inputs: Sequence[Any], options: Options, wanted: Values
) -> tuple[Difference, float, torch.dtype]:
    """The compiled graph's error at the output that is furthest beyond what it may be, what that is, and the dtype."""
    plain = tensors(run_as_it_is(gm, inputs, {})["output"])
    found = compiled_values(without_dropout(gm), inputs, options)
    return worst(tensors(wanted["output"]), plain, found)


def judge_places(
    gm: GraphModule, inputs: Sequence[Any], options: Options, wanted: Values
) -> tuple[Place, Source, Difference, float] | None:
    """The first place of a site at which the compiled graph leaves the tolerance; None where all keep to it.

    The graph is compiled anew with the places as its outputs.
    """
    places = places_of(gm, []).of
    own = run_as_it_is(gm, inputs, {})
    graph = without_dropout(gm)
    named = {n.name: n for n in graph.graph.nodes}
    held = {p: nodes_of(graph, s)[0] for p, s in places.items() if s.node in named and nodes_of(graph, s)}
    output = graph.graph.output_node()
    output.args = (tuple(held.values()),)
    for (place, node), value in zip(held.items(), compiled_values(graph, inputs, options), strict=True):
        reference, plain = wanted[node.name], own[node.name]
        d = difference(reference, value)
        limit = allowed(difference(reference, plain), plain.dtype)
        if not d.error <= limit:
            return place, places[place], d, limit
    return None


def worst(
    wanted: Sequence[Tensor], plain: Sequence[Tensor], found: Sequence[Tensor]
) -> tuple[Difference, float, torch.dtype]:
    """Of several results that which is furthest beyond what it may be."""
    judged = []
    for w, p, f in zip(wanted, plain, found, strict=True):
        if p.is_floating_point():
            judged.append((difference(w, f), allowed(difference(w, p), p.dtype), p.dtype))
    return max(judged, key=lambda j: j[0].error / max(j[1], 1e-300), default=(Difference(0, 0), 0.0, torch.float32))


def without_dropout(gm: GraphModule) -> GraphModule:
    """A copy whose results are the same at every run: nothing is dropped, no state of cached calls is written."""
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
    """The tensors of an output."""
    return [t for t in tree_leaves(out) if isinstance(t, Tensor)]
