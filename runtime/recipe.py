"""The recipe of a training run: a TOML file, every field of it typed, described and checked before anything starts."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from mhc_compile.config import Options
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.settings import MemorySettings
from mhc_compile.runtime.fields import Described, build, describe, typed, unknown
from mhc_compile.runtime.recipe_tables import (
    CheckpointTable,
    DataTable,
    MetricsTable,
    ModelTable,
    ParallelTable,
    RecomputeTable,
    StreamsTable,
    TrainTable,
    require,
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe. Raises MHC602 for values that do not go together, MHC604 where the schedule is impossible."""

    model: ModelTable
    mhc: StreamsTable | None = None
    """None: the recipe has no such table; a residual model then gets the defaults."""
    memory: MemorySettings | None = None
    data: DataTable
    train: TrainTable
    parallel: ParallelTable = field(default_factory=ParallelTable)
    recompute: RecomputeTable = field(default_factory=RecomputeTable)
    checkpoint: CheckpointTable
    metrics: MetricsTable = field(default_factory=MetricsTable)

    def __post_init__(self) -> None:
        t, p = self.train, self.parallel
        share = f"parallel.data x parallel.engram = {p.replicas} replicas"
        require(t.batch % p.replicas == 0, "train.batch", t.batch, f"a multiple of {share}")
        each = t.batch // p.replicas
        require(each % t.microbatch == 0, "train.microbatch", t.microbatch, f"a divisor of {each}, a replica's share")
        require(
            not t.evaluate_every or self.data.validation is not None,
            "train.evaluate_every",
            t.evaluate_every,
            "0 without data.validation",
        )
        _check_schedule(p, self.microbatches)
        _ = self.options

    @property
    def options(self) -> Options:
        """How the stages are compiled."""
        return Options(inner=self.model.inner, kernels=self.model.kernels, recompute=self.recompute.blocks)

    @property
    def microbatches(self) -> int:
        """Of every replica in a step."""
        return self.train.batch // self.parallel.replicas // self.train.microbatch

    @property
    def metrics_folder(self) -> Path:
        """Where metrics are written."""
        return Path(self.metrics.folder or self.checkpoint.folder)

    def plain(self) -> dict[str, dict[str, Any]]:
        """As TOML and JSON hold it, without what has no value; `parse_recipe` reads it back."""
        found: dict[str, dict[str, Any]] = {}
        for f in fields(self):
            if (table := getattr(self, f.name)) is not None:
                values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(table).items() if v is not None}
                found[f.name] = {"preset": values.pop("name"), **values} if f.name == "memory" else values
        return found


TABLES: dict[str, type[Any]] = {
    "model": ModelTable,
    "mhc": StreamsTable,
    "memory": MemorySettings,
    "data": DataTable,
    "train": TrainTable,
    "parallel": ParallelTable,
    "recompute": RecomputeTable,
    "checkpoint": CheckpointTable,
    "metrics": MetricsTable,
}
_PRESET = Described(
    "memory", "preset", "a text", '"paper"', "The published memory that the other fields change: paper, v41, qwen_ple."
)
_PATHS = (
    ("model", "folder"),
    ("data", "folder"),
    ("data", "validation"),
    ("checkpoint", "folder"),
    ("metrics", "folder"),
)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the file `path` with `overrides`, each `section.field=value`, in its place.

    Values of overrides are TOML; what is no TOML is a text. Relative paths are relative to the recipe's folder and
    become absolute. Raises MHC600 for a file that is no recipe, MHC601 for an unknown section or field, MHC602 for
    values that cannot be, MHC604 for a schedule that cannot run, and MHC201 to 204, 220 and 625 as the compiler does.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MHCError("MHC600", f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # no TOML, or no UTF-8
        raise MHCError("MHC600", f"{path}: {error}") from error
    for override in overrides:
        _override(content, override)
    return parse_recipe(content, path.resolve().parent)


def parse_recipe(content: Mapping[str, Any], folder: Path) -> Recipe:
    """The recipe from TOML's values; relative paths are relative to `folder`. Raises what `read_recipe` raises."""
    every = [f"{d.section}.{d.name}" for d in describe_fields()]
    tables: dict[str, Any] = {}
    for section, given in content.items():
        if section not in TABLES:
            raise unknown(section, [*TABLES, *(e for e in every if e.endswith(f".{section}"))])
        if not isinstance(given, dict):
            raise MHCError("MHC602", f"{section} is no table", way_out=f"write [{section}] and its fields below it")
        given = dict(given)
        for name in (name for where, name in _PATHS if where == section and isinstance(given.get(name), str)):
            given[name] = str(folder / Path(given[name]).expanduser())
        tables[section] = (
            _memory(given, every) if section == "memory" else build(TABLES[section], section, given, aside=every)
        )
    for section in ("model", "data", "train", "checkpoint"):
        if section not in tables:
            build(TABLES[section], section, {})  # names the first field that is missing
    return Recipe(**tables)


def describe_fields() -> list[Described]:
    """Every field of a recipe, in order, with what may be written, its default, and what it means."""
    found: list[Described] = []
    for section, cls in TABLES.items():
        found += [_PRESET] if section == "memory" else []
        found += describe(cls, section, leave_out=("name",) if section == "memory" else ())
    return found


def _memory(given: dict[str, Any], every: Sequence[str]) -> MemorySettings:
    preset = typed("memory.preset", given.pop("preset", "paper"), str)
    known = {f.name for f in fields(MemorySettings)} - {"name"}
    for name in given:
        if name not in known:
            raise unknown(f"memory.{name}", [*(f"memory.{k}" for k in known), *every])
    hints = get_type_hints(MemorySettings)
    return MemorySettings.preset(preset, **{k: typed(f"memory.{k}", v, hints[k]) for k, v in given.items()})


def _override(content: dict[str, Any], text: str) -> None:
    """Put `section.field=value` into the recipe's values."""
    name, equals, value = text.partition("=")
    section, point, field = name.strip().partition(".")
    if not equals or not point or not section or not field:
        raise MHCError("MHC602", f"{text!r} changes nothing", way_out="write section.field=value: train.steps=20")
    try:
        parsed: Any = tomllib.loads(f"value = {value}")["value"]
    except ValueError:
        parsed = value.strip()
    table = content.setdefault(section, {})
    if isinstance(table, dict):  # anything else is refused with the rest
        table[field] = parsed


def _check_schedule(p: ParallelTable, microbatches: int) -> None:
    """Raises MHC604 where torch's schedule would refuse to be made, with what would do."""
    each = p.stages_per_rank
    said = None
    if p.schedule == "1f1b" and each != 1:
        said = f"1f1b has one stage a rank, not parallel.stages_per_rank = {each}"
    elif p.is_v_shaped and each != 2:
        said = f"{p.schedule} has two stages a rank: parallel.stages_per_rank = 2, not {each}"
    elif p.schedule == "interleaved1f1b" and each < 2:
        said = f"interleaved1f1b has at least two stages a rank, not parallel.stages_per_rank = {each}"
    elif p.schedule == "interleaved1f1b":
        rounds = max(1, microbatches // p.stages)
        if microbatches % rounds:
            said = f"interleaved1f1b runs {rounds} rounds, which {microbatches} microbatches a step do not divide into"
    elif p.schedule != "zbv" and microbatches < p.stage_count:
        said = f"{p.schedule} keeps {p.stage_count} stages busy with as many microbatches a step, not {microbatches}"
    if said:
        raise MHCError("MHC604", said)
