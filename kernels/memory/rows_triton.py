"""`engram_kernels::rows` on a GPU, or under `TRITON_INTERPRET=1` on a CPU: launching the kernel of `rows_kernel`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mhc_compile.kernels.memory.spec import HashSpec

TOKENS = 16  # per program
WARPS = 4


def run(ids: Tensor, reach: Tensor, before: Tensor | None, spec: HashSpec) -> Tensor:
    """Compute `hashing.rows`. Raises ImportError without Triton."""
    from mhc_compile.kernels.memory.rows_kernel import rows

    B, S = ids.shape
    H = len(spec.moduli)
    out = ids.new_empty((B, S, H), dtype=torch.int64)
    if not B * S:
        return out
    pointers = [out if t is None else t.long().contiguous() for t in (ids, reach, before)]
    device = ids.device
    options: dict[str, Any] = {} if device.type == "cpu" else {"num_warps": WARPS}  # the interpreter takes none
    with torch.cuda.device(device) if device.type == "cuda" else torch.device(device):
        rows[(-(-B * S // TOKENS),)](
            *pointers, constants(spec, device), out, B * S, S, **compile_time(spec, before is not None), **options
        )
    return out


def compile_time(spec: HashSpec, before: bool) -> dict[str, Any]:
    """Return the compile-time constants of the kernel."""
    hashes = len(spec.moduli)
    return {
        "N": spec.order,
        "K": spec.heads,
        "HASHES": hashes,
        "BEFORE": before,
        "BT": TOKENS,
        "BH": 1 << (hashes - 1).bit_length(),
    }


@lru_cache(maxsize=64)
def constants(spec: HashSpec, device: torch.device) -> Tensor:
    """Return the constants that the kernel reads, int64: multipliers, fill, moduli, offsets, inverses."""
    inverses = [((1 << 64) - 1) // p for p in spec.moduli]
    values = (*spec.multipliers, spec.fill, *spec.moduli, *spec.offsets, *inverses)
    wrapped = [(x + (1 << 63)) % (1 << 64) - (1 << 63) for x in values]
    return torch.tensor(wrapped, dtype=torch.int64, device=device)
