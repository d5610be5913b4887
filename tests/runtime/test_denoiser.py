"""Training with `[diffusion]`: the losses of a plain loop on any ranks, evaluations, resuming, and what is rejected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from data_folders import documents, make_tokenizer, write_lines
from safetensors.torch import load_file
from torch import Tensor
from training import TIMES, VOCAB, batch, clip, model_folder, recipe, spread

import mhc_compile
from mhc_compile.diagnostics import MHCError
from mhc_compile.diffusion import attend, denoising_loss
from mhc_compile.parameters import attention_of
from mhc_compile.runtime import optimizer
from mhc_compile.runtime.data.loader import Loader
from mhc_compile.runtime.data.prepare import prepare
from mhc_compile.runtime.denoiser import Denoiser
from mhc_compile.runtime.loop import check_data, train
from mhc_compile.runtime.model import hollow_model
from mhc_compile.runtime.recipe import Recipe
from mhc_compile.runtime.weights import seed_of

MASK = VOCAB
TABLE = {"attention": "block:4", "mask_token": MASK}


def loss_of(model: Any, ids: Tensor, progress: float, kind: str, number: int, *, mask_token: int = MASK) -> Tensor:
    generator = torch.Generator().manual_seed(seed_of(0, kind, number))
    how: dict[str, Any] = {"mask_token": mask_token, "vocabulary": mask_token + 1, "generator": generator}
    return denoising_loss(lambda x: model(input_ids=x).logits, ids, progress, **how)


def plain(given: Recipe) -> tuple[list[float], list[float]]:
    """The losses and norms of a loop without ranks and microbatches."""
    model = attend(mhc_compile.from_pretrained(given.model.folder, inner="eager").train(), "block:4", inner="eager")
    t = given.train
    adamw = mhc_compile.TableAdamW(
        mhc_compile.parameter_groups(model, weight_decay=t.weight_decay, lr=t.lr), betas=t.betas
    )
    losses, norms = [], []
    for step in range(1, t.steps + 1):
        loss = loss_of(model, batch(step, t.batch)["input_ids"], (step - 1) / t.steps, "corruption", step)
        loss.backward()
        norms.append(float(clip(model, t.clip)))
        for group in adamw.param_groups:
            group["lr"] = optimizer.learning_rate(step, t)
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses, norms


def test_losses_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", vocab_size=VOCAB + 1)
    ranks: dict[str, Any] = {"one": {}, "stages": {"stages": 2}, "replicas": {"data": 2}}
    recipes = {name: recipe(folder, steps=6, diffusion=TABLE, parallel=p) for name, p in ranks.items()}
    losses, norms = plain(recipes["one"])
    for name, found in spread(recipes, tmp_path).items():
        assert found[0] == pytest.approx(losses, rel=1e-5), name
        assert found[1] == pytest.approx(norms, rel=1e-4), name


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model whose tokenizer names a mask token, and data."""
    folder = tmp_path_factory.mktemp("material")
    model_folder(folder / "model", vocab_size=301, num_hidden_layers=2)
    tokenizer = make_tokenizer(folder / "model")
    tokenizer.add_special_tokens(["<|mask|>"])
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    named = {"eos_token": "<|end|>", "mask_token": {"content": "<|mask|>"}}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(named))
    for name, seed in (("tokens", 0), ("held-out", 1)):
        lines = write_lines(folder / f"{name}.jsonl", documents(150, seed))
        prepare([str(lines)], folder / name, tokenizer=folder / "model")
    return folder


def whole(material: Path, folder: Path, **tables: dict[str, Any]) -> Recipe:
    given: dict[str, dict[str, Any]] = {
        "model": {"inner": "eager"},
        "data": {"folder": str(material / "tokens"), "validation": str(material / "held-out"), "sequence": 16},
        "train": {"batch": 4, "microbatch": 2, "evaluate_every": 5, "evaluate_batches": 2},
        "diffusion": {"attention": "block:4"},
        "checkpoint": {"folder": str(folder / "run"), "every": 3, "keep": 2},
        "metrics": {"every": 1},
    }
    for name, fields in tables.items():
        given[name] = given.get(name, {}) | fields
    return recipe(material / "model", steps=6, **given)


def metrics(folder: Path) -> list[dict[str, float]]:
    found = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in m.items() if k not in TIMES} for m in found]


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def test_a_run_evaluates_masks_and_is_resumed_bit_by_bit(material: Path, tmp_path: Path) -> None:
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    train(whole(material, unbroken, train={"lr": 1e-9}))
    model = attend(mhc_compile.from_pretrained(material / "model", inner="eager"), "block:4", inner="eager")
    batches = [Loader(material / "held-out", sequence=16, batch=4).batch(number) for number in range(2)]
    mask_token = Denoiser(whole(material, unbroken), 0).mask_token
    with torch.no_grad():
        losses = [
            loss_of(model, b["input_ids"], 0.0, "evaluation", n, mask_token=mask_token) for n, b in enumerate(batches)
        ]
    evaluated = [m["evaluation_loss"] for m in metrics(unbroken) if "evaluation_loss" in m]
    assert evaluated == pytest.approx([float(sum(losses)) / 2] * 2, rel=1e-5)

    shutil.rmtree(unbroken)
    train(whole(material, unbroken))
    shutil.copytree(unbroken, resumed)
    shutil.rmtree(resumed / "run" / "step-00000006")  # as if it had been killed after step 3
    train(whole(material, resumed))
    assert metrics(resumed) == metrics(unbroken)
    one, other = (weights(f / "run" / "step-00000006") for f in (unbroken, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    shutil.rmtree(resumed / "run" / "step-00000006")
    with pytest.raises(MHCError, match="MHC608"):
        train(whole(material, resumed, diffusion={"attention": "block:8"}))


def test_what_is_rejected(material: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(material / "model", tmp_path / "model"))
    (copied / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("MHC204", "block:SIZE", {"diffusion": {"attention": "blocks"}}),
        ("MHC602", "diffusion.attention", {"diffusion": {"attention": None}}),
        ("MHC602", "diffusion.mask_token = -1", {"diffusion": {"mask_token": -1}}),
        ("MHC602", "below 301", {"diffusion": {"mask_token": 301}}),
        ("MHC601", "diffusion.block", {"diffusion": {"block": 4}}),
        ("MHC602", "edits move tokens", {"data": {"documents": True}}),
        ("MHC602", "names no mask token", {"model": {"folder": str(copied)}}),
    ]
    for code, said, tables in cases:
        with pytest.raises(MHCError, match=code) as caught:
            check_data(whole(material, tmp_path, **tables))
        assert said in str(caught.value)


def test_blocks_in_a_folder_and_in_the_recipe(material: Path, tmp_path: Path) -> None:
    model = attend(mhc_compile.from_pretrained(material / "model", inner="eager"), "block:4", inner="eager")
    mhc_compile.save_pretrained(model, tmp_path / "blocks")
    given: dict[str, Any] = {"model": {"folder": str(tmp_path / "blocks")}}
    trained = hollow_model(whole(material, tmp_path, **given))
    assert attention_of(trained.modules()) == "block:4"
    with pytest.raises(MHCError, match="MHC304"):
        hollow_model(whole(material, tmp_path, **given, diffusion={"attention": "block:8"}))
    with pytest.raises(MHCError, match=r"MHC602.*next tokens are among what it sees"):
        hollow_model(recipe(tmp_path / "blocks"))
