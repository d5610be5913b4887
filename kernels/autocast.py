"""Autocast off, for arithmetic that stays in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def without_autocast(x: Tensor) -> Iterator[None]:
    """Turn autocast off for the device of `x`, where the device has one (`meta` has none)."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):
        yield
        return
    with torch.autocast(device, enabled=False):
        yield
