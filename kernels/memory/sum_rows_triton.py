"""`engram_kernels::sum_rows` on a GPU, or under `TRITON_INTERPRET=1` on a CPU: launching its kernels.

They are those of `mhc_compile.kernels.memory.sum_rows_kernel`. Shapes are fixed and nothing waits for the GPU, but for
the gradient of a table that is trained: it has a row for each distinct one that was read, as in every other look-up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from mhc_compile.kernels.memory.spec import ContentSpec

WARPS = 4
KERNELS = ("scales", "weighted_sums", "score_gradients", "read_gradient", "row_gradients")
# A tile's rows and channels, at most. Most rows of a table are found by few tokens.
_ROWS, _PLACES, _CHANNELS = 16, 8, 256


@dataclass(frozen=True)
class Launch:
    """The sizes of one call, by the names of the kernels' constants."""

    tokens: int
    M: int
    READ: int
    CORES: int
    SLICE: int
    GROUPS: int

    @classmethod
    def of(cls, scores: Tensor, table: Tensor, spec: ContentSpec) -> Self:
        """Return the sizes of a call with `scores` [..., M, c]."""
        *tokens, found, cores = scores.shape
        slice_ = (table.shape[1] - spec.input) // cores
        return cls(math.prod(tokens), found, spec.input, cores, slice_, spec.groups)

    def constants(self, kernel: str) -> dict[str, int]:
        """Return the compile-time constants of a kernel."""
        rows = _PLACES if kernel == "row_gradients" else _ROWS
        reads, sums = kernel in ("scales", "read_gradient"), kernel in ("weighted_sums", "score_gradients")
        channels = self.READ if reads else self.SLICE if sums else max(self.READ, self.SLICE)
        sizes = {
            name: size for name, size in vars(self).items() if name != "tokens" and not (reads and name == "GROUPS")
        }
        return {**sizes, "BM": min(_power(self.M), rows), "BK": min(_power(channels), _CHANNELS)}

    def __call__(self, kernel: str, programs: int, *tensors: Tensor) -> None:
        """Launch a kernel with so many programs for each token, or as many as there are tokens or distinct rows."""
        from mhc_compile.kernels.memory import sum_rows_kernel

        device, constants = tensors[0].device, self.constants(kernel)
        grid = (programs,) if kernel == "row_gradients" else (self.tokens, programs)
        options: dict[str, Any] = {} if device.type == "cpu" else {"num_warps": WARPS}  # the interpreter takes none
        with torch.cuda.device(device) if device.type == "cuda" else torch.device(device):
            getattr(sum_rows_kernel, kernel)[grid](*tensors, **constants, **options)

    def blocks(self, kernel: str) -> int:
        """Return how many programs go over the rows found by a token, or over the channels of what it reads."""
        constants = self.constants(kernel)
        return -(-self.READ // constants["BK"]) if kernel == "read_gradient" else -(-self.M // constants["BM"])


def run(rows: Tensor, groups: Tensor, scores: Tensor, input: Tensor | None, table: Tensor, spec: ContentSpec) -> Tensor:
    """Compute `expand` of the rows of `table`. A row out of range fails an assertion on the device."""
    sums = scores.new_empty((*rows.shape[:-1], spec.groups * (table.shape[1] - spec.input)))
    if not rows.numel():
        return sums
    torch._assert_async(((rows >= 0) & (rows < len(table))).all(), f"a row of a table with {len(table)} rows")
    launch = Launch.of(scores, table, spec)
    rows, groups, scores, table = (t.contiguous() for t in (rows, groups, scores, table))
    scale = _scales(launch, rows, table, input)[1]
    launch("weighted_sums", spec.groups, rows, groups, scores, scale, table, sums)
    return sums


def run_backward(
    grad: Tensor,
    rows: Tensor,
    groups: Tensor,
    scores: Tensor,
    input: Tensor | None,
    table: Tensor,
    spec: ContentSpec,
    train: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Compute the gradients of scores and input, and where `train` the distinct rows, ascending, with theirs."""
    d_scores = torch.empty_like(scores, memory_format=torch.contiguous_format)
    d_input = scores.new_empty(0) if input is None else torch.empty_like(input, memory_format=torch.contiguous_format)
    if not rows.numel():
        return d_scores, d_input, None
    launch = Launch.of(scores, table, spec)
    grad, rows, groups, scores, table = (t.contiguous() for t in (grad, rows, groups, scores, table))
    read, scale = _scales(launch, rows, table, input)
    d_scale = torch.empty_like(scale)
    blocks = launch.blocks("score_gradients")
    launch("score_gradients", blocks, rows, groups, scores, scale, table, grad, d_scores, d_scale)
    if input is not None:
        launch("read_gradient", launch.blocks("read_gradient"), rows, table, d_scale, d_input)
    if not train:
        return d_scores, d_input, None
    distinct, inverse, counts = rows.reshape(-1).unique(return_inverse=True, return_counts=True)
    order = inverse.argsort(stable=True)
    begins = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    d_rows = scores.new_empty((len(distinct), table.shape[1]))
    launch("row_gradients", len(distinct), groups, scores, scale, d_scale, read, grad, order, begins, d_rows)
    return d_scores, d_input, (distinct, d_rows)


def _scales(launch: Launch, rows: Tensor, table: Tensor, input: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the input, and its products with the rows found; without one tensors that are not read."""
    if input is None:
        nothing = rows.new_empty(1, dtype=torch.float32)
        return nothing, nothing
    input, scale = input.contiguous(), rows.new_empty(rows.shape, dtype=torch.float32)
    launch("scales", launch.blocks("scales"), rows, table, input, scale)
    return input, scale


def _power(size: int) -> int:
    """Return the least power of two that is not below `size`."""
    return 1 << max(size - 1, 0).bit_length()
