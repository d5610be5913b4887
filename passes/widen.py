"""Rewrite residual streams into the `mhc` dialect: each site's add becomes aggregate, branch, distribute.

For a site `a = carry + branch(previous)` of a stream whose n-stream state is X:

    pre, post, mix = mhc.coefficients(X, phi, alpha, bias)
    h  = mhc.aggregate(X, pre)                     what the branch reads in place of `previous`
    X' = mhc.distribute(X, branch(h), post, mix)   in place of the add

That is mHC; what a site becomes is said by its form (`mhc_compile.kernels.form`).

Values outside the branches (hidden states that a caller asked for, the final norm) read `mhc.reduce(X)`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from mhc_compile.kernels.form import ENTRY, NEXT_PRE, DepthForm, State
from mhc_compile.kernels.forms import form_of
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.start import DEFAULT
from mhc_compile.passes.attention import attentions, own_values, read_apart
from mhc_compile.passes.base import (
    Context,
    Mark,
    Widened,
    erase_unused,
    gradient_modes,
    op_name,
    refuse,
    same_shape,
    shape,
    switches_gradients,
)
from mhc_compile.passes.graphs import Writer, after
from mhc_compile.passes.match_marks import pair_with_marks, sites_of
from mhc_compile.passes.perstream import apply_per_stream
from mhc_compile.passes.results import ResidualStream, Site

REORDERS = {"transpose", "permute", "t", "movedim", "swapaxes", "swapdims"}
"""Operations after which tokens come in another order."""


@dataclass(frozen=True)
class Widen:
    """Rewrites every stream of `context.streams` with the parameters of its owner's mark. Raises MHC108, MHC206."""

    name: ClassVar[str] = "widen"
    requires: ClassVar[tuple[str, ...]] = ("streams",)
    provides: ClassVar[tuple[str, ...]] = ("dialect",)

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        """Rewrite `gm` in place."""
        for stream, mark in pair_with_marks(context.streams, context.marks):
            work = _Widening(gm.graph, stream, mark)
            work.run()
            context.widened.append(Widened(mark, stream, work.reads, work.inputs, work.writes))
            if work.attentions:
                found = sum(work.attentions)
                context.notes.append(
                    f"{found} attentions read streams of their own, in {len(work.attentions)} branches"
                )
        for mark in context.marks:
            if mark.node is not None:
                mark.node.replace_all_uses_with(mark.node.args[0])  # type: ignore[arg-type]
                gm.graph.erase_node(mark.node)
        if not any(mark.inputs for mark in context.marks):  # else later passes need them
            erase_unused(gm)
        return gm


class _Widening(Writer):
    """The rewriting of one stream."""

    def __init__(self, graph: Graph, stream: ResidualStream, mark: Mark) -> None:
        super().__init__(graph, stream.entry)
        self.stream = stream
        self.mark = mark
        self.spec = StreamSpec.parse(mark.spec)
        self.form = form_of(self.spec)
        self.gradients = gradient_modes(graph)
        self.states: dict[Node, State] = {}
        """What the form makes of every stream value."""
        self.places: dict[Node, int] = {}
        """Of the output of a site the number of the site in the mark, counted from 1."""
        self.numbers = {name: i + 1 for i, name in enumerate(sites_of(mark))}
        self.reads: dict[str, Node] = {}
        self.inputs: dict[str, Node] = {}
        self.writes: dict[str, Node] = {}
        self.attentions: list[int] = []
        """The number of attentions of each branch whose query and key read streams of their own."""

    def run(self) -> None:
        stream = self.stream
        entry, *values = stream.values
        members = {entry, *values}
        with self.graph.inserting_before(self.place(entry, entry)):
            self.states[entry] = self.form.enter(self.call, entry, self.spec)
        if isinstance(self.states[entry], tuple):
            entry.meta[ENTRY] = True
        for site in stream.sites:
            self._between(site)
            if site.name not in self.numbers:
                self.states[site.add] = (site.add,)
                continue
            writer = _SiteWriter(self, site)
            state = self.form.rewrite(writer)
            self.states[site.add] = state
            if writer.reads:
                *_, self.inputs[site.name] = writer.reads.values()
            if isinstance(state, Node):
                self.writes[site.name] = state
            else:
                self.places[state[-1]] = self.numbers[site.name]
                state[-1].meta["mhc_site"] = site.name
        for v in values:
            # An inner add of a flattened tree has no state and no reader but its tree.
            if v in self.states and self.states[v] != (v,):
                self._reduce_for(v, [u for u in v.users if u not in members])
        for v in reversed(values):
            if not v.users:
                self.graph.erase_node(v)

    def _between(self, site: Site) -> None:
        """Apply what the model does to its stream between two sites."""
        state = self.states[site.previous]
        if isinstance(state, Node):
            wide = {site.previous: state}
            apply_per_stream(self.graph, site.previous, site.chain, wide, self.spec.streams)
            for node in site.chain if NEXT_PRE in state.meta else ():
                if shape(node)[:-1] != shape(site.previous)[:-1] or op_name(node) in REORDERS:
                    raise refuse("MHC108", "the stream is laid out anew, its weights were computed before", node)
                wide[node].meta[NEXT_PRE] = state.meta[NEXT_PRE]
            self.states |= wide
        elif site.chain:
            with self.graph.inserting_before(self.place(state, site.previous)):
                total = self._total(state, site.previous)
            for node in site.chain:
                node.replace_input_with(site.previous, total)
                self.states[node] = (node,)

    def _reduce_for(self, v: Node, readers: list[Node]) -> None:
        """Give readers outside all branches the reduction: the exit's own form at the exit, the mean elsewhere."""
        if not readers:
            return
        state = self.states[v]
        inside = [u for u in readers if u.op != "output"] or [v]
        with self.graph.inserting_before(self.place(state, v, min(inside), max(inside))):
            reduced = self._total(state, v) if isinstance(state, tuple) else self._reduced(state, v)
        for u in readers:
            u.replace_input_with(v, reduced)

    def _reduced(self, X: Node, v: Node) -> Node:
        if v is self.stream.exit and self.spec.exit == "pre":
            return self.call(torch.ops.mhc.aggregate.default, X, X.meta[NEXT_PRE])
        arguments: tuple[Any, ...] = (X, self.mark.spec)
        if self.spec.exit == "head" and v is self.stream.exit:
            p = self.mark.parameters
            arguments += (p["head.fn"], p["head.base"], p["head.scale"])
        elif v is not self.stream.exit:
            arguments = (X, self.mark.spec.replace(f"exit={self.spec.exit}", "exit=mean"))
        self.like = v
        return self.call(torch.ops.mhc.reduce.default, *arguments)

    def _total(self, outputs: tuple[Node, ...], v: Node) -> Node:
        self.like = v
        assert isinstance(self.form, DepthForm)
        head = [node for name, node in self.mark.parameters.items() if name.startswith("head.")]
        if v is self.stream.exit and head:
            return self.call(self.form.op, *self.operands(outputs), *head, self.mark.spec)
        return self.form.total(self.call, outputs)

    def operands(self, state: State) -> tuple[Any, ...]:
        """Return the operands by which an op gets a state: the streams; or the outputs, then the places of each."""
        return (state, [self.places.get(o, 0) for o in state]) if isinstance(state, tuple) else (state,)

    def place(self, state: State, v: Node, reader: Node | None = None, user: Node | None = None) -> Node:
        """Return the node to insert before, right after `state`, which stands where `v` does.

        Where gradients are switched on or off at `user` other than at `v`: after that switch, before `reader`.
        """
        place = after(*(state if isinstance(state, tuple) else (state,)))
        if user is not None and self.gradients[v] != self.gradients.get(user, self.gradients[v]):
            at = place
            while at is not reader:
                at, place = at.next, at.next if switches_gradients(at) else place
        return place


class _SiteWriter:
    """One site as its form sees it: `mhc_compile.kernels.form.SiteWriter`."""

    def __init__(self, stream: _Widening, site: Site) -> None:
        self.stream = stream
        self.site = site
        self.text = stream.mark.spec
        names = stream.form.parameters(stream.spec, 0, 1, DEFAULT)
        self.parameters = [stream.mark.parameters[f"{site.name}.{name}"] for name in names]
        self.values = [v for v in (site.previous, *site.chain) if v in site.reads]
        """The values of the stream that the branch reads."""
        self.read_at = self.values[0] if self.values else site.carry
        self.read_state: State = stream.states[self.read_at]
        self.carried_state: State = stream.states[site.carry]
        self.index, self.count = stream.numbers[site.name] - 1, len(stream.numbers)
        self.first = {v: min([*site.reads[v], site.add]) for v in self.values}
        self.reads: dict[Node, Node] = {}
        self.ranks: dict[Node, int] = {}
        stream.like = site.add

    def compute(self, op: Any, *arguments: Any, ranks: Sequence[int]) -> list[Node]:
        """Call an op before all readers; return its results, of `ranks` dimensions after those of the tokens."""
        stream, site = self.stream, self.site
        reader = min([*self.first.values(), site.add])
        with stream.graph.inserting_before(stream.place(self.read_state, self.read_at, reader, site.add)):
            node = stream.call(op, *arguments)
            results = [stream.call(operator.getitem, node, i) for i in range(len(ranks))]
        self.ranks = dict(zip(results, ranks, strict=True))
        self._begin(node)
        return results

    def _begin(self, node: Node) -> None:
        """Note the node with which the site begins: the first of those that call its form's op."""
        if self.site.name not in self.stream.reads:
            node.meta["mhc_site"] = self.site.name
            self.stream.reads[self.site.name] = node

    def read(self, op: Any, *arguments: Any) -> None:
        """Make the branch read `op(state, *arguments)`; a list of outputs is followed by the places of each."""
        stream = self.stream
        for v in self.values:
            state = stream.states[v]
            operands = stream.operands(state)
            last = max([*self.ranks, *(state if isinstance(state, tuple) else (state,))])
            with stream.graph.inserting_before(stream.place(last, v, self.first[v], self.site.add)):
                self.reads[v] = stream.call(op, *operands, *(self._laid_out(a, v) for a in arguments))
            self._begin(self.reads[v])
            for reader in self.site.reads[v]:
                reader.replace_input_with(v, self.reads[v])

    def read_apart(self, op: Any, *arguments: Any) -> Node:
        """Make the branch read rows of `op(state, *arguments)`, its attention's query and key their own; return R."""
        graph, site = self.stream.graph, self.site
        self.read(op, *arguments)
        shared, count = dict(self.reads), 0
        for v, rows in shared.items():
            with graph.inserting_after(rows):
                query, key, value = (self.stream.call(torch.select, rows, 0, i) for i in range(3))
            for reader in site.reads[v]:
                reader.replace_input_with(rows, value)
            inside = attentions(graph, value, site.branches)
            count += len(inside)
            for attention in inside:
                for operand, own in ((attention.query, query), (attention.key, key)):
                    read_apart(graph, operand, value, own)
            self.reads[v] = value
        self.stream.attentions.append(count)
        if site.carry in self.reads:
            rows = shared[site.carry]
        else:
            with graph.inserting_before(site.add):
                rows = self.stream.call(op, *self.stream.operands(self.carried_state), *arguments)
        with graph.inserting_before(site.add):
            return self.stream.call(torch.select, rows, 0, 3)

    def mix_values(self, op: Any, *arguments: Any) -> None:
        """Make the branch's attention read `op([first values, own values], [0, 1], *arguments)` as its values."""
        graph, stream = self.stream.graph, self.stream.stream
        first = next(values[0] for site in stream.sites if (values := own_values(site)))
        for own in own_values(self.site):
            if not same_shape(first, own):
                raise refuse("MHC108", f"the first attention's values are {shape(first)}, these {shape(own)}", own)
            readers = list(own.users)
            with graph.inserting_after(own):
                mixed = self.stream.call(op, (first, own), [0, 1], *arguments)
            for reader in readers:
                reader.replace_input_with(own, mixed)
            self._begin(mixed)

    def sum(self) -> Node:
        """Return the model's own sum."""
        return self.site.add

    def branch(self) -> Node:
        """Return the branch's output, of the size of the stream."""
        stream, site = self.stream, self.site
        with stream.graph.inserting_before(site.add):
            branch, *others = (self.reads.get(b, b) for b in site.branches)
            for other in others:
                branch = stream.call(operator.add, branch, other)
            if all(same_shape(b, site.add) for b in site.branches):
                return branch
            one = self.carried_state  # what the add broadcast to
            if isinstance(one, Node):
                one = (stream.method("select", one, -2, 0),)
            return stream.method("expand_as", branch, one[0])

    def write(self, op: Any, *arguments: Any) -> Node:
        """Return `op(carried_state, y, *arguments)`."""
        branch = self.branch()
        with self.stream.graph.inserting_before(self.site.add):
            laid_out = [self._laid_out(a, self.site.carry) for a in arguments]
            node = self.stream.call(op, self.carried_state, branch, *laid_out)
        node.meta["mhc_site"] = self.site.name
        return node

    def carried(self, op: Any, *arguments: Any) -> Node:
        """Return `op(carried_state, *arguments)`: the node that the branch reads, where it is the same."""
        stream, carry = self.stream, self.site.carry
        if carry in self.reads:
            return self.reads[carry]
        with stream.graph.inserting_before(self.site.add):
            return stream.call(op, *stream.operands(self.carried_state), *arguments)

    def add(self, value: Node) -> Node:
        """Return `value + y`."""
        branch = self.branch()
        with self.stream.graph.inserting_before(self.site.add):
            return self.stream.call(operator.add, value, branch)

    def _laid_out(self, coefficients: Any, v: Node) -> Any:
        """Return coefficients computed at `read_at` for the tokens as they lie in `v`; any other argument as it is.

        Raises MHC108 where more than a view is between the two.
        """
        tokens = shape(v)[:-1]
        if not isinstance(coefficients, Node) or coefficients not in self.ranks:
            return coefficients
        if tokens == shape(self.read_at)[:-1]:
            return coefficients
        sizes = [d if isinstance(d, int) else -1 for d in tokens]
        if sizes.count(-1) > 1 or any(op_name(n) in REORDERS for n in self.site.chain):
            raise refuse("MHC108", "the stream is laid out anew between where it is read and where it is added to", v)
        sizes += [self.stream.spec.streams] * self.ranks[coefficients]
        return self.stream.method("reshape", coefficients, tuple(sizes))
