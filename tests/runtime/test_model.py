"""Models without weights: buffers are a normally built model's, parameters take no memory, folders are checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import mhc_compile
from mhc_compile import MHCError
from mhc_compile.parameters import owners
from mhc_compile.runtime.model import hollow_model
from mhc_compile.runtime.recipe import Recipe, parse_recipe

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10_000.0}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "llama-yarn": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=ROPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, query_pre_attn_scalar=8)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)
    ),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SMALL | {"num_key_value_heads": 4}, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
            moe_intermediate_size=16, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
            v_head_dim=8, first_k_dense_replace=1,
        )
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        model = make()
        for buffer in model.state_dict(keep_vars=True).values():
            if not isinstance(buffer, torch.nn.Parameter):
                buffer.normal_()  # what a checkpoint holds is not what a model starts with
        model.save_pretrained(root / name)
    return {name: root / name for name in MODELS}


def recipe(folder: Path, **tables: dict[str, Any]) -> Recipe:
    content: dict[str, Any] = {
        "model": {"folder": str(folder), "inner": "eager"},
        "data": {"folder": "d", "sequence": 8},
        "train": {"steps": 1, "batch": 2, "microbatch": 1, "lr": 1e-3},
        "checkpoint": {"folder": "c", "every": 0},
    }
    for name, fields in tables.items():
        content[name] = content.get(name, {}) | fields
    return parse_recipe(content, Path("/nowhere"))


@pytest.mark.parametrize("start", ["checkpoint", "scratch"])
@pytest.mark.parametrize("name", MODELS)
def test_buffers_are_those_of_a_model_with_weights(folders: dict[str, Path], name: str, start: str) -> None:
    made = hollow_model(recipe(folders[name], model={"start": start}))
    loads = start == "checkpoint"
    cls = type(MODELS[name]())
    wanted = cls.from_pretrained(folders[name]) if loads else cls(cls.config_class.from_pretrained(folders[name]))
    buffers = dict(made.named_buffers())
    assert buffers.keys() == dict(wanted.named_buffers()).keys()
    assert name == "gpt2" or any("inv_freq" in n for n in buffers)
    for n, t in wanted.named_buffers():
        assert torch.equal(buffers[n], t), n
    ours = {n for n, _ in made.named_parameters() if ".mhc." not in n}
    assert ours == dict(wanted.named_parameters()).keys()


def test_parameters_take_no_memory(folders: dict[str, Path]) -> None:
    made = hollow_model(recipe(folders["llama"]))
    for name, p in made.named_parameters():
        if ".mhc." not in name:
            assert isinstance(p, FakeTensor), name
    assert made.lm_head.weight is made.model.embed_tokens.weight


def test_the_graphs_dtype_is_the_recipes(folders: dict[str, Path]) -> None:
    made = hollow_model(recipe(folders["llama"], model={"dtype": "bfloat16"}))
    for name, p in made.named_parameters():
        assert p.dtype == (torch.float32 if ".mhc." in name else torch.bfloat16), name
    assert made.model.rotary_emb.inv_freq.dtype == torch.float32


def test_streams_are_the_recipes(folders: dict[str, Path]) -> None:
    made = hollow_model(recipe(folders["llama"], mhc={"streams": 2, "convention": "deepseek_v4"}))
    spec = owners(made)["model"].spec
    assert spec.streams == 2
    assert spec.exit == "head"


def test_a_converted_folder_keeps_its_streams(folders: dict[str, Path], tmp_path: Path) -> None:
    mhc_compile.convert_folder(folders["llama"], tmp_path / "converted", streams=3)
    made = hollow_model(recipe(tmp_path / "converted"))
    assert owners(made)["model"].spec.streams == 3
    wanted = LlamaForCausalLM.from_pretrained(folders["llama"]).model.rotary_emb.inv_freq
    assert torch.equal(made.model.rotary_emb.inv_freq, wanted)
    for table in ({"mhc": {"streams": 2}}, {"memory": {"layers": [0]}}, {"ultramem": {"layers": [0]}}):
        with pytest.raises(MHCError, match="MHC602"):
            hollow_model(recipe(tmp_path / "converted", **table))


def test_memories_have_no_rows_yet(folders: dict[str, Path]) -> None:
    memory = {"layers": [1], "rows_per_head": 1_000_000_000, "compress": False}
    made = hollow_model(recipe(folders["llama"], memory=memory, parallel={"engram": 2}))
    assert owners(made)["model"].table("layers.1").weight.is_meta


def test_rows_cannot_be_spread_where_there_are_none(folders: dict[str, Path]) -> None:
    with pytest.raises(MHCError, match=r"MHC602.*parallel\.engram"):
        hollow_model(recipe(folders["llama"], parallel={"engram": 2}))


def test_a_configuration_alone_is_enough_from_scratch(tmp_path: Path) -> None:
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    assert "architectures" not in json.loads((tmp_path / "config.json").read_text())
    assert isinstance(hollow_model(recipe(tmp_path, model={"start": "scratch"})), LlamaForCausalLM)


def test_damaged_folders_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(MHCError, match="MHC401"):
        hollow_model(recipe(tmp_path, model={"start": "scratch"}))
    copied = Path(shutil.copytree(folders["llama"], tmp_path / "copied"))
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(MHCError, match="MHC404"):
        hollow_model(recipe(copied))
    (copied / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "a.B"}}))
    with pytest.raises(MHCError, match="MHC405"):
        hollow_model(recipe(copied, model={"start": "scratch"}))
    (copied / "model.safetensors").unlink()
    with pytest.raises(MHCError, match="MHC40"):
        hollow_model(recipe(copied))


def test_the_published_start_is_the_recipes(folders: dict[str, Path]) -> None:
    for start in ("default", "paper"):
        (parameters,) = owners(hollow_model(recipe(folders["llama"], mhc={"start": start}))).values()
        assert parameters.start.paper == (start == "paper")


def test_a_compressing_memory_needs_a_tokenizer(folders: dict[str, Path]) -> None:
    with pytest.raises(MHCError, match="MHC222"):
        hollow_model(recipe(folders["llama"], memory={"layers": [1], "rows_per_head": 50}))


def test_a_buffer_that_nothing_starts_is_refused(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_init_weights", lambda *_: None)
    with pytest.raises(MHCError, match=r"MHC622.*inv_freq"):
        hollow_model(recipe(folders["llama"], model={"start": "scratch"}))
