"""Experts: their loads leave the stages that count them, and the biases that balance them follow in whole runs."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from data_folders import documents, make_tokenizer, write_lines
from rich.console import Console
from safetensors.torch import load_file
from small import stages_of, through
from torch import Tensor, nn
from torch.nn import functional as F
from training import LENGTH, batch, counted_gates, model_folder

import mhc_compile
from mhc_compile.config import Options
from mhc_compile.diagnostics import MHCError
from mhc_compile.runtime.data.prepare import prepare
from mhc_compile.runtime.experts import balance, check_biases, imbalance
from mhc_compile.runtime.export import export_checkpoint
from mhc_compile.runtime.loop import train
from mhc_compile.runtime.program import Program, capture_program
from mhc_compile.runtime.recipe import parse_recipe

GATES = ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]
BIASES = [f"{gate}.e_score_correction_bias" for gate in GATES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = model_folder(tmp_path_factory.mktemp("experts") / "model", n_routed_experts=8, vocab_size=300)
    make_tokenizer(path)
    return path


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({"inner": "eager"}, {"units": "blocks"}),
        ({"inner": "aot_eager", "recompute": "auto"}, {"split": True}),
        pytest.param({"inner": "inductor", "recompute": "auto"}, {"split": True}, marks=pytest.mark.slow),
    ],
)
def test_stages_count_their_own_forward_passes(folder: Path, options: dict[str, Any], how: dict[str, Any]) -> None:
    model = mhc_compile.from_pretrained(folder, inner="eager").train()
    for name in BIASES:
        model.get_buffer(name).copy_(torch.linspace(-0.2, 0.2, 8))
    microbatches = batch(1)["input_ids"].split(4)
    program = capture_program(model, {"input_ids": microbatches[0]})
    assert program.biases == {bias: (gate,) for bias, gate in zip(BIASES, GATES, strict=True)}
    assert not program.unclear
    stages = stages_of(program, [4], Options(**options), **how)
    assert [[t.ndim for t in stage.example_outputs] for stage in stages] == [[4], [3]]  # the streams, the logits
    assert [list(stage.biases) for stage in stages] == [[name] for name in BIASES]
    assert not any(bias.requires_grad for stage in stages for bias in stage.biases.values())
    for part in microbatches:
        through(stages, part).sum().backward()
        for stage in stages:
            stage.dw_builder()()
    for stage in stages:
        stage.eval()
    through(stages, part)
    gates = counted_gates(model)
    model(torch.cat(microbatches))
    for stage, gate, name in zip(stages, gates, GATES, strict=True):
        counted = stage.take_counted()
        assert list(counted) == [name]
        assert torch.equal(counted[name], gate.load.double())
        assert not stage.take_counted()


def test_a_run_balances_and_goes_on_bit_by_bit(folder: Path, tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "text.jsonl", documents(60, 0))
    prepare([str(lines)], tmp_path / "tokens", tokenizer=folder)
    content: dict[str, Any] = {
        "model": {"folder": str(folder), "inner": "eager"},
        "data": {"folder": str(tmp_path / "tokens"), "sequence": LENGTH},
        "train": {"steps": 3, "batch": 4, "microbatch": 2, "lr": 1e-2, "balance_rate": 0.02},
        "checkpoint": {"folder": "run", "every": 2},
        "metrics": {"every": 1},
    }
    recipe = parse_recipe(content, tmp_path)

    def run() -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        train(recipe, console=Console(file=io.StringIO()))
        logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        files = (tmp_path / "run" / "step-00000003").glob("*.safetensors")
        return logged, {name: t for file in files for name, t in load_file(file).items()}

    logged, weights = run()
    wanted = [torch.zeros(8) for _ in BIASES]
    for line in logged:
        for gate, bias in zip(GATES, wanted, strict=True):
            load = torch.tensor(line[f"expert_load/{gate}"])
            assert int(load.sum()) == 4 * LENGTH * 2
            assert line[f"expert_imbalance/{gate}"] == pytest.approx(float(load.max()) / 8)
            bias += 0.02 * torch.sign(8.0 - load)
    for name, bias in zip(BIASES, wanted, strict=True):
        assert torch.equal(next(t for n, t in weights.items() if n.startswith(f"model/{name}")), bias)
        assert bias.unique().numel() > 1
    shutil.rmtree(tmp_path / "run" / "step-00000003")
    again, weights_again = run()
    assert all(torch.equal(t, weights_again[name]) for name, t in weights.items())
    assert [line["expert_load/" + GATES[0]] for line in again] == [line["expert_load/" + GATES[0]] for line in logged]
    exported = mhc_compile.from_pretrained(export_checkpoint(recipe, tmp_path / "out"), inner="eager")
    for name, bias in zip(BIASES, wanted, strict=True):
        assert torch.equal(exported.get_buffer(name), bias)


def test_a_bias_moves_towards_the_mean_load() -> None:
    bias, load = torch.zeros(1, 4), torch.tensor([2.0, 4.0, 7.0, 3.0], dtype=torch.float64)
    balance(bias, load, 0.5)
    assert torch.equal(bias, torch.tensor([[0.5, 0.0, -0.5, 0.5]]))
    balance(bias, load, 0.0)
    assert torch.equal(bias, torch.tensor([[0.5, 0.0, -0.5, 0.5]]))
    assert imbalance({"gate": load}) == {"expert_imbalance/gate": 1.75}


class Mixtures(nn.Module):
    """Two layers of experts with one router, whose choice `sign` times a bias changes."""

    def __init__(self, sign: int) -> None:
        super().__init__()
        self.sign = sign
        self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)
        self.router, self.experts = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 8, 8))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for _ in range(2):
            x = x + self.mixed(F.layer_norm(x, (8,)))
        return self.head(x)

    def mixed(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        chosen = (scores + self.bias if self.sign == 1 else scores - self.bias).topk(2, dim=-1).indices
        outputs = (x[..., None, None, :] @ self.experts[chosen]).squeeze(-2)
        return (outputs * scores.gather(-1, chosen)[..., None]).sum(-2)


def program_of(model: nn.Module) -> Program:
    tokens = batch(1)["input_ids"]
    mhc_compile.convert(model, streams=2, inner="eager", example_kwargs={"input_ids": tokens})
    return capture_program(model, {"input_ids": tokens})


def test_routers_may_share_a_bias() -> None:
    program = program_of(Mixtures(1))
    assert list(program.biases) == ["bias"]
    first, second = program.biases["bias"]
    assert second == f"{first}#1"
    check_biases(program, 0.001)


def test_what_is_not_known_to_balance_is_refused() -> None:
    model = Mixtures(-1)
    model.bias.requires_grad_(False)
    program = program_of(model)
    assert not program.biases
    with pytest.raises(MHCError, match=r"MHC623.*bias; train.balance_rate = 0.001"):
        check_biases(program, 0.001)
    check_biases(program, 0.0)
