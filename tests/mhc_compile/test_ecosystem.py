"""Quantised weights, accelerate, and inputs made for models of transformers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from accelerate.state import AcceleratorState, GradientState, PartialState
from tiny_models import chain, close, code_of, gpt2, gradients, ids, llama, logits, shake, t5, variants
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTForImageClassification

from mhc_compile import MHCError, convert, stream_parameters
from mhc_compile.conversion.example_inputs import example_inputs

# --- quantised weights ------------------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """Weights as int8 buffers with a scale for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class PackedLinear(nn.Module):
    """Two 4-bit weights in each uint8 of a frozen parameter, unpacked by a custom operator."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        levels = (linear.weight.detach() / scale).round().to(torch.int16) + 8
        packed = (levels[:, ::2] * 16 + levels[:, 1::2]).to(torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.weight, self.scale)


@torch.library.custom_op("mhc_tests::packed_linear", mutates_args=())
def packed_linear(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return x @ unpack(packed, scale).T


def unpack(packed: Tensor, scale: Tensor) -> Tensor:
    levels = torch.stack([packed // 16, packed % 16], -1).flatten(1).to(scale.dtype) - 8
    return levels * scale


@packed_linear.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad @ unpack(*ctx.saved_tensors), None, None


packed_linear.register_autograd(_backward, setup_context=_setup)


def quantised(kind: type[nn.Module]) -> nn.Module:
    model = llama()
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, kind(child))
    return model


@pytest.mark.parametrize("kind", [Int8Linear, PackedLinear])
@pytest.mark.parametrize("inner", variants("eager", "aot_eager"))
def test_quantised_weights(kind: type[nn.Module], inner: str) -> None:
    model = quantised(kind)
    expected = model(ids()).logits
    convert(model, inner=inner)
    assert close(model(ids()).logits, expected)
    assert len(stream_parameters(model)) == 12
    assert set(stream_parameters(model)) < gradients(model).keys()


def test_packed_weights_that_dynamo_cannot_trace_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.ao is deprecated
        model = torch.ao.quantization.quantize_dynamic(llama(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(MHCError, match="MHC104") as caught:
        convert(model)
    assert "quantized/dynamic/modules/linear.py" in str(caught.value)
    assert not stream_parameters(model)


# --- accelerate -------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator() -> Iterator[Any]:
    """Makes accelerators, each as if it were the first of its process."""

    def make(**options: Any) -> Accelerator:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        return Accelerator(cpu=True, **options)

    yield make
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_a_device_map_of_one_device() -> None:
    model = dispatch_model(llama(), {"": "cpu"})
    expected = model(ids()).logits
    assert close(convert(model, inner="eager")(ids()).logits, expected)
    model = dispatch_model(convert(llama(), inner="eager"), {"": "cpu"})
    assert close(model(ids()).logits, expected)


def split(model: nn.Module, folder: Path) -> None:
    parts = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    places = dict.fromkeys([*parts, *(["model.mhc"] if stream_parameters(model) else [])], "cpu")
    dispatch_model(model, {**places, "model.layers.1": "disk"}, main_device="cpu", offload_dir=str(folder))


@pytest.mark.parametrize(
    "place",
    [
        lambda m, _: dispatch_model(m, {"": "cpu"}, force_hooks=True),
        lambda m, _: cpu_offload(m, torch.device("cpu")),
        lambda m, folder: disk_offload(m, str(folder), torch.device("cpu")),
        split,
    ],
    ids=["hooks", "cpu", "disk", "split"],
)
def test_layers_that_accelerate_moves_are_refused(place: Any, tmp_path: Path) -> None:
    model = llama()
    place(model, tmp_path)
    with pytest.raises(MHCError, match="MHC211"):
        convert(model)
    assert not stream_parameters(model)
    converted = convert(llama(), inner="eager")
    place(converted, tmp_path)
    with pytest.raises(MHCError, match="MHC211"):
        converted(ids())


def test_prepare_of_a_converted_model(accelerator: Any) -> None:
    ours = accelerator()
    model = convert(llama(), inner="aot_eager")
    before = {name: p.detach().clone() for name, p in stream_parameters(model).items()}
    model, optimizer = ours.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    ours.backward(model(ids(), labels=ids()).loss)
    optimizer.step()
    assert not [n for n, p in stream_parameters(model).items() if n.endswith("phi") and torch.equal(p, before[n])]
    assert close(ours.unwrap_model(model)(ids()).logits, model(ids()).logits)


def test_prepare_with_mixed_precision(accelerator: Any) -> None:
    ours = accelerator(mixed_precision="bf16")
    residual = ours.prepare(llama())(ids()).logits
    exact = llama().double()(ids()).logits
    model = ours.prepare(convert(llama(), inner="eager"))
    out = model(ids()).logits
    assert out.dtype == residual.dtype == torch.float32
    assert (out - exact).abs().max() <= 2 * (residual - exact).abs().max()
    assert {p.dtype for p in stream_parameters(model).values()} == {torch.float32}
    compiled = torch.compile(model, backend="mhc", options={"inner": "eager"})
    assert torch.equal(compiled(ids()).logits, out)


def test_prepare_of_an_owner_that_is_the_model(accelerator: Any) -> None:
    ours = accelerator(mixed_precision="bf16")
    model = ours.prepare(convert(chain(), ids(), inner="eager"))
    shake(model)
    expected = copy.deepcopy(ours.unwrap_model(model, keep_fp32_wrapper=False))(ids())
    assert close(model(ids()), expected, 0.05)


def test_a_prepared_model_around_the_owner_is_converted(accelerator: Any) -> None:
    model = accelerator(mixed_precision="bf16").prepare(llama())
    residual = model(ids()).logits
    assert close(convert(model, inner="eager")(ids()).logits, residual, 0.01)
    shake(model)
    assert not close(model(ids()).logits, residual, 0.01)


def test_a_prepared_owner_is_refused(accelerator: Any) -> None:
    ours = accelerator(mixed_precision="bf16")
    with pytest.raises(MHCError, match="MHC207"):
        convert(ours.prepare(chain()), ids())
    with pytest.raises(Exception, match=r"MHC303|MHC207"):
        torch.compile(ours.prepare(chain()), backend="mhc")(ids())


# --- inputs of transformers' models -----------------------------------------------------------------------------------


def bert() -> nn.Module:
    return BertForMaskedLM(
        BertConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=64,
            max_position_embeddings=64,
        )
    ).eval()


def vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
        )
    ).eval()


@pytest.mark.parametrize("make", [llama, gpt2, t5, bert, vit])
def test_hugging_face_models_need_no_example(make: Any) -> None:
    model = make()
    inputs = example_inputs(model)
    expected = logits(model(**inputs))
    assert close(logits(convert(model, inner="eager")(**inputs)), expected, 5e-6)


def test_example_inputs_have_the_dtype_of_the_weights_that_are_not_quantised() -> None:
    model = vit().to(torch.bfloat16)
    packed = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    model._parameters = {"packed": packed, **model._parameters}
    assert next(model.parameters()) is packed
    assert example_inputs(model)["pixel_values"].dtype == torch.bfloat16


def test_a_refusal_of_the_backend_shows_its_code_through_dynamo() -> None:
    model = convert(chain(), ids(), inner="eager", streams=2)
    with pytest.raises(Exception, match="MHC304") as caught:
        torch.compile(model, backend="mhc", options={"streams": 4})(ids())
    assert code_of(caught.value) == "MHC304"
