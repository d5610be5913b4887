"""How a kernel's work is cut into tiles: tokens, columns, warps, stages. Fixed by default, measured on request.

More tokens per block read phi less often, fewer leave the streams in the level-2 cache until they are weighed. Every
choice gives a fixed order of additions, but two choices give two orders: results are bit-equal for one choice alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch

from mhc_compile.kernels.cache import cache_dir
from mhc_compile.kernels.chain import Chain

# Partial sums of phi's gradient: more fill a GPU better, each costs the size of phi in memory.
MAX_SPLITS = 16
NARROW = 32
"""The columns from which on a float32 backward uses tensor cores."""
SHIPPED = Path(__file__).with_name("tiles.json")
"""Written by `mhc-compile bench gpu`. A key names a kernel's text and a GPU: for others it says nothing."""


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """One way to cut a kernel's work."""

    tokens: int
    """BT; of `phi_gradient` the tokens of one step, of a memory's `walk` its steps."""
    columns: int
    """BK."""
    warps: int
    stages: int = 2
    """Depth of the software pipeline of loads."""


def _cut(tokens: int, columns: int, warps: int) -> TileConfig:
    return TileConfig(tokens=tokens, columns=columns, warps=warps)


# Of chains with a projection, by kernel and family of GPUs: for streams in float32, for streams in half precision.
# At n = 4 no value leaves the registers for memory, with or without a norm; tests compile them all.
_CUTS = {
    ("forward", "sm_80"): (_cut(32, 32, 8), _cut(32, 32, 8)),
    ("forward", "sm_90"): (_cut(64, 32, 8), _cut(64, 32, 8)),
    ("forward", "sm_100"): (_cut(64, 32, 8), _cut(64, 32, 8)),
    ("forward", "gfx"): (_cut(64, 32, 8), _cut(64, 32, 8)),
    ("backward", "sm_80"): (_cut(16, 16, 8), _cut(16, 32, 8)),
    ("backward", "sm_90"): (_cut(16, 16, 8), _cut(16, 64, 8)),
    ("backward", "sm_100"): (_cut(16, 16, 8), _cut(16, 32, 8)),
    ("backward", "gfx"): (_cut(16, 16, 4), _cut(16, 16, 4)),
}


def default(chain: Chain, kernel: str, arch: int | str) -> TileConfig:
    """Return the choice without measuring, for an architecture (80, 90, ... for NVIDIA, "gfx942", ... for AMD)."""
    if kernel == "phi_gradient":
        cuts = {"sm_90": _cut(32, 64, 4), "sm_100": _cut(32, 32, 4)} if chain.streams_dtype == torch.bfloat16 else {}
        return cuts.get(_family(arch), _cut(16, 64, 4))
    if not chain.projects:  # tokens alone are shared out: small blocks fill the GPU
        return _cut(4, 128 if kernel == "backward" else 256, 4)
    of_float32, of_half = _CUTS[kernel, _family(arch)]
    if chain.streams_dtype != torch.float32:
        # With a pipeline this kernel alone needs two registers more than there are.
        tight = (kernel, chain.norm, _family(arch)) == ("backward", "rms", "sm_100")
        return replace(of_half, stages=1) if tight else of_half
    if (kernel, chain.kind, chain.norm, _family(arch)) == ("backward", "boundary", "none", "sm_90"):
        return _cut(16, 32, 8)  # one program on a multiprocessor, but shared memory would bound narrow ones
    # With a pipeline, NVIDIA's compiler takes 128 registers of 255 for this kernel and leaves two values in memory.
    alone = kernel == "backward" and chain.kind == "deferred" and chain.norm != "none"
    return replace(of_float32, stages=1) if alone else of_float32


def _family(arch: int | str) -> str:
    if isinstance(arch, str):
        return "gfx"
    # From 9.0 on matrix instructions take their operands from shared memory, but not on consumers' GPUs.
    return "sm_100" if 100 <= arch < 120 else "sm_90" if 90 <= arch < 100 else "sm_80"


def candidates(chain: Chain, kernel: str, arch: int | str) -> list[TileConfig]:
    """Return the choices to measure, the default first."""
    tokens = (16, 32, 64) if chain.projects or kernel == "phi_gradient" else (2, 4, 8)
    columns = (32, 64, 128) if chain.projects or kernel == "phi_gradient" else (128, 256, 512)
    return tried_with(default(chain, kernel, arch), tokens, columns, warps=(4, 8))


def tried_with(
    first: TileConfig, tokens: Sequence[int], columns: Sequence[int], *, warps: Sequence[int], largest: int = 4096
) -> list[TileConfig]:
    """Return the tiles of these sizes with 512 to `largest` values, after the `first`."""
    tried = [
        TileConfig(tokens=t, columns=c, warps=w, stages=s)
        for t in tokens
        for c in columns
        for w in warps
        for s in (2, 3)
        if 512 <= t * c <= largest
    ]
    return [first, *(tile for tile in tried if tile != first)]


def autotunes() -> bool:
    """Return whether `MHC_COMPILE_AUTOTUNE=1` asks for measuring."""
    return os.environ.get("MHC_COMPILE_AUTOTUNE", "0") == "1"


@cache
def shipped() -> dict[str, TileConfig]:
    """Return the choices that were measured before and come with the package, by the keys of `fastest`."""
    return {key: TileConfig(**tile) for key, tile in json.loads(SHIPPED.read_text(encoding="utf-8")).items()}


def fastest(key: str, choices: list[TileConfig], seconds: Callable[[TileConfig], float]) -> TileConfig:
    """Return the choice with the least `seconds`, measured once for `key` and kept in the cache directory.

    A choice for which `seconds` raises RuntimeError (too much shared memory, say) is left out; the first one is taken
    where all do.
    """
    path = cache_dir() / f"{key}.tile.json"
    if path.exists():
        return TileConfig(**json.loads(path.read_text(encoding="utf-8")))
    best, least = choices[0], float("inf")
    for choice in choices:
        try:
            took = seconds(choice)
        except RuntimeError:
            continue
        if took < least:
            best, least = choice, took
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(asdict(best)), encoding="utf-8")
    part.replace(path)
    return best
