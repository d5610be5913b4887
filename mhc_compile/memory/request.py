"""Look-ups that a user asks `convert` for, before the model's layers are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.memories import memory_of
from mhc_compile.kernels.memory.overencoding_settings import OverEncodingSettings, over_encoding_of
from mhc_compile.kernels.memory.settings import MemorySettings
from mhc_compile.kernels.memory.ultramem_settings import UltraMemSettings, ultramem_of
from mhc_compile.memory.compression import Compression
from mhc_compile.memory.parameters import Start
from mhc_compile.passes.base import shape
from mhc_compile.passes.tokens import embedded, token_embedding


@dataclass(frozen=True, kw_only=True)
class OverEncodingRequest:
    """An over-encoding of the embedding that the stream begins with."""

    settings: OverEncodingSettings
    tables_on: str | None = None
    """The device of the tables if not the model's: `meta` for tables that are only written to files."""

    def of(self, entry: Node, sites: Sequence[str]) -> dict[str, Any]:  # noqa: ARG002
        """Return the keyword arguments; raise MHC220 or 225 where the embedding is too narrow or missing."""
        embedding = token_embedding(entry)
        over = over_encoding_of(self.settings, vocab=embedding.rows, hidden=int(shape(embedding.node)[-1]))
        return {"over": over, "tables_on": self.tables_on}


@dataclass(frozen=True, kw_only=True)
class MemoryRequest:
    """A memory to be added to an owner."""

    settings: MemorySettings
    fill: int
    """The raw id of the token that `settings.fill` names."""
    compression: Compression | None
    """Maps ids of the tokenizer that stand for the same text to one id; None if ids are used as they are."""
    start: Start
    tables_on: str | None = None
    """The device of the tables if not the model's: `meta` for tables that are only written to files."""

    def of(self, entry: Node, sites: Sequence[str]) -> dict[str, Any]:
        """Return the keyword arguments; raise MHC225 or 226 where the owner has no ids or no such layer."""
        vocab, small = max(embedded(entry).values()), self.compression
        arguments: dict[str, Any] = {"memory_start": self.start, "tables_on": self.tables_on}
        fill = self.fill
        if small is not None:
            named = small.pad if self.settings.fill == "pad" else small.eos
            fill = int(small.table[min(fill, len(small.table) - 1)]) if named is None else named
            vocab = max(vocab, len(small.table))
            # Embeddings are often longer than the vocabulary: no tokenizer produces the remaining ids.
            padding = (0, vocab - len(small.table))
            arguments["compression"] = torch.nn.functional.pad(small.table, padding, value=fill)
        known = None if small is None else small.plain()
        return {**arguments, "memory": memory_of(self.settings, sites, vocab=vocab, compression=known, fill=fill)}


@dataclass(frozen=True, kw_only=True)
class UltraMemRequest:
    """Values looked up by content, to be added to an owner."""

    settings: UltraMemSettings
    tables_on: str | None = None
    """The device of the tables if not the model's: `meta` for tables that are only written to files."""

    def of(self, entry: Node, sites: Sequence[str]) -> dict[str, Any]:
        """Return the keyword arguments; raise MHC226 where the owner has no such layer."""
        return {
            "content": ultramem_of(self.settings, sites, hidden=int(shape(entry)[-1])),
            "tables_on": self.tables_on,
        }


Request = MemoryRequest | OverEncodingRequest | UltraMemRequest
"""A look-up to be added to an owner once its stream is known: `of` returns keyword arguments of `StreamParameters`."""


def requested(
    model: nn.Module,
    engram: str | MemorySettings | None,
    over_encoding: str | OverEncodingSettings | None,
    tokenizer: Callable[[], Any],
    *,
    start: Start = "zero",
    ultramem: str | UltraMemSettings | None = None,
    tables_on: str | None = None,
) -> list[Request]:
    """Return the requests that the arguments of `convert` make; `tokenizer` is called where ids are to be compressed.

    Raises MHC220 for an unknown preset or another type.
    """
    requests: list[Request] = []
    if engram is not None:
        settings = MemorySettings.preset(engram) if isinstance(engram, str) else engram
        if not isinstance(settings, MemorySettings):
            raise MHCError("MHC220", f"engram={engram!r}; a preset's name or MemorySettings")
        known = tokenizer() if settings.compress else None
        compression = None if known is None else Compression.of(known)
        fill = _fill(settings, model)
        requests.append(
            MemoryRequest(settings=settings, fill=fill, compression=compression, start=start, tables_on=tables_on)
        )
    if over_encoding is not None:
        over = OverEncodingSettings() if over_encoding == "default" else over_encoding
        if not isinstance(over, OverEncodingSettings):
            raise MHCError("MHC220", f"over_encoding={over_encoding!r}; 'default' or OverEncodingSettings")
        requests.append(OverEncodingRequest(settings=over, tables_on=tables_on))
    if ultramem is not None:
        content = UltraMemSettings.preset(ultramem) if isinstance(ultramem, str) else ultramem
        if not isinstance(content, UltraMemSettings):
            raise MHCError("MHC220", f"ultramem={ultramem!r}; a preset's name or UltraMemSettings")
        requests.append(UltraMemRequest(settings=content, tables_on=tables_on))
    return requests


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
