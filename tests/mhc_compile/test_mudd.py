"""MUDDFormer: the published equations by hand over a model's own modules, in float64; generation, folders, training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attending import SPELLINGS, Attending, converted
from tiny_models import gpt2, ids, llama, logits, predicted, shake, static_cache_agrees, t5, used
from torch import Tensor, nn
from torch.nn import functional as F

import mhc_compile
from mhc_compile import convert, stream_parameters
from mhc_compile.conversion import to_residual
from mhc_compile.parameters import owners


def normed(x: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def dense(plain: Attending, converted: nn.Module, input_ids: Tensor) -> Tensor:
    """Compute `plain` with the MUDD connections of a converted model."""
    (parameters,) = owners(converted).values()
    numbers = [dict(parameters.get_submodule(name).named_parameters()) for name in (*parameters.sites, "head")]
    streams = [plain.embed(input_ids)]
    for k, own in enumerate(numbers):
        down, up, weights = (own[name].double() for name in ("down", "up", "weights"))
        rows = (F.gelu(normed(streams[-1]) @ down.T) @ up).unflatten(-1, weights.shape) + weights
        if (scale := own.get("scale")) is None:
            reads = torch.einsum("bscj,jbsd->cbsd", rows, torch.stack(streams))
        else:
            sums = torch.einsum("bscj,jbsd->cbsd", rows, normed(torch.stack(streams)))
            reads = normed(sums) * scale.double()[:, None, None] + streams[-1]
        if k == len(numbers) - 1:
            return plain.head(reads[0])
        query, key, value, rest = reads
        if k % 2 == 0:
            streams.append(rest + plain.attend(k // 2, *(plain.norms[k](x) for x in (query, key, value))))
        else:
            streams.append(rest + plain.mlps[k // 2](plain.norms[k](value)))
    raise AssertionError


@pytest.mark.parametrize(
    ("form", "spelling", "joined"), [*(("mudd", *way) for way in SPELLINGS), ("mudd_norm", "fused", True)]
)
def test_the_equations(form: str, spelling: str, joined: bool) -> None:
    plain, model = converted(spelling, joined, form, 0.1)
    expected, result = dense(plain, model, ids()), model(ids())
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    own = list(stream_parameters(model).values())
    by_name = dict(model.named_parameters())
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = torch.autograd.grad((expected * weight).sum(), [*plain.parameters(), *own])
    ours = torch.autograd.grad((result * weight).sum(), [*(by_name[n] for n, _ in plain.named_parameters()), *own])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "form"),
    [
        (llama, "mudd"),
        (llama, "mudd_norm"),
        pytest.param(gpt2, "mudd", marks=pytest.mark.slow),
        pytest.param(t5, "mudd", marks=pytest.mark.slow),
    ],
)
def test_conversion_keeps_the_function_and_goes_back(make: Callable[[], nn.Module], form: str) -> None:
    model = make()
    with torch.no_grad():
        before = predicted(model)
        after = predicted(convert(model, form=form, inner="eager", debug="numeric"))
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(predicted(to_residual(model)), before, rtol=0, atol=0)


def test_query_key_and_value_read_streams_of_their_own() -> None:
    """With weights that differ in the row of the key alone, keys change: attention moves, the stream does not."""
    model = convert(llama(), form="mudd", inner="eager")
    with torch.no_grad():
        before = logits(model(ids()))
        (parameters,) = owners(model).values()
        site = parameters.get_submodule(list(parameters.sites)[2])
        changes = []
        for row in range(4):
            site.weights[row, 0] += 0.5
            changes.append(float((logits(model(ids())) - before).abs().max()))
            site.weights[row, 0] -= 0.5
    notes = [note for record in mhc_compile.inspect(model).passes for note in record.notes]
    assert "2 attentions read streams of their own, in 4 branches" in notes
    assert min(changes) > 1e-6
    assert len({f"{change:.6g}" for change in changes}) == 4


def test_a_static_cache() -> None:
    """Keys and values are written into buffers, of which attention reads a part."""
    model = convert(llama(), form="mudd", inner="eager")
    shake(model, 0.5)
    assert static_cache_agrees(model)


@pytest.mark.parametrize(
    ("inner", "form"),
    [
        ("eager", "mudd"),
        pytest.param("inductor", "mudd", marks=pytest.mark.slow),
        pytest.param("inductor", "mudd_norm", marks=pytest.mark.slow),
    ],
)
def test_training_generation_and_folders(inner: str, form: str, tmp_path: Path) -> None:
    used(convert(llama(), form=form, inner=inner), tmp_path)
