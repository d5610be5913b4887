"""Settings of memories, of published systems or chosen by the user, and the hashes and sizes that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal, Self, get_args

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.constants import pcg64_multipliers, primes_from, splitmix64_multipliers
from mhc_compile.kernels.memory.spec import FusionSpec, HashSpec, check_ranges, is_int

Multipliers = Literal["pcg64", "splitmix64"]
Fill = Literal["pad", "eos"]
# At least, and at most: a table's rows are numbered in int64, and an n-gram beyond 16 tokens repeats nowhere.
_RANGES = {
    "order": (2, 16),
    "heads": (1, 256),
    "rows_per_head": (2, 1 << 48),
    "row_width": (1, 1 << 16),
    "taps": (1, 64),
    "seed": (0, 1 << 62),
    "gain_offset": (0, 1),
}


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """An n-gram memory (arXiv 2601.07372). `MemorySettings.preset(name)` has those of published systems.

    Raises `MHCError` MHC220 for a value that is not possible.
    """

    name: str = "paper"
    """The preset these settings started from; the fields alone say what is computed."""
    order: int = 3
    """N: n-grams of 2 to N tokens."""
    heads: int = 8
    """K: hashes an order."""
    rows_per_head: int = 2_262_400
    """The smallest modulus is the first prime that is not less; heads, orders and layers take consecutive primes.

    The released "next unused prime over all orders and layers" and "n-th prime after the base" both give these."""
    row_width: int = 80
    """D: a token reads (N - 1) * K * D values."""
    convolution: bool = True
    """Whether a causal depthwise convolution with dilation N follows the gate."""
    taps: int = 4
    """Of the convolution's kernel."""
    signed_root: bool = True
    """`sign(s) * sqrt(max(|s|, 1e-6))` under the gate's sigmoid, as released systems do; False: `s`, as in the paper's
    equation."""
    compress: bool = True
    """Whether ids whose texts differ in case, accents or spacing alone count as one."""
    seed: int = 0
    """Of the multipliers."""
    multipliers: Multipliers = "pcg64"
    """`pcg64`: by the layer's 0-based index in the model; `splitmix64`: by its ordinal among the memory layers."""
    pad_rows_to: Literal[1, 128] = 1
    """Tables have a multiple of this many rows."""
    fill: Fill = "pad"
    """The special token that stands where an n-gram reaches back too far."""
    resets_after_eos: bool = False
    """Whether n-grams begin anew after an end-of-text token."""
    gain_offset: Literal[0, 1] = 0
    """1: the norms' gains are 1 + w, and w is what is stored."""
    layers: tuple[int | str, ...] = (1, 14)
    """The layers at whose entry a memory is added: 0-based indices, or module paths."""
    eps: float = 1e-6
    """Of the RMS norms."""

    def __post_init__(self) -> None:
        check_ranges(self, _RANGES)
        for name in ("convolution", "signed_root", "compress", "resets_after_eos"):
            if not isinstance(getattr(self, name), bool):
                raise MHCError("MHC220", f"{name}={getattr(self, name)!r}; True or False")
        choices: dict[str, tuple[Any, ...]] = {
            "multipliers": get_args(Multipliers),
            "fill": get_args(Fill),
            "pad_rows_to": (1, 128),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if isinstance(value, bool) or value not in known:
                raise MHCError("MHC220", f"{name}={value!r}; known: {', '.join(map(str, known))}")
        if not isinstance(self.eps, float) or not 0 < self.eps < 1:
            raise MHCError("MHC220", f"eps={self.eps!r}; a number between 0 and 1")
        if self.resets_after_eos and self.fill != "eos":
            raise MHCError("MHC220", "resets_after_eos=True needs fill='eos'")
        if not isinstance(self.name, str):
            raise MHCError("MHC220", f"name={self.name!r}; a text")
        if not isinstance(self.layers, (tuple, list)) or not self.layers or len(set(self.layers)) < len(self.layers):
            raise MHCError("MHC220", f"layers={self.layers!r}; distinct layers, at least one")
        if bad := [x for x in self.layers if not (x if isinstance(x, str) else is_int(x) and x >= 0)]:
            raise MHCError("MHC220", f"layers: {bad[0]!r} is no 0-based index and no module path")
        object.__setattr__(self, "layers", tuple(self.layers))

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """Return the settings of a published system with `overrides`. Raises MHC220 for unknown names.

        `paper`: the 27B model of arXiv 2601.07372. `v41`: DeepSeek-V4.1. `qwen_ple`: Qwen4-Exp's per-layer embeddings.
        """
        if name not in PRESETS:
            raise MHCError("MHC220", f"preset {name!r}; known: {', '.join(PRESETS)}")
        if unknown := sorted(set(overrides) - {f.name for f in fields(cls)}):
            raise MHCError("MHC220", f"unknown field {unknown[0]!r}; known: {', '.join(f.name for f in fields(cls))}")
        return cls(**{"name": name, **PRESETS[name], **overrides})

    @property
    def hashes(self) -> int:
        """Rows that a token reads: (N - 1) * K."""
        return (self.order - 1) * self.heads

    @property
    def memory_width(self) -> int:
        """d_mem, the width of a token's concatenated rows: (N - 1) * K * D."""
        return self.hashes * self.row_width


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "v41": {"order": 4, "rows_per_head": 16_000_000, "row_width": 256, "convolution": False},
    "qwen_ple": {
        "rows_per_head": 20_000_000,
        "row_width": 160,
        "compress": False,
        "seed": 1234,
        "multipliers": "splitmix64",
        "pad_rows_to": 128,
        "fill": "eos",
        "resets_after_eos": True,
        "gain_offset": 1,
        "layers": (1,),
    },
}
"""Where each differs from the fields' defaults, which are the paper's."""


def hash_specs(settings: MemorySettings, layers: Sequence[int], vocab: int, fill: int) -> list[HashSpec]:
    """Return the hash of each memory layer.

    `layers` are all of the model's, 0-based and ascending, as each takes the next unused primes; `vocab` is V', the
    number of ids after compression (without compression V); `fill` is the id, after compression, of the token that
    `settings.fill` names. Raises MHC220 for impossible values.
    """
    if not is_int(vocab) or not 1 <= vocab < 1 << 32:
        raise MHCError("MHC220", f"a vocabulary of {vocab!r} ids")
    if not is_int(fill) or not 0 <= fill < vocab:
        raise MHCError("MHC220", f"fill={fill!r} is no id of a vocabulary of {vocab}")
    order = list(layers)
    if not order or not all(is_int(i) and i >= 0 for i in order) or order != sorted(set(order)):
        raise MHCError("MHC220", f"layers={layers!r}; distinct 0-based indices in ascending order")
    return list(_hash_specs(settings, tuple(order), vocab, fill))


@lru_cache(maxsize=64)
def _hash_specs(settings: MemorySettings, layers: tuple[int, ...], vocab: int, fill: int) -> tuple[HashSpec, ...]:
    each = settings.hashes
    moduli = primes_from(settings.rows_per_head, each * len(layers))
    specs = []
    for ordinal, layer in enumerate(layers):
        if settings.multipliers == "pcg64":
            multipliers = pcg64_multipliers(settings.seed, layer, settings.order, vocab)
        else:
            multipliers = splitmix64_multipliers(settings.seed, ordinal, settings.order, vocab)
        of_layer = moduli[ordinal * each : (ordinal + 1) * each]
        specs.append(HashSpec(multipliers=multipliers, moduli=of_layer, fill=fill))
    return tuple(specs)


def table_rows(settings: MemorySettings, spec: HashSpec) -> int:
    """Return the rows of one layer's table: those that can be hit, rounded up to a multiple of `pad_rows_to`."""
    unit = settings.pad_rows_to
    return -(-spec.rows // unit) * unit


def fusion_spec(settings: MemorySettings) -> FusionSpec:
    """Return how the memory enters the streams."""
    return FusionSpec(
        dilation=settings.order if settings.convolution else 0,
        taps=settings.taps,
        signed_root=settings.signed_root,
        eps=settings.eps,
    )
