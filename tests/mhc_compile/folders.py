"""Checkpoint folders: to convert, converted or saved once, and copies to damage."""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import llama, shake
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mhc_compile import convert, convert_folder
from mhc_compile.parameters import is_converted, owners

torch.set_num_threads(1)
LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 0}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


def make(name: str) -> Any:
    torch.manual_seed(0)
    match name:
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
        case "llama-bf16-tied":
            return LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)).to(torch.bfloat16).eval()
        case "gpt2":
            return GPT2LMHeadModel(GPT2Config(**GPT2, eos_token_id=0)).eval()
        case "t5":
            return T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0)).eval()
        case _:
            # On disk every expert has names of its own; in memory they are merged.
            return MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=4)).eval()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in three shards, with companions of every kind."""
    folder = tmp_path_factory.mktemp("original") / "llama"
    make("llama").save_pretrained(folder, max_shard_size="30KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "extra").mkdir()
    (folder / "extra" / "template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def converted(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_folder(original, tmp_path_factory.mktemp("converted") / "llama", streams=2).folder


@pytest.fixture
def copied(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copied"))


def snapshot_of(folder: Path, cache: Path) -> Path:
    """A folder as the hub's cache lays it out: a snapshot of links into a folder of blobs."""
    snapshot, blobs = cache / "snapshots" / "abc123", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            shutil.copy(path, blobs / path.name)
            (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    return snapshot


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same_tree(left: Path, right: Path) -> None:
    assert {p.relative_to(left) for p in left.rglob("*")} == {p.relative_to(right) for p in right.rglob("*")}
    for path in left.rglob("*"):
        if path.is_file():
            assert filecmp.cmp(path, right / path.relative_to(left), shallow=False), path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained, converted Llama in several shards."""
    folder = tmp_path_factory.mktemp("saved") / "llama"
    with_streams(llama()).save_pretrained(folder, max_shard_size="30KB")
    return folder


@pytest.fixture
def saved_copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "saved_copy"))


def with_streams(model: nn.Module, **options: Any) -> Any:
    """The model converted, its streams far from their start."""
    model = convert(model, inner="eager", **options)
    shake(model)
    return model


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
    assert all(is_converted(right.get_submodule(path)) for path in others)
