"""Insert memories: rows looked up by hashes of the token ids, added to the streams at the entry of chosen layers.

    reach  = engram.reach(ids, mask, positions, ...)      where documents begin; once per graph
    rows   = engram.rows(ids', reach, before, hash)       as soon as the ids are there, for every layer
    e      = the rows of the table                        also early, so that it overlaps with the layers before
    a      = engram.gate(X, W_K e, gains)                 at the entry of the layer, before its first site
    X'     = engram.inject(X, a, W_V e, reach, conv)      what all of the layer's sites read and carry on

A cached call carries state: the last ids, how far the document reaches, and what the convolution saw. The state's
tensors are read, and written at the end, in place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

import mhc_compile.kernels.memory.ops  # noqa: F401  (registers the ops)
from mhc_compile.kernels.memory.engram import LayerMemory, Memory, layers_of
from mhc_compile.passes.base import Context, Widened, gradient_modes, value
from mhc_compile.passes.graphs import after
from mhc_compile.passes.lookups import ENGRAM, Lookups
from mhc_compile.passes.marks import Argument, Compression, State
from mhc_compile.passes.tokens import token_ids


@dataclass(frozen=True)
class Engram:
    """Adds the memories of every widened stream's owner. Raises MHC225 where the graph has no token ids.

    `portable`: rows are read by PyTorch's embedding, for programs that run without this package.
    """

    portable: bool = False

    name: ClassVar[str] = "engram"
    requires: ClassVar[tuple[str, ...]] = ("dialect",)
    provides: ClassVar[tuple[str, ...]] = ()

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        """Rewrite `gm` in place."""
        for widened in context.widened:
            memory = widened.mark.memories.engram
            if memory is not None:
                of_mark = [w for w in context.widened if w.mark is widened.mark]
                # The entries of this graph: its mode may leave out the first site of a layer.
                entries = layers_of([site for w in of_mark for site in w.reads])
                _Inserting(gm.graph, widened, memory, entries, portable=self.portable).run()
                context.notes.append(f"memory at {', '.join(memory.paths)} of {widened.mark.owner or 'the model'}")
        return gm


class _Inserting(Lookups):
    """The memories of one stream."""

    def __init__(
        self, graph: Graph, widened: Widened, memory: Memory, entries: Mapping[str, str], *, portable: bool
    ) -> None:
        ids = token_ids(widened.stream.entry, memory.vocab, widened.mark.inputs.get(Argument("ids")))
        super().__init__(graph, widened, ids, portable=portable)
        self.memory = memory
        self.entries = {layer: site for layer, site in entries.items() if site in widened.reads}
        """The site before which each layer of the stream gets its memory."""
        self.modes = gradient_modes(graph)

    def run(self) -> None:
        layers = [m for m in self.memory.layers if m.layer in self.entries]
        if not layers:
            return
        parts = {m.layer: (m.layer, self.entries[m.layer]) for m in layers}
        self.part = parts[layers[0].layer]
        ids, reach, before = self._tokens()
        rows = {}
        for m in layers:
            self.part = parts[m.layer]
            rows[m.layer] = self._early(ENGRAM.rows.default, ids, reach, before, str(m.hash))
        width = self.memory.settings.row_width
        early = {}
        for m in layers:
            self.part = parts[m.layer]
            early[m.layer] = self._look_up(m.layer, rows[m.layer], width)
        for m in layers:
            self.part = parts[m.layer]
            self._fuse(m, early[m.layer], reach)
        self._keep()

    # --- early in the graph: ids, rows ---------------------------------------------------------------------------

    def _tokens(self) -> tuple[Node, Node, Node | None]:
        """Return the compressed ids [B, S], reach [B, S], and the carried compressed ids [B, N-1]."""
        ids = self.ids
        if self.memory.compressed:
            inside = self._early(torch.clamp, ids, 0)
            compressed = self._early(operator.getitem, self.inputs[Compression()], inside)
            ids = self._early(torch.where, self._early(operator.lt, ids, 0), ids, compressed)
        eos = self.memory.layers[0].hash.fill if self.memory.settings.resets_after_eos else -1
        return ids, *self._documents(ids, eos, "")

    # --- at the layer --------------------------------------------------------------------------------------------

    def _fuse(self, m: LayerMemory, look_up: Callable[[], Node], reach: Node) -> None:
        site = self.widened.reads[self.entries[m.layer]]
        X = site.args[0]
        assert isinstance(X, Node)
        readers = [u for u in X.users if u.target is not torch.ops.mhc.reduce.default]
        place = after(max(X, self.last))
        if self.modes.get(X) != self.modes.get(site):
            place, readers = site, [u for u in readers if u >= site]
        self.like = site
        with self.graph.inserting_before(place):
            new = self._memory(m, X, look_up(), reach)
        for u in readers:
            u.replace_input_with(X, new)

    def _memory(self, m: LayerMemory, X: Node, rows: Node, reach: Node) -> Node:
        """Return the streams with the memory added, inserted at the graph's insertion point."""
        streams, dtype = value(X).shape[-2], value(X).dtype
        p = {name: self._parameter(m, name) for name in ("key", "value", "query_gain", "key_gain")}
        rows = self.method("to", rows, dtype)
        key, weight = (self.method("to", p[name], dtype) for name in ("key", "value"))
        keys = self.method("unflatten", self.call(torch.nn.functional.linear, rows, key), -1, (streams, -1))
        fact = self.call(torch.nn.functional.linear, rows, weight)
        spec = str(self.memory.fusion)
        gate = self.call(ENGRAM.gate.default, X, keys, self._gain(p["query_gain"]), self._gain(p["key_gain"]), spec)
        if not self.memory.fusion.dilation:
            return self.call(ENGRAM.inject.default, X, gate, fact, None, None, None, spec)
        gates, facts = State("gate", m.layer), State("value", m.layer)
        if gates in self.inputs:
            gate = self.call(torch.cat, (self.inputs[gates], gate), 1)
            fact = self.call(torch.cat, (self.inputs[facts], fact), 1)
            self._keep_end(gates, gate)
            self._keep_end(facts, fact)
        gain, conv = self._gain(self._parameter(m, "conv_gain")), self._parameter(m, "conv")
        return self.call(ENGRAM.inject.default, X, gate, fact, reach, gain, conv, spec)

    def _parameter(self, m: LayerMemory, name: str) -> Node:
        return self.parameters[f"engram.{m.layer}.{name}"]

    def _gain(self, gain: Node) -> Node:
        offset = self.memory.settings.gain_offset
        return self.call(operator.add, gain, offset) if offset else gain
