"""Call generated C++ on tensors."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mhc_compile.kernels import signature
from mhc_compile.kernels.chain import Chain, dtypes_against
from mhc_compile.kernels.cpp.build import Direction, load
from mhc_compile.kernels.cpp.memory import POOL

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# A backward keeps every step's matrix of LANES tokens on a thread's stack.
MAX_STEPS_BYTES = 1 << 20


def unsupported(chain: Chain) -> str | None:
    """Why there is no generated C++ for `chain`; None where there is."""
    if reason := dtypes_against(chain, FLOATS):
        return f"C++: {reason}"
    if chain.weights == "site":
        spec = chain.stream
        if spec.manifold not in ("sinkhorn", "identity", "unconstrained"):
            return f"no C++ kernel for the manifold {spec.manifold}"
        if spec.manifold == "sinkhorn" and not 1 <= spec.iterations <= MAX_STEPS_BYTES // (128 * spec.streams**2):
            return f"no C++ kernel for {spec.iterations} Sinkhorn iterations"
    return None


def run(
    chain: Chain, direction: Direction, values: Mapping[str, Tensor], wanted: tuple[str, ...], lead: tuple[int, ...]
) -> dict[str, Tensor]:
    """Run one direction on `values` (in the order of the signature) and return the `wanted` outputs by name."""
    like = values["X"]
    out = {
        name: POOL.empty(
            signature.shape(chain, name.removeprefix("d_"), lead), signature.dtype(chain, name.removeprefix("d_"))
        )
        for name in wanted
    }
    tokens = math.prod(lead)
    if not tokens:
        return {name: t.zero_() for name, t in out.items()}
    stride = signature.token_stride(like)
    held = [
        v if k == "X" and stride is not None else v.to(signature.dtype(chain, k.removeprefix("d_"))).contiguous()
        for k, v in values.items()
    ]
    pointers = [t.data_ptr() for t in (*held, *out.values())]
    sizes = [tokens, chain.stream.streams * chain.width if stride is None else stride]
    load(chain, direction)(
        (ctypes.c_void_p * len(pointers))(*pointers),
        (ctypes.c_int64 * len(sizes))(*sizes),
        ctypes.c_int(torch.get_num_threads()),
    )
    return out
