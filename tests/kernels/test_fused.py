"""The fused ops: registered for every compiler, differentiable once, the same with every provider."""

from __future__ import annotations

import pytest
import torch
from chains import CHAINS, LATER, error, exactly, name_of, random_gradients, random_inputs

from mhc_compile.kernels import targets
from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.fused import op_of, prototypes
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.target import Reference

LEAD = (2, 5)


def static(chain: Chain) -> tuple[object, ...]:
    """What stands behind an op's tensors."""
    return (str(chain.stream),) if chain.norm == "none" else (str(chain.stream), chain.norm_eps)


def call(chain: Chain, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    out = getattr(torch.ops.mhc_kernels, op_of(chain))(*inputs.values(), *static(chain))
    return list(out) if isinstance(out, (tuple, list)) else [out]


@pytest.mark.parametrize("chain", CHAINS[:1] + CHAINS[8:] + LATER, ids=name_of)
def test_opcheck(chain: Chain) -> None:
    inputs = {k: v.requires_grad_() for k, v in random_inputs(chain, LEAD, 0).items()}
    op = getattr(torch.ops.mhc_kernels, op_of(chain)).default
    torch.library.opcheck(op, (*inputs.values(), *static(chain)))


@pytest.mark.parametrize("chain", CHAINS + LATER, ids=name_of)
def test_gradients_through_the_op(chain: Chain) -> None:
    inputs, gradients = random_inputs(chain, LEAD, 0), random_gradients(chain, LEAD, 1)
    _, exact = exactly(chain, inputs, gradients)
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    out = call(chain, leaves)[: len(gradients)]
    found = torch.autograd.grad(out, list(leaves.values()), list(gradients.values()))
    half = {chain.streams_dtype, chain.branch_dtype} != {torch.float32}
    for (name, leaf), grad in zip(leaves.items(), found, strict=True):
        assert grad.dtype == leaf.dtype
        assert error(grad, exact[f"d_{name}"]) < (3e-2 if half else 1e-5), name


@pytest.mark.parametrize("name", sorted(prototypes()))
def test_the_reference_is_exact_in_float64(name: str) -> None:
    prototype = prototypes()[name]
    chain = Chain(
        kind=prototype.kind,
        stream=StreamSpec(streams=4, manifold="kronecker", exit=prototype.stream.exit),
        width=6,
        streams_dtype=torch.float64,
        branch_dtype=torch.float64,
        norm=prototype.norm,
        norm_eps=1e-6 if prototype.norm != "none" else 0.0,
    )
    assert targets.choose(chain, "cpu")[0] == "reference"
    inputs = {k: v.requires_grad_() for k, v in random_inputs(chain, LEAD, 0).items()}
    gradients = random_gradients(chain, LEAD, 1)
    exact_out, exact_grads = exactly(chain, inputs, gradients)
    out = call(chain, inputs)[: len(gradients)]
    found = torch.autograd.grad(out, list(inputs.values()), list(gradients.values()))
    for a, b in zip([*out, *found], [*exact_out.values(), *exact_grads.values()], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_of_gradients_are_refused() -> None:
    chain = CHAINS[0]
    leaves = {k: v.requires_grad_() for k, v in random_inputs(chain, LEAD, 0).items()}
    (grad,) = torch.autograd.grad(call(chain, leaves)[0].sum(), [leaves["X"]], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), [leaves["X"]])


def test_autocast_leaves_the_parameters_in_float32() -> None:
    chain = CHAINS[0]
    inputs = random_inputs(chain, LEAD, 0)
    expected = call(chain, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call(chain, inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compiled_by_inductor_with_dynamic_tokens() -> None:
    chain = CHAINS[0]

    text = str(chain.stream)

    @torch.compile(fullgraph=True, dynamic=True)
    def step(*inputs: torch.Tensor) -> list[torch.Tensor]:
        return [t * 2 for t in torch.ops.mhc_kernels.boundary(*inputs, text)]

    for tokens in (3, 8, 21):
        inputs = random_inputs(chain, (tokens,), tokens)
        for a, b in zip(step(*inputs.values()), call(chain, inputs), strict=True):
            torch.testing.assert_close(a, 2 * b)


def test_plain_pytorch_and_the_kernel_keep_the_same_values_for_the_backward() -> None:
    chain = CHAINS[0]
    inputs = random_inputs(chain, LEAD, 0)
    kept = Reference().run(chain, "forward", inputs)["z"]
    torch.testing.assert_close(call(chain, inputs)[-1], kept, rtol=1e-4, atol=1e-4)
