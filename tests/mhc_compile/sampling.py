"""What tests of probes share: a converted model off its start, and one sampled step of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import chain, ids, loss_of, shake
from torch import Tensor, nn

from mhc_compile import Probes, convert
from mhc_compile.kernels.cpp import build
from mhc_compile.probes import Sample

needs_compiler = pytest.mark.skipif(bool(build.compiler_problem()), reason="no C++ compiler: nothing is fused")


def converted(model: nn.Module | None = None, **options: Any) -> nn.Module:
    """A converted model off its start."""
    model = convert(model or chain(depth=3), ids(), **{"streams": 4, "inner": "eager", **options})
    shake(model)
    return model


def sampled(model: nn.Module, run: Callable[[], Any] | None = None) -> list[Sample]:
    probes = Probes(model, every=1)
    with probes.step():
        (run or (lambda: loss_of(model).backward()))()
    return probes.samples


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
