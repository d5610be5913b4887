"""Settings of memories that are looked up by content (UltraMem), and what follows from them for one owner."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.constants import mixed
from mhc_compile.kernels.memory.engram import layers_of
from mhc_compile.kernels.memory.spec import ContentSpec, TableSpec, check_ranges, is_int

ROOT = "ultramem"
"""The module among the owner's parameters that holds those of every layer that reads, and the table."""
TABLE = "ultra-mem"
"""The table's name among the owner's tensors."""

# At least, and at most: numbers of virtual values, times a multiplier below them, fit in int64.
_RANGES = {
    "side": (1, 1 << 15),
    "key_width": (2, 1 << 14),
    "value_width": (1, 1 << 14),
    "input_width": (0, 1 << 14),
    "top": (1, 1 << 10),
    "heads": (1, 2),
    "cores": (1, 16),
    "expansion": (1, 64),
    "skip": (0, 1 << 10),
    "seed": (0, 1 << 62),
}
_MOST_VIRTUAL = 1 << 31
_SHARED: dict[str, Any] = {
    "layers": "all", "skip": 0, "expansion": 1, "shared": True, "input_width": 192, "gain_power": 0.4,
    "side": 360, "key_width": 192, "value_width": 192, "top": 32,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {"v1": {}, "v2": _SHARED}
"""By version the fields that differ from the defaults, which are those of the first version."""


@dataclass(frozen=True, kw_only=True)
class UltraMemSettings:
    """A memory looked up by content (arXiv 2411.12364, and 2508.18756 for the preset `v2`).

    Raises `MHCError` MHC220 for a value that is not possible.
    """

    side: int = 128
    """Values a layer: `side` squared."""
    key_width: int = 512
    """Channels of each key, and of each half of the query."""
    value_width: int = 512
    """Channels of each value, without those of `input_width`."""
    top: int = 16
    """k: rows and columns that a head keeps, and values that it reads."""
    heads: int = 1
    """Sets of keys that one query is compared with."""
    cores: int = 2
    """h: Tucker cores; a value's slices are weighted by the score of a core each."""
    expansion: int = 4
    """E, a square: every value stands for E virtual ones, which are added up apart and projected together."""
    input_width: int = 0
    """Channels of every value by which its scores are multiplied first, with a projection of what is read (PEER); 0:
    none."""
    shared: bool = False
    """Whether the values of all layers are one pool, in which every layer reaches all."""
    gain_power: float = 0.33
    """Gains of the norms of queries and keys start at `key_width ** -gain_power`."""
    layers: tuple[int | str, ...] | Literal["all"] = (2,)
    """The layers whose last branch's input is read: 0-based indices, or module paths."""
    skip: int = 2
    """How many layers later what was found is added to the stream; 0: beside the branch whose input is read."""
    seed: int = 0
    """Seed of the order in which virtual values are shuffled."""
    eps: float = 1e-5
    """Added to the variance in the norms of queries and keys."""

    def __post_init__(self) -> None:
        check_ranges(self, _RANGES, "ultramem: ")
        root = math.isqrt(self.expansion)
        if root * root != self.expansion:
            raise MHCError("MHC220", f"ultramem: expansion={self.expansion}; a square")
        if self.value_width % self.cores:
            raise MHCError("MHC220", f"ultramem: value_width={self.value_width}; a multiple of cores={self.cores}")
        if self.top > root * self.side:
            raise MHCError("MHC220", f"ultramem: top={self.top} of {root * self.side} keys")
        if not isinstance(self.shared, bool):
            raise MHCError("MHC220", f"ultramem: shared={self.shared!r}; True or False")
        for name in ("gain_power", "eps"):
            if not isinstance(getattr(self, name), float) or not 0 < getattr(self, name) < 1:
                raise MHCError("MHC220", f"ultramem: {name}={getattr(self, name)!r}; a number between 0 and 1")
        if self.layers == "all":
            return
        if not isinstance(self.layers, (tuple, list)) or not self.layers or len(set(self.layers)) < len(self.layers):
            raise MHCError("MHC220", f"ultramem: layers={self.layers!r}; distinct layers, at least one, or 'all'")
        if bad := [x for x in self.layers if not (x if isinstance(x, str) else is_int(x) and x >= 0)]:
            raise MHCError("MHC220", f"ultramem: layers: {bad[0]!r} is no 0-based index and no module path")
        object.__setattr__(self, "layers", tuple(self.layers))

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """Return the settings of a version with `overrides`. Raises MHC220 for unknown names.

        `v1`: the defaults of the released code. `v2`: the model of 227M active parameters in its documentation, with
        all of the pool in each layer's reach.
        """
        if name not in PRESETS:
            raise MHCError("MHC220", f"ultramem: preset {name!r}; known: {', '.join(PRESETS)}")
        if unknown := sorted(set(overrides) - {f.name for f in fields(cls)}):
            known = ", ".join(f.name for f in fields(cls))
            raise MHCError("MHC220", f"ultramem: unknown field {unknown[0]!r}; known: {known}")
        return cls(**{**PRESETS[name], **overrides})


@dataclass(frozen=True, kw_only=True)
class UltraMem:
    """The memory of one owner."""

    settings: UltraMemSettings
    hidden: int
    """C, the channels of the stream."""
    layers: tuple[tuple[str, str], ...]
    """The module paths, relative to the owner, of each layer that reads and of the one to whose stream it adds."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise MHCError("MHC220", "ultramem: no layers")
        if self.keys**2 > _MOST_VIRTUAL:
            raise MHCError("MHC220", f"ultramem: {self.keys**2:,} virtual values; at most {_MOST_VIRTUAL:,}")

    @property
    def rows(self) -> int:
        """The number of rows of the table: the values of all layers."""
        return len(self.layers) * self.settings.side**2

    @property
    def width(self) -> int:
        """The channels of a row: those by which its scores are multiplied, then those of the value."""
        return self.settings.input_width + self.settings.value_width

    @property
    def keys(self) -> int:
        """n, rows and columns: their square is the number of virtual values in a layer's reach."""
        reach = self.rows if self.settings.shared else self.settings.side**2
        return math.isqrt(self.settings.expansion) * math.isqrt(reach)

    def spec(self, index: int) -> ContentSpec:
        """Return how the layer `index` of those that read looks values up."""
        s, n = self.settings, self.keys
        multiplier = mixed(s.seed + index) % (n * n)
        while math.gcd(multiplier, n * n) != 1:
            multiplier += 1
        return ContentSpec(
            top=s.top, multiplier=multiplier, reach=n * n // s.expansion, offset=index * s.side**2, rows=self.rows,
            groups=s.expansion, input=s.input_width, eps=s.eps,
        )  # fmt: skip

    @property
    def tables(self) -> dict[str, TableSpec]:
        """The one table of all layers, by its name."""
        s = self.settings
        reads, shown = s.top * s.heads * len(self.layers), f"{s.top} of {self.keys}^2 x {s.heads}"
        found_by = str(self.spec(0))
        table = TableSpec(
            place=ROOT, rows=self.rows, width=self.width, found_by=found_by, reads=reads, shown=shown
        )  # fmt: skip
        return {TABLE: table}

    def plain(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return {"settings": asdict(self.settings), "hidden": self.hidden, "layers": [list(x) for x in self.layers]}

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> UltraMem:
        """Return the inverse of `plain`. Raises MHC220, KeyError, TypeError or ValueError for invalid content."""
        layers = tuple((str(read), str(add)) for read, add in content["layers"])
        return cls(settings=UltraMemSettings(**content["settings"]), hidden=int(content["hidden"]), layers=layers)


def ultramem_of(settings: UltraMemSettings, sites: Sequence[str], *, hidden: int) -> UltraMem:
    """Return the memory of an owner with these `sites`, in the order of the stream.

    Raises MHC226 for a layer that the owner does not have, and for one after which no `skip` layers come.
    """
    paths = list(layers_of(sites))
    listed = ", ".join(f"{i} ({path})" for i, path in enumerate(paths))
    chosen = set()
    for layer in range(len(paths) - settings.skip) if settings.layers == "all" else settings.layers:
        path = paths[layer] if isinstance(layer, int) and layer < len(paths) else layer
        if path not in paths:
            raise MHCError("MHC226", f"{layer!r}; layers with sites: {listed}")
        chosen.add(paths.index(str(path)))
    if not chosen or max(chosen) + settings.skip >= len(paths):
        late = f"layer {max(chosen)}" if chosen else "any layer"
        detail = f"what is read at {late} is added {settings.skip} layers later; layers with sites: {listed}"
        raise MHCError("MHC226", detail)
    return UltraMem(
        settings=settings, hidden=hidden, layers=tuple((paths[i], paths[i + settings.skip]) for i in sorted(chosen))
    )


def last_sites(sites: Sequence[str]) -> dict[str, str]:
    """Return the last site of every layer by the layer's path: its feed-forward network, where it has one."""
    return {path: site for site in sites for path in layers_of([site])}
