"""`mhc-compile train`: run a recipe, or look at what it would do."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from mhc_compile.diagnostics import MHCError
from mhc_compile.output import Output


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of `train`."""

    engine: Literal["torchtitan"] | None = None
    """Train with torchtitan's trainer instead of this package's: its checkpoints, logs and data parallelism."""
    fields: bool = False
    """Explain every field of a recipe and end."""
    schema: bool = False
    """Print the JSON schema of recipes, for editors, and end."""
    accept_changes: bool = False
    """Go on from the checkpoint of a recipe with other data, steps, batch or rates."""
    dry_run: bool = False
    """Check everything, print the plan and end."""
    quiet: bool = False
    """Print warnings and errors alone; the metrics are in the run's folder."""
    export: Path | None = None
    """Train nothing: write the model of the newest checkpoint as a Hugging Face folder and end."""


_DEFAULT = Flags()


def train(
    recipe: Annotated[Path | None, Parameter(help="A TOML file.")] = None,
    /,
    *overrides: Annotated[str, Parameter(name="SECTION.FIELD=VALUE", help="Fields that differ from the recipe's.")],
    flags: Flags = _DEFAULT,
) -> int:
    """Train by a recipe, in one process or many.

    Train a model as a recipe says: a TOML file with the sections [model], [mhc], [memory], [data], [train],
    [diffusion], [parallel], [recompute], [checkpoint] and [metrics]. `--fields` explains every field.

    Alone the command is one process. torchrun starts it in several, parallel.stages x parallel.data x parallel.engram
    of them. A run that was stopped or killed goes on from its last checkpoint when the same command is given again, on
    as many processes as you like. `--export` turns its newest checkpoint into a model folder, in one process.

    ```sh
    # the tokens that [data] folder names
    mhc-compile data ./books ./tokens --tokenizer ./Qwen3-0.6B
    # check the recipe, the data, the tokenizer and the model, and print what would be done
    mhc-compile train recipe.toml --dry-run
    # with two fields changed
    mhc-compile train recipe.toml train.steps=20 parallel.schedule=1f1b
    # 2 pipeline stages, 2 replicas of them
    torchrun --nproc-per-node 4 -m mhc_compile train recipe.toml parallel.stages=2 parallel.data=2
    # start all ranks again from the last checkpoint when one is lost
    torchrun --nproc-per-node 4 --max-restarts 20 -m mhc_compile train recipe.toml
    # with torchtitan's trainer around the same stages
    torchrun --nproc-per-node 8 -m mhc_compile train recipe.toml --engine torchtitan
    # the model of the newest checkpoint, for mhc_compile.from_pretrained
    mhc-compile train recipe.toml --export ./trained
    ```

    A recipe:

    ```toml
    [model]
    folder = "Qwen3-0.6B"         # relative paths begin at the recipe's folder
    [data]
    folder = "tokens"
    sequence = 1024
    [train]
    steps = 2000
    batch = 64                    # sequences a step, over all ranks
    microbatch = 4                # sequences that a stage computes at a time
    lr = 3e-4
    [checkpoint]
    folder = "runs/first"
    every = 200
    ```
    """
    if flags.fields:
        _print_fields()
    elif flags.schema:
        from mhc_compile.runtime.recipe import recipe_schema

        print(json.dumps(recipe_schema(), indent=2))
    else:
        with Output(quiet=flags.quiet).printing():
            _run(recipe, overrides, flags)
    return 0


def _run(path: Path | None, overrides: Sequence[str], flags: Flags) -> None:
    """Train, export or print. Raises `MHCError` as `read_recipe` and `train` do."""
    from mhc_compile.runtime.recipe import read_recipe

    if path is None:
        raise MHCError("MHC600", "no file is named")
    recipe = read_recipe(path, overrides)
    engine: Any = None
    if flags.engine is not None:
        engine = import_module(f"mhc_compile.integrations.{flags.engine}")  # by its name: it stands above this room
        engine.check(recipe, exports=flags.export is not None)
    if flags.dry_run:
        _print_plan(recipe)
    elif engine is not None:
        engine.train(recipe, accept_changes=flags.accept_changes)
    elif flags.export is not None:
        from mhc_compile.runtime.export import export_checkpoint

        print(export_checkpoint(recipe, flags.export))
    else:
        from mhc_compile.runtime.loop import train

        train(recipe, accept_changes=flags.accept_changes)


def _print_fields() -> None:
    import shutil
    import textwrap

    from mhc_compile.runtime.recipe import TABLES, describe_fields

    width = min(shutil.get_terminal_size().columns, 120)
    section = ""
    for d in describe_fields():
        if d.section != section:
            section = d.section
            title = (TABLES[section].__doc__ or "").split("\n")[0].split(". ")[0].removeprefix(f"`[{section}]`: ")
            print(f"\n[{section}]  {title}")
        default = (
            "must be given" if not d.default else "may be left out" if d.default == "-" else f"default {d.default}"
        )
        print(f"  {d.name}: {d.values}; {default}")
        print(textwrap.fill(d.text, width, initial_indent=" " * 6, subsequent_indent=" " * 6))


def _print_plan(recipe: Any) -> None:
    """Check what a run checks before its first step, without the other ranks, and print what it would do."""
    import torch

    from mhc_compile.passes.stages import split_graph
    from mhc_compile.runtime.balance import cuts
    from mhc_compile.runtime.engine import capture
    from mhc_compile.runtime.launch import check_world
    from mhc_compile.runtime.loop import check_data, verify_data
    from mhc_compile.runtime.metrics import check_writers
    from mhc_compile.runtime.stage import tagged
    from mhc_compile.runtime.summary import summary

    if "WORLD_SIZE" in os.environ:
        check_world(recipe.parallel, int(os.environ["WORLD_SIZE"]))
    check_data(recipe)
    verify_data(recipe)
    check_writers(recipe.metrics)
    program = capture(recipe, torch.device("cpu"))
    p, accelerated = recipe.parallel, torch.cuda.is_available()
    starts = cuts(program, p.stage_count, p.balance, accelerated=accelerated)
    for piece in split_graph(program.graph, starts):
        tagged(piece.graph, recipe.options)
    for folder in (recipe.checkpoint.folder, recipe.metrics_folder):
        _check_writable(Path(folder))
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(summary(recipe, program, starts)))
        if recipe.parallel.world > 1 and "WORLD_SIZE" not in os.environ:
            print(f"start it with: torchrun --nproc-per-node {recipe.parallel.world} -m mhc_compile train ...")


def _check_writable(folder: Path) -> None:
    """Raise MHC619 where a folder, or the nearest one above it that is there, cannot be written; nothing is made."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise MHCError("MHC619", f"{folder}: {there} cannot be written")
