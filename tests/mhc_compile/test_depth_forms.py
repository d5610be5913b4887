"""Attention Residuals and DenseFormer: the published equations by hand over a model's own modules, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import chain, gpt2, ids, learned, llama, logits, shake, t5, used
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM

import mhc_compile
from mhc_compile import MHCError, convert
from mhc_compile.conversion import to_residual
from mhc_compile.kernels import forms
from mhc_compile.kernels.depth import DenseFormer
from mhc_compile.parameters import owners

FORMS = ["attnres", "attnres_block", "denseformer"]
DEPTH = 3
SLOW = [
    pytest.param(inner, form, marks=pytest.mark.slow)
    for inner in ("aot_eager", "inductor")
    for form in FORMS
    if (inner, form) != ("aot_eager", "attnres_block")
]


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    return BertForMaskedLM(BertConfig(vocab_size=100, attn_implementation="sdpa", **sizes)).eval()


def by_hand(model: nn.Module, form: str, blocks: int, tokens: Tensor) -> Tensor:
    """The n-source forms over the branches of a `Chain`, whose layers are x + F(x)."""
    (parameters,) = owners(model).values()
    numbers = [dict(parameters.get_submodule(name).named_parameters()) for name in (*parameters.sites, "head")]
    branches: list[Callable[[Tensor], Tensor]] = [
        lambda x, of=layer: of.down(F.gelu(of.up(of.norm(x)))) for layer in model.layers
    ]
    embedding = model.embed(tokens)
    if form == "denseformer":
        values, stream = [embedding], embedding
        for k, own in enumerate(numbers):
            stream = values[-1] + torch.einsum("j,j...->...", own["weights"].double(), torch.stack(values))
            if k < len(branches):
                values.append(stream + branches[k](stream))
        return model.head(stream)
    size = 1 if form == "attnres" else -(-len(branches) // blocks)
    sums, partial = [embedding], None
    for k, own in enumerate(numbers):
        sources = torch.stack([*sums, *([] if partial is None else [partial])])
        keys = F.rms_norm(sources, sources.shape[-1:], own["gain"].double(), eps=1e-6)
        shares = torch.softmax(keys @ own["query"].double(), 0)
        h = (shares[..., None] * sources).sum(0) * len(sources)
        if k == len(branches):
            return model.head(h)
        y = branches[k](h)
        partial = y if partial is None else partial + y
        if (k + 1) % size == 0:
            sums.append(partial)
            partial = None
    raise AssertionError


@pytest.mark.parametrize("form", FORMS)
def test_the_published_equations(form: str) -> None:
    model = chain(depth=2 * DEPTH + 1).double()
    tokens = ids()
    convert(model, tokens, form=form, streams=3, inner="eager")
    shake(model)
    expected = by_hand(model, form, 3, tokens)
    wanted = torch.autograd.grad(expected.square().mean(), list(model.parameters()))
    result = logits(model(tokens))
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(torch.autograd.grad(result.square().mean(), list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def call(model: nn.Module) -> Tensor:
    if "T5" in type(model).__name__:
        return model(input_ids=ids(), decoder_input_ids=ids(seed=1)).logits
    return logits(model(ids()))


FIRST = [(llama, "attnres"), (gpt2, "denseformer"), (bert, "attnres_block")]
MORE = [pair for pair in itertools.product((llama, gpt2, t5, bert), FORMS) if pair not in FIRST]


@pytest.mark.parametrize(("make", "form"), [*FIRST, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE)])
def test_conversion_keeps_the_function_and_every_parameter_learns(make: Callable[[], nn.Module], form: str) -> None:
    model = make()
    with torch.no_grad():
        before = call(model)
        after = call(convert(model, form=form, inner="eager", debug="numeric"))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    call(model).square().mean().backward()
    for parameters in owners(model).values():
        for name, p in parameters.named_parameters():
            assert p.grad is not None, name
            # With a query of zero the gain has no gradient; the first site of a list has one source alone, and BERT's
            # lists begin anew at every site.
            alone = make is bert or name.startswith(next(iter(parameters.sites)))
            assert alone or name.endswith(".gain") or p.grad.any(), name


@pytest.mark.parametrize(("inner", "form"), [("aot_eager", "attnres_block"), *SLOW])
def test_training_generation_and_folders(form: str, inner: str, tmp_path: Path) -> None:
    model = convert(llama(), form=form, inner=inner)
    used(model, tmp_path)
    with pytest.raises(MHCError, match="MHC411"):
        to_residual(model)


@pytest.mark.parametrize("form", FORMS)
def test_from_a_folder_and_back(form: str, tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "residual")
    mhc_compile.convert_folder(tmp_path / "residual", tmp_path / "deep", form=form)
    deep = mhc_compile.from_pretrained(tmp_path / "deep", inner="eager")
    with torch.no_grad():
        torch.testing.assert_close(logits(deep(ids())), logits(model(ids())), rtol=1e-5, atol=1e-5)
    mhc_compile.convert_folder(tmp_path / "deep", tmp_path / "again", to="residual")
    weights = [next((tmp_path / folder).glob("*.safetensors")).read_bytes() for folder in ("residual", "again")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("form", FORMS)
def test_to_residual(form: str) -> None:
    model = llama()
    before = logits(model(ids())).detach()
    assert torch.equal(logits(to_residual(convert(model, form=form, inner="eager"))(ids())), before)


def test_one_block_has_two_sources() -> None:
    """The embedding, and the sum of everything else."""
    model = convert(llama(), form="attnres_block", streams=1, inner="eager")
    with pytest.raises(MHCError, match=r"MHC204 .*convention"):
        convert(llama(), form="attnres", convention="liger")
    assert call(model).isfinite().all()


def test_a_memory_needs_streams() -> None:
    settings = mhc_compile.MemorySettings.preset("v41", layers=(1,), rows_per_head=50, row_width=4, compress=False)
    with pytest.raises(MHCError, match=r"MHC204 .*attnres"):
        convert(llama(), form="attnres", engram=settings)


def test_names_that_are_refused() -> None:
    with pytest.raises(MHCError, match=r"MHC204 .*already"):
        forms.register(DenseFormer())
    other = type("Other", (DenseFormer,), {"name": "not-a-name"})
    with pytest.raises(MHCError, match=r"MHC204 .*identifier"):
        forms.register(other())


@pytest.mark.parametrize("form", ["attnres", "attnres_block"])
def test_kernels_compute_the_same_and_its_gradients(form: str) -> None:
    results = []
    for kernels in ("none", "all"):
        model = convert(llama(), form=form, inner="eager", kernels=kernels)
        results.append(learned(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    fused = mhc_compile.inspect(model).kernels
    assert {kernel.kind for kernel in fused} == {"attend"}
    assert all(kernel.forward for kernel in fused)  # generated, not plain PyTorch
