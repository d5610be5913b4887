"""Add the embeddings of n-grams to those of tokens (Over-Encoding, arXiv 2501.16975).

    reach  = engram.reach(ids, mask, positions, ...)      where documents begin
    rows   = engram.over_rows(ids, reach, before, hash)   of all orders and heads, in one table
    e      = the rows of the table
    E'     = E + W e                                      what everything reads that has read the embedding E

A cached call carries the last ids on, and how far the document reaches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from mhc_compile.kernels.memory.overencoding_settings import ROOT, TABLE, OverEncoding
from mhc_compile.passes.base import Context, module_stack, refuse, value
from mhc_compile.passes.graphs import after
from mhc_compile.passes.lookups import ENGRAM, Lookups
from mhc_compile.passes.marks import Argument
from mhc_compile.passes.tokens import token_embedding

_NO_EOS = -1


@dataclass(frozen=True)
class OverEncode:
    """Adds the n-grams of every widened stream's owner that has some. Raises MHC225 where it embeds no token ids.

    `portable`: rows are read by PyTorch's embedding, for programs that run without this package.
    """

    portable: bool = False

    name: ClassVar[str] = "overencoding"
    requires: ClassVar[tuple[str, ...]] = ("dialect",)
    provides: ClassVar[tuple[str, ...]] = ()

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        """Rewrite `gm` in place."""
        done: set[Node] = set()
        for widened in context.widened:
            over = widened.mark.memories.over_encoding
            if over is None:
                continue
            embedding = token_embedding(widened.stream.entry, over.hash.vocab, widened.mark.inputs.get(Argument("ids")))
            # Where it lies outside, calls of the owner alone would miss it.
            if widened.mark.owner not in module_stack(embedding.node):
                detail = f"{widened.mark.owner}, which holds the stream, is given embeddings"
                raise refuse("MHC225", detail, embedding.node)
            if embedding.node in done:
                continue
            done.add(embedding.node)
            _Encoding(gm.graph, widened, embedding.ids, portable=self.portable).run(embedding.node, over)
            context.notes.append(f"over-encoding of n-grams up to {over.hash.order} at {embedding.node.name}")
        return gm


class _Encoding(Lookups):
    """The n-grams of one embedding."""

    def run(self, embedding: Node, over: OverEncoding) -> None:
        """Give all readers of `embedding` the sum."""
        self.like = embedding
        readers = list(embedding.users)
        reach, before = self._documents(self.ids, _NO_EOS, TABLE)
        rows = self._early(ENGRAM.over_rows.default, self.ids, reach, before, str(over.hash))
        look_up = self._look_up(TABLE, rows, over.width)
        with self.graph.inserting_before(after(max(embedding, self.last))):
            dtype = value(embedding).dtype
            vectors = self.method("to", look_up(), dtype)
            weight = self.method("to", self.parameters[f"{ROOT}.projection"], dtype)
            added = self.call(torch.nn.functional.linear, vectors, weight)
            total = self.call(torch.add, embedding, added)
        for reader in readers:
            reader.replace_input_with(embedding, total)
        self._keep()
