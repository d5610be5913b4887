"""Kernel specifications: what one fused chain of stream operations computes, whatever target it is generated for.

A chain reads the streams of a block of tokens once and does up to three things with them:

    mix       X' = H @ X + outer(post, y)                       the site before
    weights   pre, post, H of the next site, or another way to weigh the streams
    collapse  h = weights @ X'                                  what the next branch reads
    norm      the branch's own RMSNorm or LayerNorm of h, where it begins with one

`boundary`, all three in one, is the step from one site to the next: `(3n+1)C` of traffic in one pass instead of three
(arXiv 2512.24880, Table 2 and section 4.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from mhc_compile.kernels.spec import StreamSpec

Weights = Literal["none", "given", "site", "head", "mean", "sum"]
Norm = Literal["none", "rms", "layer"]
Kind = Literal["distribute", "aggregate", "coefficients", "read", "boundary", "reduce", "leave"]


@dataclass(frozen=True, kw_only=True)
class Chain:
    """One fused chain, forward and backward. Hashable: generated code is cached under it."""

    kind: Kind
    stream: StreamSpec
    """n, convention, manifold, iterations and exit; `distribute` and `aggregate` use n alone."""
    width: int
    """C, the hidden size."""
    streams_dtype: torch.dtype = torch.float32
    """Of X, X' and h."""
    branch_dtype: torch.dtype = torch.float32
    """Of the branch output y."""
    norm: Norm = "none"
    """What h goes through before it is written, over C with a weight (`rms`), or a weight and a bias (`layer`)."""
    norm_eps: float = 0.0

    @property
    def mixes(self) -> bool:
        """Whether it begins with `X' = H @ X + outer(post, y)`."""
        return self.kind in ("distribute", "boundary", "leave")

    @property
    def keeps_streams(self) -> bool:
        """Whether X' is written: not where the exit is all that reads it."""
        return self.kind in ("distribute", "boundary")

    @property
    def weights(self) -> Weights:
        """What weighs the streams: a tensor given, the coefficients of a site, the exit of the specification."""
        if self.kind in ("reduce", "leave"):
            return self.stream.exit
        by_kind: dict[str, Weights] = {
            "distribute": "none", "aggregate": "given", "coefficients": "site", "read": "site", "boundary": "site"
        }  # fmt: skip
        return by_kind[self.kind]

    @property
    def collapses(self) -> bool:
        """Whether h is an output."""
        return self.kind not in ("distribute", "coefficients")

    @property
    def projects(self) -> bool:
        """Whether it multiplies the flattened streams by phi: a site's or a learned head's."""
        return self.weights in ("site", "head")

    @property
    def reads_streams_backward(self) -> bool:
        """Whether its gradients depend on X: not those of a mean or a sum."""
        return self.kind != "reduce" or self.projects

    @property
    def rows(self) -> int:
        """Rows of phi: those of the site, n of a head, none otherwise."""
        return {"site": self.stream.rows, "head": self.stream.streams}.get(self.weights, 0)

    @property
    def name(self) -> str:
        """A name for generated functions and tables: `boundary_n4_c1024_float32`."""
        dtypes = [str(self.streams_dtype).removeprefix("torch.")]
        if self.mixes and self.branch_dtype != self.streams_dtype:
            dtypes.append(str(self.branch_dtype).removeprefix("torch."))
        normed = "" if self.norm == "none" else f"_{self.norm}"
        return f"{self.kind}{normed}_n{self.stream.streams}_c{self.width}_{'_'.join(dtypes)}"

    def bytes_moved(self, tokens: int, *, backward: bool = False) -> int:
        """What must travel between memory and processor: every stream, branch and coefficient value once, phi once.

        Forward of a boundary: `n*C + C` read, `n*C + C` written a token, 10C at n = 4; backward 15C, because X' is
        computed again from X and y (math: `(3n+3)C`).
        """
        n, size = self.stream.streams, self.streams_dtype.itemsize
        branch = self.branch_dtype.itemsize if self.mixes else 0
        read, written = n * size + branch, (n * size if self.keeps_streams else 0)
        if self.collapses:
            written += size
        if backward:  # reads the saved inputs and the outputs' gradients, writes the inputs' gradients
            read = (read if self.reads_streams_backward else 0) + written
            written = n * size + branch
        small = 4 * ((n + n * n) * self.mixes + (n + n * n) * (self.weights == "site") + self.rows)
        phi = 4 * self.rows * n * self.width * (2 if backward else 1)
        return tokens * ((read + written) * self.width + (2 if backward else 1) * small) + phi

    def operations(self, tokens: int, *, backward: bool = False) -> int:
        """Multiplications and additions over the width, those of the n x n arithmetic left out."""
        n = self.stream.streams
        mix = 2 * (n * n + n) * self.mixes
        project = 2 * n * self.rows
        collapse = 2 * n * self.collapses
        if backward:  # X' again and two products a product of the forward
            return tokens * self.width * (3 * mix + 2 * project + 2 * collapse)
        return tokens * self.width * (mix + project + collapse)


def dtypes_against(chain: Chain, known: tuple[torch.dtype, ...]) -> str:
    """Why a target whose kernels are for streams and branches of the `known` dtypes has none; nothing where it has."""
    if chain.streams_dtype not in known or (chain.mixes and chain.branch_dtype not in known):
        names = ", ".join(str(t).removeprefix("torch.") for t in known)
        return f"kernels are for {names}, not {chain.streams_dtype} streams and {chain.branch_dtype} branches"
    if chain.mixes and torch.promote_types(chain.streams_dtype, chain.branch_dtype) != chain.streams_dtype:
        return f"a branch in {chain.branch_dtype} makes the streams change from {chain.streams_dtype}"
    return ""
