"""Value residual: an attention's values keep a part of the first attention's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mhc_compile.kernels.form import DepthForm, Parameter, SiteWriter, State
from mhc_compile.kernels.reference import compute_dtype
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.start import Start


class ValueResidual(DepthForm):
    """Value residual (arXiv 2410.17897): V' = first V_1 + own V, with the values V_1 of the stream's first attention.

    V is what a projection computed of the tokens at hand, before heads are split or a cache joins it to earlier ones.
    The stream is the model's own: first = 0 and own = 1 are the residual network.
    """

    name = "value_residual"
    later_attentions: ClassVar[bool] = True

    def parameters(self, spec: StreamSpec, index: int, hidden: int, start: Start) -> dict[str, Parameter]:  # noqa: ARG002
        """Return weights `[2]`, first and own."""
        return {"weights": Parameter((2,), lambda: torch.tensor([0.0, 1.0]))}

    def read(self, outputs: Sequence[Tensor], places: Sequence[int], spec: StreamSpec, **parameters: Tensor) -> Tensor:  # noqa: ARG002
        """Return V' of the two `outputs`, computed in max(float32, their dtype)."""
        dtype = compute_dtype(outputs[0].dtype)
        first, own = parameters["weights"].to(dtype)
        return (first * outputs[0].to(dtype) + own * outputs[1].to(dtype)).to(outputs[1].dtype)

    def weights(
        self, outputs: Sequence[Tensor], places: Sequence[int], spec: StreamSpec, **parameters: Tensor  # noqa: ARG002
    ) -> Tensor:  # fmt: skip
        """Return first and own."""
        return parameters["weights"]

    def rewrite(self, site: SiteWriter) -> State:
        """Mix the values of the site's attention; leave the stream as it is."""
        site.mix_values(self.op, *site.parameters, site.text)
        return (site.sum(),)
