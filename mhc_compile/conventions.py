"""Convert parameters from one convention to another, and from and to Hugging Face's modules.

A conversion of `H` is linear in its logits (`logits' = W logits + c`), so it moves rows of `phi` and `bias` and leaves
`alpha` alone. Differences that remain, such as an eps or the order of the normalisations, are measured and reported;
the most common mistake in this field is a DeepSeek-V4 matrix loaded untransposed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels import reference
from mhc_compile.kernels.spec import Convention, StreamSpec
from mhc_compile.kernels.start import start_head

SAMPLE_TOKENS = 256
# exp(-30) is below float32's rounding of 1: the weight is practically zero, its gradient is not.
FAR = -30.0


@dataclass(frozen=True)
class Conversion:
    """What a conversion preserves."""

    exact: bool
    """Both sides are the same function of the streams in exact arithmetic."""
    bound: float
    """The largest difference of pre, post and H (or of a head's weights) measured on the sample, in float64."""
    why: str
    """What differs, or that nothing does; it names the sample."""


@dataclass(frozen=True)
class _MixMap:
    """`logits' = weight @ logits + offset`, `[target rows, source rows]` and `[target rows]`, float64."""

    weight: Tensor
    offset: Tensor
    differs: tuple[str, ...] = ()


def convert_site(
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    source: StreamSpec,
    target: StreamSpec,
    *,
    sample: Tensor | None = None,
    tolerance: float = 1e-2,
) -> tuple[Tensor, Tensor, Tensor, Conversion]:
    """Return the parameters with which `target` computes the function of `source` with `phi`, `alpha` and `bias`.

    phi `[rows, n*C]`, alpha `[3]`, bias `[rows]` -> new tensors of the same dtypes, and what is lost. `sample` holds
    streams `[..., n, C]` on which the difference is measured (the magnitude of real streams decides how much an eps
    weighs); without it, 256 tokens from N(0, 1). The exits are not compared: see `convert_head`.

    Raises `MHCError` MHC205 where the numbers of streams differ, where no map of the parameters exists, and where the
    measured difference exceeds `tolerance`.
    """
    if source.streams != target.streams:
        raise _impossible(source, target, "the numbers of streams differ")
    if source.convention.fields.deferred != target.convention.fields.deferred:
        raise _impossible(source, target, "only one of them reads with the pre of the site before")
    _check_rows(phi, alpha, bias, source)
    mix, n2 = _mix_map(source, target), 2 * source.streams
    with torch.no_grad():
        new_phi = torch.cat([phi[:n2], _moved(mix, phi[n2:], with_offset=False)])
        new_bias = torch.cat([bias[:n2], _moved(mix, bias[n2:], with_offset=True)])
        new_alpha = alpha.clone()
        streams, described = _sample(sample, source.streams, phi)
        before = _maps(streams, phi, alpha, bias, source)
        after = _maps(streams, new_phi, new_alpha, new_bias, target)
    bound = max((a - b).abs().max().item() for a, b in zip(before, after, strict=True))
    differs = (*_gate_differences(source, target), *mix.differs)
    conversion = Conversion(not differs, bound, _explain(differs, described))
    if not bound <= tolerance:
        detail = f"at these parameters they differ by {bound:.1e}: {conversion.why}"
        raise _impossible(
            source, target, detail, "accept the difference by a larger `tolerance`, or keep the convention"
        )
    return new_phi, new_alpha, new_bias, conversion


def convert_head(
    head: reference.Head | None, source: StreamSpec, target: StreamSpec, *, hidden: int, sample: Tensor | None = None
) -> tuple[reference.Head | None, Conversion]:
    """Return the exit of `target` that reduces as `source` does: fn `[n, n*hidden]`, base `[n]`, scale `[1]`, or None.

    A mean becomes a head with equal weights; a head stays one. `sample` as in `convert_site`. Raises `MHCError` MHC205
    for every other change of exit and for different numbers of streams, and ValueError where a head is missing.
    """
    if source.streams != target.streams:
        raise _impossible(source, target, "the numbers of streams differ")
    if (source.exit == "head") != (head is not None):
        raise ValueError("`head` goes with an exit of 'head', and with no other")
    if source.exit == target.exit and head is None:
        return None, Conversion(True, 0.0, _explain((), "no sample"))
    if target.exit != "head" or source.exit == "sum":
        reason = "a learned head's weights depend on the streams" if head else "their weights are constants that differ"
        raise _impossible(source, target, f"exit {source.exit} is not exit {target.exit}: {reason}")
    fn, base, scale = start_head(target, hidden) if head is None else (t.detach().clone() for t in head)
    new = fn, base, scale
    streams, described = _sample(sample, source.streams, fn)
    with torch.no_grad():
        before, after = (_reduced(streams, h, s) for h, s in ((head, source), (new, target)))
    differs = _gate_differences(source, target) if head is not None else ()
    if head is None and source.streams == 1:
        differs = ("a sigmoid does not reach the weight 1 of a single stream",)
    return new, Conversion(not differs, (before - after).abs().max().item(), _explain(differs, described))


def site_from_transformers(module: nn.Module) -> tuple[Tensor, Tensor, Tensor, StreamSpec]:
    """Return phi, alpha, bias and `StreamSpec` of a Hugging Face `DeepseekV4HyperConnection` (GLM-5 next's, Hy-V4's).

    They are the module's own `fn`, `scale` and `base`, not copies; Hy-V4's `scale`, which has two entries because there
    is no matrix, is padded. Raises `MHCError` MHC202 where the module's eps (or the magnitude of Hy's post) belong to
    no convention here.
    """
    site: Any = module
    if site.scale.numel() == 2:
        return _site_without_matrix(site)
    convention = _transposed_convention(site.input_norm.eps, site.hc_eps)
    iterations = max(1, site.hc_sinkhorn_iters)  # the module always normalises columns once
    spec = StreamSpec(streams=site.hc_mult, convention=convention, iterations=iterations, exit=convention.fields.exit)
    return site.fn, site.scale, site.base, spec


def site_to_transformers(phi: Tensor, alpha: Tensor, bias: Tensor, spec: StreamSpec) -> dict[str, Tensor]:
    """Return the tensors under Hugging Face's names `fn`, `scale` and `base`; of Hy-V4 `scale` has two entries.

    Raises `MHCError` MHC205 where `spec` is not what those modules compute: `convert_site` first.
    """
    if spec.convention is Convention.HY_V4 and spec.manifold == "identity":
        return {"fn": phi, "scale": alpha[:2], "base": bias}
    if not spec.convention.fields.transposed or spec.manifold != "sinkhorn" or spec.iterations < 1:
        known = StreamSpec(streams=spec.streams, convention=Convention.DEEPSEEK_V4)
        raise _impossible(spec, known, "Hugging Face's module computes only the latter; use convert_site first")
    return {"fn": phi, "scale": alpha, "base": bias}


def head_from_transformers(module: nn.Module) -> reference.Head:
    """Return fn, base and scale of a Hugging Face `DeepseekV4HyperHead`: its own `hc_fn`, `hc_base` and `hc_scale`.

    Raises `MHCError` MHC202 where the module's eps are those of no convention here.
    """
    head: Any = module
    _transposed_convention(head.input_norm.eps, head.eps)
    return head.hc_fn, head.hc_base, head.hc_scale


def head_to_transformers(head: reference.Head) -> dict[str, Tensor]:
    """Return the tensors under Hugging Face's names."""
    fn, base, scale = head
    return {"hc_fn": fn, "hc_base": base, "hc_scale": scale}


def _site_without_matrix(site: Any) -> tuple[Tensor, Tensor, Tensor, StreamSpec]:
    convention = Convention.HY_V4
    fields = convention.fields
    rms_eps, eps, magnitude = site.input_norm.eps, site.hc_eps, site.hc_post_magnitude
    if (rms_eps, eps, eps, magnitude) != (fields.rms_eps, fields.pre_eps, fields.post_eps, fields.post_scale):
        raise MHCError("MHC202", f"one without a matrix, with rms eps {rms_eps}, eps {eps}, magnitude {magnitude}")
    spec = StreamSpec(
        streams=site.hc_mult, convention=convention, manifold=fields.manifold, iterations=0, exit=fields.exit
    )
    return site.fn, torch.nn.functional.pad(site.scale, (0, 1)), site.base, spec


def _transposed_convention(rms_eps: float, eps: float) -> Convention:
    for convention in Convention:
        fields = convention.fields
        if fields.transposed and (fields.rms_eps, fields.pre_eps, fields.sinkhorn_eps) == (rms_eps, eps, eps):
            return convention
    raise MHCError("MHC202", f"a transposed one with rms eps {rms_eps} and eps {eps}")


def _mix_map(source: StreamSpec, target: StreamSpec) -> _MixMap:
    n, pair = source.streams, (source.manifold, target.manifold)
    if pair[0] == pair[1]:
        differs = _sinkhorn_differences(source, target) if pair[0] == "sinkhorn" else ()
        return _MixMap(_orientation(source, target), torch.zeros(target.mix_rows, dtype=torch.float64), differs)
    if pair[0] == "identity" or (n == 1 and pair[0] != "unconstrained"):
        return _constant(source, target)
    if n == 2 and "unconstrained" not in pair and "identity" not in pair:
        # Two streams mix by one number: the weight of keeping (identity) against swapping.
        pair = ("kronecker", pair[1]) if pair[0] in ("permutations", "circulant") else pair
        pair = (pair[0], "kronecker") if pair[1] in ("permutations", "circulant") else pair
    zeros = torch.zeros(target.mix_rows, dtype=torch.float64)
    match pair:
        case ("kronecker", "kronecker"):
            return _MixMap(torch.eye(2, dtype=torch.float64), zeros)
        case ("sinkhorn", "kronecker") if n == 2:
            halves = torch.tensor([[0.5, 0, 0, 0.5], [0, 0.5, 0.5, 0]], dtype=torch.float64)
            return _MixMap(halves, zeros, ("the target is the limit of the iterations",))
        case ("kronecker", "sinkhorn"):
            # The exponential of these sums is proportional to the doubly stochastic product: nothing to iterate.
            differs = ("eps in the target's Sinkhorn",) if target.convention.fields.divisor == "add_eps" else ()
            differs = differs if target.iterations else ("the target does not normalise",)
            return _MixMap(_bits(n), zeros, differs)
        case ("kronecker", "permutations"):
            flips = [tuple(i ^ m for i in range(n)) for m in range(n)]  # row (0, m) of the product
            return _as_permutations(_bits(n), flips)
        case (_, "identity"):
            reason = "the identity has no parameters, and the mixing would be lost"
        case (_, "unconstrained") | ("unconstrained", _):
            reason = "one matrix is linear in the streams' projection and the other is not"
        case ("circulant", "permutations"):
            shifts = [tuple((i + k) % n for i in range(n)) for k in range(n)]
            return _as_permutations(torch.eye(n, dtype=torch.float64), shifts)
        case ("transportation", _) | (_, "transportation"):
            reason = "only one of them is filled entry by entry, between bounds that depend on the entries before"
        case ("permutations" | "circulant", _):
            reason = "a sum over permutations is not of the target's form"
        case _:
            reason = f"a {target.manifold} matrix has {target.mix_rows} parameters, which do not span the source's"
    raise _impossible(source, target, reason)


def _moved(mix: _MixMap, rows: Tensor, *, with_offset: bool) -> Tensor:
    """Return what the map makes of the rows of a parameter: the same bits where it only moves them."""
    weight, offset = mix.weight.to(rows.device), mix.offset.to(rows.device)
    if weight.numel() and not offset.any() and ((weight == 0) | (weight == 1)).all() and (weight.sum(1) == 1).all():
        return rows[weight.argmax(1)]  # a sum with zeros would make -0.0 a 0.0
    changed = weight @ rows.double()
    return (changed + offset if with_offset else changed).to(rows.dtype)


def _constant(source: StreamSpec, target: StreamSpec) -> _MixMap:
    """Return the map for an H that is always the identity: a fixed offset."""
    n = target.streams
    eye = torch.eye(n, dtype=torch.float64).reshape(-1)
    offset = torch.full((target.mix_rows,), FAR, dtype=torch.float64)
    match target.manifold:
        case "sinkhorn":
            offset = FAR * (1 - eye)
        case "unconstrained":
            offset = eye
        case "permutations" | "circulant":
            offset[0] = 0.0
        case "kronecker":
            offset[::2] = 0.0
        case "transportation":
            offset[::n] = -FAR
        case "identity":
            pass
    differs: tuple[str, ...] = ()
    if n > 1 and target.manifold != "unconstrained":
        differs = (f"the identity is reached up to weights of exp({FAR:.0f})",)
    for spec in (source, target):
        if spec.manifold == "sinkhorn" and spec.convention.fields.sinkhorn_eps and not differs:
            differs = ("eps in Sinkhorn",)
    return _MixMap(torch.zeros(target.mix_rows, source.mix_rows, dtype=torch.float64), offset, differs)


def _orientation(source: StreamSpec, target: StreamSpec) -> Tensor:
    """Return the map between two matrices of logits: a transposition of the published matrix, or the identity."""
    rows = torch.eye(source.mix_rows, dtype=torch.float64)
    matrix = source.manifold in ("sinkhorn", "unconstrained")
    if matrix and source.convention.fields.transposed != target.convention.fields.transposed:
        n = source.streams
        rows = rows.reshape(n, n, n * n).transpose(0, 1).reshape(n * n, n * n)
    return rows


def _bits(n: int) -> Tensor:
    """Return `[n*n, 2K]`: which factors' logits are summed for entry (i, j) of a Kronecker product (symmetric)."""
    powers = n.bit_length() - 1
    rows = torch.zeros(n * n, 2 * powers, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            for k in range(powers):
                rows[i * n + j, 2 * k + ((i ^ j) >> (powers - 1 - k) & 1)] = 1.0
    return rows


def _as_permutations(sums: Tensor, chosen: Sequence[tuple[int, ...]]) -> _MixMap:
    """Return the map to permutations whose row `m` of `sums` is the logit of `chosen[m]`; the others get no weight."""
    n = len(chosen)
    orders = {order: k for k, order in enumerate(permutations(range(n)))}
    weight = torch.zeros(math.factorial(n), sums.shape[1], dtype=torch.float64)
    offset = torch.full((math.factorial(n),), FAR, dtype=torch.float64)
    for m, order in enumerate(chosen):
        weight[orders[order]], offset[orders[order]] = sums[m], 0.0
    return _MixMap(weight, offset, (f"other permutations keep weights of exp({FAR:.0f})",))


def _sinkhorn_differences(source: StreamSpec, target: StreamSpec) -> tuple[str, ...]:
    a, b = source.convention.fields, target.convention.fields
    differences = {
        "one normalises rows of H first and the other columns": _first_axis(source) != _first_axis(target),
        f"{source.iterations} and {target.iterations} iterations": source.iterations != target.iterations,
        "eps and start of Sinkhorn": (a.divisor, a.sinkhorn_eps, a.start) != (b.divisor, b.sinkhorn_eps, b.start),
    }
    return tuple(text for text, differs in differences.items() if differs)


def _first_axis(spec: StreamSpec) -> str:
    """Return which axis of H is normalised first; a softmax over the last dimension counts as rows as published."""
    fields = spec.convention.fields
    columns = fields.order == "columns_rows"
    return "columns" if columns != fields.transposed else "rows"


def _gate_differences(source: StreamSpec, target: StreamSpec) -> tuple[str, ...]:
    a, b = source.convention.fields, target.convention.fields
    differences = {
        "eps of the root mean square": (a.rms_eps, a.rms_inside) != (b.rms_eps, b.rms_inside),
        "eps of pre": a.pre_eps != b.pre_eps,
        "scale of post": a.post_scale != b.post_scale,
        "eps of post": a.post_eps != b.post_eps,
    }
    return tuple(text for text, differs in differences.items() if differs)


def _maps(X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, spec: StreamSpec) -> tuple[Tensor, Tensor, Tensor]:
    return reference.coefficients(X, phi.double(), alpha.double(), bias.double(), spec)


def _reduced(X: Tensor, head: reference.Head | None, spec: StreamSpec) -> Tensor:
    wide = None if head is None else (head[0].double(), head[1].double(), head[2].double())
    return reference.reduce(X, spec, wide)


def _sample(sample: Tensor | None, n: int, phi: Tensor) -> tuple[Tensor, str]:
    hidden = phi.shape[1] // n
    if sample is not None:
        return sample.detach().to(phi.device, torch.float64), f"{sample[..., 0, 0].numel()} tokens given"
    rng = torch.Generator().manual_seed(0)
    drawn = torch.randn(SAMPLE_TOKENS, n, hidden, generator=rng, dtype=torch.float64)
    return drawn.to(phi.device), f"{SAMPLE_TOKENS} tokens from N(0, 1)"


def _explain(differs: tuple[str, ...], described: str) -> str:
    return f"{'; '.join(differs) or 'the same function'} (measured on {described})"


def _check_rows(phi: Tensor, alpha: Tensor, bias: Tensor, spec: StreamSpec) -> None:
    if phi.shape[0] != spec.rows or bias.shape != (spec.rows,) or alpha.shape != (3,):
        shapes = f"phi {tuple(phi.shape)}, alpha {tuple(alpha.shape)}, bias {tuple(bias.shape)}"
        raise ValueError(f"{shapes} are not the parameters of {spec}, which has {spec.rows} rows")


def _impossible(source: StreamSpec, target: StreamSpec, reason: str, way_out: str | None = None) -> MHCError:
    return MHCError("MHC205", f"from '{source}' to '{target}': {reason}", way_out=way_out)
