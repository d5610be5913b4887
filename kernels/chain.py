"""Kernel specifications: what one fused chain of stream operations computes, whatever target it is generated for.

A chain reads the streams of a block of tokens once and does up to three things with them:

    mix       X' = H @ X + outer(post, y)                       the site before
    weights   pre, post, H of the next site, or another way to weigh the streams
    collapse  h = weights @ X'                                  what the next branch reads
    norm      the branch's own RMSNorm or LayerNorm of h, where it begins with one

`boundary`, all three in one, is the step from one site to the next: `(3n+1)C` of traffic in one pass instead of three
(arXiv 2512.24880, Table 2 and section 4.3). `deferred` is the same step where `pre` was computed a site ahead
(DeepSeek-V4.1): the streams are weighed as they are mixed, and the coefficients of the site leave with its own `pre`.

Values: `T` tokens (all leading dimensions flattened), `n` streams, `C` hidden size, `R` rows of phi. Streams, h and y
are in the chain's dtypes, all else is float32 (float64 where one of them is).

    X [T, n, C]   y [T, C]   post [T, n]   mix [T, n, n]   pre [T, n]   phi [R, n*C]   alpha [3], of a head [1]
    bias [R]   norm_weight, norm_bias [C]
                                          of Hyper-Connections: phi [n+2, C], alpha [2], bias [2n+n^2]
    next_X [T, n, C]   h [T, C]   next_pre, next_post [T, n]   next_mix [T, n, n]
    z [T, groups * (R + 1)]  phi @ X before the norm, then sums of squares: what the backward needs of the coefficients

Hyper-Connections project and normalise each stream apart: n `groups` of `span` = C values. mHC has one, of n*C values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from mhc_compile.kernels import hc, reference
from mhc_compile.kernels.kernelspec import Direction, KernelSpec, Sizes, Values, dtype_names
from mhc_compile.kernels.mixtures import MIXTURES
from mhc_compile.kernels.spec import StreamSpec

Weights = Literal["none", "site", "head", "mean", "sum"]
Norm = Literal["none", "rms", "layer"]
Kind = Literal["distribute", "aggregate", "coefficients", "read", "boundary", "deferred", "carry", "reduce", "leave"]

NORMED: tuple[Kind, ...] = ("read", "boundary", "deferred")
"""The kinds that may end with the branch's norm."""


@dataclass(frozen=True, kw_only=True)
class Chain(KernelSpec):
    """One fused chain."""

    WIDE: ClassVar[tuple[str, ...]] = ("X", "next_X", "y", "h")

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
    def n(self) -> int:
        """The number of streams."""
        return self.stream.streams

    @property
    def mixes(self) -> bool:
        """Whether it begins with `X' = H @ X + outer(post, y)`."""
        return self.kind in ("distribute", "boundary", "deferred", "carry", "leave")

    @property
    def keeps_streams(self) -> bool:
        """Whether X' is written: not where the exit is all that reads it."""
        return self.kind in ("distribute", "boundary", "deferred", "carry")

    @property
    def weights(self) -> Weights:
        """Return what computes weights of the streams: a site, a learned head, a mean, a sum, or nothing."""
        if self.kind in ("reduce", "leave"):
            assert self.stream.exit != "pre"  # which is an aggregate
            return self.stream.exit
        by_kind: dict[str, Weights] = {
            "distribute": "none", "aggregate": "none", "carry": "none",
            "coefficients": "site", "read": "site", "boundary": "site",
            "deferred": "site",
        }  # fmt: skip
        return by_kind[self.kind]

    @property
    def given(self) -> bool:
        """Whether the weights of h are an input: `pre`."""
        return self.kind in ("aggregate", "carry", "deferred")

    @property
    def weighs_itself(self) -> bool:
        """Whether the weights of h are computed from the streams that they weigh."""
        return self.projects and self.collapses and not self.given

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
    def is_hyper_connection(self) -> bool:
        """Whether its site is one of Hyper-Connections (`mhc_compile.kernels.hc`), not of mHC."""
        return self.weights == "site" and self.stream.form == "hc"

    @property
    def mixture(self) -> bool:
        """Whether H is a mixture of permutations."""
        return self.weights == "site" and self.stream.form == "mhc" and self.stream.manifold in MIXTURES

    @property
    def fills(self) -> bool:
        """Whether H is filled entry by entry."""
        return self.weights == "site" and self.stream.form == "mhc" and self.stream.manifold == "transportation"

    @property
    def uses_sinkhorn(self) -> bool:
        """Whether Sinkhorn's iterations make its mixing matrix."""
        return self.weights == "site" and self.stream.form == "mhc" and self.stream.manifold == "sinkhorn"

    @property
    def rows(self) -> int:
        """Rows of phi: those of the site, n of a head, none otherwise."""
        site = self.n + 2 if self.is_hyper_connection else self.stream.rows
        return {"site": site, "head": self.n}.get(self.weights, 0)

    @property
    def groups(self) -> int:
        """The parts of the flattened streams that phi is multiplied with, each with a norm of its own."""
        return self.n if self.is_hyper_connection else 1

    @property
    def span(self) -> int:
        """Values in one of the groups: columns of phi."""
        return self.n * self.width // self.groups

    @property
    def biases(self) -> int:
        """Values of the bias."""
        return 2 * self.n + self.n**2 if self.is_hyper_connection else self.rows

    @property
    def scales(self) -> int:
        """Values of alpha."""
        return 1 if self.weights == "head" else 2 if self.is_hyper_connection else 3

    @property
    def name(self) -> str:
        """A name for generated functions and tables: `boundary_n4_c1024_float32`."""
        normed = "" if self.norm == "none" else f"_{self.norm}"
        return f"{self.kind}{normed}_n{self.n}_c{self.width}_{dtype_names([*self.floats().values()])}"

    def floats(self) -> dict[str, torch.dtype]:
        """Return the dtypes of streams and branch."""
        return {"X": self.streams_dtype, **({"y": self.branch_dtype} if self.mixes else {})}

    def inputs(self, direction: Direction = "forward") -> tuple[str, ...]:
        """Return the names of what one direction reads, in order."""
        names = ["X"]
        if self.mixes:
            names += ["y", "post", "mix"]
        if self.given:
            names.append("pre")
        if self.projects:
            names += ["phi", "alpha", "bias"]
        if self.norm != "none":
            names.append("norm_weight")
        if self.norm == "layer":
            names.append("norm_bias")
        if direction == "forward":
            return tuple(names)
        gradients = (f"d_{name}" for name in self.outputs() if name != "z")
        return (*names, *(("z",) if self.projects else ()), *gradients)

    def outputs(self, direction: Direction = "forward") -> tuple[str, ...]:
        """Return the names of what one direction writes; `z` is kept for the backward and has no gradient."""
        if direction == "backward":
            return tuple(f"d_{name}" for name in self.inputs())
        names = []
        if self.keeps_streams:
            names.append("next_X")
        if self.collapses:
            names.append("h")
        if self.weights == "site" and not self.weighs_itself:
            names.append("next_pre")
        if self.weights == "site":
            names += ["next_post", "next_mix"]
        if self.projects:
            names.append("z")
        return tuple(names)

    def shape(self, name: str, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape of a value; `sizes` are its leading dimensions."""
        n = self.n
        by_name: dict[str, tuple[int, ...]] = {
            "X": (*sizes, n, self.width),
            "y": (*sizes, self.width),
            "h": (*sizes, self.width),
            "pre": (*sizes, n),
            "post": (*sizes, n),
            "mix": (*sizes, n, n),
            "z": (*sizes, self.groups * (self.rows + 1)),
            "phi": (self.rows, self.span),
            "alpha": (self.scales,),
            "bias": (self.biases,),
            "norm_weight": (self.width,),
            "norm_bias": (self.width,),
        }
        return by_name[name.removeprefix("d_").removeprefix("next_")]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a value."""
        name = name.removeprefix("d_")
        if name in ("X", "next_X", "h"):
            return self.streams_dtype
        if name == "y":
            return self.branch_dtype
        return reference.compute_dtype(self.streams_dtype, self.branch_dtype)

    def sizes(self, values: Values) -> Sizes:
        """Return the leading dimensions of the streams."""
        return tuple(values["X"].shape[:-2])

    def numbers(self, sizes: Sizes) -> dict[str, int]:
        """Return the number of tokens."""
        return {"tokens": math.prod(sizes)}

    def of_dtypes(self, values: Values) -> Self:
        """Return the chain for streams and branches of the dtypes at hand."""
        X = values["X"]
        return replace(self, streams_dtype=X.dtype, branch_dtype=values["y"].dtype if "y" in values else X.dtype)

    def reference(self, values: Values) -> dict[str, Tensor]:
        """Compute the outputs of the forward in plain PyTorch."""
        X, out = values["X"], {}
        if self.mixes:
            X = reference.distribute(X, values["y"], values["post"], values["mix"])
            out["next_X"] = X
        if self.weights == "site":
            parameters = values["phi"], values["alpha"], values["bias"]
            if self.is_hyper_connection:
                pre, post, mix = hc.dynamic(X, *parameters)
            else:
                pre, post, mix = reference.coefficients(X, *parameters, self.stream)
            out |= {"next_pre": pre, "next_post": post, "next_mix": mix, "h": reference.aggregate(X, pre)}
        elif self.weights != "none":
            head = (values["phi"], values["bias"], values["alpha"]) if self.weights == "head" else None
            out["h"] = reference.reduce(X, self.stream, head)
        if self.given:
            out["h"] = reference.aggregate(X, values["pre"])
        if self.norm != "none":
            out["h"] = self._normed(out["h"], values)
        if self.projects:
            v = X.flatten(-2).unflatten(-1, (self.groups, self.span)).to(self.dtype("z"))
            u = F.linear(v, values["phi"].to(v.dtype)).flatten(-2)
            out["z"] = torch.cat([u, v.square().sum(-1)], -1)
        return {name: out[name] for name in self.outputs()}

    def _normed(self, h: Tensor, values: Values) -> Tensor:
        # From h as it is stored.
        wide, weight = h.to(self.dtype("z")), values["norm_weight"]
        if self.norm == "rms":
            return F.rms_norm(wide, (self.width,), weight.to(wide.dtype), self.norm_eps).to(h.dtype)
        bias = values["norm_bias"].to(wide.dtype)
        return F.layer_norm(wide, (self.width,), weight.to(wide.dtype), bias, self.norm_eps).to(h.dtype)

    def bytes_moved(self, tokens: int, *, backward: bool = False) -> int:
        """Return what must travel between memory and processor: streams, branch and coefficients once, phi once.

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
        small = 4 * ((n + n * n) * self.mixes + (n + n * n) * (self.weights == "site") + self.groups * self.rows)
        phi = 4 * self.rows * self.span * (2 if backward else 1)
        return tokens * ((read + written) * self.width + (2 if backward else 1) * small) + phi

    def operations(self, tokens: int, *, backward: bool = False) -> int:
        """Return the multiplications and additions over the width; those of the n x n arithmetic are left out."""
        n = self.stream.streams
        mix = 2 * (n * n + n) * self.mixes
        project = 2 * n * self.rows
        collapse = 2 * n * self.collapses
        if backward:  # X' again and two products a product of the forward
            return tokens * self.width * (3 * mix + 2 * project + 2 * collapse)
        return tokens * self.width * (mix + project + collapse)
