"""The depth forms: Attention Residuals, full and in blocks, and DenseFormer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mhc_compile.kernels.attend import Attend, attend
from mhc_compile.kernels.form import DepthForm, Parameter, SiteWriter, State
from mhc_compile.kernels.kernelspec import KernelSpec
from mhc_compile.kernels.reference import compute_dtype
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.start import Start


class AttentionResiduals(DepthForm):
    """Attention Residuals (arXiv 2603.15031), full: a site reads earlier outputs by attention over depth.

        p = softmax over i of query . (gain * RMSNorm(s_i)),    h = N sum of p_i s_i

    with the N outputs s_i so far. The published h has no factor N. A norm after it cancels the factor, up to its eps;
    with it the start, query = 0, is the residual network for every model.
    """

    name = "attnres"

    def parameters(self, spec: StreamSpec, index: int, hidden: int, start: Start) -> dict[str, Parameter]:  # noqa: ARG002
        """Return query `[C]` and gain `[C]`."""
        return {
            "query": Parameter((hidden,), lambda: torch.zeros(hidden)),
            "gain": Parameter((hidden,), lambda: torch.ones(hidden)),
        }

    def head(self, spec: StreamSpec, sites: int, hidden: int, start: Start) -> dict[str, Parameter]:
        """Return those of the exit."""
        return self.parameters(spec, sites, hidden, start)

    def read(self, outputs: Sequence[Tensor], places: Sequence[int], spec: StreamSpec, **parameters: Tensor) -> Tensor:  # noqa: ARG002
        """Return h, computed in max(float32, the outputs' dtype)."""
        return attend(outputs, parameters["query"], parameters["gain"])[0]

    def weights(
        self, outputs: Sequence[Tensor], places: Sequence[int], spec: StreamSpec, **parameters: Tensor  # noqa: ARG002
    ) -> Tensor:  # fmt: skip
        """Return p."""
        _, z = attend(outputs, parameters["query"], parameters["gain"])
        return torch.softmax(z[..., : len(outputs)], -1)

    def kernel(self, **fields: Any) -> KernelSpec | None:
        """Return the fused read."""
        return Attend(**fields)


class BlockAttentionResiduals(AttentionResiduals):
    """Attention Residuals over blocks: the outputs of a block of sites are summed, and `streams` is how many blocks."""

    name = "attnres_block"

    def rewrite(self, site: SiteWriter) -> State:
        """Read the sums of blocks; add the branch's output to that of its own."""
        site.read(self.op, *site.parameters, site.text)
        state = site.carried_state
        assert isinstance(state, tuple)
        size = -(-site.count // StreamSpec.parse(site.text).streams)
        if site.index % size == 0 or len(state) == 1:
            return (*state, site.branch())
        return (*state[:-1], site.add(state[-1]))


class DenseFormer(DepthForm):
    """DenseFormer (arXiv 2402.02622): the stream becomes a weighted sum of its earlier values before each site.

        Y = X_k + sum of weights_j X_j,    X_{k+1} = Y + F(Y)

    with the entry X_0 and the streams X_j after the sites before. weights = 0 is the residual network; the published
    form averages after each layer, this one after each branch.
    """

    name = "denseformer"

    def parameters(self, spec: StreamSpec, index: int, hidden: int, start: Start) -> dict[str, Parameter]:  # noqa: ARG002
        """Return weights `[index + 1]`."""
        return {"weights": Parameter((index + 1,), lambda: torch.zeros(index + 1))}

    def head(self, spec: StreamSpec, sites: int, hidden: int, start: Start) -> dict[str, Parameter]:
        """Return those of the exit, `[sites + 1]`."""
        return self.parameters(spec, sites, hidden, start)

    def read(self, outputs: Sequence[Tensor], places: Sequence[int], spec: StreamSpec, **parameters: Tensor) -> Tensor:  # noqa: ARG002
        """Return Y, computed in max(float32, the outputs' dtype)."""
        dtype = compute_dtype(outputs[0].dtype)
        weights = parameters["weights"].to(dtype)
        total = outputs[-1].to(dtype)
        for place, output in zip(places, outputs, strict=True):
            total = total + weights[place] * output.to(dtype)
        return total.to(outputs[0].dtype)

    def weights(
        self, outputs: Sequence[Tensor], places: Sequence[int], spec: StreamSpec, **parameters: Tensor  # noqa: ARG002
    ) -> Tensor:  # fmt: skip
        """Return the weights of the outputs at hand, that of X_k with its 1."""
        weights = parameters["weights"][list(places)]
        newest = torch.zeros_like(weights)
        newest[-1] = 1.0
        return weights + newest

    def total(self, call: Callable[..., Node], outputs: tuple[Node, ...]) -> Node:  # noqa: ARG002
        """Return the newest value of the stream."""
        return outputs[-1]

    def rewrite(self, site: SiteWriter) -> State:
        """Read Y; append Y + F(Y)."""
        site.read(self.op, *site.parameters, site.text)
        stream = site.carried(self.op, *site.parameters, site.text)
        assert isinstance(site.carried_state, tuple)
        return (*site.carried_state, site.add(stream))
