"""Rows in float8_e4m3fn with a float32 scale for every 32 channels.

A value x of a block with scale s is off by at most `max(|x| / 16, s / 1024)`: e4m3 keeps three bits after the
leading one down to 2**-6, and steps of 2**-9 below. The scale maps the block's largest value to 448, the format's
largest.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
BLOCK = 32
"""Channels per scale."""
LARGEST = 448.0


def blocks(width: int) -> int:
    """Return the number of scales of a row of `width` channels; the last block may be shorter."""
    return -(-width // BLOCK)


def quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """Convert finite floats `[..., width]` to float8_e4m3fn and float32 scales `[..., blocks(width)]`."""
    values = values.float()
    width = values.shape[-1]
    padded = torch.nn.functional.pad(values, (0, blocks(width) * BLOCK - width))
    parts = padded.unflatten(-1, (-1, BLOCK))
    # Not below the smallest normal number: its reciprocal must be finite.
    scale = (parts.abs().amax(-1) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    narrow = (parts / scale[..., None]).clamp(-LARGEST, LARGEST).to(FP8)
    return narrow.flatten(-2)[..., :width].contiguous(), scale


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the inverse of `quantise`, `[..., width]` in `dtype`."""
    width = weight.shape[-1]
    if width % BLOCK == 0:
        return (weight.to(torch.float32).unflatten(-1, (-1, BLOCK)) * scale[..., None]).flatten(-2).to(dtype)
    return (weight.to(torch.float32) * scale.repeat_interleave(BLOCK, -1)[..., :width]).to(dtype)
