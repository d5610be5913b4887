"""How a memory enters the streams: the reference against sums written out, token by token, and its rules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory import fusion, ops  # noqa: F401  (the ops)
from mhc_compile.kernels.memory.spec import FusionSpec

SOME = settings(max_examples=25, deadline=None, derandomize=True)


def tensors(n: int, C: int, S: int, before: int, spec: FusionSpec, seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = {
        "X": (2, S, n, C), "keys": (2, S, n, C), "a": (2, before + S, n), "value": (2, before + S, C),
        "query_gain": (n, C), "key_gain": (n, C), "conv_gain": (n, C), "conv": (n, C, spec.taps),
    }  # fmt: skip
    made = {k: torch.randn(shape, generator=rng, dtype=torch.float64) for k, shape in shapes.items()}
    made["reach"] = torch.randint(0, spec.history + 3, (2, S), generator=rng)
    return made


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / math.sqrt(float((x**2).mean()) + eps) * gain


@SOME
@given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_the_gate_is_the_published_equation(n: int, C: int, S: int, signed: bool, seed: int) -> None:
    spec = FusionSpec(signed_root=signed, eps=1e-4)
    t = tensors(n, C, S, 0, spec, seed)
    found = fusion.gate(t["X"], t["keys"], t["query_gain"], t["key_gain"], spec)
    for at in ((b, s, m) for b in range(2) for s in range(S) for m in range(n)):
        m = at[-1]
        query, key = rms_norm(t["X"][at], t["query_gain"][m], 1e-4), rms_norm(t["keys"][at], t["key_gain"][m], 1e-4)
        score = float(query @ key) / math.sqrt(C)
        if signed:
            score = math.copysign(math.sqrt(max(abs(score), 1e-6)), score)
        assert float(found[at]) == pytest.approx(1 / (1 + math.exp(-score)), abs=1e-12)


@SOME
@given(
    st.integers(1, 8), st.integers(1, 5), st.integers(1, 9), st.sampled_from([(1, 2), (2, 4), (3, 4), (1, 1)]),
    st.sampled_from(["none", "whole", "some"]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_the_convolution_is_the_sum_over_taps_that_are_reached(
    n: int, C: int, S: int, shape: tuple[int, int], history: str, reached: bool, seed: int
) -> None:
    spec = FusionSpec(dilation=shape[0], taps=shape[1], eps=1e-4)
    before = {"none": 0, "whole": spec.history, "some": spec.history // 2}[history]
    t = tensors(n, C, S, before, spec, seed)
    reach = t["reach"] if reached else None
    found = fusion.inject(t["X"], t["a"], t["value"], reach, t["conv_gain"], t["conv"], spec)
    for b, s, m in ((b, s, m) for b in range(2) for s in range(S) for m in range(n)):
        u = t["a"][b, :, m, None] * t["value"][b]
        y = torch.zeros(C, dtype=torch.float64)
        for k in range(spec.taps):
            offset = (spec.taps - 1 - k) * spec.dilation
            row = before + s - offset
            if row >= 0 and (reach is None or offset <= reach[b, s]):
                y += t["conv"][m, :, k] * rms_norm(u[row], t["conv_gain"][m], 1e-4)
        want = t["X"][b, s, m] + u[before + s] + y / (1 + torch.exp(-y))
        torch.testing.assert_close(found[b, s, m], want, rtol=1e-11, atol=1e-11)
    plain = fusion.inject(t["X"], t["a"], t["value"], reach, None, None, spec)
    u = t["a"][:, before:, :, None] * t["value"][:, before:, None]
    torch.testing.assert_close(plain, t["X"] + u)


def test_gradients_are_those_of_differences() -> None:
    spec = FusionSpec(dilation=2, taps=3, eps=1e-2)
    t = {k: v if k == "reach" else v.requires_grad_() for k, v in tensors(2, 3, 4, 4, spec, 0).items()}
    gains = (t["query_gain"], t["key_gain"])
    assert torch.autograd.gradcheck(lambda *x: fusion.gate(*x, spec), (t["X"], t["keys"], *gains))
    floats = (t["X"], t["a"], t["value"], t["conv_gain"], t["conv"])
    assert torch.autograd.gradcheck(lambda X, a, v, *g: fusion.inject(X, a, v, t["reach"], *g, spec), floats)


def test_a_score_of_zero_takes_half_and_has_no_slope() -> None:
    keys = torch.zeros(1, 2, 4, requires_grad=True)
    a = fusion.gate(torch.randn(1, 2, 4), keys, torch.ones(2, 4), torch.ones(2, 4), FusionSpec())
    assert torch.equal(a, torch.full((1, 2), 0.5))
    (grad,) = torch.autograd.grad(a.sum(), keys)
    assert not grad.any()


def test_arithmetic_is_in_float32_whatever_comes() -> None:
    t = {k: v if k == "reach" else v.bfloat16() for k, v in tensors(2, 8, 3, 0, FusionSpec(dilation=1), 0).items()}
    a = fusion.gate(t["X"], t["keys"], t["query_gain"], t["key_gain"], FusionSpec())
    assert a.dtype == torch.float32
    exact = fusion.gate(*(t[k].double() for k in ("X", "keys", "query_gain", "key_gain")), FusionSpec())
    torch.testing.assert_close(a.double(), exact, rtol=1e-5, atol=1e-6)
    assert fusion.inject(t["X"], a, t["value"], None, None, None, FusionSpec()).dtype == torch.bfloat16


def test_shapes_that_do_not_fit_are_refused() -> None:
    X, a, value = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2), torch.zeros(1, 3, 4)
    gain, conv = torch.ones(2, 4), torch.zeros(2, 4, 4)
    for args, spec in (
        ((X, a, value[:, :2], None, None, None), FusionSpec()),
        ((X, a[:, :2], value[:, :2], None, None, None), FusionSpec()),
        ((X, a, value, None, gain, conv), FusionSpec()),
        ((X, a, value, None, gain, conv[..., :2]), FusionSpec(dilation=2)),
    ):

        def fused(*x: Any) -> Any:
            kernels = torch.ops.engram_kernels
            return kernels.add(*x[:3], str(x[-1])) if x[5] is None else kernels.inject(*x[:-1], str(x[-1]))

        for inject in (fusion.inject, fused):
            with pytest.raises(MHCError, match="MHC220"):
                inject(*args, spec)
