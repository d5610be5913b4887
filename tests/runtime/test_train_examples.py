"""The recipes in `examples/` are valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mhc_compile.runtime.recipe import read_recipe

ROOT = Path(__file__).parent.parent.parent
TRAIN = ROOT / "examples" / "train"
RECIPES = sorted((ROOT / "examples").rglob("*.toml"))


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
