"""Insert UltraMem: values that are looked up by content, beside the feed-forward network or some layers later.

    x            = what the last branch of a layer reads, after its norm
    rows, g, s   = engram.retrieve(W_q x, gains, keys, cores)      by content: no ids, positions or carried state
    e            = the rows of the table                           begun here, awaited where it is added
    y'           = y + W_o engram.expand(e, g, s, W_i x)           y: what a layer's last branch adds to the stream

Both are of one layer, or y is of one some layers later. A stream of n takes y' as it takes y.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

import mhc_compile.kernels.memory.ultramem  # noqa: F401  (registers the ops)
from mhc_compile.kernels.memory.ultramem_settings import ROOT, TABLE, UltraMem, last_sites
from mhc_compile.passes.base import Context, refuse, same_shape, shape, value
from mhc_compile.passes.graphs import after
from mhc_compile.passes.lookups import ENGRAM, TableReader
from mhc_compile.passes.norms import match_norm


@dataclass(frozen=True)
class LookUpByContent:
    """Adds the UltraMem of every widened stream's owner that has one. Raises MHC226 where a layer has no place for it.

    `portable`: rows are read by PyTorch's embedding, for programs that run without this package.
    """

    portable: bool = False

    name: ClassVar[str] = "ultramem"
    requires: ClassVar[tuple[str, ...]] = ("dialect",)
    provides: ClassVar[tuple[str, ...]] = ()

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        """Rewrite `gm` in place."""
        for widened in context.widened:
            memory = widened.mark.memories.ultramem
            if memory is not None:
                # The last sites in this graph: its mode may leave some out.
                of_mark = [name for w in context.widened if w.mark is widened.mark for name in w.reads]
                reading = _Reading(gm.graph, widened, portable=self.portable)
                context.notes += reading.run(memory, last_sites(of_mark))
        return gm


class _Reading(TableReader):
    """The look-ups of one stream."""

    def run(self, memory: UltraMem, sites: Mapping[str, str]) -> list[str]:
        """Insert all; return a note for each."""
        notes = []
        for index, (layer, later) in enumerate(memory.layers):
            read, add = sites.get(layer), sites.get(later)
            there = [site in self.widened.reads for site in (read, add)]
            if not any(there):
                continue
            if read is None or add is None or not all(there):
                raise refuse("MHC226", f"{layer} and {later} are no layers of one stream", self.widened.stream.entry)
            notes.append(self._insert(memory, index, read, add))
        return notes

    def _insert(self, memory: UltraMem, index: int, read: str, add: str) -> str:
        layer, _ = memory.layers[index]
        branch, streams = self.widened.inputs.get(read), self.widened.writes.get(add)
        if branch is None or streams is None or streams.target is not torch.ops.mhc.distribute.default:
            raise refuse("MHC226", f"{read} reads no stream, or {add} adds to none", self.widened.reads[read])
        norm = match_norm(branch)
        x = branch if norm is None else norm.out
        y = streams.args[1]
        assert isinstance(y, Node)
        if not same_shape(x, y):
            detail = f"{read} reads {list(shape(x))}, {add} adds {list(shape(y))}: tokens are laid out otherwise"
            raise refuse("MHC226", detail, y)
        self.part, self.like, self.last = (layer, read), x, max(x, self.last)
        query = self._early(torch.nn.functional.linear, x, self._weight(layer, "query", x))
        operands = [self.parameters[f"{ROOT}.{layer}.{name}"] for name in ("query_gain", "keys", "key_gain", "cores")]
        spec = str(memory.spec(index))
        found = self._early(ENGRAM.retrieve.default, query, *operands, spec)
        rows, groups, scores = (self._early(operator.getitem, found, i) for i in range(3))
        values = self._look_up(TABLE, rows, memory.width)
        width = memory.settings.input_width
        read_by_values = self._early(torch.nn.functional.linear, x, self._weight(layer, "input", x)) if width else None
        self.like = streams
        with self.graph.inserting_before(streams):
            out = self.call(ENGRAM.expand.default, values(), groups, scores, read_by_values, spec)
            out = self.method("to", out, value(y).dtype)
            projection = self.method("to", self.parameters[f"{ROOT}.{layer}.projection"], value(y).dtype)
            added = self.call(torch.nn.functional.linear, out, projection)
            streams.update_arg(1, self.call(torch.add, y, added))
        normed = "" if norm is None else "normed "
        return f"values by the {normed}input of {read}, added at {add}"

    def _weight(self, layer: str, name: str, like: Node) -> Node:
        """Insert the parameter in the dtype of `like`, after the last node of the look-up."""
        with self.graph.inserting_before(after(self.last)):
            self.last = self.method("to", self.parameters[f"{ROOT}.{layer}.{name}"], value(like).dtype)
        return self.last
