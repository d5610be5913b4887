"""Insert memories: rows looked up by hashes of the token ids, added to the streams at the entry of chosen layers.

    reach  = engram.reach(ids, mask, positions, ...)      where documents begin; once a graph
    rows   = engram.rows(ids', reach, before, hash)       as soon as the ids are there, for every layer
    e      = the rows of the table                        also early, so that it overlaps with the layers before
    a      = engram.gate(X, W_K e, gains)                 at the entry of the layer, in front of its first site
    X'     = engram.inject(X, a, W_V e, reach, conv)      what all of the layer's sites read and carry on

A cached call carries state: the last ids, how far the document reaches, and what the convolution saw. The state's
tensors are read, and written at the end, in place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

import mhc_compile.kernels.engram.gather
import mhc_compile.kernels.engram.hash_ops
import mhc_compile.kernels.engram.ops  # noqa: F401  (these register the ops)
from mhc_compile.kernels.engram.memory import LayerMemory, Memory
from mhc_compile.passes.base import Context, copy_meta, gradient_modes, value
from mhc_compile.passes.tokens import token_ids
from mhc_compile.passes.widen import Widened

ENGRAM = torch.ops.engram
KERNELS = torch.ops.engram_kernels
_ALL = slice(None)


@dataclass(frozen=True)
class Engram:
    """Adds the memories of every widened stream's owner. Raises MHC225 where the graph has no token ids.

    `plain`: rows are read by PyTorch's embedding, for programs that run without this package.
    """

    plain: bool = False

    name: ClassVar[str] = "engram"
    requires: ClassVar[tuple[str, ...]] = ("dialect",)
    provides: ClassVar[tuple[str, ...]] = ()

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        """Rewrite `gm` in place."""
        for widened in context.widened:
            if widened.mark.memory is not None:
                _Inserting(gm.graph, widened, widened.mark.memory, plain=self.plain).run()
                layers = ", ".join(m.layer for m in widened.mark.memory.layers)
                context.notes.append(f"memory at {layers} of {widened.mark.owner or 'the model'}")
        return gm


class _Inserting:
    """The memories of one stream."""

    def __init__(self, graph: Graph, widened: Widened, memory: Memory, *, plain: bool) -> None:
        self.graph, self.widened, self.memory, self.plain = graph, widened, memory, plain
        self.given, self.parameters = widened.mark.given, widened.mark.parameters
        self.modes = gradient_modes(graph)
        self.ids = token_ids(widened.entry, memory.vocab)
        self.last = max(self.ids, *self.given.values(), *self.parameters.values())
        """Everything that look-ups read is there behind it; the next look-up goes behind the one before."""
        self.like = widened.entry
        """Whose module and source line the nodes inserted now get."""
        self.kept: dict[str, Node] = {}
        """What every tensor of the state becomes."""

    def run(self) -> None:
        layers = [m for m in self.memory.layers if m.site in self.widened.reads]
        if not layers:
            return
        ids, reach, before = self._tokens()
        rows = {}
        for m in layers:
            rows[m.layer] = self._early(ENGRAM.rows.default, ids, reach, before, str(m.hash))
        early = {m.layer: self._look_up(m, rows[m.layer]) for m in layers}
        for m in layers:
            self._fuse(m, early[m.layer], reach)
        self._keep()

    # --- early in the graph: ids, rows ---------------------------------------------------------------------------

    def _tokens(self) -> tuple[Node, Node, Node | None]:
        """Compressed ids [B, S], reach [B, S], and the carried compressed ids [B, N-1]."""
        given = self.given
        ids = self.ids
        if self.memory.compressed:
            inside = self._early(torch.clamp, ids, 0)
            compressed = self._early(operator.getitem, given["compression"], inside)
            ids = self._early(torch.where, self._early(operator.lt, ids, 0), ids, compressed)
        eos = self.memory.layers[0].hash.fill if self.memory.settings.resets_after_eos else -1
        optional = (given.get("attention_mask"), given.get("position_ids"), given.get("state.reach"))
        reach = self._early(ENGRAM.reach.default, ids, *optional, eos)
        before = given.get("state.ids")
        if before is not None:
            self._keep_end("state.ids", self._early(torch.cat, (before, ids), 1))
            following = self._early(operator.add, self._early(operator.getitem, reach, (_ALL, -1)), 1)
            # A document ends with its end-of-text token, and in front of padding.
            for tensor, end in ((ids, eos), (given.get("attention_mask"), 0)):
                if tensor is not None and end >= 0:
                    last = self._early(operator.getitem, tensor, (_ALL, -1))
                    following = self._early(operator.mul, following, self._early(operator.ne, last, end))
            self.kept["state.reach"] = following
        return ids, reach, before

    def _look_up(self, m: LayerMemory, rows: Node) -> Callable[[], Node]:
        """Begin to fetch the rows; returns what gives the node of their values, inserted where it is called."""
        width = self.memory.settings.row_width
        if self.plain:
            weight = self.given[f"weight:{m.layer}"]
            found = self._early(torch.nn.functional.embedding, rows, weight)
            flat = self._early(torch.flatten, found, -2)
            return lambda: flat
        name = next(n for n in self.given if n.startswith(f"table:{m.layer}:"))
        anchor, handle, far = self.given[name], int(name.split(":")[2]), name.endswith(":far")
        dtype = torch.float32 if name.split(":")[3] == "float32" else torch.bfloat16
        if not far:
            return lambda: self._call(KERNELS.gather.default, rows, anchor, handle, width, dtype)
        ticket = self._early(KERNELS.prefetch.default, rows, handle)
        return lambda: self._call(KERNELS.collect.default, ticket, rows, anchor, handle, width, dtype)

    # --- at the layer --------------------------------------------------------------------------------------------

    def _fuse(self, m: LayerMemory, look_up: Callable[[], Node], reach: Node) -> None:
        site = self.widened.reads[m.site]
        X = site.args[0]
        assert isinstance(X, Node)
        readers = [u for u in X.users if u.target is not torch.ops.mhc.reduce.default]
        place = self._behind(max(X, self.last))
        if self.modes.get(X) != self.modes.get(site):
            place, readers = site, [u for u in readers if u >= site]
        self.like = site
        with self.graph.inserting_before(place):
            new = self._memory(m, X, look_up(), reach)
        for u in readers:
            u.replace_input_with(X, new)

    def _memory(self, m: LayerMemory, X: Node, rows: Node, reach: Node) -> Node:
        """The streams with the memory added, inserted where the graph inserts now."""
        streams, dtype = value(X).shape[-2], value(X).dtype
        p = {name: self._parameter(m, name) for name in ("key", "value", "query_gain", "key_gain")}
        rows = self._method("to", rows, dtype)
        key, weight = (self._method("to", p[name], dtype) for name in ("key", "value"))
        keys = self._method("unflatten", self._call(torch.nn.functional.linear, rows, key), -1, (streams, -1))
        fact = self._call(torch.nn.functional.linear, rows, weight)
        spec = str(self.memory.fusion)
        gate = self._call(ENGRAM.gate.default, X, keys, self._gain(p["query_gain"]), self._gain(p["key_gain"]), spec)
        if not self.memory.fusion.dilation:
            return self._call(ENGRAM.inject.default, X, gate, fact, None, None, None, spec)
        if f"state.gate:{m.layer}" in self.given:
            gate = self._call(torch.cat, (self.given[f"state.gate:{m.layer}"], gate), 1)
            fact = self._call(torch.cat, (self.given[f"state.value:{m.layer}"], fact), 1)
            self._keep_end(f"state.gate:{m.layer}", gate)
            self._keep_end(f"state.value:{m.layer}", fact)
        gain, conv = self._gain(self._parameter(m, "conv_gain")), self._parameter(m, "conv")
        return self._call(ENGRAM.inject.default, X, gate, fact, reach, gain, conv, spec)

    def _parameter(self, m: LayerMemory, name: str) -> Node:
        return self.parameters[f"engram.{m.layer}.{name}"]

    def _gain(self, held: Node) -> Node:
        offset = self.memory.settings.gain_offset
        return self._call(operator.add, held, offset) if offset else held

    # --- state ---------------------------------------------------------------------------------------------------

    def _keep_end(self, name: str, whole: Node) -> None:
        """The state becomes the end of `whole`."""
        with self.graph.inserting_before(self._behind(whole)):
            end = self._call(operator.getitem, whole, (_ALL, slice(-value(self.given[name]).shape[1], None)))
            self.kept[name] = self._method("detach", end)

    def _keep(self) -> None:
        """Write the state, once everything has read it."""
        output = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        with self.graph.inserting_before(output):
            for name, new in self.kept.items():
                self._method("copy_", self.given[name], new)

    # --- nodes ---------------------------------------------------------------------------------------------------

    def _early(self, target: Callable[..., Any], *args: Any) -> Node:
        with self.graph.inserting_before(self._behind(self.last)):
            self.last = self._call(target, *args)
        return self.last

    def _call(self, target: Callable[..., Any], *args: Any) -> Node:
        return copy_meta(self.graph.call_function(target, args), self.like)

    def _method(self, name: str, *args: Any) -> Node:
        return copy_meta(self.graph.call_method(name, args), self.like)

    def _behind(self, node: Node) -> Node:
        place = node.next
        while place.op == "placeholder":
            place = place.next
        return place
