"""What a run is going to do, in a few lines."""

from __future__ import annotations

from collections.abc import Sequence

from mhc_compile.memory.parameters import tables
from mhc_compile.passes.stages import split_graph
from mhc_compile.runtime.data.shards import open_data
from mhc_compile.runtime.program import Program
from mhc_compile.runtime.recipe import Recipe


def summary(recipe: Recipe, program: Program, starts: Sequence[int]) -> list[str]:
    """Describe the model, its stages, the data and the steps, line by line.

    `starts`: the first site of every stage but the first.
    """
    p, t = recipe.parallel, recipe.train
    trained = sum(q.numel() for q in program.parameters.values() if q.requires_grad)
    sizes = [table.rows * table.width for _, table in tables(program.model)]
    more = f" and {_short(sum(sizes))} in {len(sizes)} table{'s' * (len(sizes) > 1)}" if sizes else ""
    tokens = t.batch * recipe.data.sequence
    mixed = [open_data(folder).tokens for folder in recipe.data.folders]
    parts = recipe.data.weights or [1.0] * len(mixed)
    epochs = [t.steps * tokens * part / sum(parts) / max(count, 1) for part, count in zip(parts, mixed, strict=True)]
    read = ", ".join(f"{count:.2g} epochs of {f}" for count, f in zip(epochs, recipe.data.folders, strict=True))
    return [
        f"model     {recipe.model.folder}: {_short(trained)} parameters{more}, {program.sites} sites",
        *_stages(recipe, program, starts),
        f"ranks     {p.world} = {p.stages} stages x {p.data} replicas x {p.engram} shards of tables, {p.mode}",
        f"step      {t.batch} sequences of {recipe.data.sequence:,} ({_short(tokens)} tokens), {recipe.microbatches} "
        f"microbatches of {t.microbatch} a replica, {p.schedule}",
        f"run       {t.steps:,} steps, {_short(t.steps * tokens)} tokens, {read}",
        f"recompute {recipe.recompute.blocks}, {recipe.model.dtype}, {recipe.model.inner}",
        f"saves     {recipe.checkpoint.folder}, "
        + (f"every {recipe.checkpoint.every} steps" if recipe.checkpoint.every else "at the end"),
    ]


def _stages(recipe: Recipe, program: Program, starts: Sequence[int]) -> list[str]:
    lines = []
    replicas = recipe.parallel.replicas
    for i, piece in enumerate(split_graph(program.graph, starts)):
        names = {program.names.get(n.name) for n in piece.graph.graph.find_nodes(op="placeholder")}
        size = sum(q.numel() for name, q in program.parameters.items() if name in names)
        first = recipe.parallel.place_of(i) * replicas
        ranks = f"rank {first}" if replicas == 1 else f"ranks {first} to {first + replicas - 1}"
        sites = f"{piece.sites[0]} to {piece.sites[-1]}"
        lines.append(f"stage {i:<3} sites {sites}, {_short(size)} parameters, {ranks}")
    return lines


def _short(number: float) -> str:
    """Return a number with three digits: 1.23 M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
