"""Learning rates by step, groups by name, steps that are left out. What ranks do together: test_parity."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from training import batch, model_folder, recipe

import mhc_compile
from mhc_compile.runtime.engine import build_engine
from mhc_compile.runtime.launch import launch
from mhc_compile.runtime.optimizer import learning_rate
from mhc_compile.runtime.recipe_tables import TrainTable


def rates(**fields: object) -> list[float]:
    train = TrainTable(**({"steps": 10, "batch": 1, "microbatch": 1, "lr": 2.0} | fields))  # type: ignore[arg-type]
    return [learning_rate(step, train) for step in range(1, 11)]


def test_rates_rise_and_fall() -> None:
    assert rates(schedule="constant", warmup=4) == [0.5, 1.0, 1.5] + [2.0] * 7
    linear = rates(schedule="linear", warmup=2, final=0.5)
    assert linear[:2] == [1.0, 2.0]
    assert linear[-1] == 1.0
    assert all(a - b == pytest.approx(0.125) for a, b in pairwise(linear[1:]))
    cosine = rates(final=0.1)
    assert cosine[-1] == pytest.approx(0.2)
    assert cosine[4] == pytest.approx(2 * (0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2))
    assert cosine == sorted(cosine, reverse=True)
    stable = rates(schedule="wsd", warmup=2, decay=0.4, final=0.0)
    assert stable == pytest.approx([1.0, *[2.0] * 5, 1.5, 1.0, 0.5, 0.0])
    assert rates(warmup=10) == pytest.approx([0.2 * step for step in range(1, 11)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = mhc_compile.MemorySettings.preset("paper", layers=(1,), rows_per_head=50, row_width=4, compress=False)
    return model_folder(tmp_path_factory.mktemp("optimizer") / "model", engram=settings)


def test_groups_are_those_of_parameter_groups(folder: Path) -> None:
    model = mhc_compile.from_pretrained(folder, inner="eager")
    names = {id(p): name for name, p in model.named_parameters()}
    wanted = mhc_compile.parameter_groups(model, weight_decay=0.1, lr=1e-2)
    given = recipe(folder, model={"inner": "eager"})
    with launch(given.parallel) as world:
        engine = build_engine(given, world)
        ours = {id(p): name for stage in engine.stages for name, p in stage.named_parameters()}
        for group, other in zip(engine.optimizer.param_groups, wanted, strict=True):
            assert {ours[id(p)] for p in group["params"]} == {names[id(p)] for p in other["params"]}
            assert (group["lr"], group["weight_decay"]) == (other["lr"], other["weight_decay"])


def test_a_step_that_is_left_out_leaves_no_trace(folder: Path) -> None:
    given = recipe(folder, model={"inner": "eager"})
    with launch(given.parallel) as world:
        engine = build_engine(given, world)
        weights = {name: p.clone() for stage in engine.stages for name, p in stage.named_parameters()}
        first = engine.gradients(batch(1), 1)
        engine.optimizer.skip()
        assert all(t.gradient is None for t in engine.optimizer.tables.values())
        again = engine.gradients(batch(1), 1)
        assert (first.loss, first.norm) == (again.loss, again.norm)
        for stage in engine.stages:
            for name, p in stage.named_parameters():
                assert torch.equal(p, weights[name]), name
        engine.optimizer.update(1, again.norm)
        moved = {n for s in engine.stages for n, p in s.named_parameters() if not torch.equal(p, weights[n])}
        # The convolution is 0 at its start: what stands before it has no gradient yet.
        assert weights.keys() - moved <= {"model.mhc.engram.layers.1.conv_gain"}


def test_numbers_drawn_in_a_step_depend_on_the_step_alone(tmp_path: Path) -> None:
    given = recipe(model_folder(tmp_path, attention_dropout=0.5), model={"inner": "eager"})
    with launch(given.parallel) as world:
        engine = build_engine(given, world)
        losses = []
        for step in (1, 1, 2):
            losses.append(engine.gradients(batch(1), step).loss)
            engine.optimizer.skip()
        assert losses[0] == losses[1] != losses[2]
