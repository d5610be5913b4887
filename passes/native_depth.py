"""Part of `native`: lift attention over depth that a model writes out by hand.

A read stacks its N sources `[..., C]` before the channels and computes from the stack and one parameter, `[C]` or
`[Q, C]`, one value `[..., C]` for each of its Q queries: a proposal. Where values and gradients are those of
`mhc_forms::attend_normalised` it is replaced by that op, which reads the sources themselves.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.attend import attend_normalised
from mhc_compile.kernels.reference import compute_dtype
from mhc_compile.passes.base import is_tensor, module_path, op_name, refuse, shape, value
from mhc_compile.passes.confirm import TOLERANCE, Trial
from mhc_compile.passes.dataflow import Dataflow, storage_root
from mhc_compile.passes.fuse_depth import OWN_READ
from mhc_compile.passes.graphs import Writer
from mhc_compile.passes.hyperconnections import Ahead, NotApart, Region, is_pure, region, without_widening

MAX_STEPS = 48
"""Values computed from a stack that are looked at: a read takes about twenty operations."""


@dataclass
class DepthRead:
    """A candidate for a read by attention over depth."""

    stack: Node
    """`[..., N, C]`."""
    built: list[Node]
    """The nodes that build it from the sources, itself included."""
    sources: list[Node]
    query: Node
    """The parameter, `[C]` or `[Q, C]`."""
    results: list[Node]
    """Candidates for the values read, `[..., Q, C]`, or `[..., C]` for one query, in graph order."""

    @property
    def queries(self) -> int:
        """Q."""
        return math.prod(shape(self.query)[:-1])


@dataclass
class ConfirmedRead:
    """A read that computes what `mhc_forms::attend_normalised` does."""

    read: DepthRead
    result: Node
    """The one of its results to replace."""
    scale: float
    """Factor of the logits."""
    apart: Region

    @property
    def nodes(self) -> list[Node]:
        """Nodes that become unused when the read is rewritten, unless something else reads them."""
        return [*self.read.built, *self.apart.nodes]


def proposals(flow: Dataflow) -> Iterator[DepthRead]:
    """Yield every stack of values of which something is computed with one parameter of their width, in graph order."""
    for stack in flow.nodes:
        built: list[Node] = []
        sources = _sources(stack, built) if stack in flow.hot else []
        one_device = len({value(source).device for source in sources}) == 1
        if len(sources) > 1 and one_device and (read := _proposal(flow, stack, built, sources)) is not None:
            yield read


def _sources(stack: Node, built: list[Node]) -> list[Node]:
    """Return the values `[..., C]` that `stack` holds along the dimension before its last; none where it holds others.

    What arranges them is appended to `built`.
    """
    if op_name(stack) not in ("cat", "concat", "stack") or not is_tensor(stack) or len(shape(stack)) < 3:
        return []
    parts: Any = stack.args[0] if stack.args else stack.kwargs.get("tensors")
    axis = stack.args[1] if len(stack.args) > 1 else stack.kwargs.get("dim", stack.kwargs.get("axis", 0))
    if axis not in (-2, len(shape(stack)) - 2) or not isinstance(parts, (list, tuple)):
        return []
    built.append(stack)
    if op_name(stack) == "stack":
        return list(parts)
    sources: list[Node] = []
    for part in parts:
        row = without_widening(part)
        if len(shape(row)) != len(shape(stack)):  # an empty cache
            return []
        inner: list[Node] = []
        if shape(row)[-2] != 0:
            source = _unsqueezed(row) if shape(row)[-2] == 1 else None
            inner = [source] if source is not None else _sources(row, built)
            if not inner:
                return []
        built += [part, row]
        sources += inner
    return sources


def _unsqueezed(row: Node) -> Node | None:
    """Return the value `[..., C]` of which `row` `[..., 1, C]` is a view, or None."""
    source, name = row.args[0] if row.args else None, op_name(row)
    if not isinstance(source, Node) or not is_tensor(source) or shape(source) != (*shape(row)[:-2], shape(row)[-1]):
        return None
    index = row.args[1] if len(row.args) > 1 else None
    inserts = isinstance(index, tuple) and all(i in (None, Ellipsis) or i == slice(None) for i in index)
    views = name in ("unsqueeze", "view", "reshape") or (name == "getitem" and inserts)
    return source if views else None


def _proposal(flow: Dataflow, stack: Node, built: list[Node], sources: list[Node]) -> DepthRead | None:
    *tokens, _, hidden = shape(stack)
    read: DepthRead | None = None
    near = {stack}
    ahead = Ahead(flow, [stack])
    for node in ahead:
        hot = [n for n in flow.inputs[node] if n in flow.hot]
        if not hot or not near.issuperset(hot) or not is_pure(node):
            continue
        near.add(node)
        ahead.add(node)
        if len(near) > MAX_STEPS:
            break
        if not is_tensor(node) or shape(node)[-1:] != (hidden,):
            continue
        query = _parameter(flow, node, stack)
        if query is None or shape(query)[-1:] != (hidden,) or len(shape(query)) > 2:
            continue
        read = read or DepthRead(stack, built, sources, query, [])
        forms = [(*tokens, read.queries, hidden), *([(*tokens, hidden)] if read.queries == 1 else [])]
        if query is read.query and shape(node) in forms:
            read.results.append(node)
    return read if read is not None and read.results else None


def _parameter(flow: Dataflow, node: Node, stack: Node) -> Node | None:
    """Return the one parameter with which `node` is computed from `stack`, or None."""
    try:
        parameters = region(flow, [node], [stack]).parameters
    except NotApart:
        return None
    return parameters[0] if len(parameters) == 1 else None


def _confirm(flow: Dataflow, read: DepthRead) -> ConfirmedRead:
    """Return the read as it is computed. Raises `NotApart` with the reason where it is another function."""
    if any(storage_root(source) in flow.writes for source in read.sources):
        raise NotApart("a source is written in place")
    nearest, why = math.inf, ""
    equal: list[ConfirmedRead] = []
    for result in read.results:
        try:
            apart = region(flow, [result], [read.stack])
            error, scale = _compare(flow, read, result, apart)
        except NotApart as reason:
            why = why or str(reason)
            continue
        if error <= TOLERANCE:
            equal.append(ConfirmedRead(read, result, scale, apart))
        elif error < nearest:
            nearest, why = error, f"attention over {len(read.sources)} sources of another kind, {error:.1e} off"
    if not equal:
        raise NotApart(why)
    return next((c for c in reversed(equal) if _stands_alone(c)), equal[0])


def _compare(flow: Dataflow, read: DepthRead, result: Node, apart: Region) -> tuple[float, float]:
    """Return how far `result` is from what the op computes, and the scale of the logits at which it is nearest."""
    hidden = int(shape(read.stack)[-1])
    trial = Trial(flow, apart, shape(read.stack)[:-2])
    trial.draw(read.stack, (len(read.sources), hidden), magnitudes=True)
    trial.draw(read.query, shape(read.query))
    trial.run()
    errors = []
    for scale in (hidden**-0.5, 1.0):
        query = trial.values[read.query].reshape(read.queries, hidden) * scale
        h, _ = attend_normalised(trial.values[read.stack].unbind(-2), query)
        one = len(shape(result)) < len(shape(read.stack))
        errors.append((trial.error(result, h.squeeze(-2) if one else h), scale))
    return min(errors)


def _stands_alone(done: ConfirmedRead) -> bool:
    """Return whether nothing else reads what the result is computed from."""
    inside = set(done.apart.nodes)
    return all(u in inside for n in inside if n is not done.result for u in n.users)


def over_depth(flow: Dataflow) -> MHCError | None:
    """Return MHC112 if a model reads the same earlier values by attention again and again."""
    reads = list(proposals(flow))
    often = Counter(source for read in reads for source in set(read.sources))
    if max(often.values(), default=0) < 2:
        return None
    most = max(len(read.sources) for read in reads)
    return refuse("MHC112", f"{len(reads)} reads of up to {most} earlier values", reads[-1].results[0])


def confirm_reads(flow: Dataflow, modes: Mapping[Node, object], notes: list[str]) -> list[ConfirmedRead]:
    """Return the hand-written reads of a graph, whose gradient modes are `modes`; note what is none and why."""
    confirmed: list[ConfirmedRead] = []
    for read in proposals(flow):
        try:
            done = _confirm(flow, read)
            if len({modes[n] for n in done.apart.nodes}) > 1:
                raise NotApart("a part of it runs without gradients")
        except NotApart as error:
            notes.append(f"{module_path(read.results[0]) or '(root)'}: left alone: {error}")
            continue
        for number in done.apart.numbers:
            float(value(number))  # a guard: with another value the model is compiled again
        confirmed.append(done)
    return confirmed


def rewrite_read(write: Writer, done: ConfirmedRead, now: Callable[[Node], Node], name: str) -> Node:
    """Insert the op in place of a confirmed read; return what its result becomes. `now(node)` replaces `node`."""
    read, result = done.read, done.result
    dtype = value(read.stack).dtype
    wide = compute_dtype(dtype)

    def cast(node: Node, to: torch.dtype, old: Node) -> Node:
        return node if value(old).dtype == to else write.method("to", node, to, like=result)

    with write.graph.inserting_before(result):
        sources = [cast(now(source), dtype, source) for source in read.sources]
        query = cast(read.query, wide, read.query)
        if len(shape(read.query)) < 2:
            query = write.method("unsqueeze", query, 0, like=result)
        if done.scale != 1.0:
            query = write.call(operator.mul, query, done.scale, like=result)
        new = write.call(OWN_READ, sources, query, like=result)
        new.meta["mhc_site"] = name
        if len(shape(result)) < len(shape(read.stack)):
            new = write.method("squeeze", new, -2, like=result)
        return new if value(result).dtype == wide else write.method("to", new, value(result).dtype, like=result)
