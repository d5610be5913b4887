"""Look-ups that a user asks `convert` for, before the model's layers are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.engram import Memory, memory_of
from mhc_compile.kernels.memory.memories import Memories
from mhc_compile.kernels.memory.overencoding_settings import OverEncodingSettings, over_encoding_of
from mhc_compile.kernels.memory.settings import MemorySettings
from mhc_compile.kernels.memory.ultramem_settings import UltraMemSettings, ultramem_of
from mhc_compile.memory.compression import Compression
from mhc_compile.memory.parameters import Start
from mhc_compile.passes.base import shape
from mhc_compile.passes.tokens import embedded, token_embedding


@dataclass(frozen=True, kw_only=True)
class Request:
    """Look-ups to be added to an owner once its stream is known."""

    engram: MemorySettings | None = None
    fill: int = 0
    """The raw id of the token that `engram.fill` names."""
    compression: Compression | None = None
    """Maps ids of the tokenizer that stand for the same text to one id; None if ids are used as they are."""
    start: Start = "zero"
    over_encoding: OverEncodingSettings | None = None
    ultramem: UltraMemSettings | None = None
    tables_on: str | None = None
    """The device of the tables if not the model's: `meta` for tables that are only written to files."""

    def of(self, entry: Node, sites: Sequence[str]) -> dict[str, Any]:
        """Return the keyword arguments of `StreamParameters` for the stream that begins at `entry`.

        Raises MHC225 or 226 where the owner has no ids or no such layer, MHC220 where an embedding is too narrow.
        """
        arguments: dict[str, Any] = {"memory_start": self.start, "tables_on": self.tables_on}
        kinds: dict[str, Any] = {}
        if self.engram is not None:
            kinds["engram"], arguments["compression"] = self._engram(self.engram, entry, sites)
        if self.over_encoding is not None:
            embedding = token_embedding(entry)
            channels = int(shape(embedding.node)[-1])
            kinds["over_encoding"] = over_encoding_of(self.over_encoding, vocab=embedding.rows, hidden=channels)
        if self.ultramem is not None:
            kinds["ultramem"] = ultramem_of(self.ultramem, sites, hidden=int(shape(entry)[-1]))
        return {**arguments, "memories": Memories(**kinds)}

    def _engram(
        self, settings: MemorySettings, entry: Node, sites: Sequence[str]
    ) -> tuple[Memory, torch.Tensor | None]:
        vocab, small, fill = max(embedded(entry).values()), self.compression, self.fill
        if small is None:
            return memory_of(settings, sites, vocab=vocab, compression=None, fill=fill), None
        named = small.pad if settings.fill == "pad" else small.eos
        fill = int(small.table[min(fill, len(small.table) - 1)]) if named is None else named
        vocab = max(vocab, len(small.table))
        # Embeddings are often longer than the vocabulary: no tokenizer produces the remaining ids.
        ids = torch.nn.functional.pad(small.table, (0, vocab - len(small.table)), value=fill)
        return memory_of(settings, sites, vocab=vocab, compression=small.plain(), fill=fill), ids


NOTHING = Request()


def requested(
    model: nn.Module,
    engram: str | MemorySettings | None,
    over_encoding: str | OverEncodingSettings | None,
    tokenizer: Callable[[], Any],
    *,
    start: Start = "zero",
    ultramem: str | UltraMemSettings | None = None,
    tables_on: str | None = None,
) -> Request:
    """Return what the arguments of `convert` ask for; `tokenizer` is called where ids are to be compressed.

    Raises MHC220 for an unknown preset or another type.
    """
    memory = MemorySettings.preset(engram) if isinstance(engram, str) else engram
    over = OverEncodingSettings() if over_encoding == "default" else over_encoding
    content = UltraMemSettings.preset(ultramem) if isinstance(ultramem, str) else ultramem
    if not isinstance(memory, MemorySettings | None):
        raise MHCError("MHC220", f"engram={engram!r}; a preset's name or MemorySettings")
    if not isinstance(over, OverEncodingSettings | None):
        raise MHCError("MHC220", f"over_encoding={over_encoding!r}; 'default' or OverEncodingSettings")
    if not isinstance(content, UltraMemSettings | None):
        raise MHCError("MHC220", f"ultramem={ultramem!r}; a preset's name or UltraMemSettings")
    known = tokenizer() if memory is not None and memory.compress else None
    return Request(
        engram=memory,
        fill=0 if memory is None else _fill(memory, model),
        compression=None if known is None else Compression.of(known),
        start=start,
        over_encoding=over,
        ultramem=content,
        tables_on=tables_on,
    )


def _fill(settings: MemorySettings, model: nn.Module) -> int:
    """Return the id before a document: the configuration's pad or end-of-text token, or 0."""
    config: Any = getattr(model, "config", None)
    names = ("pad_token_id", "eos_token_id") if settings.fill == "pad" else ("eos_token_id", "pad_token_id")
    for name in names:
        ids = getattr(config, name, None)
        first = ids[0] if isinstance(ids, (list, tuple)) and ids else ids
        if isinstance(first, int) and first >= 0:
            return first
    return 0
