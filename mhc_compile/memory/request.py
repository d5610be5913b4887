"""What a user asks of `convert`: a memory, an over-encoding, for a model whose layers are not known yet."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.fx import Node

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.memories import memory_of
from mhc_compile.kernels.memory.overencoding_settings import OverEncodingSettings, over_encoding_of
from mhc_compile.kernels.memory.settings import MemorySettings
from mhc_compile.memory.compression import Compression
from mhc_compile.memory.parameters import Start
from mhc_compile.passes.base import shape
from mhc_compile.passes.tokens import embedded, token_embedding


class Request(Protocol):
    """Something to be made for the owner whose stream is found."""

    def of(self, entry: Node, sites: Sequence[str]) -> dict[str, Any]:
        """What `StreamParameters` takes of it."""
        ...


@dataclass(frozen=True, kw_only=True)
class OverEncodingRequest:
    """An over-encoding of the embedding whose sum the stream begins with."""

    settings: OverEncodingSettings
    tables_on: str | None = None
    """As in `MemoryRequest`."""

    def of(self, entry: Node, sites: Sequence[str]) -> dict[str, Any]:  # noqa: ARG002
        """What `StreamParameters` takes of it. Raises MHC220 and 225 where the embedding is too narrow or none."""
        found = token_embedding(entry)
        over = over_encoding_of(self.settings, vocab=found.rows, hidden=int(shape(found.node)[-1]))
        return {"over": over, "tables_on": self.tables_on}


@dataclass(frozen=True, kw_only=True)
class MemoryRequest:
    """A memory to be made for the owner whose stream is found."""

    settings: MemorySettings
    fill: int
    """The raw id of the token that `settings.fill` names."""
    compression: Compression | None
    """Of the tokenizer, where there is one and the settings want it."""
    start: Start
    tables_on: str | None = None
    """The device of the tables where it is not the model's: `meta` for tables that are only written."""

    def of(self, entry: Node, sites: Sequence[str]) -> dict[str, Any]:
        """What `StreamParameters` takes of it. Raises MHC225 and 226 where the owner has no ids or no such layer."""
        vocab, small = max(embedded(entry).values()), self.compression
        if small is None:
            memory = memory_of(self.settings, sites, vocab=vocab, compression=None, fill=self.fill)
            return {"memory": memory, "memory_start": self.start, "tables_on": self.tables_on}
        named = small.pad if self.settings.fill == "pad" else small.eos
        fill = int(small.table[min(self.fill, len(small.table) - 1)]) if named is None else named
        vocab = max(vocab, len(small.table))
        memory = memory_of(self.settings, sites, vocab=vocab, compression=small.plain(), fill=fill)
        # Embeddings are often longer than the vocabulary: no tokenizer gives the ids behind it.
        table = torch.nn.functional.pad(small.table, (0, vocab - len(small.table)), value=fill)
        return {"memory": memory, "compression": table, "memory_start": self.start, "tables_on": self.tables_on}


def requested(
    engram: str | MemorySettings | MemoryRequest | None,
    tokenizer: Any,
    model: nn.Module,
    *,
    start: Start = "zero",
    tables_on: str | None = None,
) -> MemoryRequest | None:
    """The request that `convert`'s arguments make; `tokenizer` may be a function that reads it where it is needed.

    Raises MHC220 for a preset or an argument that is none.
    """
    if engram is None or isinstance(engram, MemoryRequest):
        if tokenizer is not None and engram is None and not inspect.isfunction(tokenizer):
            raise MHCError("MHC220", "a tokenizer without engram=", way_out="name a preset: engram='v41'")
        return engram
    settings = MemorySettings.preset(engram) if isinstance(engram, str) else engram
    if not isinstance(settings, MemorySettings):
        raise MHCError("MHC220", f"engram={engram!r}; a preset's name or MemorySettings")
    compression = None
    if settings.compress and tokenizer is not None:
        held = tokenizer() if inspect.isfunction(tokenizer) else tokenizer
        compression = Compression.of(held)
    return MemoryRequest(
        settings=settings, fill=_fill(settings, model), compression=compression, start=start, tables_on=tables_on
    )


def over_requested(
    wanted: str | OverEncodingSettings | OverEncodingRequest | None, *, tables_on: str | None = None
) -> OverEncodingRequest | None:
    """The request that `convert`'s argument `over_encoding` makes. Raises MHC220 for what is none."""
    if wanted is None or isinstance(wanted, OverEncodingRequest):
        return wanted
    settings = OverEncodingSettings() if wanted == "default" else wanted
    if not isinstance(settings, OverEncodingSettings):
        raise MHCError("MHC220", f"over_encoding={wanted!r}; 'default' or OverEncodingSettings")
    return OverEncodingRequest(settings=settings, tables_on=tables_on)


def _fill(settings: MemorySettings, model: nn.Module) -> int:
    """The id in front of a document: the configuration's pad or end-of-text token, or 0."""
    config: Any = getattr(model, "config", None)
    names = ("pad_token_id", "eos_token_id") if settings.fill == "pad" else ("eos_token_id", "pad_token_id")
    for name in names:
        found = getattr(config, name, None)
        found = found[0] if isinstance(found, (list, tuple)) and found else found
        if isinstance(found, int) and found >= 0:
            return found
    return 0
