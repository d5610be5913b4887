"""The Sinkhorn projection as one opaque op with a hand-written backward, both cheap in eager mode.

`mhc_kernels::sinkhorn(Tensor logits, str spec) -> Tensor`: logits `[..., n, n]` -> H `[..., n, n]`, contiguous, in
max(float32, dtype of logits); the equations are those of `reference.sinkhorn` (arXiv 2512.24880, Eq. 9).
`mhc_kernels::sinkhorn_backward(Tensor grad, Tensor logits, str spec) -> Tensor`: the gradient of the logits, in their
dtype. Only the logits are saved: the backward repeats the iterations. Gradients of the gradient raise
NotImplementedError.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mhc_compile.kernels import reference
from mhc_compile.kernels.spec import StreamSpec

LIBRARY = torch.library.Library("mhc_kernels", "DEF")
# Tokens worked on at a time on a CPU, so that an iteration's matrices stay in the cache.
CHUNK = 8192

parse_spec = lru_cache(maxsize=256)(StreamSpec.parse)
"""`StreamSpec.parse`, remembered: every call of an op carries the text."""


def forward(logits: Tensor, spec: StreamSpec) -> Tensor:
    """Compute H `[..., n, n]`, contiguous, of `logits` in max(float32, their dtype)."""
    work = _tokens_last(logits)
    out = torch.empty_like(work)
    for source, target in zip(_chunks(work), _chunks(out), strict=True):
        matrix = _start(source, spec)
        for axis in reference.sinkhorn_axes(spec):
            matrix.div_(_divisor(matrix, axis, spec))
        target.copy_(matrix)
    return _tokens_first(out, logits, spec)


def backward(grad: Tensor, logits: Tensor, spec: StreamSpec) -> Tensor:
    """Compute the gradient of `logits` for the gradient `grad` of H; shape and dtype of `logits`, contiguous."""
    work, flow = _tokens_last(logits), _tokens_last(grad)
    if spec.convention.fields.transposed:
        flow = flow.transpose(0, 1)
    out = torch.empty_like(work)
    for source, seen, target in zip(_chunks(work), _chunks(flow), _chunks(out), strict=True):
        target.copy_(_backward_chunk(source, seen, spec))
    return _tokens_first(out, logits, None).to(logits.dtype)


def _backward_chunk(logits: Tensor, grad: Tensor, spec: StreamSpec) -> Tensor:
    """Compute the gradient of `logits`; all are `[n, n, tokens]`, in the published orientation."""
    fields = spec.convention.fields
    axes = reference.sinkhorn_axes(spec)
    start = _start(logits, spec)
    matrices, divisors = [start], []
    for axis in axes:
        divisors.append(_divisor(matrices[-1], axis, spec))
        matrices.append(matrices[-1] / divisors[-1])
    flow = grad.clone(memory_format=torch.contiguous_format)
    for axis, divisor in zip(reversed(axes), reversed(divisors), strict=True):
        matrix = matrices.pop()
        # q = m / d(sum m): dm = (dq - sum(dq * q)) / d, without the second term where the divisor is a constant.
        if fields.divisor == "clamp":
            flow.masked_fill_(matrices[-1] <= reference.vanishing(flow.dtype), 0.0)
        common = (flow * matrix).sum(axis + 2, keepdim=True)
        if fields.divisor == "clamp":
            common.masked_fill_(divisor <= fields.sinkhorn_eps, 0.0)
        flow.sub_(common).div_(divisor)
    return _start_backward(flow, start, logits, spec)


def _start(logits: Tensor, spec: StreamSpec) -> Tensor:
    """Compute `reference.sinkhorn_start` on `[n, n, tokens]`; never an alias of `logits`."""
    fields = spec.convention.fields
    if fields.start == "softmax_eps":
        return torch.softmax(logits, dim=1).add_(fields.sinkhorn_eps)
    columns = fields.start == "exp_colmax"
    shifted = logits - logits.amax(0 if columns else 1, keepdim=True)
    if columns:
        shifted.clamp_(min=reference.LOGIT_FLOOR)
    return shifted.exp_()


def _start_backward(flow: Tensor, start: Tensor, logits: Tensor, spec: StreamSpec) -> Tensor:
    fields = spec.convention.fields
    if fields.start == "softmax_eps":
        weights = torch.softmax(logits, dim=1)  # not start - eps, which cancels
        flow = flow * weights
        return flow.sub_(weights.mul_(flow.sum(1, keepdim=True)))
    axis = 0 if fields.start == "exp_colmax" else 1
    peak = logits.amax(axis, keepdim=True)
    flow = flow * start
    if fields.start == "exp_colmax":
        flow.masked_fill_(logits - peak < reference.LOGIT_FLOOR, 0.0)
    if not spec.iterations:
        at_peak = logits == peak
        share = flow.sum(axis, keepdim=True) / at_peak.sum(axis, keepdim=True)
        flow.sub_(share * at_peak)
    return flow


def _divisor(matrix: Tensor, axis: int, spec: StreamSpec) -> Tensor:
    fields = spec.convention.fields
    total = matrix.sum(axis + 2, keepdim=True)
    if fields.divisor == "add_eps":
        total.add_(fields.sinkhorn_eps)
    elif fields.divisor == "clamp":
        total.clamp_(min=fields.sinkhorn_eps)
    return total


def _tokens_last(x: Tensor) -> Tensor:
    """Permute `[..., n, n]` to a contiguous `[n, n, tokens]`, so that every step is a loop over adjacent tokens."""
    n = x.shape[-1]
    flat = x.reshape(math.prod(x.shape[:-2]), n, n).to(reference.compute_dtype(x.dtype))
    return flat.permute(1, 2, 0).contiguous()


def _tokens_first(x: Tensor, like: Tensor, spec: StreamSpec | None) -> Tensor:
    """Permute `[n, n, tokens]` to the shape of `like`, contiguous; transposed where the convention of `spec` is."""
    turn = spec is not None and spec.convention.fields.transposed
    order = (2, 1, 0) if turn else (2, 0, 1)
    return x.permute(order).contiguous().view(like.shape)


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(CHUNK, dim=-1) if x.device.type == "cpu" else (x,)


def _kernel(logits: Tensor, spec: str) -> Tensor:
    return forward(logits, parse_spec(spec))


def _kernel_backward(grad: Tensor, logits: Tensor, spec: str) -> Tensor:
    return backward(grad, logits, parse_spec(spec))


def _fake(logits: Tensor, spec: str) -> Tensor:  # noqa: ARG001
    return logits.new_empty(logits.shape, dtype=reference.compute_dtype(logits.dtype))


def _fake_backward(grad: Tensor, logits: Tensor, spec: str) -> Tensor:  # noqa: ARG001
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(inputs[0])
    ctx.spec = inputs[1]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (logits,) = ctx.saved_tensors
    return torch.ops.mhc_kernels.sinkhorn_backward(grad, logits, ctx.spec), None


def _save_backward(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:2])
    ctx.spec = inputs[2]


def _differentiate_backward(ctx: Any, flow: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the backward, of any order, as PyTorch computes them for the reference."""
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        grad, logits = (t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in ctx.saved_tensors)
        H = reference.sinkhorn(logits, parse_spec(ctx.spec))
        (first,) = torch.autograd.grad(H, logits, grad, create_graph=True)
        to_grad, to_logits = torch.autograd.grad(first, (grad, logits), flow, create_graph=further)
    return to_grad, to_logits, None


def _register() -> None:
    tags = (torch.Tag.pt2_compliant_tag,)
    LIBRARY.define("sinkhorn(Tensor logits, str spec) -> Tensor", tags=tags)
    LIBRARY.define("sinkhorn_backward(Tensor grad, Tensor logits, str spec) -> Tensor", tags=tags)
    LIBRARY.impl("sinkhorn", _kernel, "CompositeExplicitAutograd")
    LIBRARY.impl("sinkhorn_backward", _kernel_backward, "CompositeExplicitAutograd")
    torch.library.register_fake("mhc_kernels::sinkhorn", _fake, lib=LIBRARY)
    torch.library.register_fake("mhc_kernels::sinkhorn_backward", _fake_backward, lib=LIBRARY)
    torch.library.register_autograd("mhc_kernels::sinkhorn", _differentiate, setup_context=_save, lib=LIBRARY)
    torch.library.register_autograd(
        "mhc_kernels::sinkhorn_backward", _differentiate_backward, setup_context=_save_backward, lib=LIBRARY
    )


_register()
