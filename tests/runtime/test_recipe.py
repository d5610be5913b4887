"""Recipes: what is read, what is refused and by which code, and that every field is described."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.ultramem_settings import UltraMemSettings
from mhc_compile.runtime.recipe import describe_fields, parse_recipe, read_recipe, recipe_schema

RECIPE = """
[model]
folder = "llama"
[data]
folder = "tokens"
sequence = 128
[train]
steps = 100
batch = 16
microbatch = 2
lr = 3e-4
[checkpoint]
folder = "/runs/a"
every = 50
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def test_what_is_left_out_has_its_default(recipe: Path) -> None:
    read = read_recipe(recipe)
    assert read.model.start == "checkpoint"
    assert read.train.betas == (0.9, 0.95)
    assert read.parallel.world == 1
    assert read.microbatches == 8
    assert read.mhc is None
    assert read.memory is None
    assert read.recompute.blocks == "off"


def test_relative_paths_begin_at_the_recipe(recipe: Path) -> None:
    read = read_recipe(recipe)
    assert read.model.folder == str(recipe.parent.resolve() / "llama")
    assert read.checkpoint.folder == "/runs/a"
    assert read.metrics_folder == Path("/runs/a")
    assert read_recipe(recipe, ["metrics.folder=m"]).metrics_folder == recipe.parent.resolve() / "m"


def test_overrides_are_toml_or_text(recipe: Path) -> None:
    changes = [
        "train.steps=20", "train.lr=1", "train.betas=[0.9, 0.99]", "parallel.stages=2", "parallel.schedule=zbv",
        "parallel.stages_per_rank=2", "parallel.balance=[3, 3, 3, 3]", "recompute.blocks=2GiB", "mhc.convention=liger",
        "checkpoint.asynchronous=false",
    ]  # fmt: skip
    read = read_recipe(recipe, changes)
    assert read.train.steps == 20
    assert read.train.lr == 1.0
    assert isinstance(read.train.lr, float)
    assert read.train.betas == (0.9, 0.99)
    assert read.parallel.balance == (3, 3, 3, 3)
    assert read.parallel.stage_count == 4
    assert read.recompute.blocks == "2GiB"
    assert read.mhc is not None
    assert read.mhc.spec.convention.value == "liger"
    assert read.checkpoint.asynchronous is False


def test_streams_take_what_is_left_out_from_the_convention(recipe: Path) -> None:
    read = read_recipe(recipe, ["mhc.convention=deepseek_v4"])
    assert read.mhc is not None
    assert read.mhc.spec.exit == "head"


def test_a_memory_starts_from_a_preset(recipe: Path) -> None:
    read = read_recipe(recipe, ["memory.preset=qwen_ple", "memory.layers=[0, 2]", "memory.resets_after_eos=true"])
    assert read.memory is not None
    assert read.memory.fill == "eos"
    assert read.memory.layers == (0, 2)
    assert read.memory.row_width == 160


def test_ultramem_starts_from_a_version(recipe: Path) -> None:
    read = read_recipe(recipe, ["ultramem.preset=v2", "ultramem.side=64", "ultramem.layers=[1]"])
    assert read.ultramem == UltraMemSettings.preset("v2", side=64, layers=(1,))
    assert read_recipe(recipe, ["ultramem.side=64"]).ultramem == UltraMemSettings.preset("v1", side=64)
    with pytest.raises(MHCError, match="MHC220"):
        read_recipe(recipe, ["ultramem.preset=v3"])


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["ultramem.preset=v2", "ultramem.top=4"],
        ["memory.layers=[0]", "parallel.balance=[4]", "mhc.streams=2", "metrics.folder=/m"],
    ],
)
def test_plain_values_are_the_recipe_again(recipe: Path, changes: list[str]) -> None:
    read = read_recipe(recipe, changes)
    assert parse_recipe(read.plain(), recipe.parent) == read


@pytest.mark.parametrize(
    ("change", "nearest"),
    [
        ("train.stepz=1", "did you mean train.steps?"),
        ("train.learning_rate=1", "unknown field"),
        ("trian.steps=1", "did you mean train?"),
        ("model.lr=1", "did you mean train.lr?"),
        ("parallel.tensor=2", "known: parallel.stages"),
        ("train.folder=x", ".folder?"),
        ("paralel.stages=1", "did you mean parallel?"),
        ("memory.rows=1", "memory.rows_per_head?"),
        ("memory.name=x", "memory.name"),
        ("ultramem.sides=1", "did you mean ultramem.side?"),
        ("steps.x=1", "did you mean train.steps?"),
    ],
)
def test_misspelt_names_are_refused_with_the_nearest(recipe: Path, change: str, nearest: str) -> None:
    with pytest.raises(MHCError, match="MHC601") as refused:
        read_recipe(recipe, [change])
    assert nearest in str(refused.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.steps=ten", "train.steps"),
        ("train.steps=1.5", "a whole number"),
        ("train.steps=true", "train.steps = true"),
        ("train.steps=0", "at least 1"),
        ("train.lr=0", "train.lr"),
        ("train.lr=nan", "train.lr"),
        ("train.lr=inf", "train.lr"),
        ("train.lr=[1]", "train.lr"),
        ("train.final=1.5", "train.final"),
        ("train.betas=[0.9]", "2 numbers in a list"),
        ("train.betas=[0.9, 1.0]", "train.betas"),
        ("train.warmup=101", "train.warmup"),
        ("train.batch=15", "train.microbatch"),
        ("train.microbatch=3", "train.microbatch"),
        ("train.explode=0.5", "train.explode"),
        ("train.profile=12-10", 'steps as "10-12"'),
        ("train.profile=first", 'steps as "10-12"'),
        ("train.decay=0", "train.decay"),
        ("data.weights=[1, 2]", "1 numbers above 0"),
        ("train.schedule=step", '"cosine" | "linear" | "constant"'),
        ("train.on_nonfinite=1", "train.on_nonfinite"),
        ("train.evaluate_every=5", "data.validation"),
        ("parallel.data=3", "train.batch"),
        ("parallel.timeout=0", "parallel.timeout"),
        ("parallel.balance=[3, 3]", "parallel.balance"),
        ("parallel.balance=['a']", "parallel.balance"),
        ("recompute.blocks=1.5", "recompute.blocks"),
        ("checkpoint.keep=0", "checkpoint.keep"),
        ("checkpoint.folder=1", "a text"),
        ("data.workers=-1", "data.workers"),
        ("train=1", "changes nothing"),
        ("train.steps", "changes nothing"),
        ("=1", "changes nothing"),
    ],
)
def test_values_that_cannot_be_are_refused(recipe: Path, change: str, said: str) -> None:
    with pytest.raises(MHCError, match="MHC602") as refused:
        read_recipe(recipe, [change])
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("mhc.streams=9", "MHC201"),
        ("mhc.manifold=kronecker mhc.streams=3", "MHC203"),
        ("memory.order=1", "MHC220"),
        ("model.kernels=fast", "MHC204"),
        ("recompute.blocks=0", "MHC204"),
        ("recompute.blocks=2 boxes", "MHC204"),
        ("recompute.blocks=auto model.inner=eager", "MHC625"),
    ],
)
def test_the_compilers_own_values_have_its_codes(recipe: Path, change: str, code: str) -> None:
    with pytest.raises(MHCError, match=code):
        read_recipe(recipe, change.split(" ") if "=" in change.split(" ")[-1] else [change])


@pytest.mark.parametrize(
    "change",
    [
        "parallel.stages=16",
        "parallel.stages_per_rank=2",
        "parallel.schedule=zbv",
        "parallel.schedule=dualpipev",
        "parallel.schedule=interleaved1f1b",
        "parallel.schedule=dualpipev parallel.stages_per_rank=2 parallel.stages=8",
        "parallel.schedule=zbv parallel.stages_per_rank=3",
        "parallel.schedule=interleaved1f1b parallel.stages_per_rank=2 parallel.stages=2 train.batch=10",
    ],
)
def test_schedules_that_cannot_run_are_refused(recipe: Path, change: str) -> None:
    with pytest.raises(MHCError, match="MHC604"):
        read_recipe(recipe, change.split())


@pytest.mark.parametrize("missing", ["model", "data", "train", "checkpoint"])
def test_a_section_that_must_be_there_is_named(tmp_path: Path, missing: str) -> None:
    parts = [part for part in RECIPE.split("\n[") if part.strip() and not part.startswith(missing)]
    path = tmp_path / "recipe.toml"
    path.write_text("\n".join(("" if part.startswith("\n[") else "[") + part for part in parts))
    with pytest.raises(MHCError, match="MHC602") as refused:
        read_recipe(path)
    assert f"[{missing}]" in str(refused.value)


@pytest.mark.parametrize("content", [None, "train = ", b"\xff\xfe"])
def test_no_recipe(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MHCError, match="MHC600"):
        read_recipe(path)


def test_a_section_that_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("train = 3\n")
    with pytest.raises(MHCError, match=r"MHC602.*train is no table"):
        read_recipe(path)


def test_every_field_is_described() -> None:
    described = describe_fields()
    assert len({(d.section, d.name) for d in described}) == len(described) > 50
    for d in described:
        assert len(d.text) > 3, f"{d.section}.{d.name} has no docstring"
        assert d.values
    by_name = {f"{d.section}.{d.name}": d for d in described}
    assert by_name["train.steps"].default == ""
    assert by_name["train.clip"].default == "1.0"
    assert by_name["mhc.exit"].default == "-"
    assert by_name["parallel.balance"].values == '"model" | "measure" | a list of whole numbers'


def test_the_schema_takes_what_a_recipe_takes(recipe: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = recipe_schema()
    whole = read_recipe(recipe, ["memory.layers=[0]", "ultramem.preset=v2", "parallel.balance=[4]", "mhc.streams=2"])
    jsonschema.validate(whole.plain(), schema)
    named = {f"{section}.{name}" for section, table in schema["properties"].items() for name in table["properties"]}
    assert named == {f"{d.section}.{d.name}" for d in describe_fields()}
    for wrong in ({"steps": "ten"}, {"stepz": 1}, {"schedule": "step"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(whole.plain() | {"train": whole.plain()["train"] | wrong}, schema)
