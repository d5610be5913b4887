"""`mhc.json`: what makes a checkpoint folder a converted one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mhc_compile.checkpoint.shards import read_json, write_text
from mhc_compile.config import Options
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.engram import layers_of
from mhc_compile.kernels.memory.memories import NONE, Memories
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.parameters import StreamParameters
from mhc_compile.versions import VERSION

NAME = "mhc.json"
FORMAT = 4
"""Incremented when older versions cannot read the file: 2 has look-ups, 3 `attention`, 4 skipped adds; else 1."""


@dataclass(frozen=True)
class Owner:
    """The streams of one owner."""

    spec: StreamSpec
    sites: dict[str, int]
    """The sites' names, in the order of the stream, with C."""
    memories: Memories = NONE
    """The owner's memories."""
    readers: tuple[str, ...] = ()
    """`StreamParameters.own_readers`."""
    partial: tuple[frozenset[str], ...] = ()
    """The smaller sets of sites that graphs in one mode, training or evaluation, have."""
    skipped: tuple[str, ...] = ()
    """Adds that could be sites and were not chosen: they stay residual."""
    attention: str | None = None
    """`Options.attention`: blocks or everything, where positions do not see only what comes before them."""

    @classmethod
    def of(cls, parameters: StreamParameters) -> Owner:
        """Return the entry for an owner's parameters."""
        p = parameters
        return cls(p.spec, p.sites, p.memories, p.own_readers, p.partial, p.skipped, p.options.attention)

    def plain(self) -> dict[str, Any]:
        """Return the entry as JSON, without empty fields."""
        spec = {f.name: getattr(self.spec, f.name) for f in fields(StreamSpec)}
        if spec["form"] == "mhc":  # as folders from before there were other forms
            del spec["form"]
        optional = {
            "readers": list(self.readers),
            "partial": [sorted(names) for names in self.partial],
            "skipped": list(self.skipped),
            "attention": self.attention,
            **self.memories.plain(),
        }
        spec["convention"] = self.spec.convention.value
        return {"spec": spec, "sites": self.sites, **{name: value for name, value in optional.items() if value}}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The streams of a converted folder and where their parameters lie."""

    architecture: str
    """The class that the weights belong to."""
    owners: dict[str, Owner]
    """By module path."""
    streams_file: str
    """The shard that holds the stream parameters and nothing else."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Digests of weight files by name. Folders of older versions list only the streams' file."""

    def write(self, folder: Path) -> None:
        """Write `mhc.json` in `folder`."""
        attends = any(o.attention for o in self.owners.values())
        looks_up = any(o.memories.kinds for o in self.owners.values())
        skips = any(o.skipped for o in self.owners.values())
        content = {
            "format": FORMAT if skips else 3 if attends else 2 if looks_up else 1,
            "mhc_compile": VERSION,
            "architecture": self.architecture,
            "owners": {path: o.plain() for path, o in self.owners.items()},
            "streams_file": self.streams_file,
            "sha256": self.sha256,
        }
        write_text(folder / NAME, json.dumps(content, indent=2) + "\n")


def is_converted(folder: Path) -> bool:
    """Return whether `folder` is marked as a converted model."""
    return (folder / NAME).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read the folder's `mhc.json`. Raises MHC410 where there is none, MHC414 where it is not valid."""
    path = folder / NAME
    if not path.is_file():
        raise MHCError("MHC410", f"{folder} holds no {NAME}")
    content = read_json(path, "MHC414")
    if not isinstance(content.get("format"), int):
        raise MHCError("MHC414", f"{path} names no format")
    if content["format"] > FORMAT:
        raise MHCError("MHC414", f"{path} has format {content['format']}, this version reads up to {FORMAT}")
    try:
        return _parse(content)
    except (KeyError, TypeError, ValueError, MHCError) as error:
        raise MHCError("MHC414", f"{path}: {error}") from error


def _parse(content: Mapping[str, Any]) -> Manifest:
    owners = {path: _owner(_mapping(entry)) for path, entry in _mapping(content["owners"]).items()}
    if not owners:
        raise TypeError("no owners")
    streams_file = content["streams_file"]
    if not isinstance(streams_file, str) or Path(streams_file).name != streams_file:
        raise TypeError(f"{streams_file!r} is not a file's name")
    return Manifest(
        architecture=str(content["architecture"]),
        owners=owners,
        streams_file=streams_file,
        sha256={str(name): str(value) for name, value in _mapping(content["sha256"]).items()},
    )


def _owner(entry: Mapping[str, Any]) -> Owner:
    sites = {_site(name): _positive(hidden) for name, hidden in _mapping(entry["sites"]).items()}
    if not sites:
        raise TypeError("an owner without sites")
    memories = Memories.parse(entry)
    if memories.engram is not None and (unknown := {m.site for m in memories.engram.layers} - set(sites)):
        raise TypeError(f"a memory at {sorted(unknown)}, which are no sites")
    by_content = () if memories.ultramem is None else memories.ultramem.layers
    if not {path for pair in by_content for path in pair} <= layers_of(list(sites)).keys():
        raise TypeError("values looked up at a layer that has no sites")
    partial = tuple(frozenset(names) for names in entry.get("partial", ()))
    if any(not names < set(sites) for names in partial):
        raise TypeError("a mode with sites that the owner has not")
    skipped = _names(entry, "skipped")
    if set(skipped) & set(sites):
        raise TypeError("a skipped add that is a site")
    # An unknown field is a TypeError of the dataclass.
    attention = Options(attention=entry.get("attention")).attention
    return Owner(
        StreamSpec(**_mapping(entry["spec"])), sites, memories, _names(entry, "readers"), partial, skipped, attention
    )


def _names(entry: Mapping[str, Any], field_name: str) -> tuple[str, ...]:
    names = entry.get(field_name, [])
    if not isinstance(names, list):
        raise TypeError(f"{names!r} is no list of names")
    return tuple(_site(str(name)) for name in names)


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is not an object")
    return value


def _site(name: str) -> str:
    if not all(name.split(".")):
        raise TypeError(f"{name!r} is not a site's name")
    return name


def _positive(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise TypeError(f"{value!r} is not a hidden size")
    return value
