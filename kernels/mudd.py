"""MUDDFormer, a depth form: reads that depend on the token, one each for an attention's query, key and value."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from mhc_compile.kernels.form import DepthForm, Parameter, SiteWriter, State
from mhc_compile.kernels.reference import compute_dtype
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.start import Start

RMS_EPS = 1e-6
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
        dtype = compute_dtype(outputs[0].dtype)
        down, up, weights = (parameters[name].to(dtype) for name in ("down", "up", "weights"))
        newest = outputs[-1].to(dtype)
        rows = F.gelu(F.linear(F.rms_norm(newest, newest.shape[-1:], eps=RMS_EPS), down)) @ up
        rows = rows.unflatten(-1, weights.shape) + weights
        total: Tensor | None = None
        for place, output in zip(places, outputs, strict=True):
            term = rows[..., place, None] * output.to(dtype)[..., None, :]
            total = term if total is None else total + term
        assert total is not None
        ways = total.movedim(-2, 0).to(outputs[0].dtype)
        return ways if len(weights) > 1 else ways[0]

    def total(self, call: Callable[..., Node], outputs: tuple[Node, ...]) -> Node:  # noqa: ARG002
        """Return the newest value of the stream."""
        return outputs[-1]

    def rewrite(self, site: SiteWriter) -> State:
        """Read Q, K, V and R; append R + F(Q, K, V)."""
        stream = site.read_apart(self.op, *site.parameters, site.text)
        assert isinstance(site.carried_state, tuple)
        return (*site.carried_state, site.add(stream))


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
