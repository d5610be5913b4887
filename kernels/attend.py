"""The read of attention over depth as one fused computation, for any target: of Attention Residuals, and of Inkling2.

    n_i = s_i / rms(s_i)            z_i = <w, n_i>                  p = softmax of z
    h = N sum of p_i s_i            Attention Residuals (arXiv 2603.15031): w = query * gain
    h_q = sum of p_qi n_i           `normalised`: what is summed is normalised too, for each of Q queries w_q

over the N sources s_i. The forward reads each source once: h is a running sum, scaled down whenever a larger logit
comes (an online softmax). The backward reads them for dp and, from the caches, for the rest: <dh, h>, which is the mean
of dp, would do without the first, but not to the precision of gradients where h is stored in half precision. With
f_i = N, or 1 / rms(s_i) where normalised:

    dp_i = f_i <dh, s_i>            dz_i = p_i (dp_i - sum of p_j dp_j)             dw = sum of dz_i n_i
    ds_i = f_i p_i dh + dz_i / rms(s_i) * w - (dz_i z_i [+ p_i dp_i where normalised]) s_i / (C rms(s_i)^2)

summed over the queries. Shapes: sources `s0`, `s1`, ... `[..., C]`; h `[..., C]`, query and gain `[C]`, or h
`[..., Q, C]` and query `[Q, C]` where normalised; z `[..., (Q + 1) N]`, the logits and then 1 / rms of each source, is
kept for the backward. Sources share a dtype, and h has it too where not normalised; all else is float32 (float64 where
they are).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from mhc_compile.kernels.kernelspec import Direction, KernelSpec, Sizes, Values, dtype_names
from mhc_compile.kernels.reference import compute_dtype

RMS_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Attend(KernelSpec):
    """The read of one site or exit."""

    WIDE: ClassVar[tuple[str, ...]] = ("h",)

    kind: Literal["attend"] = "attend"
    sources: int
    """N."""
    width: int
    """C, the hidden size."""
    sources_dtype: torch.dtype = torch.float32
    """The dtype of the sources."""
    normalised: bool = False
    """Whether what is summed is normalised, too."""
    queries: int = 1
    """Q: 1 where not normalised."""

    @property
    def n(self) -> int:
        """The number of sources."""
        return self.sources

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sources."""
        return tuple(f"s{i}" for i in range(self.sources))

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters."""
        return ("query",) if self.normalised else ("query", "gain")

    @property
    def name(self) -> str:
        """A name for generated functions and tables: `attend_n5_c1024_float32`, `attend_n5_q3_c1024_float32`."""
        queries = f"_q{self.queries}" if self.normalised else ""
        return f"attend_n{self.sources}{queries}_c{self.width}_{dtype_names([self.sources_dtype])}"

    def floats(self) -> dict[str, torch.dtype]:
        """Return the dtype of the sources."""
        return {"s0": self.sources_dtype}

    def inputs(self, direction: Direction = "forward") -> tuple[str, ...]:
        """Return the names of what one direction reads, in order."""
        names = (*self.names, *self.parameters)
        return names if direction == "forward" else (*names, "z", "d_h")

    def outputs(self, direction: Direction = "forward") -> tuple[str, ...]:
        """Return the names of what one direction writes, in order."""
        return ("h", "z") if direction == "forward" else tuple(f"d_{name}" for name in self.inputs())

    def shape(self, name: str, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape of a value; `sizes` are its leading dimensions."""
        name = name.removeprefix("d_")
        row = (self.queries, self.width) if self.normalised and name in ("query", "h") else (self.width,)
        if name in ("query", "gain"):
            return row
        return (*sizes, (self.queries + 1) * self.sources) if name == "z" else (*sizes, *row)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a value."""
        in_sources_dtype = self.names if self.normalised else (*self.names, "h")
        wide = name.removeprefix("d_") not in in_sources_dtype
        return compute_dtype(self.sources_dtype) if wide else self.sources_dtype

    def sizes(self, values: Values) -> Sizes:
        """Return the leading dimensions of the sources."""
        return tuple(values["s0"].shape[:-1])

    def numbers(self, sizes: Sizes) -> dict[str, int]:
        """Return the number of tokens."""
        return {"tokens": math.prod(sizes)}

    def of_dtypes(self, values: Values) -> Self:
        """Return the read of sources of the dtype at hand."""
        return replace(self, sources_dtype=values["s0"].dtype)

    def reference(self, values: Values) -> dict[str, Tensor]:
        """Compute h and z in plain PyTorch."""
        sources = [values[name] for name in self.names]
        if self.normalised:
            h, z = attend_normalised(sources, values["query"])
        else:
            h, z = attend(sources, values["query"], values["gain"])
        return {"h": h, "z": z}

    def wide(self, direction: Direction) -> tuple[str, ...]:
        """Return h, the sources, and their gradients."""
        every = (*self.inputs(direction), *self.outputs(direction))
        return tuple(name for name in every if name.removeprefix("d_") in (*self.names, *self.WIDE))

    def bytes_moved(self, tokens: int, *, backward: bool = False) -> int:
        """Return what must travel between memory and processor: `(N+Q)C` forward, `(2N+Q)C` backward, a token."""
        wide = (1 + backward) * self.sources * self.sources_dtype.itemsize + self.queries * self.dtype("h").itemsize
        parameters = 4 * sum(math.prod(self.shape(name, ())) for name in self.parameters)
        logits = 4 * (self.queries + 1) * self.sources
        return tokens * (self.width * wide + logits) + parameters * (1 + backward)

    def operations(self, tokens: int, *, backward: bool = False) -> int:
        """Return the multiplications and additions over the width."""
        return tokens * self.width * self.sources * (2 + 8 * self.queries if backward else 2 + 4 * self.queries)


def attend(sources: Sequence[Tensor], query: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Return h `[..., C]` in the sources' dtype, and z `[..., 2N]`, computed in max(float32, that dtype)."""
    dtype = compute_dtype(sources[0].dtype)
    weight, wide = query.to(dtype) * gain.to(dtype), [source.to(dtype) for source in sources]
    scales = [torch.rsqrt(s.square().mean(-1) + RMS_EPS) for s in wide]
    logits = torch.stack([(s @ weight) * scale for s, scale in zip(wide, scales, strict=True)], -1)
    shares = torch.softmax(logits, -1) * len(sources)
    total = sum(shares[..., i, None] * s for i, s in enumerate(wide))
    assert isinstance(total, Tensor)
    return total.to(sources[0].dtype), torch.cat([logits, torch.stack(scales, -1)], -1)


def attend_normalised(sources: Sequence[Tensor], query: Tensor) -> tuple[Tensor, Tensor]:
    """Return h `[..., Q, C]` and z `[..., (Q + 1) N]`, computed and returned in max(float32, the sources' dtype)."""
    dtype = compute_dtype(sources[0].dtype)
    stacked = torch.stack([source.to(dtype) for source in sources], -2)
    scales = torch.rsqrt(stacked.square().mean(-1) + RMS_EPS)
    normed = stacked * scales[..., None]
    logits = query.to(dtype) @ normed.transpose(-1, -2)
    return torch.softmax(logits, -1) @ normed, torch.cat([logits.flatten(-2), scales], -1)
