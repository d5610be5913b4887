"""Streams that a site reads and writes with gates of its own, and that are never mixed."""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_compile.kernels.forms import Parameter, StreamForm
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.start import Start


class Gated(StreamForm):
    """pre and post are parameters, H is the identity: `h = pre @ X`, `X' = X + outer(post, y)`."""

    name = "gated"
    reads_streams = False

    def parameters(self, spec: StreamSpec, index: int, hidden: int, start: Start) -> dict[str, Parameter]:  # noqa: ARG002
        """Return pre `[n]`, which starts by reading one stream, and post `[n]`, which starts at 1."""
        n = spec.streams
        return {"pre": Parameter((n,), lambda: torch.eye(n)[index % n]), "post": Parameter((n,), lambda: torch.ones(n))}

    def coefficients(self, X: Tensor, spec: StreamSpec, **parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same three maps for every token."""
        tokens, n = X.shape[:-2], spec.streams
        pre, post = (parameters[name].repeat(*tokens, 1) for name in ("pre", "post"))
        return pre, post, torch.eye(n, dtype=pre.dtype, device=X.device).repeat(*tokens, 1, 1)
