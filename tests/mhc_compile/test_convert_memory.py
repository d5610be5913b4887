"""`convert(model)`: what stays converted, and what a converted model's parameters and calls look like."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, Block, Chain, chain, close, gradients, ids, llama, logits, loss_of, shake, t5
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, MusicgenForCausalLM
from transformers.models.musicgen import MusicgenDecoderConfig

from mhc_compile import MHCError, convert, stream_parameters
from mhc_compile.parameters import at_start, is_converted, owners

# --- the converted model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [1, 2, 8])
def test_the_function_is_unchanged(streams: int) -> None:
    model = chain()
    expected = model(ids())
    assert close(convert(model, ids(), inner="eager", streams=streams)(ids()), expected, 1e-3 if streams == 1 else 2e-6)


def test_the_example_of_a_model_whose_batch_holds_codebooks() -> None:
    config = MusicgenDecoderConfig(
        vocab_size=VOCAB, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, num_codebooks=3
    )
    model = MusicgenForCausalLM(config).eval()
    codes = ids(6)
    before = logits(model(codes))
    convert(model, inner="eager")
    assert close(logits(model(codes)), before)


def test_hidden_states_are_those_of_the_residual_model_at_the_start() -> None:
    model = llama()
    expected = model(ids(), output_hidden_states=True).hidden_states
    convert(model, inner="eager")
    found = model(ids(), output_hidden_states=True).hidden_states
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))
    shake(model)
    moved = model(ids(), output_hidden_states=True).hidden_states
    assert not any(close(a, b) for a, b in zip(moved[1:], found[1:], strict=True))


def test_the_routing_of_experts_enters_the_loss() -> None:
    """transformers installs what records the router's logits at the first call, under a lock."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(
        **sizes, num_hidden_layers=2, vocab_size=VOCAB, num_local_experts=4, output_router_logits=True
    )
    model = MixtralForCausalLM(config).eval()
    expected = copy.deepcopy(model)(ids(), labels=ids())
    found = convert(model, inner="eager")(ids(), labels=ids())
    assert close(found.loss, expected.loss)
    assert close(found.aux_loss, expected.aux_loss)
    assert found.aux_loss > 0


def test_attentions_are_returned() -> None:
    model = llama(attn_implementation="eager")
    expected = model(ids(), output_attentions=True).attentions
    found = convert(model, inner="eager")(ids(), output_attentions=True).attentions
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))


def test_parts_of_a_converted_model_called_on_their_own() -> None:
    model = llama()
    inner = model.model(ids()).last_hidden_state
    embedded = model.model.embed_tokens(ids())
    convert(model, inner="eager")
    assert close(model.model(ids()).last_hidden_state, inner)
    assert close(model.model(inputs_embeds=embedded).last_hidden_state, inner)
    # A single layer is no owner: it would compute its residual form.
    with pytest.raises(MHCError, match="MHC313"):
        model.model.layers[0](embedded, position_embeddings=model.model.rotary_emb(embedded, torch.arange(8)[None]))
    shake(model)
    assert not close(model.model(ids()).last_hidden_state, inner)


@pytest.mark.parametrize(
    "wrap", [lambda x: {"n": 1, "x": x}, lambda x: [None, x], lambda x: (1, {"x": [x]})], ids=["dict", "list", "nested"]
)
@pytest.mark.parametrize("named", [True, False])
def test_an_owner_whose_tensors_come_in_containers(wrap: Any, named: bool) -> None:
    class Batches(Chain):
        def forward(self, batch: Any) -> Tensor:
            while not isinstance(batch, Tensor):
                batch = batch["x"] if isinstance(batch, dict) else batch[1]
                batch = batch[0] if isinstance(batch, list) else batch
            return super().forward(batch)

    model = Batches().eval()
    args, kwargs = ((), {"batch": wrap(ids())}) if named else ((wrap(ids()),), {})
    expected = model(*args, **kwargs)
    convert(model, *args, example_kwargs=kwargs, inner="eager")
    assert close(model(*args, **kwargs), expected)
    compiled = torch.compile(model, backend="mhc", options={"inner": "eager"})
    assert close(compiled(*args, **kwargs), expected)


def test_an_owner_that_calls_its_children_in_turn() -> None:
    model = nn.Sequential(nn.Embedding(VOCAB, 32), Block(), Block(), nn.Linear(32, VOCAB)).eval()
    expected = model(ids())
    convert(model, ids(), inner="eager")
    assert close(model(ids()), expected)
    shake(model)
    assert not close(model(ids()), expected)
    embedded = model[:1](ids())  # of the same class, without streams
    assert torch.equal(embedded, model[0](ids()))


def test_a_new_model_of_the_class_of_a_converted_one_is_residual() -> None:
    model = convert(chain(), ids(), inner="eager")
    torch.manual_seed(0)
    other = type(model)().eval()
    assert not is_converted(other)
    assert torch.equal(other(ids()), chain()(ids()))
    convert(other, ids(), inner="eager")
    assert is_converted(other)
    assert close(other(ids()), model(ids()))


@torch._dynamo.config.patch(automatic_dynamic_shapes=False, assume_static_by_default=True)
def test_more_graphs_than_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mhc_compile.tracing.RECOMPILE_LIMIT", 3)
    model = convert(chain(), ids(), inner="eager")
    for length in (2, 3, 4):
        model(ids(1, length))
    with pytest.raises(MHCError, match="MHC307"):
        model(ids(1, 5))


def test_hooks_of_the_owner_and_of_its_layers_run() -> None:
    model = convert(llama(), inner="eager")
    model(ids())
    calls: list[str] = []
    model.model.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.model.register_forward_hook(lambda *_: calls.append("after"))
    model.model.layers[0].register_forward_hook(lambda *_: calls.append("layer"))
    model(ids())
    assert calls == ["before", "layer", "after"]


def test_a_hook_may_change_what_a_layer_returns() -> None:
    model = convert(chain(), ids(), inner="eager")
    handle = model.layers[1].register_forward_hook(lambda *call: 2 * call[-1])
    changed = model(ids())
    handle.remove()
    residual = chain()
    residual.layers[1].register_forward_hook(lambda *call: 2 * call[-1])
    assert close(changed, residual(ids()))


def test_two_owners_of_one_class_keep_their_own_parameters() -> None:
    model = convert(t5(), inner="eager")
    encoder, decoder = owners(model).values()
    assert not {id(p) for p in encoder.parameters()} & {id(p) for p in decoder.parameters()}
    before = model(ids(), decoder_input_ids=ids()).logits
    with torch.no_grad():
        next(iter(encoder.parameters())).add_(1.0)
    assert not close(model(ids(), decoder_input_ids=ids()).logits, before)


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [chain, llama])
def test_a_deep_copy_is_converted_and_independent(make: Any) -> None:
    model = convert(make(), example_kwargs={"x" if make is chain else "input_ids": ids()}, inner="eager")
    expected = logits(model(ids()))
    other = copy.deepcopy(model)
    shake(other)
    assert not close(logits(other(ids())), expected)
    assert torch.equal(logits(model(ids())), expected)
    assert owners(other).keys() == owners(model).keys()


@pytest.mark.slow
def test_a_pickle_opens_converted_in_a_fresh_process(tmp_path: Path) -> None:
    model = convert(llama(), inner="eager")
    shake(model)
    path = tmp_path / "model.pt"
    torch.save((model, ids(), model(ids()).logits), path)
    program = f"""
import torch
model, x, expected = torch.load({str(path)!r}, weights_only=False)
print(torch.equal(model(x).logits, expected))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_each_pickle_protocol(protocol: int) -> None:
    model = convert(chain(), ids(), inner="eager")
    other = pickle.loads(pickle.dumps(model, protocol))
    assert is_converted(other)
    assert torch.equal(other(ids()), model(ids()))


def test_a_copy_of_a_converted_and_compiled_model() -> None:
    model = convert(chain(), ids(), inner="eager")
    model.compile(backend="mhc", options={"inner": "eager"})
    expected = model(ids())
    assert torch.equal(copy.deepcopy(model)(ids()), expected)


# --- parameters -------------------------------------------------------------------------------------------------------


def test_functional_calls_use_the_parameters_given() -> None:
    model = convert(chain(), ids(), inner="eager")
    expected = model(ids())
    given = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, given, (ids(),)), expected)
    other = copy.deepcopy(model)
    shake(other)
    moved = torch.func.functional_call(model, dict(other.named_parameters()), (ids(),))
    assert torch.equal(moved, other(ids()))
    assert torch.equal(model(ids()), expected)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state_dict(assign: bool) -> None:
    model, other = (convert(chain(), ids(), inner="eager") for _ in range(2))
    model(ids())
    shake(other)
    model.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(model(ids()), other(ids()))
    gradients(model)
    assert all(p.grad is not None for p in model.parameters())


def test_keys_are_those_of_the_residual_model_and_the_sites() -> None:
    residual = set(llama().state_dict())
    keys = set(convert(llama(), inner="eager").state_dict())
    sites = {f"model.mhc.layers.{i}#{j}.{p}" for i in range(2) for j in range(2) for p in ("phi", "alpha", "bias")}
    assert keys == residual | sites


@pytest.mark.parametrize(
    ("cast", "weights", "streams"),
    [
        (lambda m: m.to(torch.bfloat16), torch.bfloat16, torch.float32),
        (lambda m: m.half(), torch.float16, torch.float32),
        (lambda m: m.double(), torch.float64, torch.float64),
        (lambda m: m.double().to(torch.bfloat16), torch.bfloat16, torch.float64),
        (lambda m: m.bfloat16().float(), torch.float32, torch.float32),
    ],
)
def test_casting_a_model_leaves_its_streams_in_float32_at_least(
    cast: Any, weights: torch.dtype, streams: torch.dtype
) -> None:
    model = cast(convert(chain(), ids(), inner="eager"))
    assert {p.dtype for p in stream_parameters(model).values()} == {streams}
    assert model(ids()).dtype == model.head.weight.dtype == weights
    loss_of(model).backward()


@pytest.mark.parametrize("form", ["mhc", "hc"])
def test_streams_are_float32_whatever_the_default_dtype(form: str) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = convert(chain(), ids(), inner="eager", form=form)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in stream_parameters(model).values()} == {torch.float32}
    assert all(at_start(p) for p in owners(model).values())


def test_a_model_on_the_meta_device() -> None:
    source = convert(chain(), ids(), inner="eager")
    shake(source)
    with torch.device("meta"):
        model = chain()
    convert(model, ids().to("meta"), inner="eager")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model(ids().to("meta")).shape == (2, 8, VOCAB)
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(model(ids()), source(ids()))


def test_a_hugging_face_model_on_the_meta_device_needs_no_inputs() -> None:
    with torch.device("meta"):
        model = llama()
    convert(model, inner="eager")
    assert {p.device.type for p in stream_parameters(model).values()} == {"meta"}


def test_conversion_in_inference_mode_leaves_trainable_parameters() -> None:
    model = chain()
    with torch.inference_mode():
        convert(model, ids(), inner="eager")
    assert gradients(model).keys() == {name for name, _ in model.named_parameters()}


def test_conversion_from_scratch_draws_phi() -> None:
    model = convert(chain(), ids(), inner="eager", scratch=True, start="paper")
    assert not any(at_start(p) for p in owners(model).values())
    phis = torch.cat([p.flatten() for name, p in stream_parameters(model).items() if name.endswith("phi")])
    assert 0.015 < phis.std() < 0.025


def test_stream_parameters_have_a_value_for_every_member() -> None:
    model = convert(chain(), ids(), inner="eager")
    assert dict(inspect.getmembers(model.mhc))["vocab"] is None
