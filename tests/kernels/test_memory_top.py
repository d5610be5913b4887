"""The places of the largest values: C++ against `topk`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mhc_compile.kernels.cpp import build
from mhc_compile.kernels.memory import top

needs_compiler = pytest.mark.skipif(bool(build.compiler_problem()), reason="no C++ compiler")


@pytest.fixture(params=[4, 8, 16])
def _floats(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(build, "lanes", lambda: request.param)
    top._library.cache_clear()
    yield
    top._library.cache_clear()


@needs_compiler
@pytest.mark.usefixtures("_floats")
def test_places_of_the_largest_values() -> None:
    choose, rng = torch.ops.engram_kernels.top, torch.Generator().manual_seed(0)
    for n, k in ((1, 1), (5, 3), (16, 16), (37, 1), (128, 16), (130, 129)):
        values = torch.randn(3, 2, n, generator=rng) * 10 ** torch.randn(3, 2, 1, generator=rng)
        for x in (values, -values.abs(), values.mT.contiguous().mT):
            assert torch.equal(choose(x, k), x.topk(k).indices.sort().values)
    # Equal values: as many as are missing, the first.
    assert choose(torch.tensor([0.0, 1, 0, 1, 0, 1, 2, 0]), 3).tolist() == [1, 3, 6]
    assert choose(torch.zeros(40), 39).tolist() == list(range(39))
    # Whatever the values, k different places.
    infinite = torch.tensor([float("inf"), float("nan"), -float("inf"), -float("nan"), 0.0])
    assert choose(infinite, 2).tolist() == [0, 1]
    for k in range(1, 6):
        assert len(set(choose(infinite, k).tolist())) == k


def test_other_dtypes_and_compilers() -> None:
    values = torch.randn(4, 9, dtype=torch.float64)
    assert torch.equal(torch.ops.engram_kernels.top(values, 4).sort().values, values.topk(4).indices.sort().values)
    torch.library.opcheck(torch.ops.engram_kernels.top.default, (values.float(), 4))
    with pytest.raises(RuntimeError):
        torch.ops.engram_kernels.top(values.float(), 10)
