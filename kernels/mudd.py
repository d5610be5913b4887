"""MUDDFormer, two depth forms: reads that depend on the token, one each for an attention's query, key and value."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from mhc_compile.kernels.form import DepthForm, Parameter, SiteWriter, State
from mhc_compile.kernels.reference import compute_dtype
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.start import Start

RMS_EPS = 1e-6
POST_SCALE = 1e-3
WAYS = 4
"""How many sums a site reads: inputs of query, key and value, and the stream that the branch is added to."""


class MUDDFormer(DepthForm):
    """MUDDFormer (arXiv 2502.12170): dense connections over depth whose weights depend on the token.

        A = GELU(RMSNorm(X_k) @ down.T) @ up + weights        of 4 rows Q, K, V, R over the streams X_0 ... X_k so far
        X_{k+1} = sum of A[R, j] X_j + F(sum of A[Q, j] X_j, sum of A[K, j] X_j, sum of A[V, j] X_j)

    An attention's query and key are computed from the first two, all else of a branch from the third. At the start
    `up` is zero and `weights` one at X_k: the residual network. The published form reads once a layer, this one once a
    branch, and the first branch scales its one input.
    """

    name = "mudd"

    def parameters(self, spec: StreamSpec, index: int, hidden: int, start: Start) -> dict[str, Parameter]:  # noqa: ARG002
        """Return down `[K, C]`, up `[K, 4S]` and weights `[4, S]` for S streams so far, K = 4S."""
        return _parameters(WAYS, index + 1, hidden)

    def head(self, spec: StreamSpec, sites: int, hidden: int, start: Start) -> dict[str, Parameter]:  # noqa: ARG002
        """Return those of the exit, which reads once: up `[K, S]` and weights `[1, S]`."""
        return _parameters(1, sites + 1, hidden)

    def read(self, outputs: Sequence[Tensor], places: Sequence[int], spec: StreamSpec, **parameters: Tensor) -> Tensor:  # noqa: ARG002
        """Return Q, K, V and R `[4, ..., C]`, of an exit `[..., C]`, computed in max(float32, the streams' dtype)."""
        rows = _rows(outputs[-1], parameters)
        terms = [(rows[..., k, None], x.to(rows.dtype)) for k, x in zip(places, outputs, strict=True)]
        ways = self.mix(terms, parameters).movedim(-2, 0).to(outputs[0].dtype)
        return ways if len(ways) > 1 else ways[0]

    def weights(
        self, outputs: Sequence[Tensor], places: Sequence[int], spec: StreamSpec, **parameters: Tensor  # noqa: ARG002
    ) -> Tensor:  # fmt: skip
        """Return the row R."""
        return _rows(outputs[-1], parameters)[..., -1, list(places)]

    def mix(self, terms: Sequence[tuple[Tensor, Tensor]], parameters: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        """Return the sums `[..., 4, C]` of the streams `[..., C]`, each with weights `[..., 4, 1]`, oldest first."""
        return functools.reduce(torch.add, (weights * stream[..., None, :] for weights, stream in terms))

    def total(self, call: Callable[..., Node], outputs: tuple[Node, ...]) -> Node:  # noqa: ARG002
        """Return the newest value of the stream."""
        return outputs[-1]

    def rewrite(self, site: SiteWriter) -> State:
        """Read Q, K, V and R; append R + F(Q, K, V)."""
        stream = site.read_apart(self.op, *site.parameters, site.text)
        assert isinstance(site.carried_state, tuple)
        return (*site.carried_state, site.add(stream))


class NormedMUDDFormer(MUDDFormer):
    """MUDDFormer with PrePostDANorm: the streams are normalised before they are summed, and so are the sums.

        scale * RMSNorm(sum of A_j RMSNorm(X_j)) + X_k        in place of each sum of A_j X_j

    At the start `weights` are zero and `scale` is 1e-3. The norm of the streams has no gain: A scales them.
    """

    name = "mudd_norm"

    def parameters(self, spec: StreamSpec, index: int, hidden: int, start: Start) -> dict[str, Parameter]:
        """Return those of `mudd` and scale `[4, C]`."""
        return _scaled(super().parameters(spec, index, hidden, start), WAYS, hidden)

    def head(self, spec: StreamSpec, sites: int, hidden: int, start: Start) -> dict[str, Parameter]:
        """Return those of the exit, with scale `[1, C]`."""
        return _scaled(super().head(spec, sites, hidden, start), 1, hidden)

    def mix(self, terms: Sequence[tuple[Tensor, Tensor]], parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the sums `[..., 4, C]` of the streams, normalised before and after, added to the newest stream."""
        total = super().mix([(weights, _normed(stream)) for weights, stream in terms], parameters)
        newest = terms[-1][1]
        return parameters["scale"].to(total.dtype) * _normed(total) + newest[..., None, :]


def _rows(newest: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """Return A `[..., 4, S]`, in max(float32, the streams' dtype)."""
    dtype = compute_dtype(newest.dtype)
    down, up, weights = (parameters[name].to(dtype) for name in ("down", "up", "weights"))
    rows = F.gelu(F.linear(_normed(newest.to(dtype)), down)) @ up
    return rows.unflatten(-1, weights.shape) + weights


def _scaled(parameters: dict[str, Parameter], ways: int, hidden: int) -> dict[str, Parameter]:
    shape = parameters["weights"].shape
    return parameters | {
        "weights": Parameter(shape, lambda: torch.zeros(shape)),
        "scale": Parameter((ways, hidden), lambda: torch.full((ways, hidden), POST_SCALE)),
    }


def _normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=RMS_EPS)


def _parameters(ways: int, streams: int, hidden: int) -> dict[str, Parameter]:
    rows = ways * streams
    width = WAYS * streams

    def newest() -> Tensor:
        weights = torch.zeros(ways, streams)
        weights[:, -1] = 1.0
        return weights

    def cosines() -> Tensor:  # rows of variance 1 / C as published, at right angles, the same for every conversion
        row, column = torch.arange(width)[:, None] + 0.5, torch.arange(hidden) + 0.5
        return torch.cos(torch.pi / hidden * row * column) * (2 / hidden) ** 0.5

    return {
        "down": Parameter((width, hidden), cosines),
        "up": Parameter((width, rows), lambda: torch.zeros(width, rows)),
        "weights": Parameter((ways, streams), newest),
    }
