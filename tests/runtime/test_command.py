"""`mhc-compile train`: fields explained, plans printed, mistakes refused by code with exit code 1."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from data_folders import documents, make_tokenizer, write_lines
from training import model_folder

from mhc_compile.cli import main
from mhc_compile.runtime.data.prepare import prepare
from mhc_compile.runtime.recipe import TABLES, describe_fields


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    model_folder(folder / "model", vocab_size=300)
    make_tokenizer(folder / "model")
    lines = write_lines(folder / "texts.jsonl", documents(150))
    prepare([str(lines)], folder / "tokens", tokenizer=folder / "model")
    (folder / "recipe.toml").write_text("""
        [model]
        folder = "model"
        inner = "eager"
        [data]
        folder = "tokens"
        sequence = 16
        [train]
        steps = 2
        batch = 4
        microbatch = 1
        lr = 1e-2
        [checkpoint]
        folder = "run"
        every = 1
    """)
    return folder / "recipe.toml"


def test_every_field_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--fields"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for d in describe_fields():
        assert f" {d.name}: {d.values}; " in said
        assert d.text in said
    for section in TABLES:
        assert f"[{section}] " in said


def test_a_dry_run_prints_the_plan_and_makes_no_step(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["parallel.stages=2", "parallel.data=2", "train.batch=8", "train.microbatch=2"]
    assert main(["train", str(recipe), *changes[:2], "--dry-run", *changes[2:]]) == 0  # in any order
    said = capsys.readouterr().out
    for part in ("6 sites", "stage 1   sites ", "ranks 2 to 3", "2 microbatches of 2", "--nproc-per-node 4"):
        assert part in said
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        (["train.stepz=1"], "MHC601"),
        (["train.steps=ten"], "MHC602"),
        (["parallel.schedule=zbv"], "MHC604"),
        (["data.sequence=65"], "MHC602"),
        (["recompute.blocks=10B", "model.inner=aot_eager", "--dry-run"], "MHC626"),
        (["checkpoint.folder=recipe.toml/run", "--dry-run"], "MHC619"),
        (["parallel.stages=7", "train.batch=8", "--dry-run"], "MHC620"),
        (["model.folder=elsewhere"], "MHC401"),
    ],
)
def test_mistakes_are_refused(recipe: Path, changes: list[str], code: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), *changes]) == 3
    assert capsys.readouterr().err.startswith(code)


def test_no_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train"]) == 3
    assert main(["train", str(tmp_path / "none.toml")]) == 3
    assert capsys.readouterr().err.count("MHC600 no recipe") == 2


def test_the_module_trains(recipe: Path) -> None:
    command = [sys.executable, "-m", "mhc_compile", "train", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout
    assert (recipe.parent / "run" / "step-00000002").is_dir()
