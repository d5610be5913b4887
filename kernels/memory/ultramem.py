"""UltraMem (arXiv 2411.12364, 2508.18756) in plain PyTorch, and the ops of the dialect that decompose to it.

A layer that reads x `[..., C]`, with Tucker decomposed query-key retrieval and implicit value expansion:

    q        = layernorm(W_q x)                                two halves of K channels, for rows and for columns
    S1, S2   = <q's halves, layernorm(keys)>                   [n, r] each for every head, r = 2
    I, J     = the k largest of S1 u and of S2 v               u, v: first singular vectors of the sum of the cores
    s_c      = S1[i]^T C_c S2[j]  for i in I, j in J           the k pairs with the largest sum over the cores c
    o_g      = sum over the pairs of group g of s_c * value    a slice of the value for each core, no softmax
    y        = W_o [o_1 ... o_E]

    engram::retrieve(query [..., 2 K], query_gain [K], keys [h, 2, n, K, 2], key_gain [K], cores [c, h, 2, 2], spec)
        -> rows [..., h k] int64, groups [..., h k] int64, scores [..., h k, c]
    engram::expand(rows' values [..., h k D], groups, scores, input [..., I]?, spec) -> [..., E V]

`engram_kernels::retrieve` is the same, with the choice of the largest in a kernel on a CPU.

`spec` is `str(ContentSpec)`. A row of the table holds I channels, by whose product with `input` its scores are
multiplied (second version), and V of the value: D = I + V.

The released code is followed where it differs from the papers: x is the normed input of the feed-forward network in
both versions; the penalty on further singular values is not applied; the product with `input` has no activation. Other
than there, nothing is kept from step to step. There the sign of u and v is the one nearer to the step before. Here they
point to the side of (1, 1), where cores drawn from U(0, 1) have both: the sign is continuous while they stay within a
right angle of that, and training, evaluation and every rank agree. Virtual values are shuffled by a multiplication
modulo their number, where the code keeps a random permutation, of 8 bytes each. Norms have no bias.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import mhc_compile.kernels.memory.top  # noqa: F401  (registers the op)
from mhc_compile.kernels.autocast import without_autocast
from mhc_compile.kernels.memory.spec import ContentSpec
from mhc_compile.kernels.reference import compute_dtype

RANK = 2
"""r of the Tucker decomposition, in both releases."""
DIALECT = torch.library.Library("engram", "FRAGMENT")
KERNELS = torch.library.Library("engram_kernels", "FRAGMENT")


def first_singular_vectors(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the left and the right one of matrices `[..., 2, 2]`, `[..., 2]` each, to the side of (1, 1); no gradient.

    In closed form: v is the direction in which |A v| is largest, at half the angle of the ellipse's axis.
    """
    A = matrices.detach()
    (a, b), (c, d) = (row.unbind(-1) for row in A.unbind(-2))
    angle = torch.atan2(2 * (a * b + c * d), a * a + c * c - b * b - d * d) / 2
    v = torch.stack((angle.cos(), angle.sin()), -1)
    u = (A * v.unsqueeze(-2)).sum(-1)
    u = u / u.square().sum(-1, keepdim=True).sqrt().clamp(min=torch.finfo(u.dtype).tiny)
    sign = torch.where((u + v).sum(-1, keepdim=True) < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, v * sign


def _topk(values: Tensor, k: int) -> Tensor:
    return values.topk(k, -1, sorted=False).indices


def retrieve(
    query: Tensor,
    query_gain: Tensor,
    keys: Tensor,
    key_gain: Tensor,
    cores: Tensor,
    spec: ContentSpec,
    top: Callable[[Tensor, int], Tensor] = _topk,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows of the table that `query` finds, their groups, and the score that every core gives them.

    Scores are float32, or float64 where an input is. Of equal scores any may be found, and rows in any order. `top`
    returns the places of the largest values of the last dimension.
    """
    dtype = compute_dtype(query.dtype, query_gain.dtype, keys.dtype, key_gain.dtype, cores.dtype)
    heads, _, n, width, _ = keys.shape
    halves = _layer_norm(query.to(dtype).unflatten(-1, (2, width)), -1, spec.eps) * query_gain.to(dtype)
    normed = _layer_norm(keys.to(dtype), 3, spec.eps) * key_gain.to(dtype).unsqueeze(-1)
    similarity = torch.einsum("...pk,hpnkr->...phnr", halves, normed)
    cores = cores.to(dtype)
    chosen, kept = [], []
    for half, axis in enumerate(first_singular_vectors(cores.sum(0))):
        fine = similarity.select(-4, half)
        coarse = (fine.detach() * axis.unsqueeze(-2)).sum(-1)
        index = top(coarse, spec.top)
        chosen.append(index)
        kept.append(fine.gather(-2, index.unsqueeze(-1).expand(*index.shape, RANK)))
    by_core = torch.einsum("...hir,chrs,...hjs->...chij", kept[0], cores, kept[1]).flatten(-2)
    best = top(by_core.detach().sum(-3), spec.top)
    first, second = best.div(spec.top, rounding_mode="floor"), best.remainder(spec.top)
    virtual = (chosen[0].gather(-1, first) * n + chosen[1].gather(-1, second)).flatten(-2)
    virtual = (virtual * spec.multiplier).remainder(n * n)
    scores = by_core.gather(-1, best.unsqueeze(-3).expand(*best.shape[:-2], len(cores), heads, spec.top))
    groups = virtual.div(spec.reach, rounding_mode="floor")
    return (virtual.remainder(spec.reach) + spec.offset).remainder(spec.rows), groups, scores.flatten(-2).mT


def expand(values: Tensor, groups: Tensor, scores: Tensor, input: Tensor | None, spec: ContentSpec) -> Tensor:
    """Return the weighted sums of the values in every group, side by side, in the dtype of `scores`."""
    dtype = scores.dtype
    rows = values.to(dtype).unflatten(-1, (groups.shape[-1], -1))
    if input is not None:
        product = (rows[..., : spec.input] * input.to(dtype).unsqueeze(-2)).sum(-1, keepdim=True)
        scores, rows = scores * product, rows[..., spec.input :]
    slices = rows.unflatten(-1, (scores.shape[-1], -1))
    if spec.groups == 1:
        return torch.einsum("...kc,...kcv->...cv", scores, slices).flatten(-2)
    member = groups.unsqueeze(-1) == torch.arange(spec.groups, device=groups.device)
    weights = member.to(dtype).unsqueeze(-1) * scores.unsqueeze(-2)
    return torch.einsum("...kgc,...kcv->...gcv", weights, slices).flatten(-3)


def expand_backward(
    grad: Tensor, values: Tensor, groups: Tensor, scores: Tensor, input: Tensor | None, spec: ContentSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of values, scores and input (empty where it is None) from that of the result of `expand`."""
    dtype, cores = scores.dtype, scores.shape[-1]
    rows = values.to(dtype).unflatten(-1, (groups.shape[-1], -1))
    first, slices = rows[..., : spec.input], rows[..., spec.input :].unflatten(-1, (cores, -1))
    sums = grad.to(dtype).unflatten(-1, (spec.groups, cores, -1))
    index = groups[..., None, None].expand(*groups.shape, *sums.shape[-2:])
    of = sums.gather(-3, index)
    d_weights = (slices * of).sum(-1)
    if input is None:
        return (scores.unsqueeze(-1) * of).flatten(-3), d_weights, scores.new_empty(0)
    read = input.to(dtype).unsqueeze(-2)
    product = (first * read).sum(-1, keepdim=True)
    d_product = (d_weights * scores).sum(-1, keepdim=True)
    d_slices = ((scores * product).unsqueeze(-1) * of).flatten(-2)
    d_rows = torch.cat((d_product * read, d_slices), -1).flatten(-2)
    return d_rows, d_weights * product, (d_product * first).sum(-2).to(input.dtype)


def _layer_norm(x: Tensor, dim: int, eps: float) -> Tensor:
    centred = x - x.mean(dim, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dim, keepdim=True) + eps)


def _retrieve(
    query: Tensor, query_gain: Tensor, keys: Tensor, key_gain: Tensor, cores: Tensor, spec: str
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(query):
        return retrieve(query, query_gain, keys, key_gain, cores, ContentSpec.parse(spec))


def _retrieve_in_kernels(
    query: Tensor, query_gain: Tensor, keys: Tensor, key_gain: Tensor, cores: Tensor, spec: str
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(query):
        top = torch.ops.engram_kernels.top
        return retrieve(query, query_gain, keys, key_gain, cores, ContentSpec.parse(spec), top)


def _expand(values: Tensor, groups: Tensor, scores: Tensor, input: Tensor | None, spec: str) -> Tensor:
    with without_autocast(values):
        return expand(values, groups, scores, input, ContentSpec.parse(spec))


_NORMED = "Tensor query, Tensor query_gain, Tensor keys, Tensor key_gain, Tensor cores, str spec"
for _schema, _composite in (
    (f"retrieve({_NORMED}) -> (Tensor, Tensor, Tensor)", _retrieve),
    ("expand(Tensor values, Tensor groups, Tensor scores, Tensor? input, str spec) -> Tensor", _expand),
):
    DIALECT.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    DIALECT.impl(_schema.split("(", 1)[0], _composite, "CompositeImplicitAutograd")
KERNELS.define(f"retrieve({_NORMED}) -> (Tensor, Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
KERNELS.impl("retrieve", _retrieve_in_kernels, "CompositeImplicitAutograd")
