"""Raise the hyper-connections that a model writes out by hand to the `mhc` dialect, so that they compile as ours do.

`hyperconnections` proposes sites by structure, `confirm` judges them by arithmetic; `native_depth` does both for reads
by attention over depth. What is not confirmed stays as it is, with a note that says why: unlike a residual stream, each
site stands for itself.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

import mhc_compile.kernels.ops  # noqa: F401  (registers the dialect)
from mhc_compile.kernels import reference
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.passes.base import (
    Context,
    erase_unused,
    gradient_modes,
    is_tensor,
    module_path,
    op_name,
    shape,
    value,
)
from mhc_compile.passes.confirm import Confirmed, Verdict, confirm_exit, confirm_site, is_function
from mhc_compile.passes.dataflow import CASTS, Dataflow
from mhc_compile.passes.graphs import Writer
from mhc_compile.passes.hyperconnections import NotApart, Proposal, cast_behind, local, proposals
from mhc_compile.passes.merge import merge_equal
from mhc_compile.passes.native_depth import ConfirmedRead, confirm_reads, rewrite_read
from mhc_compile.passes.ownership import is_owned
from mhc_compile.passes.results import NativeRead, NativeSite

MAX_EXITS = 8
"""Values computed from the last streams that are tried as their reduction."""


@dataclass(frozen=True)
class Native:
    """Rewrites hand-written hyper-connections of known conventions, and attention over depth. Refuses nothing.

    Fills `context.native` and `context.native_reads`.
    """

    name: ClassVar[str] = "native"
    requires: ClassVar[tuple[str, ...]] = ("normal-form",)
    provides: ClassVar[tuple[str, ...]] = ("dialect",)

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        """Rewrite `gm` in place."""
        drop_idle_casts(gm)
        merge_equal(gm)
        lifting = _Lifting(gm, context)
        # Gradients are compared, whatever the caller runs under.
        with torch.inference_mode(mode=False), torch.enable_grad():
            lifting.analyse()
        lifting.rewrite()
        erase_unused(gm)
        return gm


def drop_idle_casts(gm: GraphModule) -> None:
    """Erase `x.float()` and its like where `x` is returned as it is: they would hide that two values are one."""
    for node in gm.graph.nodes:
        source = node.args[0] if node.args else None
        if op_name(node) not in CASTS or not isinstance(source, Node) or not (is_tensor(node) and is_tensor(source)):
            continue
        same = (value(node).dtype, value(node).device) == (value(source).dtype, value(source).device)
        if same and not {"copy", "memory_format"} & set(node.kwargs) and True not in node.args:
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)


class _Lifting(Writer):
    """The analysis of one graph, then its rewriting."""

    def __init__(self, gm: GraphModule, context: Context) -> None:
        super().__init__(gm.graph)
        self.context = context
        self.flow = Dataflow(gm.graph, is_owned)
        self.gradients = gradient_modes(gm.graph)
        self.first = next(n for n in gm.graph.nodes if n.op != "placeholder")
        self.memory: dict[Any, Verdict] = {}
        self.confirmed: list[Confirmed] = []
        self.reads: list[ConfirmedRead] = []
        self.entries: dict[Node, Node] = {}
        """What is expanded into n streams, by these streams."""
        self.means: dict[Node, tuple[Node, StreamSpec]] = {}
        """What the last streams are reduced to, with its specification, by these streams."""
        self.dead: set[Node] = set()
        self.new: dict[Node, Node] = {}

    # --- analysis ----------------------------------------------------------------------------------------------

    def analyse(self) -> None:
        """Confirm proposals, then what stands at both ends of the streams; and reads by attention over depth."""
        for p in proposals(self.flow):
            self.context.cut += p.rows > p.n and p.branch is None
            try:
                self._confirm(p)
            except NotApart as error:
                self.context.notes.append(f"{self._place(p.projection)}: left alone: {error}")
        written = {c.following for c in self.confirmed}
        read = {c.proposal.streams for c in self.confirmed}
        for streams in read - written:
            self._find_entry(streams)
        for c in self.confirmed:
            if c.following is not None and c.following not in read:
                self._find_exit(c.following, c.spec)
        self.reads = confirm_reads(self.flow, self.gradients, self.context.notes)
        self.dead.update(n for read in self.reads for n in read.nodes)

    def _confirm(self, p: Proposal) -> None:
        hints = list(dict.fromkeys(c.spec for c in reversed(self.confirmed)))
        if p.rows == p.n:
            done = confirm_exit(self.flow, p, hints)
        else:
            done = confirm_site(self.flow, p, hints, self.memory)
        if len({self.gradients[n] for n in done.nodes}) > 1:
            raise NotApart("a part of it runs without gradients")
        if any(n is other.following or n is other.proposal.read for other in self.confirmed for n in done.nodes):
            raise NotApart("another site shares its values")
        for n in done.numbers:
            float(value(n))  # a guard: with another value the model is compiled again
        self.confirmed.append(done)
        self.dead.update(done.nodes)

    def _find_entry(self, streams: Node) -> None:
        *tokens, n, hidden = shape(streams)
        at = self.flow.dominators.get(streams)
        while at is not None and not (is_tensor(at) and shape(at) == (*tokens, hidden)):
            at = self.flow.dominators.get(at)
        if at is None or value(at).dtype != value(streams).dtype:
            return
        apart = is_function(self.flow, streams, at, lambda x: reference.expand(x, n), (hidden,))
        if apart is not None:
            self.entries[streams] = at
            self.dead.update(apart.nodes)

    def _find_exit(self, streams: Node, spec: StreamSpec) -> None:
        *tokens, n, hidden = shape(streams)
        near = [v for v in local(self.flow, streams) if is_tensor(v) and shape(v) == (*tokens, hidden)]
        for out in near[:MAX_EXITS]:
            for kind in ("mean", "sum"):
                chosen = replace(spec, exit=kind)
                apart = is_function(self.flow, out, streams, lambda x: reference.reduce(x, chosen), (n, hidden))  # noqa: B023
                if apart is not None:
                    self.means[streams] = cast_behind(out, value(streams).dtype), chosen
                    self.dead.update(apart.nodes)
                    return

    # --- rewriting ---------------------------------------------------------------------------------------------

    def rewrite(self) -> None:
        """Put the dialect in place of all that was confirmed."""
        for streams, x in self.entries.items():
            with self.graph.inserting_before(streams):
                new = self.call(torch.ops.mhc.expand.default, x, shape(streams)[-2], like=streams)
            self._replace(streams, new)
        counts: Counter[str] = Counter()
        for c in self.confirmed:
            if c.following is None:
                self._rewrite_exit(c)
                continue
            path = module_path(c.following)
            self._rewrite_site(c, f"{path}#{counts[path]}")
            counts[path] += 1
        for streams, (out, spec) in self.means.items():
            self._reduce(streams, out, str(spec))
        for done in self.reads:
            self._rewrite_read(done, counts)
        order = self.flow.index
        for node in sorted(self.dead, key=order.__getitem__, reverse=True):
            if not node.users and node.op != "placeholder":
                self.graph.erase_node(node)
        self._report()

    def _rewrite_site(self, c: Confirmed, name: str) -> None:
        p, spec = c.proposal, str(c.spec)
        assert p.branch is not None
        assert c.following is not None
        X, dtype = self._now(p.streams), value(p.streams).dtype
        phi, alpha, bias = self._parameters(c)
        with self.graph.inserting_before(p.read):
            coefficients = self.call(torch.ops.mhc.coefficients.default, X, phi, alpha, bias, spec, like=p.read)
            pre, post, mix = (self.call(operator.getitem, coefficients, i, like=p.read) for i in range(3))
            wide, wide_dtype = self._widened(X, dtype, p.read)
            read = self.call(torch.ops.mhc.aggregate.default, wide, pre, like=p.read)
            self._replace(p.read, self._cast(read, wide_dtype, value(p.read).dtype))
        with self.graph.inserting_before(c.following):
            post, mix = (
                self.method("to", m, c.rounded[kind], like=c.following) if kind in c.rounded else m
                for kind, m in (("post", post), ("mix", mix))
            )
            wide, wide_dtype = self._widened(X, dtype, c.following)
            y, wide_dtype = self._now(p.branch), torch.promote_types(wide_dtype, value(p.branch).dtype)
            new = self.call(torch.ops.mhc.distribute.default, wide, y, post, mix, like=c.following)
            self._replace(c.following, self._cast(new, wide_dtype, value(c.following).dtype))
        new.meta["mhc_site"] = coefficients.meta["mhc_site"] = name
        self.context.native.append(NativeSite(name, spec))

    def _rewrite_read(self, done: ConfirmedRead, counts: Counter[str]) -> None:
        path = module_path(done.result)
        name = f"{path}#{counts[path]}"
        counts[path] += 1
        self._replace(done.result, rewrite_read(self, done, self._now, name))
        self.context.native_reads.append(NativeRead(name, len(done.read.sources), done.read.queries))

    def _parameters(self, c: Confirmed) -> tuple[Node, Node, Node]:
        p = c.proposal
        phi, alpha, bias = c.parameters
        if shape(phi) != (p.rows, p.n * p.hidden):
            phi = self._early(torch.t, phi, p.read)
        if shape(alpha) == (2,):
            # Without a mixing matrix there is no third factor, and nothing reads this one.
            alpha = self._early(torch.nn.functional.pad, alpha, p.read, (0, 1))
        return phi, alpha, bias

    def _rewrite_exit(self, c: Confirmed) -> None:
        p = c.proposal
        fn, base, scale = c.parameters
        if shape(fn) != (p.n, p.n * p.hidden):
            fn = self._early(torch.t, fn, p.read)
        if shape(scale) == ():
            scale = self._early(torch.reshape, scale, p.read, (1,))
        self._reduce(p.streams, p.read, str(c.spec), fn, base, scale)

    def _early(self, target: Callable[..., Any], parameter: Node, like: Node, *arguments: Any) -> Node:
        """Insert a form of `parameter`, before all else where possible: `fuse` wants it outside the chain."""
        early = parameter.op == "placeholder" and self.gradients[self.first] == self.gradients[like]
        with self.graph.inserting_before(self.first if early else like):
            return self.call(target, parameter, *arguments, like=like)

    def _reduce(self, streams: Node, out: Node, spec: str, *head: Node) -> None:
        with self.graph.inserting_before(out):
            wide, wide_dtype = self._widened(self._now(streams), value(streams).dtype, out)
            new = self.call(torch.ops.mhc.reduce.default, wide, spec, *head, like=out)
            self._replace(out, self._cast(new, wide_dtype, value(out).dtype))

    def _widened(self, X: Node, dtype: torch.dtype, like: Node) -> tuple[Node, torch.dtype]:
        """Return X in the dtype of `like` where that is the wider one, and its dtype then."""
        target_dtype = value(like).dtype
        if target_dtype == dtype or torch.promote_types(target_dtype, dtype) != target_dtype:
            return X, dtype
        return self.method("to", X, target_dtype, like=like), target_dtype

    def _cast(self, node: Node, dtype: torch.dtype, target_dtype: torch.dtype) -> Node:
        return node if dtype == target_dtype else self.method("to", node, target_dtype, like=node)

    def _now(self, node: Node) -> Node:
        return self.new.get(node, node)

    def _replace(self, old: Node, new: Node) -> None:
        old.replace_all_uses_with(new)
        self.new[old] = new
        self.dead.add(old)

    # --- report ------------------------------------------------------------------------------------------------

    def _report(self) -> None:
        notes = self.context.notes
        for spec, count in Counter(site.spec for site in self.context.native).items():
            notes.append(f"{count} hand-written sites raised: {spec}")
        for read, count in Counter(map(str, self.context.native_reads)).items():
            notes.append(f"{count} hand-written reads raised: {read}")
        exits = [str(c.spec) for c in self.confirmed if c.following is None] + [str(s) for _, s in self.means.values()]
        notes += [f"exit raised: {spec}" for spec in exits]
        notes += [f"entry raised at {self._place(x)}" for x in self.entries.values()]

    def _place(self, node: Node) -> str:
        return module_path(node) or "(root)"
