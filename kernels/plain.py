"""Fused chains in plain PyTorch: the provider for any device, dtype and manifold; kernels are tested against it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from mhc_compile.kernels import reference, signature
from mhc_compile.kernels.chain import Chain

Values = Mapping[str, Tensor]


def run(chain: Chain, direction: str, values: Values, wanted: tuple[str, ...], lead: tuple[int, ...]) -> Values:  # noqa: ARG001
    """One direction of `chain`, as `mhc_compile.kernels.cpp.run.run` computes it."""
    found = (_forward if direction == "forward" else _backward)(chain, values)
    return {name: found[name].contiguous() for name in wanted}


def _forward(chain: Chain, values: Values) -> dict[str, Tensor]:
    X, out = values["X"], {}
    if chain.mixes:
        X = reference.distribute(X, values["y"], values["post"], values["mix"])
        out["next_X"] = X
    if chain.weights == "given":
        out["h"] = reference.aggregate(X, values["pre"])
    elif chain.weights == "site":
        pre, post, mix = reference.coefficients(X, values["phi"], values["alpha"], values["bias"], chain.stream)
        out |= {"next_pre": pre, "next_post": post, "next_mix": mix, "h": reference.aggregate(X, pre)}
    elif chain.weights != "none":
        head = (values["phi"], values["bias"], values["alpha"]) if chain.weights == "head" else None
        out["h"] = reference.reduce(X, chain.stream, head)
    if chain.norm != "none":
        out["h"] = _normed(chain, out["h"], values)
    if chain.projects:
        v = X.flatten(-2).to(signature.dtype(chain, "z"))
        u = F.linear(v, values["phi"].to(v.dtype))
        out["z"] = torch.cat([u, v.square().sum(-1, keepdim=True)], -1)
    # An output that is its input (a copy of n = 1 streams) would be an alias, which an op must not return.
    return {name: t.clone() if t is values["X"] else t for name, t in out.items()}


def _normed(chain: Chain, h: Tensor, values: Values) -> Tensor:
    # From h as it is stored.
    wide, weight = h.to(signature.dtype(chain, "z")), values["norm_weight"]
    if chain.norm == "rms":
        return F.rms_norm(wide, (chain.width,), weight.to(wide.dtype), chain.norm_eps).to(h.dtype)
    bias = values["norm_bias"].to(wide.dtype)
    return F.layer_norm(wide, (chain.width,), weight.to(wide.dtype), bias, chain.norm_eps).to(h.dtype)


def _backward(chain: Chain, values: Values) -> dict[str, Tensor]:
    with autograd_inside_an_op(values["X"].device.type):
        inputs = {name: values[name].detach().requires_grad_() for name in signature.inputs(chain)}
        found = _forward(chain, inputs)
        used = [name for name in signature.gradients_in(chain) if found[name].requires_grad]
        gradients = torch.autograd.grad(
            [found[name] for name in used],
            list(inputs.values()),
            [values[f"d_{name}"].to(found[name].dtype) for name in used],
            allow_unused=True,
        )
    return {
        f"d_{name}": torch.zeros_like(t) if g is None else g
        for (name, t), g in zip(inputs.items(), gradients, strict=True)
    }


@contextmanager
def autograd_inside_an_op(device: str) -> Iterator[None]:
    """Record gradients inside an op's kernel, where the dispatcher has switched autograd off."""
    keys = ["AutogradFunctionality", f"Autograd{ {'cpu': 'CPU', 'cuda': 'CUDA', 'meta': 'Meta'}.get(device, 'Other') }"]
    with ExitStack() as stack:
        for key in [*keys, "ADInplaceOrView"]:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(getattr(torch._C.DispatchKey, key), False))
        stack.enter_context(torch.enable_grad())
        yield
