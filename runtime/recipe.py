"""The recipe of a training run: a TOML file whose fields are typed, described and checked before anything starts."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from mhc_compile.config import Options
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.settings import MemorySettings
from mhc_compile.kernels.memory.ultramem_settings import UltraMemSettings
from mhc_compile.runtime.fields import Described, build, checked, describe, schema, unknown
from mhc_compile.runtime.recipe_tables import (
    CheckpointTable,
    DataTable,
    DiffusionTable,
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
    ultramem: UltraMemSettings | None = None
    data: DataTable
    train: TrainTable
    diffusion: DiffusionTable | None = None
    """None: next tokens are learnt."""
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
        if self.diffusion is not None:
            require(not self.data.documents, "data.documents", True, "false with [diffusion]: edits move tokens")
        _check_schedule(p, self.microbatches)
        _ = self.options

    @property
    def options(self) -> Options:
        """How the stages are compiled."""
        m, attention = self.model, None if self.diffusion is None else self.diffusion.attention
        return Options(inner=m.inner, kernels=m.kernels, recompute=self.recompute.blocks, attention=attention)

    @property
    def microbatches(self) -> int:
        """Of every replica in a step."""
        return self.train.batch // self.parallel.replicas // self.train.microbatch

    @property
    def metrics_folder(self) -> Path:
        """Where metrics are written."""
        return Path(self.metrics.folder or self.checkpoint.folder)

    @property
    def settled(self) -> dict[str, Any]:
        """The fields that a run follows from its first to its last step, by their names, as JSON holds them."""
        content = self.plain()
        named = {
            f"{section}.{name}": v
            for section in ("model", "train", "data", "diffusion")
            for name, v in content.get(section, {}).items()
        }
        return {name: value for name, value in named.items() if name not in _FREE}

    def plain(self) -> dict[str, dict[str, Any]]:
        """Return the recipe as TOML and JSON hold it, without fields that are None; `parse_recipe` reads it back."""
        content: dict[str, dict[str, Any]] = {}
        for f in fields(self):
            if (table := getattr(self, f.name)) is not None:
                values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(table).items() if v is not None}
                preset = {"preset": values.pop("name")} if f.name == "memory" else {}
                content[f.name] = preset | values
        return content


TABLES: dict[str, type[Any]] = {
    "model": ModelTable,
    "mhc": StreamsTable,
    "memory": MemorySettings,
    "ultramem": UltraMemSettings,
    "data": DataTable,
    "train": TrainTable,
    "diffusion": DiffusionTable,
    "parallel": ParallelTable,
    "recompute": RecomputeTable,
    "checkpoint": CheckpointTable,
    "metrics": MetricsTable,
}
_CHANGED = "The published memory that the other fields change: "
_PRESETS = {
    "memory": Described("memory", "preset", "a text", '"paper"', f"{_CHANGED}paper, v41, qwen_ple."),
    "ultramem": Described("ultramem", "preset", "a text", '"v1"', f"{_CHANGED}v1, v2."),
}
"""By the sections of memories the field that names their other fields' values."""
_FREE = {
    *("model.folder", "model.start", "model.inner", "model.kernels"),
    *("train.microbatch", "train.evaluate_every", "train.evaluate_batches", "train.on_nonfinite", "train.explode"),
    *("train.profile", "data.folder", "data.mixture", "data.validation", "data.workers"),
}
"""What may change on the way: the model and the data are compared by what they hold."""
_HIDDEN = {"memory": ("name",)}
"""Fields that `preset` names instead."""
_PATHS = {
    "model": ("folder",),
    "data": ("folder", "mixture", "validation"),
    "checkpoint": ("folder",),
    "metrics": ("folder",),
}


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe in the file `path`, with `overrides`, each `section.field=value`, applied.

    Values of overrides are TOML; what is no TOML is a text. Relative paths start at the recipe's folder and become
    absolute. Raises MHC600 for a file that is no recipe, MHC601 for an unknown section or field, MHC602 for
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
    """Return the recipe of TOML's values; relative paths start at `folder`. Raises what `read_recipe` raises."""
    names = [f"{d.section}.{d.name}" for d in describe_fields()]
    tables: dict[str, Any] = {}
    for section, table in content.items():
        if section not in TABLES:
            raise unknown(section, [*TABLES, *(name for name in names if name.endswith(f".{section}"))])
        if not isinstance(table, dict):
            raise MHCError("MHC602", f"{section} is no table", way_out=f"write [{section}] and its fields below it")
        values = table | {name: _absolute(table[name], folder) for name in _PATHS.get(section, ()) if name in table}
        tables[section] = (
            _memory(section, values, names)
            if section in _PRESETS
            else build(TABLES[section], section, values, aside=names)
        )
    for section in ("model", "data", "train", "checkpoint"):
        if section not in tables:
            build(TABLES[section], section, {})  # names the first field that is missing
    return Recipe(**tables)


def _absolute(path: Any, folder: Path) -> Any:
    """Return a path, or a list of paths, from `folder` on; anything else is left to the field's own check."""
    if isinstance(path, list | tuple):
        return [_absolute(one, folder) for one in path]
    return str(folder / Path(path).expanduser()) if isinstance(path, str) else path


def describe_fields() -> list[Described]:
    """Return every field of a recipe, in order, with what may be written, its default, and what it means."""
    described: list[Described] = []
    for section, cls in TABLES.items():
        described += [_PRESETS[section]] if section in _PRESETS else []
        described += describe(cls, section, leave_out=_HIDDEN.get(section, ()))
    return described


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, by which editors complete and check its TOML."""
    sections = {section: schema(cls, leave_out=_HIDDEN.get(section, ())) for section, cls in TABLES.items()}
    for section, preset in _PRESETS.items():
        sections[section]["properties"] = {
            "preset": {"type": "string", "default": json.loads(preset.default), "description": preset.text},
            **sections[section]["properties"],
        }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of mhc-compile",
        "type": "object",
        "properties": sections,
        "required": ["model", "data", "train", "checkpoint"],
        "additionalProperties": False,
    }


def _memory(section: str, values: dict[str, Any], names: Sequence[str]) -> Any:
    """Return the settings of a section of `_PRESETS`: those of its preset, with `values`."""
    settings, default = TABLES[section], json.loads(_PRESETS[section].default)
    preset = checked(str, f"{section}.preset", values.pop("preset", default))
    hints = get_type_hints(settings)
    for name in values:
        if f"{section}.{name}" not in names:
            raise unknown(f"{section}.{name}", names)
    return settings.preset(preset, **{k: checked(hints[k], f"{section}.{k}", v) for k, v in values.items()})


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
    if isinstance(table, dict):  # `parse_recipe` rejects anything else
        table[field] = parsed


def _check_schedule(p: ParallelTable, microbatches: int) -> None:
    """Raise MHC604 where torch's schedule would reject the numbers, with those that it takes."""
    each = p.stages_per_rank
    reason = None
    if p.schedule == "1f1b" and each != 1:
        reason = f"1f1b has one stage a rank, not parallel.stages_per_rank = {each}"
    elif p.is_v_shaped and each != 2:
        reason = f"{p.schedule} has two stages a rank: parallel.stages_per_rank = 2, not {each}"
    elif p.schedule == "interleaved1f1b" and each < 2:
        reason = f"interleaved1f1b has at least two stages a rank, not parallel.stages_per_rank = {each}"
    elif p.schedule == "interleaved1f1b":
        rounds = max(1, microbatches // p.stages)
        if microbatches % rounds:
            reason = f"interleaved1f1b runs {rounds} rounds, into which {microbatches} microbatches do not divide"
    elif p.schedule != "zbv" and microbatches < p.stage_count:
        reason = f"{p.schedule} keeps {p.stage_count} stages busy with as many microbatches a step, not {microbatches}"
    if reason:
        raise MHCError("MHC604", reason)
