"""Saving and loading converted models: nothing is lost, and the folder holds what it should."""

from __future__ import annotations

import copy
import io
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import assert_same, with_streams
from safetensors.torch import load_file
from tiny_models import chain, gpt2, ids, llama, shake, t5
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaModel,
    Trainer,
    TrainingArguments,
)

import mhc_compile
from mhc_compile import MHCError, convert, from_pretrained, save_pretrained, to_residual


def llama_bf16() -> Any:
    # `.to(bfloat16)` would narrow the rotary table as well, which no checkpoint holds.
    return LlamaForCausalLM._from_config(llama(tie_word_embeddings=True).config, dtype=torch.bfloat16).eval()


# --- there and back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "shard"),
    [
        pytest.param(llama, {}, "30KB", id="llama"),
        pytest.param(
            llama_bf16, {"convention": "deepseek_v4"}, "50GB", id="llama-bf16-tied-head", marks=pytest.mark.compat
        ),
        pytest.param(gpt2, {"streams": 2, "manifold": "kronecker"}, "50GB", id="gpt2-tied"),
        # No part of compat: Dynamo of torch 2.11 does not trace T5 where it makes its own cache (docs/limits.md).
        pytest.param(t5, {"exit": "sum"}, "30KB", id="t5"),
    ],
)
def test_round_trip_is_bit_equal(make: Any, options: dict[str, Any], shard: str, tmp_path: Path) -> None:
    model = with_streams(make(), **options)
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path / "saved", max_shard_size=shard)
    loaded = from_pretrained(tmp_path / "saved", inner="eager")
    assert_same(model, loaded)
    assert not loaded.training
    assert loaded.generation_config.temperature == 0.5
    assert {p.dtype for p in mhc_compile.stream_parameters(loaded).values()} == {torch.float32}
    tied = getattr(model.config, "tie_word_embeddings", False)
    assert tied == (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight)
    inputs = {"input_ids": ids(), **({"decoder_input_ids": ids(seed=1)} if model.config.is_encoder_decoder else {})}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)


def test_a_loaded_model_trains_and_is_saved_again(saved: Path, tmp_path: Path) -> None:
    model = from_pretrained(saved, inner="eager").train()
    model(input_ids=ids(), labels=ids()).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.save_pretrained(tmp_path / "again")
    assert_same(model, from_pretrained(tmp_path / "again", inner="eager"))


def test_owners_may_have_specifications_of_their_own(tmp_path: Path) -> None:
    model = t5()
    kwargs = {"input_ids": ids(), "use_cache": False}
    convert(model.encoder, example_kwargs=kwargs, streams=2, inner="eager")
    convert(model.decoder, example_kwargs=kwargs, streams=3, inner="eager")
    save_pretrained(model, tmp_path / "saved")
    assert_same(model, from_pretrained(tmp_path / "saved", inner="eager"))


def test_the_owner_alone_is_saved_as_a_model_of_its_own(tmp_path: Path) -> None:
    model = with_streams(llama())
    model.model.save_pretrained(tmp_path / "saved")
    loaded = from_pretrained(tmp_path / "saved", inner="eager")
    assert isinstance(loaded, LlamaModel)
    assert_same(model.model, loaded)


def test_copies_save_themselves(tmp_path: Path) -> None:
    model = with_streams(llama())
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stored, weights_only=False)]
    for i, other in enumerate(copies):
        with torch.no_grad():
            other.lm_head.weight.fill_(i)
        other.save_pretrained(tmp_path / str(i))
        assert_same(other, from_pretrained(tmp_path / str(i), inner="eager"))


def test_compiled_models_and_those_converted_at_their_first_call_save_their_streams(tmp_path: Path) -> None:
    compiled = torch.compile(llama(), backend="mhc", options={"inner": "eager"})
    with torch.no_grad(), pytest.warns(mhc_compile.MHCWarning, match="MHC302"):
        compiled(ids())
    compiled.save_pretrained(tmp_path / "a")
    save_pretrained(compiled, tmp_path / "b")
    for name in ("a", "b"):
        assert_same(compiled._orig_mod, from_pretrained(tmp_path / name, inner="eager"))


def test_the_trainer_saves_streams(tmp_path: Path) -> None:
    model = with_streams(llama())
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    data = [{"input_ids": ids()[0], "labels": ids()[0]}] * 2
    Trainer(model=model, args=arguments, train_dataset=data).train()
    loaded = from_pretrained(tmp_path / "checkpoint-1", inner="eager")
    assert_same(model, loaded)
    assert (tmp_path / "checkpoint-1" / "optimizer.pt").exists()


def test_sharded_parameters_are_gathered_by_the_caller(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = with_streams(llama())
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(MHCError, match=r"MHC204.*sharded"):
            model.save_pretrained(tmp_path / "saved")
        gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        model.save_pretrained(tmp_path / "saved", state_dict=dict(gathered))
    finally:
        torch.distributed.destroy_process_group()
    loaded = from_pretrained(tmp_path / "saved", inner="eager")
    assert all(torch.equal(t, gathered[name]) for name, t in loaded.state_dict().items())


# --- what a folder holds -------------------------------------------------------------------------------------------


def test_the_configuration_of_a_loaded_model_is_the_original(saved: Path, tmp_path: Path) -> None:
    model = from_pretrained(saved, inner="eager")
    assert not hasattr(model.config, "transformers_weights")
    convert(llama(), inner="eager").save_pretrained(tmp_path / "start")
    to_residual(from_pretrained(tmp_path / "start", inner="eager")).save_pretrained(tmp_path / "residual")
    llama().save_pretrained(tmp_path / "original")
    texts = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("residual", "original")]
    assert texts[0] | {"dtype": "float32"} == texts[1] | {"dtype": "float32"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "residual")


def test_every_weight_file_is_compared_with_what_was_written(saved_copy: Path) -> None:
    manifest = json.loads((saved_copy / "mhc.json").read_text())
    files = sorted(saved_copy.glob("*.safetensors"))
    assert len(files) > 2
    assert set(manifest["sha256"]) == {p.name for p in files}
    content = bytearray(files[0].read_bytes())
    content[-1] ^= 1
    files[0].write_bytes(content)
    with pytest.raises(MHCError, match=f"MHC414.*{files[0].name}.*sha256"):
        from_pretrained(saved_copy, inner="eager")
    from_pretrained(saved_copy, inner="eager", verify=False)


def test_streams_lie_in_a_shard_of_their_own(saved: Path) -> None:
    manifest = json.loads((saved / "mhc.json").read_text())
    streams = load_file(saved / manifest["streams_file"])
    assert set(streams) == set(mhc_compile.stream_parameters(with_streams(llama())))
    index = json.loads((saved / "mhc.safetensors.index.json").read_text())["weight_map"]
    assert {name for name, file in index.items() if file == manifest["streams_file"]} == set(streams)


def test_loading_says_nothing_about_unexpected_weights(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("transformers")
    log.propagate = True
    try:
        from_pretrained(saved, inner="eager")
    finally:
        log.propagate = False
    assert not caplog.records


def test_saving_into_a_used_folder_replaces_the_earlier_save_alone(saved_copy: Path) -> None:
    (saved_copy / "trainer_state.json").write_text("{}")
    model = from_pretrained(saved_copy, inner="eager")
    shake(model)
    model.save_pretrained(saved_copy, max_shard_size="50GB")
    assert_same(model, from_pretrained(saved_copy, inner="eager"))
    assert sorted(p.name for p in saved_copy.iterdir()) == [
        "config.json", "generation_config.json", "loading_mhc.py", "mhc.json", "mhc.safetensors.index.json",
        "model.mhc-00001-of-00002.safetensors", "model.mhc-00002-of-00002.safetensors", "model.safetensors.index.json",
        "trainer_state.json",
    ]  # fmt: skip


def test_leftovers_of_a_killed_save_do_not_disturb(saved_copy: Path) -> None:
    model = from_pretrained(saved_copy, inner="eager")
    for name in (".mhc-finished", "..mhc-finished.mhc-partial"):
        (saved_copy / name).mkdir()
        (saved_copy / name / "model.mhc.safetensors").write_bytes(b"x")
    model.save_pretrained(saved_copy)
    assert_same(model, from_pretrained(saved_copy, inner="eager"))
    assert not [p for p in saved_copy.iterdir() if p.name.startswith(".")]


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    with_streams(llama()).save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not any(tmp_path.iterdir())


def test_a_state_dict_is_saved_instead_of_the_models_own(tmp_path: Path) -> None:
    model = with_streams(llama())
    state = {name: t + 1 for name, t in model.state_dict().items()}
    model.save_pretrained(tmp_path / "saved", state_dict=dict(state))
    loaded = from_pretrained(tmp_path / "saved", inner="eager")
    assert all(torch.equal(t, state[name]) for name, t in loaded.state_dict().items())


# --- refusals when saving ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", [{"variant": "fp16"}, {"push_to_hub": True}, {"distributed_checkpoint": True}])
def test_arguments_that_would_lose_the_streams(argument: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(MHCError, match="MHC204"):
        with_streams(llama()).save_pretrained(tmp_path / "saved", **argument)
    assert not any(tmp_path.iterdir())


def test_a_state_dict_without_streams(tmp_path: Path) -> None:
    model = with_streams(llama())
    state = {name: t for name, t in model.state_dict().items() if not name.endswith("layers.1#0.bias")}
    with pytest.raises(MHCError, match=r"MHC404.*layers\.1#0\.bias"):
        model.save_pretrained(tmp_path / "saved", state_dict=state)


def test_models_that_cannot_be_saved_so(tmp_path: Path) -> None:
    with pytest.raises(MHCError, match="MHC410"):
        save_pretrained(llama(), tmp_path / "saved")
    with pytest.raises(MHCError, match="MHC405"):
        save_pretrained(convert(chain(), ids(), inner="eager"), tmp_path / "saved")


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
def test_a_folder_with_residual_weights(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(MHCError, match=f"MHC412.*{name}"):
        with_streams(llama()).save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "saved").write_text("x")
    with pytest.raises(MHCError, match="MHC412"):
        with_streams(llama()).save_pretrained(tmp_path / "saved")
