"""The Engram of one stream owner, as values: which layers, how each hashes, how rows enter the streams."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.settings import MemorySettings, fusion_spec, hash_specs, table_rows
from mhc_compile.kernels.memory.spec import FusionSpec, HashSpec, TableSpec

ROOT = "engram"
"""The module among the owner's parameters that holds those of every layer, each with its table."""


@dataclass(frozen=True, kw_only=True)
class LayerMemory:
    """The memory at the entry of one layer."""

    layer: str
    """The layer's module path, relative to the owner."""
    site: str
    """Its first site, before which the memory is added to the streams."""
    hash: HashSpec
    rows: int
    """The number of rows of its table, padding included."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """All memories of one owner."""

    settings: MemorySettings
    vocab: int
    """V, ids of the model; ids at or above it are refused."""
    compression: Mapping[str, Any] | None = None
    """Describes the projection V -> V' that ids go through first: V' (`size`), and what identifies its tokenizer."""
    layers: tuple[LayerMemory, ...]

    @property
    def compressed(self) -> bool:
        """Whether ids are compressed."""
        return self.compression is not None

    @property
    def fusion(self) -> FusionSpec:
        """How rows enter the streams."""
        return fusion_spec(self.settings)

    @property
    def paths(self) -> tuple[str, ...]:
        """The layers' module paths, relative to the owner."""
        return tuple(m.layer for m in self.layers)

    @property
    def order(self) -> int:
        """The longest n-gram."""
        return self.layers[0].hash.order

    @property
    def fill(self) -> int:
        """The (compressed) id before a document."""
        return self.layers[0].hash.fill

    @property
    def history(self) -> int:
        """Earlier tokens that the convolution reads."""
        return (self.settings.taps - 1) * self.settings.order if self.settings.convolution else 0

    @property
    def tables(self) -> dict[str, TableSpec]:
        """The table of every layer, by the layer's path."""
        return {
            m.layer: TableSpec(
                place=f"{ROOT}.{m.layer}",
                rows=m.rows,
                width=self.settings.row_width,
                found_by=str(m.hash),
                reads=len(m.hash.moduli),
                shown=f"2..{m.hash.order} x {m.hash.heads}",
            )
            for m in self.layers
        }

    def plain(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        layers = [{**vars(m), "hash": str(m.hash)} for m in self.layers]
        return {**vars(self), "settings": asdict(self.settings), "layers": layers}

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> Memory:
        """Return the inverse of `plain`. Raises MHC220, KeyError or TypeError for invalid content."""
        settings, compression = dict(content["settings"]), content["compression"]
        layers = [
            LayerMemory(
                layer=str(m["layer"]), site=str(m["site"]), hash=HashSpec.parse(str(m["hash"])), rows=int(m["rows"])
            )
            for m in content["layers"]
        ]
        if not layers:
            raise TypeError("a memory without layers")
        return cls(
            settings=MemorySettings(**settings),
            vocab=int(content["vocab"]),
            compression=None if compression is None else dict(compression),
            layers=tuple(layers),
        )

    def __str__(self) -> str:
        return json.dumps(self.plain())


def memory_of(
    settings: MemorySettings, sites: Sequence[str], *, vocab: int, compression: Mapping[str, Any] | None, fill: int
) -> Memory:
    """Return the memories at the layers in `settings` of an owner with these `sites`, in the order of the stream.

    `compression` is that of the tokenizer where ids are compressed, `fill` the (compressed) id before a document.
    Raises MHC226 for a layer that the owner does not have.
    """
    known = layers_of(sites)
    paths = list(known)
    chosen = set()
    for layer in settings.layers:
        path = paths[layer] if isinstance(layer, int) and layer < len(paths) else layer
        if path not in known:
            listed = ", ".join(f"{i} ({path})" for i, path in enumerate(paths))
            raise MHCError("MHC226", f"{layer!r}; layers with sites: {listed}")
        chosen.add(paths.index(str(path)))
    indices = sorted(chosen)
    size = vocab if compression is None else int(compression["size"])
    hashes = hash_specs(settings, indices, vocab=size, fill=fill)
    layers = tuple(
        LayerMemory(layer=paths[i], site=known[paths[i]], hash=spec, rows=table_rows(settings, spec))
        for i, spec in zip(indices, hashes, strict=True)
    )
    return Memory(settings=settings, vocab=vocab, compression=compression, layers=layers)


def layers_of(sites: Sequence[str]) -> dict[str, str]:
    """Return the first site of every layer by the layer's path: the path of a site up to its first number."""
    first: dict[str, str] = {}
    for site in sites:
        path = site.rsplit("#", 1)[0]
        numbered = re.match(r"(?:.*?\.)??\d+(?=\.|$)", path)
        first.setdefault(numbered[0] if numbered else path or site, site)
    return first
