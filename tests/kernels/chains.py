"""A fixed list of kernel specifications, their random inputs, and the float64 reference of values and gradients."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.spec import Convention, StreamSpec

BF16 = {"streams_dtype": torch.bfloat16, "branch_dtype": torch.bfloat16}
F16 = {"streams_dtype": torch.float16, "branch_dtype": torch.float16}
V4 = StreamSpec(convention=Convention.DEEPSEEK_V4, exit="head")
V41 = StreamSpec(convention=Convention.DEEPSEEK_V41, exit="pre")
# Each is compiled once: C below, at and behind a vector's width, every n, every convention, manifold and dtype.
CHAINS = [
    Chain(kind="boundary", stream=StreamSpec(), width=48),
    Chain(kind="boundary", stream=StreamSpec(streams=8, iterations=3), width=17),
    Chain(kind="boundary", stream=StreamSpec(streams=1), width=5),
    Chain(kind="boundary", stream=StreamSpec(streams=3, convention=Convention.MEGATRON_MAIN), width=33),
    Chain(kind="boundary", stream=StreamSpec(streams=2, convention=Convention.LIGER), width=16, **BF16),
    Chain(kind="boundary", stream=StreamSpec(streams=5, manifold="unconstrained"), width=20),
    Chain(kind="boundary", stream=StreamSpec(streams=6, convention=Convention.HY_V4, manifold="identity"), width=9),
    Chain(kind="boundary", stream=StreamSpec(streams=7), width=40, branch_dtype=torch.bfloat16),
    Chain(kind="boundary", stream=StreamSpec(), width=36, norm="rms", norm_eps=1e-5),
    Chain(kind="read", stream=StreamSpec(streams=3), width=21, norm="layer", norm_eps=1e-6, **BF16),
    Chain(kind="read", stream=V4, width=31),
    Chain(kind="coefficients", stream=V4, width=32),
    Chain(kind="distribute", stream=StreamSpec(), width=19, **BF16),
    Chain(kind="aggregate", stream=StreamSpec(streams=3), width=70),
    Chain(kind="reduce", stream=V4, width=18),
    Chain(kind="reduce", stream=StreamSpec(exit="sum"), width=23),
    Chain(kind="leave", stream=StreamSpec(streams=2), width=32),
    Chain(kind="leave", stream=V4, width=15),
    Chain(kind="boundary", stream=V4, width=35, norm="layer", norm_eps=1e-5, **F16),
    Chain(kind="distribute", stream=StreamSpec(), width=37, **F16),
    Chain(kind="boundary", stream=StreamSpec(form="hc"), width=36, norm="rms", norm_eps=1e-5),
    Chain(kind="boundary", stream=StreamSpec(streams=3, form="hc"), width=17, **BF16),
    Chain(kind="read", stream=StreamSpec(streams=2, form="hc"), width=32),
    Chain(kind="coefficients", stream=StreamSpec(streams=1, form="hc"), width=9),
    Chain(kind="carry", stream=StreamSpec(streams=3), width=19),
    Chain(kind="boundary", stream=StreamSpec(manifold="circulant"), width=24, norm="rms", norm_eps=1e-5),
    Chain(kind="read", stream=StreamSpec(streams=3, manifold="permutations", convention=Convention.LIGER), width=17),
    Chain(kind="coefficients", stream=StreamSpec(manifold="kronecker"), width=12),
]
FEW = 4
"""The most streams for which Triton's interpreter is quick."""
# In a list of their own: hypothesis draws other examples from a longer one.
LATER = [
    Chain(kind="deferred", stream=V41, width=35),
    Chain(kind="deferred", stream=V41, width=24, norm="rms", norm_eps=1e-5, **BF16),
    Chain(kind="deferred", stream=replace(V41, streams=3, manifold="identity"), width=17, norm="layer", norm_eps=1e-6),
    Chain(kind="boundary", stream=StreamSpec(manifold="transportation"), width=24, norm="rms", norm_eps=1e-5),
    Chain(kind="read", stream=StreamSpec(streams=2, manifold="transportation", convention=Convention.LIGER), width=17),
    Chain(kind="coefficients", stream=StreamSpec(streams=1, manifold="transportation"), width=12),
    Chain(kind="coefficients", stream=replace(V4, streams=5, manifold="transportation"), width=9),
]


def name_of(chain: Chain) -> str:
    """A test's name for the chain."""
    weights = chain.stream.form if chain.is_hyper_connection else chain.weights
    return f"{chain.name}-{chain.stream.convention.value}-{chain.stream.manifold}-{weights}"


def random_inputs(chain: Chain, lead: tuple[int, ...], seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Inputs by name; `scale` multiplies what the logits are made of."""
    rng = torch.Generator().manual_seed(seed)
    values = {}
    for name in chain.inputs():
        value = torch.randn(chain.shape(name, lead), generator=rng)
        if name == "phi":
            value *= scale / value.shape[1] ** 0.5
        elif name == "bias":
            value *= scale
        elif name == "mix":
            value = torch.softmax(value, -1)
        values[name] = value.to(chain.dtype(name))
    return values


def random_gradients(chain: Chain, lead: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    """Gradients of the outputs by `d_` and their name."""
    rng = torch.Generator().manual_seed(seed)
    names = [name for name in chain.inputs("backward") if name.startswith("d_")]
    return {name: torch.randn(chain.shape(name, lead), generator=rng).to(chain.dtype(name)) for name in names}


def exactly(
    chain: Chain, inputs: dict[str, Tensor], gradients: dict[str, Tensor], dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs, and gradients of the inputs, of the reference in `dtype`."""
    leaves = {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}
    found = chain.reference(leaves)
    names = [name.removeprefix("d_") for name in gradients]
    grads = torch.autograd.grad(
        [found[n] for n in names if found[n].requires_grad],
        list(leaves.values()),
        [gradients[f"d_{n}"].to(dtype) for n in names if found[n].requires_grad],
        allow_unused=True,
    )
    zero = [torch.zeros_like(v) if g is None else g for v, g in zip(leaves.values(), grads, strict=True)]
    return {n: found[n].detach() for n in names}, {f"d_{n}": g for n, g in zip(leaves, zero, strict=True)}


def backward_values(
    chain: Chain, inputs: dict[str, Tensor], outputs: dict[str, Tensor], gradients: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What the backward is called with, in its order."""
    every = {**inputs, **outputs, **gradients}
    return {name: every[name] for name in chain.inputs("backward")}


def error(found: Tensor, exact: Tensor) -> float:
    """The largest difference relative to the largest value."""
    if not exact.numel():
        return 0.0
    return float((found.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1e-20))
