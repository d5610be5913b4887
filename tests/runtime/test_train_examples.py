"""The recipes in `examples/` are valid, and the demo's trains."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest

from mhc_compile.cli import main
from mhc_compile.runtime.recipe import read_recipe

ROOT = Path(__file__).parent.parent.parent
TRAIN = ROOT / "examples" / "train"
RECIPES = sorted(p for p in (ROOT / "examples").rglob("*.toml") if p.name != "pyproject.toml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_read_and_says_how_to_start_it(path: Path) -> None:
    recipe = read_recipe(path)
    text = path.read_text(encoding="utf-8")
    # The ranks that the command in the comments starts are those that the recipe asks for.
    nodes, processes = re.search(r"--nnodes (\d+)", text), re.search(r"--nproc-per-node (\d+)", text)
    if path.parent == TRAIN and path.stem != "demo":
        assert processes is not None
        assert int(processes[1]) * (int(nodes[1]) if nodes else 1) == recipe.parallel.world


def test_the_demo_on_two_and_four_processes() -> None:
    text = (TRAIN / "demo.toml").read_text(encoding="utf-8").replace("\\\n#", "")
    commands = re.findall(r"torchrun --nproc-per-node (\d) -m mhc_compile train examples/train/demo.toml (.+)", text)
    assert [int(processes) for processes, _ in commands] == [2, 4]
    for processes, overrides in commands:
        recipe = read_recipe(TRAIN / "demo.toml", overrides.split())
        assert recipe.parallel.world == int(processes)
        assert Path(recipe.checkpoint.folder).parent == TRAIN / "work"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like `examples/train`, after `prepare.py`."""
    folder = tmp_path_factory.mktemp("train")
    shutil.copy(TRAIN / "demo.toml", folder)
    spec = importlib.util.spec_from_file_location("prepare_example", TRAIN / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(folder / "work")
    with pytest.raises(SystemExit, match="there already"):
        module.main(folder / "work")
    return folder


@pytest.mark.filterwarnings("error:Converting a tensor with requires_grad")  # an evaluation that keeps gradients
@pytest.mark.slow
def test_the_demo_trains(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = [
        "model.inner=eager", "data.sequence=32", "train.steps=3", "train.warmup=1", "train.evaluate_every=2",
        "train.evaluate_batches=1", "metrics.every=1", "metrics.probes_every=3",
    ]  # fmt: skip
    assert main(["train", str(prepared / "demo.toml"), *quick]) == 0
    lines = [json.loads(line) for line in (prepared / "work" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        # Near the entropy of 2048 equally likely tokens.
        assert 0.8 * math.log(2048) < line["loss"] < 1.2 * math.log(2048)
        assert min(line[name] for name in ("lr", "grad_norm", "tokens_per_second", "seconds")) > 0
    assert [("evaluation_loss" in line) for line in lines] == [False, True, True]  # the last step, too
    probes = [name for name in lines[2] if name.startswith("separation/")]
    assert probes == [f"separation/model.layers.{layer}#{k}" for layer in range(4) for k in (0, 1)]
    assert lines[2]["composite_gain/forward_max"] == pytest.approx(1.0, abs=1e-2)
    assert "separation/model.layers.0#0" not in lines[1]
    assert "step 3/3" in capsys.readouterr().out


def test_tensorboard_that_is_missing_is_said_before_anything_is_compiled(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [n for n in sys.modules if n.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    overrides = ["metrics.tensorboard=true", "checkpoint.folder=work/never"]
    for flags in (["--dry-run"], []):
        assert main(["train", str(prepared / "demo.toml"), *overrides, *flags]) == 3
        assert "MHC606" in capsys.readouterr().err
    assert not (prepared / "work" / "never").exists()
