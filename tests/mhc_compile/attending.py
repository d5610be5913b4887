"""A model of attention and MLPs, whose attention is spelled in several ways, and its conversion."""

from __future__ import annotations

import copy

import torch
from tiny_models import ids, shake
from torch import Tensor, nn
from torch.nn import functional as F

from mhc_compile import convert

C, HEADS = 16, 2
SPELLINGS = [("fused", True), ("named", False), ("matmul", False), ("einsum", True), ("baddbmm", True)]
"""Each with whether one projection computes queries, keys and values."""


class Attending(nn.Module):
    """Causal attention and an MLP in turn, each behind a norm; the attention fused, or written out."""

    def __init__(self, *, spelling: str, joined: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spelling, self.joined = spelling, joined
        self.embed = nn.Embedding(100, C)
        self.norms = nn.ModuleList(nn.RMSNorm(C) for _ in range(4))
        self.projections = nn.ModuleList(nn.Linear(C, 3 * C) for _ in range(2))
        self.outs = nn.ModuleList(nn.Linear(C, C) for _ in range(2))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(C, 32), nn.GELU(), nn.Linear(32, C)) for _ in range(2))
        self.head = nn.Linear(C, 100)

    def attend(self, k: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = []
        if self.joined and query is key is value:
            parts = [*self.projections[k](query).split(C, -1)]
        else:
            for i, x in enumerate((query, key, value)):
                weight, bias = (t[i * C : (i + 1) * C] for t in (self.projections[k].weight, self.projections[k].bias))
                parts.append(F.linear(x, weight, bias))
        q, k_, v = (x.unflatten(-1, (HEADS, C // HEADS)).transpose(1, 2) for x in parts)
        if self.spelling == "fused":
            mixed = F.scaled_dot_product_attention(q, k_, v, is_causal=True)
        elif self.spelling == "named":
            mixed = F.scaled_dot_product_attention(query=q, key=k_, value=v, is_causal=True)
        else:
            scale, size = (C // HEADS) ** -0.5, q.shape[-2]
            mask = torch.full((size, size), -torch.inf, dtype=q.dtype).triu(1)
            if self.spelling == "einsum":
                shares = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k_) * scale + mask, -1)
                mixed = torch.einsum("bhqk,bhkd->bhqd", shares, v)
            elif self.spelling == "baddbmm":
                rows, keys, values = (x.flatten(0, 1) for x in (q, k_, v))
                scores = torch.baddbmm(mask.expand(len(rows), size, size), rows, keys.mT, alpha=scale)
                mixed = torch.bmm(scores.softmax(-1), values).unflatten(0, q.shape[:2])
            else:
                mixed = F.dropout(torch.softmax(q @ k_.mT * scale + mask, -1), 0.0) @ v
        return self.outs[k](mixed.transpose(1, 2).flatten(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for k in range(2):
            h = self.norms[2 * k](x)
            x = x + self.attend(k, h, h, h)
            x = x + self.mlps[k](self.norms[2 * k + 1](x))
        return self.head(x)


def converted(spelling: str, joined: bool, form: str, shaken: float) -> tuple[Attending, nn.Module]:
    """The float64 model, and a copy converted to `form`: equal at the start, then with its parameters moved."""
    plain = Attending(spelling=spelling, joined=joined).double().eval()
    model = convert(copy.deepcopy(plain), ids(), form=form, inner="eager")
    with torch.no_grad():
        before = plain(ids())
        torch.testing.assert_close(model(ids()), before, rtol=0, atol=1e-12)
        shake(model, shaken)
        assert (model(ids()) - before).abs().max() > 1e-3
    return plain, model
