"""The equations of UltraMem against an implementation of the papers, token by token."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import mhc_compile.kernels.memory.ultramem  # noqa: F401  (registers the ops)
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.spec import ContentSpec
from mhc_compile.kernels.memory.ultramem import first_singular_vectors
from mhc_compile.kernels.memory.ultramem_settings import UltraMem, UltraMemSettings, last_sites, ultramem_of

C, TOKENS = 6, 7
SITES = [f"layers.{i}#{j}" for i in range(3) for j in range(2)]
V1 = UltraMemSettings(side=4, key_width=5, value_width=6, top=3, layers=(0, 1), skip=1)
V2 = UltraMemSettings(
    side=4, key_width=5, value_width=6, top=3, heads=2, cores=3, input_width=3, shared=True, layers="all", skip=0,
    expansion=1, gain_power=0.4, seed=5,
)  # fmt: skip
ONE_CORE = dataclasses.replace(V1, cores=1, expansion=9, heads=2)


def parameters(memory: UltraMem, seed: int = 0) -> dict[str, Tensor]:
    """All tensors of one layer and the table, at random, in float64."""
    s, rng = memory.settings, torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=rng, dtype=torch.float64)

    made = {
        "x": random(TOKENS, C), "query": random(2 * s.key_width, C), "query_gain": random(s.key_width),
        "keys": random(s.heads, 2, memory.keys, s.key_width, 2), "key_gain": random(s.key_width),
        "cores": random(s.cores, s.heads, 2, 2), "table": random(memory.rows, memory.width),
        "projection": random(C, s.expansion * s.value_width),
    }  # fmt: skip
    made |= {"input": random(s.input_width, C)} if s.input_width else {}
    return {name: t.requires_grad_() for name, t in made.items()}


def ours(memory: UltraMem, index: int, p: dict[str, Tensor]) -> Tensor:
    spec, op = memory.spec(index), torch.ops.engram
    query = p["x"] @ p["query"].T
    rows, groups, scores = op.retrieve(query, p["query_gain"], p["keys"], p["key_gain"], p["cores"], str(spec))
    read = p["x"] @ p["input"].T if "input" in p else None
    out = op.expand(p["table"][rows].flatten(-2), groups, scores, read, str(spec))
    return out @ p["projection"].T


def by_the_paper(memory: UltraMem, index: int, p: dict[str, Tensor]) -> Tensor:
    """One token after the other, one virtual value after the other."""
    s, n = memory.settings, memory.keys
    spec = memory.spec(index)
    found = []
    for x in p["x"]:
        q = F.layer_norm((p["query"] @ x).view(2, -1), (s.key_width,), p["query_gain"], None, s.eps)
        out = [torch.zeros(s.value_width, dtype=torch.float64) for _ in range(s.expansion)]
        for head in range(s.heads):
            k1, k2 = (
                F.layer_norm(half.transpose(-1, -2), (s.key_width,), p["key_gain"], None, s.eps)
                for half in p["keys"][head]
            )
            S1, S2 = k1 @ q[0], k2 @ q[1]
            U, _, V = torch.linalg.svd(p["cores"][:, head].detach().sum(0))
            u, v = U[:, 0], V[0]
            if (u + v).sum() < 0:
                u, v = -u, -v
            rows = sorted(range(n), key=lambda i: -float(S1[i].detach() @ u))[: s.top]
            columns = sorted(range(n), key=lambda j: -float(S2[j].detach() @ v))[: s.top]
            grid = {(i, j): [S1[i] @ core[head] @ S2[j] for core in p["cores"]] for i in rows for j in columns}
            for i, j in sorted(grid, key=lambda ij: -float(sum(grid[ij]).detach()))[: s.top]:
                virtual = (i * n + j) * spec.multiplier % n**2
                physical = virtual % (n**2 // s.expansion)
                row = p["table"][(physical + index * s.side**2) % memory.rows]
                scale = row[: s.input_width] @ (p["input"] @ x) if s.input_width else 1.0
                parts = row[s.input_width :].chunk(s.cores)
                out[virtual // (n**2 // s.expansion)] = out[virtual // (n**2 // s.expansion)] + torch.cat(
                    [scale * score * part for score, part in zip(grid[i, j], parts, strict=True)]
                )
        found.append(p["projection"] @ torch.cat(out))
    return torch.stack(found)


@pytest.mark.parametrize("settings", [V1, V2, ONE_CORE], ids=["v1", "v2", "one core"])
@pytest.mark.parametrize("index", [0, 1])
def test_values_and_all_gradients_equal_the_papers(settings: UltraMemSettings, index: int) -> None:
    memory = ultramem_of(settings, SITES, hidden=C)
    p = parameters(memory, seed=index)
    weights = torch.randn(TOKENS, C, dtype=torch.float64)
    results = []
    for compute in (ours, by_the_paper):
        out = compute(memory, index, p)
        results.append((out, *torch.autograd.grad((out * weights).sum(), list(p.values()))))
    for name, a, b in zip(("output", *p), *results, strict=True):
        assert float((a - b).detach().abs().max() / b.detach().abs().max()) < 1e-12, name
        assert bool(b.any()), name


def test_any_leading_dimensions_and_narrow_inputs() -> None:
    memory = ultramem_of(V2, SITES, hidden=C)
    p = {name: t.detach() for name, t in parameters(memory).items()}
    flat = ours(memory, 1, p)
    assert torch.allclose(ours(memory, 1, {**p, "x": p["x"].view(1, 7, C)}), flat.view(1, 7, C))
    narrow = {name: t.float() for name, t in p.items()}
    with torch.autocast("cpu", torch.bfloat16):
        query = narrow["x"] @ narrow["query"].T
        assert query.dtype == torch.bfloat16
        *_, scores = torch.ops.engram.retrieve(
            query, *(narrow[name] for name in ("query_gain", "keys", "key_gain", "cores")), str(memory.spec(1))
        )
    assert scores.dtype == torch.float32


def test_singular_vectors_and_their_sign() -> None:
    A = torch.randn(200, 2, 2, dtype=torch.float64)
    u, v = first_singular_vectors(A)
    U, S, _ = torch.linalg.svd(A)
    assert torch.allclose((u.unsqueeze(-2) @ A @ v.unsqueeze(-1)).flatten(), S[:, 0])
    assert torch.allclose((u * U[..., 0]).sum(-1).abs(), torch.ones(200, dtype=torch.float64))
    assert bool(((u + v).sum(-1) >= 0).all())
    assert not u.requires_grad
    positive = torch.rand(2, 2, dtype=torch.float64)
    walk = torch.stack([positive + t * 0.01 * torch.eye(2, dtype=torch.float64) for t in range(100)])
    for axis in first_singular_vectors(walk):
        assert float((axis[1:] - axis[:-1]).abs().max()) < 0.1
    assert not any(bool(t.isnan().any()) for t in first_singular_vectors(torch.zeros(1, 2, 2)))


@pytest.mark.parametrize("settings", [V1, V2, ONE_CORE], ids=["v1", "v2", "one core"])
def test_virtual_values_are_shuffled_without_a_loss(settings: UltraMemSettings) -> None:
    memory = ultramem_of(settings, SITES, hidden=C)
    seen = []
    for index in range(len(memory.layers)):
        spec, n = memory.spec(index), memory.keys
        assert math.gcd(spec.multiplier, n) == 1
        virtual = torch.arange(n * n) * spec.multiplier % (n * n)
        assert torch.equal(virtual.sort().values, torch.arange(n * n))
        rows = (virtual % spec.reach + spec.offset) % spec.rows
        counts = rows.bincount(minlength=memory.rows)
        assert set(counts.tolist()) <= {0, settings.expansion}
        seen.append(counts)
    if settings.shared:
        assert int(torch.stack(seen).sum(0).min()) > 0
    else:  # each layer has rows of its own
        assert torch.equal(torch.stack(seen).sum(0), torch.full((memory.rows,), settings.expansion))


WRONG: list[dict[str, Any]] = [
    {"side": 0}, {"top": 9}, {"expansion": 3}, {"value_width": 7}, {"heads": 3}, {"shared": 1}, {"eps": 1},
    {"layers": ()}, {"layers": (-1,)}, {"layers": (1, 1)}, {"layers": "every"}, {"gain_power": 2.0},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MHCError, match=f"MHC220.*{next(iter(wrong))}"):
        dataclasses.replace(V1, **wrong)


def test_impossible_layers_and_texts_are_refused() -> None:
    for settings in (
        dataclasses.replace(V1, layers=(7,)),
        dataclasses.replace(V1, layers=("blocks.1",)),
        dataclasses.replace(V1, layers=(2,)),
        dataclasses.replace(V1, layers="all", skip=3),
    ):
        with pytest.raises(MHCError, match="MHC226"):
            ultramem_of(settings, SITES, hidden=C)
    for call in (lambda: UltraMemSettings.preset("v3"), lambda: UltraMemSettings.preset("v1", knn=3)):
        with pytest.raises(MHCError, match="MHC220"):
            call()
    with pytest.raises(MHCError, match=r"MHC220.*virtual"):
        ultramem_of(dataclasses.replace(V1, side=1 << 15), SITES, hidden=C)
    with pytest.raises(MHCError, match="MHC220"):
        ContentSpec.parse("top=3")


def test_layers_and_plain_text() -> None:
    assert last_sites(SITES) == {f"layers.{i}": f"layers.{i}#1" for i in range(3)}
    memory = ultramem_of(V1, SITES, hidden=C)
    assert memory.layers == (("layers.0", "layers.1"), ("layers.1", "layers.2"))
    assert len(ultramem_of(V2, SITES, hidden=C).layers) == 3
    assert UltraMem.parse(memory.plain()) == memory
    assert ContentSpec.parse(str(memory.spec(1))) == memory.spec(1)
    assert UltraMemSettings.preset("v2").expansion == 1
