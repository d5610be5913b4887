"""Checkpoint folders: conversion file by file, and the way back."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import assert_same_tree, make, snapshot_of, weights
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import mhc_compile
from mhc_compile import convert_folder
from mhc_compile.conversion.example_inputs import example_inputs
from mhc_compile.parameters import owners

# --- what is written -----------------------------------------------------------------------------------------------


def test_weights_are_copied_byte_by_byte_and_streams_follow(original: Path, converted: Path) -> None:
    shards = sorted(original.glob("*.safetensors"))
    assert len(shards) == 3
    for i, shard in enumerate(shards, start=1):
        assert filecmp.cmp(shard, converted / f"model.mhc-{i:05d}-of-00004.safetensors", shallow=False)
    streams = load_file(converted / "model.mhc-00004-of-00004.safetensors")
    assert "model.mhc.layers.0#0.phi" in streams
    assert {t.dtype for t in streams.values()} == {torch.float32}
    index = json.loads((converted / "mhc.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(weights(original)) | set(streams)
    for name, file in index["weight_map"].items():
        assert name in load_file(converted / file)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights(converted).values())


def test_companions_are_copied_as_they_are(original: Path, converted: Path) -> None:
    for name in ("generation_config.json", "tokenizer.json", "extra/template.jinja"):
        assert filecmp.cmp(original / name, converted / name, shallow=False)


def test_manifest_says_what_the_streams_are(converted: Path) -> None:
    manifest = json.loads((converted / "mhc.json").read_text())
    assert manifest["format"] == 1
    assert manifest["mhc_compile"] == mhc_compile.__version__
    assert manifest["architecture"] == "LlamaForCausalLM"
    owner = manifest["owners"]["model"]
    assert owner["sites"] == {f"layers.{layer}#{i}": 32 for layer in range(2) for i in range(2)}
    assert owner["spec"]["streams"] == 2
    assert owner["spec"]["convention"] == "paper"
    assert set(manifest["sha256"]) == {p.name for p in converted.glob("*.safetensors")}


def test_sites_and_start_are_those_of_a_conversion_in_memory(converted: Path) -> None:
    in_memory = owners(mhc_compile.convert(make("llama"), streams=2, inner="eager"))
    from_folder = owners(mhc_compile.from_pretrained(converted, inner="eager"))
    assert in_memory.keys() == from_folder.keys()
    for owner, parameters in in_memory.items():
        assert list(parameters.sites.items()) == list(from_folder[owner].sites.items())
        assert parameters.spec == from_folder[owner].spec
        for p, q in zip(parameters.parameters(), from_folder[owner].parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("variant", [None, "mhc"])
def test_a_plain_from_pretrained_says_what_loads_it(variant: str | None, converted: Path) -> None:
    for cls in (AutoModelForCausalLM, LlamaForCausalLM):
        with pytest.raises(ValueError, match=r"mhc_compile\.from_pretrained"):
            cls.from_pretrained(converted, variant=variant)


def test_the_configuration_has_one_entry_more(original: Path, converted: Path) -> None:
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (original, converted))
    assert "mhc-compile" in after.pop("transformers_weights")
    assert after.pop("auto_map").keys() == {"AutoModelForCausalLM"}
    assert before == after


@pytest.mark.parametrize("text", [lambda c: json.dumps(c), lambda c: "\t" + json.dumps(c, indent=1) + "\n\n"])
def test_a_configuration_of_any_spelling_comes_back(text: Any, copied: Path, tmp_path: Path) -> None:
    path = copied / "config.json"
    path.write_text(text(json.loads(path.read_text())))
    convert_folder(copied, tmp_path / "there")
    convert_folder(tmp_path / "there", tmp_path / "back", to="residual")
    assert filecmp.cmp(path, tmp_path / "back" / "config.json", shallow=False)


@pytest.mark.parametrize(
    ("name", "shard", "options", "tolerance"),
    [
        ("llama", "30KB", {}, 1e-5),
        pytest.param(
            "llama-bf16-tied", "1GB", {"streams": 2, "convention": "deepseek_v4"}, 2e-2, marks=pytest.mark.compat
        ),
        ("gpt2", "30KB", {"manifold": "permutations", "streams": 3}, 1e-5),
        ("t5", "30KB", {}, 1e-4),
        ("mixtral", "30KB", {}, 1e-5),
    ],
)
def test_same_function_and_back_bit_by_bit(
    name: str, shard: str, options: dict[str, Any], tolerance: float, tmp_path: Path
) -> None:
    model = make(name)
    model.save_pretrained(tmp_path / "a", max_shard_size=shard)
    done = convert_folder(tmp_path / "a", tmp_path / "b", **options)
    streams = mhc_compile.from_pretrained(tmp_path / "b", inner="eager")
    assert type(streams) is type(model)
    added = mhc_compile.stream_parameters(streams)
    assert sum(p.numel() for p in added.values()) == done.parameters
    assert {p.dtype for p in added.values()} == {torch.float32}
    assert {p.dtype for n, p in streams.named_parameters() if n not in added} == {model.dtype}
    inputs = example_inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(streams(**inputs).logits, model(**inputs).logits, atol=tolerance, rtol=tolerance)
    assert convert_folder(tmp_path / "b", tmp_path / "c", to="residual").parameters == done.parameters
    assert_same_tree(tmp_path / "a", tmp_path / "c")


def test_a_model_that_computes_from_constants(tmp_path: Path) -> None:
    # Falcon's tracing fails on the meta device.
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    FalconForCausalLM(config).save_pretrained(tmp_path / "falcon")
    assert convert_folder(tmp_path / "falcon", tmp_path / "out").sites == 2  # attention and MLP in parallel


def test_experts_in_bfloat16(tmp_path: Path) -> None:
    """Their grouped matrix products are traced only over weights with the strides of real ones."""
    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, vocab_size=100, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(tmp_path / "original")
    assert convert_folder(tmp_path / "original", tmp_path / "converted").sites == 4


def test_progress_grows_to_the_size_of_the_weights(original: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    convert_folder(original, tmp_path / "out", progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert calls[-1][0] == calls[-1][1] == sum(p.stat().st_size for p in original.glob("*.safetensors"))
    assert "model-00002-of-00003.safetensors" in {what for _, _, what in calls}


def test_other_formats_and_folders_with_weights_stay_behind(copied: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "model.fp16.safetensors", "model.onnx"):
        (copied / name).write_bytes(b"x")
    (copied / "pytorch_model.bin.index.json").write_text("{}")
    (copied / "checkpoint-1").mkdir()
    (copied / "checkpoint-1" / "model.safetensors").write_bytes(b"x")
    (copied / ".cache").mkdir()
    (copied / "linked").symlink_to(tmp_path)
    done = convert_folder(copied, tmp_path / "out")
    assert {str(p) for p in done.left_out} == {
        "pytorch_model.bin", "training_args.bin", "model.fp16.safetensors", "model.onnx",
        "pytorch_model.bin.index.json", "checkpoint-1", ".cache", "linked",
    }  # fmt: skip
    assert not any((done.folder / p).exists() for p in done.left_out)


def test_files_that_are_links_are_followed(original: Path, tmp_path: Path) -> None:
    snapshot = snapshot_of(original, tmp_path / "models--tiny")
    (snapshot / "again.txt").symlink_to("config.json")
    (tmp_path / "here").symlink_to(snapshot)
    done = convert_folder(tmp_path / "here", tmp_path / "out")
    assert not any(p.is_symlink() for p in done.folder.rglob("*"))
    for name in ("generation_config.json", "again.txt"):
        assert filecmp.cmp(snapshot / name, done.folder / name, shallow=False)


def test_an_empty_output_folder_is_used(original: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert_folder(original, tmp_path / "out")
    assert (tmp_path / "out" / "mhc.json").is_file()
    convert_folder(original, tmp_path / "deep" / "er" / "out")
    assert (tmp_path / "deep" / "er" / "out" / "mhc.json").is_file()
