"""Memory traffic of the fused boundary on paper: `python -m mhc_compile.kernels.traffic [width] [streams]`.

The model is `Chain.bytes_token` (arXiv 2512.24880, Table 2); a kernel that finds the streams in a cache when it
weighs them moves this much; one that does not reads `n * C` values per token once more.
"""

from __future__ import annotations

import sys

import torch

from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.kernelspec import DIRECTIONS
from mhc_compile.kernels.spec import StreamSpec


def table(width: int, streams: int = 4) -> str:
    """Return a table of what a boundary and its three parts move per token, forward and backward, in bfloat16.

    The unit is the hidden size.
    """
    spec = StreamSpec(streams=streams)
    lines = [f"{'chain':<14}{'forward':>9}{'backward':>10}   (times C = {width} values a token, n = {streams})"]
    for kind in ("boundary", "distribute", "coefficients", "aggregate"):
        chain = Chain(
            kind=kind, stream=spec, width=width, streams_dtype=torch.bfloat16, branch_dtype=torch.bfloat16
        )  # fmt: skip
        moved = [chain.bytes_token(direction) / (2 * width) for direction in DIRECTIONS]
        lines.append(f"{kind:<14}{moved[0]:>9.2f}{moved[1]:>10.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(*(int(a) for a in sys.argv[1:3] or ["4096"])))
