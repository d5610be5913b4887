"""Find attention in a graph, fused or written out, and change what its operands are computed from.

    scaled_dot_product_attention(query, key, value)
    matmul(softmax(... matmul(query, key) ...), value)        batched products of any spelling

Found by what is multiplied with what: masks, biases, scales, dropout and casts may lie between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from mhc_compile.kernels.forms import form_of
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.passes.base import is_tensor, op_name, refuse
from mhc_compile.passes.graphs import ancestors, base_of, reachable, writes
from mhc_compile.passes.results import ResidualStream, Site

PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")
_LAYOUT = (
    "view", "reshape", "transpose", "permute", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "repeat",
    "repeat_interleave", "contiguous", "clone", "to", "float", "type", "mT", "cat", "index_copy",
)  # fmt: skip
SDPA = torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True)
class Operand:
    """An operand of an operation."""

    reader: Node
    value: Node


@dataclass(frozen=True)
class Attention:
    """The operands of one attention."""

    query: Operand
    key: Operand
    value: Operand


def attentions(graph: Graph, source: Node, ends: Sequence[Node]) -> list[Attention]:
    """Return the attentions between `source` and `ends`, in graph order.

    An operand that a cache was written into stands for what was written.
    """
    downstream = reachable([source], lambda n: n.users)
    behind = downstream & ancestors(ends)
    found = []
    for node in graph.nodes:
        if node not in behind:
            continue
        if node.target is SDPA:
            names = enumerate(("query", "key", "value"))
            values = (node.args[i] if len(node.args) > i else node.kwargs[name] for i, name in names)
            operands = [(node, value) for value in values]
        elif op_name(node) == "softmax" and (scores := scores_of(node, behind)) and (mixed := mixed_of(node)):
            query, key = _factors(scores)[-2:]
            operands = [(scores, query), (scores, key), (mixed, _factors(mixed)[-1])]
        else:
            continue
        found.append(Attention(*(_before_cache(Operand(*operand), downstream) for operand in operands)))
    return found


def _before_cache(operand: Operand, downstream: set[Node]) -> Operand:
    """Return the operand, or where it does not depend on the stream what of it was last written into its storage."""
    reader, value = operand.reader, operand.value
    if value in downstream:
        return operand
    base = base_of(value)
    nodes = (n for n in value.graph.nodes if n in downstream and writes(n) and n < reader)
    writers = [n for n in nodes if base_of(n.args[0]) is base]
    written = [n for n in writers[-1].all_input_nodes if n in downstream] if writers else []
    return Operand(writers[-1], written[0]) if written else operand


def _factors(product: Node) -> list[Node]:
    return [a for a in product.args if isinstance(a, Node)]


def scores_of(softmax: Node, behind: set[Node]) -> Node | None:
    """Return the product of queries and keys that a softmax goes over: the nearest one."""
    queue = [softmax]
    for node in queue:  # grows
        if op_name(node) in PRODUCTS:
            return node
        queue += [n for n in node.all_input_nodes if n in behind and n not in queue]
    return None


def mixed_of(softmax: Node) -> Node | None:
    """Return the product whose left operand is a softmax's result: the nearest one."""
    queue = [softmax]
    for node in queue:  # grows
        for user in node.users:
            if op_name(user) in PRODUCTS:
                return user if _factors(user)[:1] == [node] else None
            if is_tensor(user) and user not in queue:
                queue.append(user)
    return None


def own_values(site: Site) -> list[Node]:
    """Return what computes the values of the site's attentions from the tokens at hand: the projections' results.

    Views, casts and the cache that joins them to earlier values come after. An attention over another sequence has
    values that do not depend on the stream, and is left out. Raises MHC108 where keys are computed from the same.
    """
    graph = site.add.graph
    found: dict[Node, None] = {}
    for source in site.reads:
        behind = reachable([source], lambda n: n.users)
        for attention in attentions(graph, source, site.branches):
            node = attention.value.value
            while node in behind and op_name(node) in _LAYOUT:
                node = next(n for n in node.all_input_nodes if n in behind)
            if node in behind:
                if node in ancestors([attention.key.value]):
                    raise refuse("MHC108", "the attention's keys and values come from one projection", node)
                found[node] = None
    return list(found)


def written(stream: ResidualStream, spec: str | StreamSpec) -> tuple[Site, ...]:
    """Return the sites of a stream that its form writes; the others stay residual adds."""
    form = form_of(spec if isinstance(spec, StreamSpec) else StreamSpec.parse(spec))
    if not form.later_attentions:
        return stream.sites
    return tuple(site for site in stream.sites if own_values(site))[1:]


def read_apart(graph: Graph, operand: Operand, source: Node, other: Node) -> None:
    """Compute `operand` from `other` where it is computed from `source`, by copies of the nodes between.

    `other` stands before all of them. Nothing happens where the operand does not depend on `source`. Raises MHC108
    where something between is written in place, which a copy would repeat.
    """
    between = reachable([source], lambda n: n.users) & ancestors([operand.value])
    if (write := next(filter(writes, between), None)) is not None:
        raise refuse("MHC108", "an operand of an attention is computed by a write in place", write)
    copies = {source: other}
    for node in [n for n in graph.nodes if n in between and n is not source]:
        with graph.inserting_after(node):
            copies[node] = graph.node_copy(node, lambda n: copies.get(n, n))
    if operand.value in copies:
        operand.reader.replace_input_with(operand.value, copies[operand.value])
