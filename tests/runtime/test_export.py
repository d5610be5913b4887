"""A run's checkpoint as a Hugging Face folder: the logits of the trained model, whatever ranks wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_ranks import save_model, trained
from ranks import run_ranks
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import mhc_compile
from mhc_compile import MHCError, from_pretrained
from mhc_compile.runtime.export import export_checkpoint
from mhc_compile.runtime.recipe import Recipe, parse_recipe

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
MEMORY = {"preset": "paper", "layers": [1], "rows_per_head": 50, "row_width": 16, "compress": False}


def recipe(tmp_path: Path, **tables: Any) -> Recipe:
    content = {
        "model": {"folder": "source", "inner": "eager"},
        "data": {"folder": "data", "sequence": 8},
        "train": {"steps": 1, "batch": 1, "microbatch": 1, "lr": 0.1},
        "checkpoint": {"folder": "run", "every": 1},
        **tables,
    }
    return parse_recipe(content, tmp_path)


def folder(tmp_path: Path, kind: str) -> Path:
    torch.manual_seed(0)
    if kind == "mixtral":
        model: Any = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=kind == "tied"))
    source = tmp_path / "source"
    model.save_pretrained(source)
    (source / "tokenizer_config.json").write_text('{"mine": 1}')
    (source / "generation_config.json").write_text('{"max_new_tokens": 7}')
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    return source


@pytest.mark.parametrize(
    ("kind", "world", "memory"),
    [
        ("llama", 2, True),
        pytest.param("tied", 1, False, marks=pytest.mark.slow),
        pytest.param("mixtral", 1, False, marks=pytest.mark.slow),
    ],
)
def test_logits_of_the_exported_folder(kind: str, world: int, memory: bool, tmp_path: Path) -> None:
    source = folder(tmp_path, kind)
    options: dict[str, Any] = {"streams": 4, "inner": "eager"}
    tables: dict[str, Any] = {"mhc": {"streams": 4}}
    if memory:
        fields = {k: v for k, v in MEMORY.items() if k != "preset"}
        options["engram"] = mhc_compile.MemorySettings.preset("paper", **{**fields, "layers": (1,)})
        tables["memory"] = MEMORY
    if world == 1:
        save_model(str(source), str(tmp_path / "run"), options)
    else:
        run_ranks(world, save_model, tmp_path, str(source), str(tmp_path / "run"), options)
    out = export_checkpoint(recipe(tmp_path, **tables), tmp_path / "out")
    model, wanted = from_pretrained(out), trained(str(source), options)
    for (name, p), (other, q) in zip(model.named_parameters(), wanted.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(p, q), name
    ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # the same values at addresses of another alignment: sums may be added in another order
        torch.testing.assert_close(model(ids).logits, wanted(ids).logits, rtol=0, atol=1e-6)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"mine": 1}
    assert json.loads((out / "generation_config.json").read_text()) == {"max_new_tokens": 7}
    assert not (out / "pytorch_model.bin").exists()
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("meeting")) == ["out", "run", "source"]


def test_a_run_that_started_from_a_converted_folder(tmp_path: Path) -> None:
    source = folder(tmp_path, "llama")
    mhc_compile.convert_folder(source, tmp_path / "converted", streams=2)
    save_model(str(source), str(tmp_path / "run"), {"streams": 2, "inner": "eager"})
    model = {"folder": "converted", "inner": "eager"}
    out = export_checkpoint(recipe(tmp_path, model=model), tmp_path / "out")
    again, wanted = from_pretrained(out), trained(str(source), {"streams": 2, "inner": "eager"})
    for (name, p), (_, q) in zip(again.named_parameters(), wanted.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    source = folder(tmp_path, "llama")
    with pytest.raises(MHCError, match="MHC615"):
        export_checkpoint(recipe(tmp_path), tmp_path / "out")
    save_model(str(source), str(tmp_path / "run"), {"streams": 4, "inner": "eager"})
    with pytest.raises(MHCError, match=r"MHC617.*model/model.mhc.* there and "):
        export_checkpoint(recipe(tmp_path, mhc={"streams": 2}), tmp_path / "out")
    with pytest.raises(MHCError, match=r"MHC617.*only here: model/model.mhc.engram"):
        export_checkpoint(recipe(tmp_path, memory=MEMORY), tmp_path / "out")
    shard = next((tmp_path / "run" / "step-00000001").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(MHCError, match="MHC615"):
        export_checkpoint(recipe(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
