"""Saving and loading converted models: nothing is lost, and no reader takes one for a residual model."""

from __future__ import annotations

import copy
import io
import json
import logging
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from memories import tokenizer
from safetensors.torch import load_file, save_file
from tiny_models import chain, gpt2, ids, llama, shake, t5
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

import mhc_compile
from mhc_compile import MHCError, convert, from_pretrained, save_pretrained, to_residual
from mhc_compile.arm import is_armed
from mhc_compile.parameters import owners


def converted(model: nn.Module, **options: Any) -> Any:
    model = convert(model, inner="eager", **options)
    shake(model)
    return model


def llama_bf16() -> Any:
    # `.to(bfloat16)` would narrow the rotary table as well, which no checkpoint holds.
    return LlamaForCausalLM._from_config(llama(tie_word_embeddings=True).config, dtype=torch.bfloat16).eval()


def assert_same(left: nn.Module, right: nn.Module) -> None:
    assert type(left).__name__ == type(right).__name__
    a, b = left.state_dict(), right.state_dict()
    assert a.keys() == b.keys()
    for name, t in a.items():
        assert t.dtype == b[name].dtype
        assert torch.equal(t, b[name]), name
    mine, others = owners(left), owners(right)
    assert {path: (p.spec, list(p.sites.items())) for path, p in mine.items()} == {
        path: (p.spec, list(p.sites.items())) for path, p in others.items()
    }
    assert all(is_armed(right.get_submodule(path)) for path in others)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained, converted Llama in several shards."""
    folder = tmp_path_factory.mktemp("saved") / "llama"
    converted(llama()).save_pretrained(folder, max_shard_size="30KB")
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copied"))


# --- there and back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "shard"),
    [
        pytest.param(llama, {}, "30KB", id="llama", marks=pytest.mark.compat),
        pytest.param(
            llama_bf16, {"convention": "deepseek_v4"}, "50GB", id="llama-bf16-tied-head", marks=pytest.mark.compat
        ),
        pytest.param(gpt2, {"streams": 2, "manifold": "kronecker"}, "50GB", id="gpt2-tied", marks=pytest.mark.compat),
        # No part of compat: Dynamo of torch 2.11 does not trace T5 where it makes its own cache (docs/limits.md).
        pytest.param(t5, {"exit": "sum"}, "30KB", id="t5"),
    ],
)
def test_round_trip_is_bit_equal(make: Any, options: dict[str, Any], shard: str, tmp_path: Path) -> None:
    model = converted(make(), **options)
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
    model = converted(llama())
    model.model.save_pretrained(tmp_path / "saved")
    loaded = from_pretrained(tmp_path / "saved", inner="eager")
    assert isinstance(loaded, LlamaModel)
    assert_same(model.model, loaded)


def test_copies_save_themselves(tmp_path: Path) -> None:
    model = converted(llama())
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
    model = converted(llama())
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
        model = converted(llama())
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


PLAIN_LOADS: dict[str, Any] = {
    "AutoModel": AutoModel.from_pretrained,
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
    "variant": lambda f: AutoModel.from_pretrained(f, variant="mhc"),
    "variant of a causal model": lambda f: AutoModelForCausalLM.from_pretrained(f, variant="mhc"),
    "another head": lambda f: AutoModelForSequenceClassification.from_pretrained(f, variant="mhc"),
    "the class": LlamaForCausalLM.from_pretrained,
    "variant of the class": lambda f: LlamaForCausalLM.from_pretrained(f, variant="mhc"),
    "variant of the base": lambda f: LlamaModel.from_pretrained(f, variant="mhc", device_map="cpu"),
    "remote code": lambda f: AutoModelForCausalLM.from_pretrained(f, variant="mhc", trust_remote_code=True),
    "its configuration": lambda f: LlamaModel.from_pretrained(f, config=LlamaConfig.from_pretrained(f), variant="mhc"),
    "pipeline": lambda f: pipeline("text-generation", model=str(f), model_kwargs={"variant": "mhc"}),
    "plain pipeline": lambda f: pipeline("text-generation", model=str(f)),
}


@pytest.mark.parametrize("load", PLAIN_LOADS)
def test_transformers_alone_does_not_load_it(load: str, copied: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer()).save_pretrained(copied)
    with pytest.raises((OSError, ValueError), match=r"mhc_compile\.from_pretrained"):
        PLAIN_LOADS[load](copied)


def test_transformers_alone_reads_what_is_beside_the_weights(copied: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer()).save_pretrained(copied)
    assert AutoTokenizer.from_pretrained(copied)("ab").input_ids
    assert AutoConfig.from_pretrained(copied).hidden_size == 32
    assert GenerationConfig.from_pretrained(copied).pad_token_id == 0


def test_the_configuration_of_a_loaded_model_is_the_original(saved: Path, tmp_path: Path) -> None:
    model = from_pretrained(saved, inner="eager")
    assert not hasattr(model.config, "transformers_weights")
    convert(llama(), inner="eager").save_pretrained(tmp_path / "start")
    to_residual(from_pretrained(tmp_path / "start", inner="eager")).save_pretrained(tmp_path / "residual")
    llama().save_pretrained(tmp_path / "original")
    texts = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("residual", "original")]
    assert texts[0] | {"dtype": "float32"} == texts[1] | {"dtype": "float32"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "residual")


def test_every_weight_file_is_compared_with_what_was_written(copied: Path) -> None:
    manifest = json.loads((copied / "mhc.json").read_text())
    files = sorted(copied.glob("*.safetensors"))
    assert len(files) > 2
    assert set(manifest["sha256"]) == {p.name for p in files}
    content = bytearray(files[0].read_bytes())
    content[-1] ^= 1
    files[0].write_bytes(content)
    with pytest.raises(MHCError, match=f"MHC414.*{files[0].name}.*sha256"):
        from_pretrained(copied, inner="eager")
    from_pretrained(copied, inner="eager", verify=False)


def test_streams_lie_in_a_shard_of_their_own(saved: Path) -> None:
    manifest = json.loads((saved / "mhc.json").read_text())
    streams = load_file(saved / manifest["streams_file"])
    assert set(streams) == set(mhc_compile.stream_parameters(converted(llama())))
    index = json.loads((saved / "model.safetensors.index.mhc.json").read_text())["weight_map"]
    assert {name for name, file in index.items() if file == manifest["streams_file"]} == set(streams)


def test_loading_says_nothing_about_unexpected_weights(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("transformers")
    log.propagate = True
    try:
        from_pretrained(saved, inner="eager")
    finally:
        log.propagate = False
    assert not caplog.records


def test_saving_into_a_used_folder_replaces_the_earlier_save_alone(copied: Path) -> None:
    (copied / "trainer_state.json").write_text("{}")
    model = from_pretrained(copied, inner="eager")
    shake(model)
    model.save_pretrained(copied, max_shard_size="50GB")
    assert_same(model, from_pretrained(copied, inner="eager"))
    assert sorted(p.name for p in copied.iterdir()) == [
        "config.json", "generation_config.json", "mhc.json", "model.mhc-00001-of-00002.safetensors",
        "model.mhc-00002-of-00002.safetensors", "model.safetensors.index.mhc.json", "trainer_state.json",
    ]  # fmt: skip


def test_leftovers_of_a_killed_save_do_not_disturb(copied: Path) -> None:
    model = from_pretrained(copied, inner="eager")
    for name in (".mhc-finished", "..mhc-finished.mhc-partial"):
        (copied / name).mkdir()
        (copied / name / "model.mhc.safetensors").write_bytes(b"x")
    model.save_pretrained(copied)
    assert_same(model, from_pretrained(copied, inner="eager"))
    assert not [p for p in copied.iterdir() if p.name.startswith(".")]


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    converted(llama()).save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not any(tmp_path.iterdir())


def test_a_state_dict_is_saved_instead_of_the_models_own(tmp_path: Path) -> None:
    model = converted(llama())
    state = {name: t + 1 for name, t in model.state_dict().items()}
    model.save_pretrained(tmp_path / "saved", state_dict=dict(state))
    loaded = from_pretrained(tmp_path / "saved", inner="eager")
    assert all(torch.equal(t, state[name]) for name, t in loaded.state_dict().items())


# --- refusals when saving ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", [{"variant": "fp16"}, {"push_to_hub": True}, {"distributed_checkpoint": True}])
def test_arguments_that_would_lose_the_streams(argument: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(MHCError, match="MHC204"):
        converted(llama()).save_pretrained(tmp_path / "saved", **argument)
    assert not any(tmp_path.iterdir())


def test_a_state_dict_without_streams(tmp_path: Path) -> None:
    model = converted(llama())
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
        converted(llama()).save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "saved").write_text("x")
    with pytest.raises(MHCError, match="MHC412"):
        converted(llama()).save_pretrained(tmp_path / "saved")


# --- loading: keywords and damaged folders -------------------------------------------------------------------------


def test_transformers_own_keywords(saved: Path) -> None:
    model = from_pretrained(saved, inner="eager", dtype=torch.bfloat16, attn_implementation="eager", device_map="cpu")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert {p.dtype for p in mhc_compile.stream_parameters(model).values()} == {torch.float32}
    assert owners(model)["model"].options.inner == "eager"
    assert owners(from_pretrained(saved))["model"].options.inner == "inductor"


@pytest.mark.parametrize(
    ("keywords", "code"),
    [
        ({"trust_remote_code": True}, "MHC204"),
        ({"variant": "fp16"}, "MHC204"),
        ({"state_dict": {}}, "MHC204"),
        ({"inner": "outer"}, "MHC204"),
        ({"streams": 4}, "MHC304"),
    ],
)
def test_keywords_that_are_refused(keywords: dict[str, Any], code: str, saved: Path) -> None:
    with pytest.raises(MHCError, match=code):
        from_pretrained(saved, **keywords)


def test_a_model_spread_over_devices(saved: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    with pytest.raises(MHCError, match=r"MHC204.*cpu, disk"):
        from_pretrained(saved, device_map={**places, "lm_head": "cpu"}, offload_folder=tmp_path)


def test_a_residual_folder(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "residual")
    with pytest.raises(MHCError, match="MHC410"):
        from_pretrained(tmp_path / "residual")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MHCError, match="MHC401"):
        from_pretrained(tmp_path / "no")


def edit(folder: Path, **entries: Any) -> None:
    path = folder / "mhc.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def owner(**entries: Any) -> dict[str, Any]:
    return {"model": {"spec": {"streams": 4}, "sites": {"layers.0#0": 32}} | entries}


def streams_file(folder: Path) -> Path:
    return folder / json.loads((folder / "mhc.json").read_text())["streams_file"]


DAMAGE: dict[str, tuple[Any, str, str]] = {
    "no mhc.json": (lambda f: (f / "mhc.json").unlink(), "MHC402", "mhc.json is missing"),
    "mhc.json not JSON": (lambda f: (f / "mhc.json").write_text("{"), "MHC414", "is not JSON"),
    "mhc.json of nothing": (lambda f: (f / "mhc.json").write_text("{}"), "MHC414", "no format"),
    "mhc.json nested too deeply": (
        lambda f: (f / "mhc.json").write_text('{"a":' * 100_000), "MHC414", "is not JSON",
    ),
    "iterations without end": (
        lambda f: edit(f, owners=owner(spec={"iterations": 10_000_000})), "MHC414", "iterations=10000000",
    ),
    "a later format": (lambda f: edit(f, format=3), "MHC414", "format 3"),
    "no owners": (lambda f: edit(f, owners={}), "MHC414", "no owners"),
    "no sites": (lambda f: edit(f, owners=owner(sites={})), "MHC414", "without sites"),
    "a site without a name": (lambda f: edit(f, owners=owner(sites={"": 32})), "MHC414", "not a site's name"),
    "a size out of bounds": (lambda f: edit(f, owners=owner(sites={"a#0": 1 << 40})), "MHC414", "not a hidden size"),
    "an unknown field": (lambda f: edit(f, owners=owner(spec={"lanes": 4})), "MHC414", "lanes"),
    "an unknown convention": (lambda f: edit(f, owners=owner(spec={"convention": "x"})), "MHC414", "MHC202"),
    "fewer sites": (lambda f: edit(f, owners=owner()), "MHC414", "differ in model.mhc.layers.0#1"),
    "streams elsewhere": (lambda f: edit(f, streams_file="../x.safetensors"), "MHC414", "not a file's name"),
    "another architecture": (lambda f: edit(f, architecture="GPT2LMHeadModel"), "MHC414", "GPT2LMHeadModel"),
    "streams missing": (lambda f: edit(f, streams_file="model.mhc-9.safetensors"), "MHC402", "is missing"),
    "a shard missing": (lambda f: min(f.glob("*.safetensors")).unlink(), "MHC402", "which is missing"),
    "streams cut short": (lambda f: streams_file(f).write_bytes(streams_file(f).read_bytes()[:-4]), "MHC403", ""),
    "streams exchanged": (
        lambda f: save_file({n: t + 1 for n, t in load_file(streams_file(f)).items()}, streams_file(f)),
        "MHC414", "sha256",
    ),
    "another width": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('_size": 64', '_size": 56')),
        "MHC404", "of another shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder(case: str, copied: Path) -> None:
    damage, code, text = DAMAGE[case]
    damage(copied)
    with pytest.raises(MHCError) as caught:
        from_pretrained(copied, inner="eager")
    assert caught.value.code == code
    assert text in str(caught.value)


def test_an_owner_that_the_model_does_not_have(copied: Path) -> None:
    manifest = json.loads((copied / "mhc.json").read_text())
    edit(copied, owners={"other": manifest["owners"]["model"]}, sha256={})
    streams = {n.replace("model.", "other."): t for n, t in load_file(streams_file(copied)).items()}
    save_file(streams, streams_file(copied))
    index = copied / "model.safetensors.index.mhc.json"
    index.write_text(index.read_text().replace("model.mhc.layers", "other.mhc.layers"))
    with pytest.raises(MHCError, match=r"MHC414.*no module 'other'"):
        from_pretrained(copied, inner="eager")


@pytest.mark.parametrize("missing", ["transformers", "accelerate"])
def test_without_what_loading_needs(saved: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MHCError, match="MHC415"):
        from_pretrained(saved)


# --- back to the residual form in memory ---------------------------------------------------------------------------
