"""Merge dialect ops into the largest chains that a kernel exists for.

    distribute, coefficients, aggregate  ->  mhc_kernels.boundary   from one site to the next
    distribute, aggregate, coefficients  ->  mhc_kernels.deferred   the same where pre was computed one site ahead
    coefficients, aggregate              ->  mhc_kernels.read       the first site, and after a norm of each stream
    distribute, aggregate                ->  mhc_kernels.carry      where pre does not depend on the streams it weighs
    distribute, reduce                   ->  mhc_kernels.leave      the exit
    ... aggregate, norm of the branch    ->  mhc_kernels.boundary_rms, read_layer, ...
    whatever is left alone               ->  its own kernel
    a read of earlier outputs            ->  mhc_kernels.attend_N   N outputs (`mhc_compile.passes.fuse_depth`)

A chain is left to `lower` where no kernel exists for its device, dtype or manifold, where its parts are in different
recompute blocks or gradient modes, or where it is switched off; the pass notes which and why.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch.fx import Graph, GraphModule, Node

import mhc_compile.kernels.fused  # noqa: F401  (registers the ops)
from mhc_compile.kernels import targets
from mhc_compile.kernels.chain import NORMED, Chain, Kind
from mhc_compile.kernels.forms import COEFFICIENTS, StreamForm, form_of
from mhc_compile.kernels.fused import op_of
from mhc_compile.kernels.kernelspec import KernelSpec
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.passes.base import (
    KERNELS_OF,
    Context,
    copy_meta,
    device_of,
    gradient_modes,
    is_tensor,
    kernels_of,
    site_path,
    value,
)
from mhc_compile.passes.fuse_depth import fuse_reads
from mhc_compile.passes.fuse_memory import MEMORIES, fuse_memories
from mhc_compile.passes.graphs import Writer
from mhc_compile.passes.norms import BranchNorm, match_norm

DIALECT = torch.ops.mhc
Fused = Literal[Kind, "attend", "engram"]
UNFUSED = "mhc_unfused"
"""Node metadata: why chains that begin with the node were not fused."""
KERNELS: tuple[Fused, ...] = get_args(Fused)
"""Names that switch kernels off: kinds of chain, `attend` (Attention Residuals), and `engram` (memories)."""


@dataclass(frozen=True)
class Fuse:
    """Replaces dialect ops by `mhc_kernels` ops; `kinds` names the kinds of chain that may be used.

    With `engram` among them memories get their kernels, too. With `without_kernels` chains are merged whether or not a
    kernel exists for them, which shows what belongs together.
    """

    kinds: tuple[Fused, ...] = KERNELS
    without_kernels: bool = False

    name: ClassVar[str] = "fuse"
    requires: ClassVar[tuple[str, ...]] = ("dialect",)
    provides: ClassVar[tuple[str, ...]] = ("fused",)

    def prepare(self, gm: GraphModule) -> None:
        """Look for compilers, which takes seconds once per process and does not count as time of this pass."""
        dialect = [n for n in gm.graph.nodes if is_tensor(n) and getattr(n.target, "namespace", "") == "mhc"]
        if dialect and self.kinds:
            targets.look_for_compilers(value(dialect[0]).device.type)

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        """Rewrite `gm` in place."""
        work = _Fusing(gm.graph, self.kinds, without_kernels=self.without_kernels)
        work.run()
        context.notes += [f"{count} x {text}" for text, count in work.notes.items()]
        if "attend" in self.kinds:
            context.notes += fuse_reads(gm.graph, without_kernels=self.without_kernels)
        if MEMORIES in self.kinds:
            context.notes += fuse_memories(gm.graph)
        return gm


@dataclass
class _Parts:
    """The nodes of one chain; any may be missing."""

    mix: Node | None = None
    site: Node | None = None
    weigh: Node | None = None
    norm: BranchNorm | None = None

    @property
    def nodes(self) -> list[Node]:
        normed = self.norm.nodes if self.norm else ()
        return [n for n in (self.mix, self.site, self.weigh, *normed) if n is not None]


class _Fusing(Writer):
    def __init__(self, graph: Graph, kernels: tuple[str, ...], *, without_kernels: bool) -> None:
        super().__init__(graph)
        self.kernels = kernels
        self.without_kernels = without_kernels
        self.modes = gradient_modes(graph)
        self.notes: Counter[str] = Counter()

    def run(self) -> None:
        for node in [n for n in self.graph.nodes if n.target in COEFFICIENTS]:
            self._hoist(node)
        # Larger chains first: the smaller ones get what is left.
        for node in list(self.graph.nodes):
            if node.target is DIALECT.distribute.default:
                self._mix(node)
        for node in list(self.graph.nodes):
            if node.target in COEFFICIENTS:
                self._site(_Parts(site=node, weigh=self._only_aggregate(node)), "read")
        for node in list(self.graph.nodes):
            if node.target is DIALECT.distribute.default:
                self._replace("distribute", _Parts(mix=node), StreamSpec(streams=_streams(node)))
            elif node.target in COEFFICIENTS:
                self._site(_Parts(site=node), "coefficients")
            elif node.target is DIALECT.aggregate.default:
                self._replace("aggregate", _Parts(weigh=node), StreamSpec(streams=_streams(node)))
            elif node.target is DIALECT.reduce.default:
                self._replace("reduce", _Parts(weigh=node), _spec(node))

    def _hoist(self, site: Node) -> None:
        """Move coefficients that do not read the streams' values before the `distribute` that they are given."""
        form, mix = form_of(_spec(site)), site.all_input_nodes[0]
        free = isinstance(form, StreamForm) and not form.reads_streams and mix.target is DIALECT.distribute.default
        same = _block(mix) == _block(site) and self.modes[mix] == self.modes[site]
        if free and same and all(node < mix for node in site.all_input_nodes[1:]):
            site.update_arg(0, mix.args[0])
            for node in (site, *(u for u in site.users if u.target is operator.getitem)):
                mix.prepend(node)

    def _mix(self, mix: Node) -> None:
        site = next((u for u in mix.users if u.target in COEFFICIENTS and u.args[0] is mix), None)
        if site is not None:
            weigh = self._only_aggregate(site)
            if weigh is not None and weigh.args[0] is mix:
                self._replace("boundary", _Parts(mix, site, weigh), _spec(site))
                return
        reads = [u for u in mix.users if u.target is DIALECT.aggregate.default]
        if len(reads) == 1 and all(node < mix for node in reads[0].all_input_nodes[1:]):
            if site is not None and self._replace("deferred", _Parts(mix, site, reads[0]), _spec(site)):
                return
            self._replace("carry", _Parts(mix=mix, weigh=reads[0]), StreamSpec(streams=_streams(mix)))
        elif len(mix.users) == 1 and next(iter(mix.users)).target is DIALECT.reduce.default:
            exit_ = next(iter(mix.users))
            self._replace("leave", _Parts(mix=mix, weigh=exit_), _spec(exit_))

    def _site(self, parts: _Parts, kind: Kind) -> None:
        assert parts.site is not None
        if kind == "read" and (parts.weigh is None or parts.weigh.args[0] is not parts.site.args[0]):
            return
        self._replace(kind, parts, _spec(parts.site))

    def _only_aggregate(self, site: Node) -> Node | None:
        """Return the one reader of the site's `pre`."""
        readers = [u for item in _items(site, 0) for u in item.users]
        only = len(readers) == 1 and readers[0].target is DIALECT.aggregate.default
        return readers[0] if only else None

    def _replace(self, kind: Kind, parts: _Parts, spec: StreamSpec) -> bool:
        """Replace `parts` by one op, where a kernel may and can compute them; with the branch's norm if possible."""
        norm = match_norm(parts.weigh) if kind in NORMED and parts.weigh is not None else None
        if norm is not None and self._replaced(kind, replace(parts, norm=norm), spec, "its norm not fused into it"):
            return True
        return self._replaced(kind, parts, spec, "not fused")

    def _replaced(self, kind: Kind, parts: _Parts, spec: StreamSpec, otherwise: str) -> bool:
        first, values = self._values(parts)
        X, y = value(values["X"]), value(values["y"]) if "y" in values else None
        fields: dict[str, Any] = {
            "kind": kind, "width": int(X.shape[-1]), "streams_dtype": X.dtype,
            "branch_dtype": X.dtype if y is None else y.dtype,
            "norm": parts.norm.kind if parts.norm else "none", "norm_eps": parts.norm.eps if parts.norm else 0.0,
        }  # fmt: skip
        form = form_of(spec)
        if parts.site is not None and isinstance(form, StreamForm):
            chain = form.kernel(spec, **fields)
        else:
            chain = Chain(stream=spec, **fields)
        if chain is None:
            return self._left(first, f"{kind} {otherwise}: the form {spec.form} has no kernel")
        if reason := self._against(chain, parts, first, values):
            return self._left(first, f"{kind} {otherwise}: {reason}")
        op = getattr(torch.ops.mhc_kernels, op_of(chain)).default
        arguments = tuple(values[name] for name in chain.inputs())
        with self.graph.inserting_before(first):
            static: tuple[str, float] | tuple[str] = (str(spec), chain.norm_eps) if parts.norm else (str(spec),)
            fused = copy_meta(self.graph.call_function(op, (*arguments, *static)), parts.nodes[-1])
            fused.meta[KERNELS_OF] = (chain,)
            fused.meta["mhc_parts"] = tuple(n.name for n in parts.nodes)
            if site := first.meta.get("mhc_site"):
                fused.meta["mhc_site"] = site
            for part, made_of in (("mhc_mixes", parts.mix), ("mhc_reads", parts.site)):
                if made_of is not None:
                    fused.meta[part] = site_path(made_of)
            names = chain.outputs()
            items = {n: self.item(fused, i) if len(names) > 1 else fused for i, n in enumerate(names) if n != "z"}
        self._redirect(parts, items)
        self.notes[f"{op_of(chain)} in {chain.name}"] += 1
        return True

    def _left(self, first: Node, note: str) -> bool:
        """Note why a chain is left as it is, for the pass and for its site."""
        self.notes[note] += 1
        first.meta[UNFUSED] = (*first.meta.get(UNFUSED, ()), note)
        return False

    def _values(self, parts: _Parts) -> tuple[Node, dict[str, Any]]:
        """Return the node before which the new op goes, and its arguments by name."""
        values: dict[str, Any] = {}
        if parts.weigh is not None:
            values["X"] = parts.weigh.args[0]
            if parts.weigh.target is DIALECT.aggregate.default:
                values["pre"] = parts.weigh.args[1]
            elif len(parts.weigh.args) > 2:
                values["phi"], values["bias"], values["alpha"] = parts.weigh.args[2:]
        if parts.site is not None:
            names = [a.name for a in parts.site.target._schema.arguments]  # type: ignore[union-attr]
            values |= {"X": parts.site.args[0], **dict(zip(names[1:], parts.site.args[1:-1], strict=False))}
        if parts.mix is not None:
            values["X"], values["y"], values["post"], values["mix"] = parts.mix.args
        if parts.norm is not None:
            values["norm_weight"], values["norm_bias"] = parts.norm.weight, parts.norm.bias
        return parts.nodes[0], values

    def _against(self, chain: Chain, parts: _Parts, first: Node, values: dict[str, Any]) -> str:
        """Return why the chain is not fused, or '' where it is."""
        if chain.kind not in self.kernels:
            return "switched off"
        if len({self.modes[n] for n in parts.nodes}) > 1:
            return "gradients are switched on or off inside it"
        if len({_block(n) for n in parts.nodes}) > 1:
            return "it crosses a recompute boundary"
        if any(values[name] >= first for name in chain.inputs()):
            return "a parameter is computed inside it"
        if self.without_kernels:
            return ""
        target, reason = targets.choose(chain, device_of(values["X"]))
        return reason if target == "reference" else ""

    def _redirect(self, parts: _Parts, items: dict[str, Node]) -> None:
        """Replace the old nodes by the new ones for all readers, and erase the old."""
        if parts.site is not None:
            for i, name in enumerate(("next_pre", "next_post", "next_mix")):
                for old in _items(parts.site, i):
                    if name in items:
                        _take_place(items[name], old)
        if parts.weigh is not None:
            ends = parts.norm.nodes if parts.norm else ()
            _take_place(items["h"], ends[-1] if ends else parts.weigh)
            for old in (*reversed(ends), parts.weigh):
                self.graph.erase_node(old)
        if parts.site is not None:
            for old in list(parts.site.users):
                self.graph.erase_node(old)
            self.graph.erase_node(parts.site)
        if parts.mix is not None:
            if "next_X" in items:
                _take_place(items["next_X"], parts.mix)
            self.graph.erase_node(parts.mix)


def _block(node: Node) -> tuple[object, object]:
    """Return the recompute block of a node."""
    return node.meta.get("ac_graph_id"), node.meta.get("recompute")


def kernels_in(gm: GraphModule) -> dict[tuple[KernelSpec, str], int]:
    """Return the fused kernels of a graph with the type of device that computes them, and how often each occurs."""
    return dict(Counter((spec, device_of(n.args[0])) for n in gm.graph.nodes for spec in kernels_of(n)))


def _take_place(new: Node, old: Node) -> None:
    if new is not old:
        old.replace_all_uses_with(new)
        new.meta.setdefault("example_value", value(old))


def _items(node: Node, index: int) -> list[Node]:
    return [u for u in node.users if u.target is operator.getitem and u.args[1] == index]


def _streams(node: Node) -> int:
    X = node.args[0]
    assert isinstance(X, Node)
    return int(value(X).shape[-2])


def _spec(node: Node) -> StreamSpec:
    """Return the specification that a site or an exit carries."""
    return StreamSpec.parse(str(node.args[-1 if node.target in COEFFICIENTS else 1]))
