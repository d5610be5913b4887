"""Rewrite residual streams into the `mhc` dialect: each site's add becomes aggregate, branch, distribute.

For a site `a = carry + branch(previous)` of a stream whose n-stream state is X:

    pre, post, mix = mhc.coefficients(X, phi, alpha, bias)
    h  = mhc.aggregate(X, pre)                     what the branch reads in place of `previous`
    X' = mhc.distribute(X, branch(h), post, mix)   in place of the add

In another form (`mhc_compile.kernels.forms`) the coefficients are another op's, the rest is the same.

Values outside the branches (hidden states that a caller asked for, the final norm) read `mhc.reduce(X)`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from mhc_compile.kernels.forms import form_of
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.passes.base import (
    Context,
    Mark,
    Widened,
    copy_meta,
    erase_unused,
    gradient_modes,
    op_name,
    refuse,
    same_shape,
    shape,
    switches_gradients,
)
from mhc_compile.passes.match_marks import pair_with_marks
from mhc_compile.passes.perstream import apply_per_stream
from mhc_compile.passes.results import ResidualStream, Site

REORDERS = {"transpose", "permute", "t", "movedim", "swapaxes", "swapdims"}
"""Operations behind which tokens come in another order."""


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
            context.widened.append(Widened(mark, stream, work.reads))
        for mark in context.marks:
            if mark.node is not None:
                mark.node.replace_all_uses_with(mark.node.args[0])  # type: ignore[arg-type]
                gm.graph.erase_node(mark.node)
        if not any(mark.inputs for mark in context.marks):  # else the passes behind this one have use for them
            erase_unused(gm)
        return gm


class _Widening:
    """The rewriting of one stream."""

    def __init__(self, graph: Graph, stream: ResidualStream, mark: Mark) -> None:
        self.graph = graph
        self.stream = stream
        self.mark = mark
        self.spec = StreamSpec.parse(mark.spec)
        self.gradients = gradient_modes(graph)
        self.wide: dict[Node, Node] = {}
        """The n-stream form of every stream value."""
        self.reads: dict[str, Node] = {}

    def run(self) -> None:
        stream = self.stream
        entry, *values = stream.values
        own = {entry, *values}
        with self.graph.inserting_before(self._behind(entry, entry)):
            self.wide[entry] = self._call(torch.ops.mhc.expand.default, (entry, self.spec.streams), entry)
        for site in stream.sites:
            apply_per_stream(self.graph, site.previous, site.chain, self.wide, self.spec.streams)
            self._rewrite(site)
        for v in values:
            # An inner add of a flattened tree has no n-stream form and no reader but its tree.
            if v in self.wide:
                self._reduce_for(v, [u for u in v.users if u not in own])
        for v in reversed(values):
            if not v.users:
                self.graph.erase_node(v)

    def _rewrite(self, site: Site) -> None:
        values = [v for v in (site.previous, *site.chain) if v in site.reads]
        read_at = values[0] if values else site.carry
        state = self.wide[read_at]
        form = form_of(self.spec)
        parameters = [self.mark.parameters[f"{site.name}.{p}"] for p in form.shapes(self.spec, self.stream.hidden)]
        first = {v: min([*site.reads[v], site.add]) for v in values}
        place = self._behind(state, read_at, min([*first.values(), site.add]), site.add)
        with self.graph.inserting_before(place):
            coefficients = self._call(form.op, (state, *parameters, self.mark.spec), site.add)
            pre, post, mix = (self._call(operator.getitem, (coefficients, i), site.add) for i in range(3))
        read: dict[Node, Node] = {}
        for v in values:
            with self.graph.inserting_before(self._behind(max(mix, self.wide[v]), v, first[v], site.add)):
                arguments = (self.wide[v], self._laid_out(pre, 1, read_at, v, site))
                read[v] = self._call(torch.ops.mhc.aggregate.default, arguments, site.add)
            for u in site.reads[v]:
                u.replace_input_with(v, read[v])
        with self.graph.inserting_before(site.add):
            branch, *others = (read.get(b, b) for b in site.branches)
            for other in others:
                branch = self._call(operator.add, (branch, other), site.add)
            if any(not same_shape(b, site.add) for b in site.branches):
                # What the add broadcast.
                one = copy_meta(self.graph.call_method("select", (self.wide[site.carry], -2, 0)), site.add)
                branch = copy_meta(self.graph.call_method("expand_as", (branch, one)), site.add)
            laid_out = [self._laid_out(c, k, read_at, site.carry, site) for c, k in ((post, 1), (mix, 2))]
            operands: tuple[Node, ...] = (self.wide[site.carry], branch, *laid_out)
            new = self._call(torch.ops.mhc.distribute.default, operands, site.add)
        new.meta["mhc_site"] = coefficients.meta["mhc_site"] = site.name
        self.reads[site.name] = coefficients
        self.wide[site.add] = new

    def _laid_out(self, coefficients: Node, rank: int, read_at: Node, v: Node, site: Site) -> Node:
        """The coefficients computed at `read_at`, their last `rank` dimensions n, for the tokens as they lie in `v`.

        Raises MHC108 where more than a view is between the two.
        """
        tokens = shape(v)[:-1]
        if tokens == shape(read_at)[:-1]:
            return coefficients
        sizes = [d if isinstance(d, int) else -1 for d in tokens]
        if sizes.count(-1) > 1 or any(op_name(n) in REORDERS for n in site.chain):
            raise refuse("MHC108", "the stream is laid out anew between where it is read and where it is added to", v)
        sizes += [self.spec.streams] * rank
        return copy_meta(self.graph.call_method("reshape", (coefficients, tuple(sizes))), site.add)

    def _reduce_for(self, v: Node, readers: list[Node]) -> None:
        """Give readers outside all branches the reduction: the exit's own form at the exit, the mean elsewhere."""
        if not readers:
            return
        arguments: tuple[Any, ...] = (self.wide[v], self.mark.spec)
        if self.spec.exit == "head" and v is self.stream.exit:
            p = self.mark.parameters
            arguments += (p["head.fn"], p["head.base"], p["head.scale"])
        elif v is not self.stream.exit:
            arguments = (self.wide[v], self.mark.spec.replace(f"exit={self.spec.exit}", "exit=mean"))
        inside = [u for u in readers if u.op != "output"] or [v]
        with self.graph.inserting_before(self._behind(self.wide[v], v, min(inside), max(inside))):
            reduced = self._call(torch.ops.mhc.reduce.default, arguments, v)
        for u in readers:
            u.replace_input_with(v, reduced)

    def _call(self, target: Callable[..., Any], arguments: tuple[Any, ...], like: Node) -> Node:
        return copy_meta(self.graph.call_function(target, arguments), like)

    def _behind(self, node: Node, v: Node, reader: Node | None = None, wanted: Node | None = None) -> Node:
        """What to insert in front of, right behind `node`, which stands where `v` does.

        Where gradients are switched on or off at `wanted` other than at `v`: behind that switch, in front of `reader`.
        """
        place = node.next
        while place.op == "placeholder":
            place = place.next
        if wanted is not None and self.gradients[v] != self.gradients.get(wanted, self.gradients[v]):
            at = place
            while at is not reader:
                at, place = at.next, at.next if switches_gradients(at) else place
        return place
