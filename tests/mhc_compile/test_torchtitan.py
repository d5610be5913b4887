"""torchtitan as the engine: on CPUs it trains our stages as our own loop does, and what it does not carry is refused.

Most of it needs torch 2.14 and torchtitan, which CI has in the lane of the newest versions.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

import mhc_compile
from mhc_compile.cli import main
from mhc_compile.diagnostics import MHCError
from mhc_compile.integrations import torchtitan
from mhc_compile.runtime.loop import train
from mhc_compile.runtime.recipe import Recipe, parse_recipe

sys.path.append(str(Path(__file__).parents[1] / "runtime"))
from data_folders import documents, make_tokenizer, write_lines
from titan_ranks import Runs, Train, ranks
from training import model_folder

from mhc_compile.runtime.data.prepare import prepare

HAS_TITAN = Version(torch.__version__) >= Version("2.14") and importlib.util.find_spec("torchtitan") is not None
with_titan = pytest.mark.skipif(not HAS_TITAN, reason="needs torch 2.14 or newer and torchtitan")
WAYS: dict[str, dict[str, Any]] = {
    "1f1b": {"schedule": "1f1b"},
    "interleaved1f1b": {"schedule": "interleaved1f1b", "stages_per_rank": 2},
    "zbv": {"schedule": "zbv", "stages_per_rank": 2},
    "dualpipev": {"schedule": "dualpipev", "stages_per_rank": 2},
}
MEMORIES: dict[str, Any] = {
    "engram": mhc_compile.MemorySettings.preset("v41", layers=(0, 1), rows_per_head=50, row_width=4, compress=False),
    "ultramem": mhc_compile.UltraMemSettings.preset(
        "v2", side=6, key_width=8, value_width=8, input_width=4, top=3, heads=2
    ),
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model with a tied head, its tokenizer, and data."""
    folder = tmp_path_factory.mktemp("material")
    model_folder(folder / "model", vocab_size=300, num_hidden_layers=2)
    make_tokenizer(folder / "model")
    for name, seed in (("tokens", 0), ("held-out", 1)):
        lines = write_lines(folder / f"{name}.jsonl", documents(150, seed))
        prepare([str(lines)], folder / name, tokenizer=folder / "model")
    return folder


@pytest.fixture(scope="module")
def on_ranks() -> Iterator[Train]:
    with ranks() as train:
        yield train


def recipe(material: Path, folder: Path, *, steps: int = 3, **tables: dict[str, Any]) -> Recipe:
    content: dict[str, Any] = {
        "model": {"folder": str(material / "model"), "inner": "eager"},
        "data": {"folder": str(material / "tokens"), "sequence": 16},
        "train": {"steps": steps, "batch": 8, "microbatch": 1, "lr": 1e-2, "warmup": 2, "clip": 0.5},
        "parallel": {"timeout": 200, "patience": 400},
        "checkpoint": {"folder": str(folder), "every": 0, "asynchronous": False},
        "metrics": {"every": 1},
    }
    for name, fields in tables.items():
        content[name] = content.get(name, {}) | fields
    return parse_recipe(content, folder)


TIMES = ("seconds", "tokens_per_second", "tokens_per_second_per_device", "mfu", "peak_memory")
"""Figures of a run that differ from one time to the next."""


def figures(folder: Path) -> dict[int, dict[str, float]]:
    """What either engine has logged, by step, without times and loads of experts, which torchtitan does not log."""
    found: dict[int, dict[str, float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        kept = {k: v for k, v in values.items() if k not in ("step", *TIMES) and not k.startswith("expert_")}
        found.setdefault(values["step"], {}).update(kept)
    return found


def check(on_ranks: Train, recipes: Runs, own: Recipe, *, but: tuple[str, ...] = (), rel: float = 3e-5) -> None:
    """Train by `own` with our engine in this process, by `recipes` with torchtitan; they log the same, except `but`."""
    train(own)
    on_ranks(recipes)
    wanted = figures(Path(own.checkpoint.folder))
    for name, r in recipes.items():
        found = figures(Path(r.checkpoint.folder))
        assert found.keys() == wanted.keys(), name
        for step, values in wanted.items():
            values = {k: v for k, v in values.items() if k not in but}
            assert found[step] == pytest.approx(values, rel=rel), f"{name}, step {step}"


@with_titan
@pytest.mark.compat
def test_a_few_ways(on_ranks: Train, material: Path, tmp_path: Path) -> None:
    """The head is tied: its gradients are sums over stages, and count once."""
    held_out = {"data": {"validation": str(material / "held-out")}, "train": {"evaluate_every": 2}}
    ways = {"stages": {"stages": 2, "data": 2, "mode": "fsdp"}, "zbv": {"stages": 2, **WAYS["zbv"]}}
    check(
        on_ranks,
        {name: recipe(material, tmp_path / name, parallel=way, **held_out) for name, way in ways.items()},
        recipe(material, tmp_path / "own", **held_out),
    )


@with_titan
@pytest.mark.slow
@pytest.mark.parametrize("data", [1, 2])
def test_every_schedule_for_twenty_steps(on_ranks: Train, material: Path, tmp_path: Path, data: int) -> None:
    how = {"model": {"inner": "aot_eager"}, "recompute": {"blocks": "auto"}, "steps": 20}
    fsdp = {"data": data, "mode": "fsdp"}
    ways = {"replicas": {"data": 2 * data}, "fsdp": {"data": 2 * data, "mode": "fsdp"}}
    ways |= {name: {"stages": 2, **fsdp, **way} for name, way in WAYS.items()}
    recipes = {name: recipe(material, tmp_path / name, parallel=way, **how) for name, way in ways.items()}
    check(on_ranks, recipes, recipe(material, tmp_path / "own", **how))


@with_titan
@pytest.mark.parametrize(
    "memory", [pytest.param("engram", marks=pytest.mark.slow), pytest.param("ultramem", marks=pytest.mark.compat)]
)
def test_tables(on_ranks: Train, material: Path, tmp_path: Path, memory: str) -> None:
    """Rows are trained, also those of a table that layers of several stages share."""
    folder = model_folder(tmp_path / "model", vocab_size=300, num_hidden_layers=2, **{memory: MEMORIES[memory]})
    make_tokenizer(folder)
    model = {"model": {"folder": str(folder)}}
    ways = {"stages": {"stages": 2, "data": 2, "mode": "fsdp"}}
    check(
        on_ranks,
        {name: recipe(material, tmp_path / name, parallel=way, **model) for name, way in ways.items()},
        recipe(material, tmp_path / "own", **model),
    )


@with_titan
@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True])
def test_the_auxiliary_loss_of_experts(on_ranks: Train, material: Path, tmp_path: Path, documents: bool) -> None:
    """With `documents` the tokens that begin one do not count, and the auxiliary loss counts as ever."""
    experts = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 5.0}
    folder = model_folder(tmp_path / "model", vocab_size=300, num_hidden_layers=2, **experts)
    make_tokenizer(folder)
    how = {"model": {"folder": str(folder)}, "train": {"microbatch": 2}, "data": {"documents": documents}}
    ways = {"fsdp": {"data": 2, "mode": "fsdp"}, "stages": {"stages": 2}}
    check(
        on_ranks,
        {name: recipe(material, tmp_path / name, parallel=way, **how) for name, way in ways.items()},
        recipe(material, tmp_path / "own", **how),
        but=("auxiliary_loss",),
    )


@with_titan
@pytest.mark.slow
def test_bfloat16(on_ranks: Train, material: Path, tmp_path: Path) -> None:
    """Every step computes with what the weights are by then."""
    how: dict[str, Any] = {"model": {"dtype": "bfloat16"}, "steps": 5}
    fsdp = recipe(material, tmp_path / "fsdp", parallel={"data": 2, "mode": "fsdp"}, **how)
    check(on_ranks, {"fsdp": fsdp}, recipe(material, tmp_path / "own", **how), rel=5e-3)


@with_titan
@pytest.mark.compat
def test_a_run_goes_on_in_another_shape(on_ranks: Train, material: Path, tmp_path: Path) -> None:
    model = {"model": {"folder": str(tmp_path / "model")}}
    make_tokenizer(model_folder(tmp_path / "model", vocab_size=300, num_hidden_layers=2, engram=MEMORIES["engram"]))

    def part(steps: int, **parallel: Any) -> Recipe:
        train = {"schedule": "constant"}  # for any number of steps
        return recipe(material, tmp_path / "run", steps=steps, train=train, parallel=parallel, **model)

    parts = {"sharded": part(2, data=2, mode="fsdp"), "stages": part(3, stages=2, **WAYS["zbv"]), "one": part(4)}
    on_ranks(parts)
    own = recipe(material, tmp_path / "own", steps=4, train={"schedule": "constant"}, **model)
    train(own)
    wanted = figures(tmp_path / "own")
    for step, values in figures(tmp_path / "run").items():
        assert values == pytest.approx(wanted[step], rel=3e-5), step
    # Names are the model's: torch reads the last checkpoint into it.
    trained = mhc_compile.from_pretrained(tmp_path / "model", inner="eager")
    weights = {name: p.detach() for name, p in trained.named_parameters()}
    before = {name: t.clone() for name, t in weights.items()}
    torch.distributed.checkpoint.load(weights, checkpoint_id=tmp_path / "run" / "checkpoint" / "step-4")
    assert {name for name, t in weights.items() if (t != before[name]).any()} == weights.keys()


@with_titan
@pytest.mark.slow
def test_gradients_that_are_not_finite(on_ranks: Train, material: Path, tmp_path: Path) -> None:
    huge = {"lr": 1e30, "warmup": 0}
    with pytest.raises(AssertionError, match="MHC618"):
        on_ranks({"huge": recipe(material, tmp_path, train=huge, parallel={"stages": 2}, metrics={"every": 10})})


@with_titan
@pytest.mark.slow
def test_biases_that_balance_experts(on_ranks: Train, material: Path, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", vocab_size=300, num_hidden_layers=2, n_routed_experts=4)
    make_tokenizer(folder)
    model = {"model": {"folder": str(folder)}}
    with pytest.raises(AssertionError, match=r"MHC651.*train\.balance_rate"):
        on_ranks({"moved": recipe(material, tmp_path / "moved", parallel={"stages": 2}, **model)})
    still = {"train": {"balance_rate": 0.0}, **model}
    fsdp = recipe(material, tmp_path / "fsdp", parallel={"data": 2, "mode": "fsdp"}, **still)
    check(on_ranks, {"fsdp": fsdp}, recipe(material, tmp_path / "own", **still))


@with_titan
def test_other_data(material: Path, tmp_path: Path) -> None:
    from mhc_compile.integrations.torchtitan_parts import Batches

    def batches(folder: str, accepts: bool = False) -> Any:
        r = recipe(material, tmp_path, data={"folder": str(material / folder)})
        return Batches.Config(recipe=r, accept_changes=accepts).build(dp_rank=0, dp_world_size=1, local_batch_size=3)

    state = batches("tokens").state_dict()
    for part, (_, labels) in zip((3, 3, 2, 3), begun := batches("tokens"), strict=False):
        assert len(labels) == part
    later = begun.state_dict()
    assert (later["step"], later["samples"]) == (2, 16)
    with pytest.raises(MHCError, match="MHC608"):
        batches("held-out").load_state_dict(state)
    batches("held-out", accepts=True).load_state_dict(state)


@with_titan
def test_settings_that_stages_do_not_carry(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchtitan.tools import utils

    monkeypatch.setattr(utils, "device_type", "cpu")
    r = recipe(material, tmp_path)
    config = torchtitan.trainer_config(r)
    config.model_spec.model.update_from_config(config=config)
    for section, name, value in (
        ("parallelism", "tensor_parallel_degree", 2),
        ("parallelism", "context_parallel_degree", 2),
        ("parallelism", "expert_parallel_degree", 2),
        ("parallelism", "spmd_backend", "full_dtensor"),
        ("training", "max_norm", 1.0),
        ("compile", "enable", True),
    ):
        config = torchtitan.trainer_config(r)
        setattr(getattr(config, section), name, value)
        with pytest.raises(MHCError, match=rf"MHC651.*{section}\.{name}"):
            config.model_spec.model.update_from_config(config=config)


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        (r"\[diffusion\]", {"diffusion": {"attention": "bidirectional"}}),
        ("parallel.engram = 2", {"parallel": {"engram": 2}}),
        ("parallel.stages_per_rank = 2", {"parallel": WAYS["zbv"]}),
        ("train.on_nonfinite", {"train": {"on_nonfinite": "skip"}}),
        ("train.explode", {"train": {"explode": 3.0}}),
        ("checkpoint.keep", {"checkpoint": {"keep": 1}}),
        ("metrics.probes_every = 5", {"metrics": {"probes_every": 5}}),
        ("train.profile", {"train": {"profile": "1-2"}}),
        ("metrics.wandb", {"metrics": {"wandb": "project"}}),
    ],
)
def test_fields_that_it_does_not_carry(material: Path, tmp_path: Path, name: str, tables: dict[str, Any]) -> None:
    with pytest.raises(MHCError, match=f"MHC651.*{name}"):
        torchtitan.check(recipe(material, tmp_path, **tables))


def test_checkpoints_of_the_other_engine_are_not_overlooked(material: Path, tmp_path: Path) -> None:
    (tmp_path / "step-00000002").mkdir()
    with pytest.raises(MHCError, match=r"MHC651.*checkpoint\.folder"):
        torchtitan.check(recipe(material, tmp_path))


def test_the_command_says_what_is_missing(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    r = recipe(material, tmp_path)
    text = "\n".join(
        f"[{section}]\n" + "\n".join(f"{name} = {json.dumps(value)}" for name, value in fields.items())
        for section, fields in r.plain().items()
    )
    (tmp_path / "recipe.toml").write_text(text)
    command = ["train", str(tmp_path / "recipe.toml"), "--engine", "torchtitan"]
    assert main([*command, "--export", str(tmp_path / "out")]) == 3
    assert "MHC651" in capsys.readouterr().err
    if not HAS_TITAN or not torch.cuda.is_available():
        assert main(command) == 3
        assert "MHC650" in capsys.readouterr().err
