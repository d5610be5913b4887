"""Weights of stages: the same from a seed for every cut, a stage's own from folders, refusals."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import by_name, ids, llama, program_of, stages_of, through
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import mhc_compile
from mhc_compile.diagnostics import MHCError
from mhc_compile.parameters import stream_parameters
from mhc_compile.runtime.weights import initialise, load_folder


def test_a_seed_means_the_same_for_every_cut() -> None:
    program = program_of(llama(memory=True), ids())
    one, many = stages_of(program, []), stages_of(program, [1, 4])
    for stages in (one, many):
        initialise(stages, program, seed=3)
    first, second = by_name(one), by_name(many)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    initialise(many, program, seed=4)
    assert not torch.equal(first["model.embed_tokens.weight"], second["model.embed_tokens.weight"])
    # As transformers starts them: the configured deviation, norms at one; streams as from scratch.
    assert float(first["model.layers.1.mlp.up_proj.weight"].std()) == pytest.approx(0.1, rel=0.1)
    assert torch.equal(first["model.norm.weight"], torch.ones(32))
    assert float(first["model.mhc.layers.0#0.phi"].std()) == pytest.approx(0.02, rel=0.1)
    assert float(next(iter(many[1].tables.values())).weight.std()) == pytest.approx(0.02, rel=0.1)


def test_a_residual_folder(tmp_path: Path) -> None:
    model = llama(memory=True)
    residual = LlamaForCausalLM(model.config)
    residual.save_pretrained(tmp_path)
    program, tokens = program_of(model, ids()), ids()
    stages = stages_of(program, [2, 3])
    load_folder(stages, program, tmp_path, seed=0)
    torch.testing.assert_close(through(stages, tokens), residual(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_converted_folder(tmp_path: Path) -> None:
    model, tokens = llama(memory=True), ids()
    with torch.no_grad():
        for p in stream_parameters(model).values():
            p.add_(0.01 * torch.randn_like(p))
    model.save_pretrained(tmp_path)
    program = program_of(llama(memory=True), tokens)
    stages = stages_of(program, [2, 3])
    load_folder(stages, program, tmp_path, seed=0)
    assert torch.equal(through(stages, tokens), model.eval()(input_ids=tokens).logits)


def test_a_folder_whose_experts_transformers_merges(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                           num_key_value_heads=1, vocab_size=64, num_local_experts=2)  # fmt: skip
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    tokens = ids()
    program = program_of(mhc_compile.convert(MixtralForCausalLM(config), inner="eager"), tokens)
    stages = stages_of(program, [2])
    assert not set(by_name(stages)) - {n for n in by_name(stages) if ".mhc." in n} <= set(saved)
    load_folder(stages, program, tmp_path, seed=0)
    torch.testing.assert_close(through(stages, tokens), model(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_converted_folder_whose_experts_transformers_merges(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                           num_key_value_heads=1, vocab_size=64, num_local_experts=2)  # fmt: skip
    model = mhc_compile.convert(MixtralForCausalLM(config).eval(), inner="eager")
    model.save_pretrained(tmp_path)
    program = program_of(mhc_compile.convert(MixtralForCausalLM(config), inner="eager"), ids())
    stages = stages_of(program, [2])
    load_folder(stages, program, tmp_path, seed=0)
    expected = dict(model.named_parameters())
    values = by_name(stages)
    assert any("experts" in name for name in values)
    assert all(torch.equal(values[name], expected[name]) for name in values)


@pytest.mark.parametrize(("change", "code"), [("missing", "MHC622"), ("shape", "MHC404"), ("file", "MHC401")])
def test_refusals(tmp_path: Path, change: str, code: str) -> None:
    model = llama()
    LlamaForCausalLM(model.config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    if change == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    elif change == "shape":
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, file, metadata={"format": "pt"})
    program = program_of(model, ids())
    stages = stages_of(program, [2])
    with pytest.raises(MHCError, match=code):
        load_folder(stages, program, tmp_path if change != "file" else tmp_path / "none", seed=0)


def test_a_parameter_that_nothing_starts() -> None:
    model = llama()
    model.model.norm.register_parameter("shift", torch.nn.Parameter(torch.zeros(32)))
    forward = model.model.norm.forward
    model.model.norm.forward = lambda x: forward(x) + model.model.norm.shift
    program = program_of(model, ids())
    with pytest.raises(MHCError, match="MHC622"):
        initialise(stages_of(program, []), program, seed=0)
