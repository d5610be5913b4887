"""Compare a recipe with every other schedule, and find the nearest recipe that fits where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product

from mhc_compile.diagnostics import MHCError
from mhc_compile.passes.cost import bytes_text
from mhc_compile.runtime.plan.estimate import Estimate, cut_stages, estimate, least
from mhc_compile.runtime.plan.hardware import Hardware
from mhc_compile.runtime.plan.model import Counted
from mhc_compile.runtime.recipe import Recipe
from mhc_compile.runtime.recipe_tables import SCHEDULES, ParallelTable, RecomputeTable, ScheduleName

MOST = 40
"""Recipes that are simulated before none is said to fit."""
_WITH_THE_SCHEDULE = ("parallel.stages_per_rank", "parallel.balance")
"""Fields that change with `parallel.schedule` and are no changes of their own."""


@dataclass(frozen=True)
class Compared:
    """A recipe's plan."""

    recipe: Recipe
    counted: Counted
    hardware: Hardware
    chosen: Estimate
    """As the recipe says."""
    others: dict[ScheduleName, Estimate | MHCError]
    """Every schedule with as many ranks and microbatches, the recipe's own among them, or why it cannot be."""
    nearest: Estimate | None
    """Where the recipe does not fit into the hardware's memory: what does, with the fewest changes."""

    @property
    def fits(self) -> bool:
        """Whether every rank's memory is enough."""
        return self.chosen.fullest <= self.hardware.memory


def compare(recipe: Recipe, counted: Counted, hardware: Hardware) -> Compared:
    """Plan the recipe, counted already. Raises what `estimate` raises for the recipe's own schedule."""
    chosen = estimate(counted, hardware, recipe)
    others: dict[ScheduleName, Estimate | MHCError] = {}
    for name in SCHEDULES:
        try:
            other = replace(recipe, parallel=with_schedule(recipe.parallel, name))
            others[name] = chosen if other == recipe else estimate(counted, hardware, other)
        except MHCError as error:
            others[name] = error
    nearest = None if chosen.fullest <= hardware.memory else _nearest(counted, hardware, recipe)
    return Compared(recipe, counted, hardware, chosen, others, nearest)


def with_schedule(parallel: ParallelTable, name: ScheduleName) -> ParallelTable:
    """Return the same ranks under another schedule, with as few stages a rank as it takes."""
    if name == parallel.schedule:
        return parallel
    return replace(parallel, schedule=name, stages_per_rank=1 if name == "1f1b" else 2, balance="model")


def _nearest(counted: Counted, hardware: Hardware, recipe: Recipe) -> Estimate | None:
    """Return the recipe that fits with the fewest changes, of those the fewest ranks, of those the shortest step."""
    candidates = [(_distance(recipe, c), c) for c in _candidates(recipe, len(counted.works))]
    tried = 0
    best: Estimate | None = None
    nearest: tuple[int, int] | None = None
    for distance, candidate in sorted(candidates, key=lambda c: c[0]):
        if tried >= MOST or (nearest is not None and distance > nearest):
            break
        with suppress(MHCError):
            stages = cut_stages(counted, hardware, candidate)
            if least(candidate, stages) > hardware.memory:
                continue  # without simulating it
            tried += 1
            planned = estimate(counted, hardware, candidate)
            if planned.fullest <= hardware.memory and (best is None or planned.seconds < best.seconds):
                best, nearest = planned, distance
    return best


def _candidates(recipe: Recipe, sites: int) -> Iterator[Recipe]:
    p, microbatch = recipe.parallel, recipe.train.microbatch
    times = [2**k for k in range(8) if p.stages * 2**k <= sites]
    for blocks, name, mode, longer, size, wider in product(
        dict.fromkeys((recipe.recompute.blocks, "auto", "stage")),
        SCHEDULES,
        dict.fromkeys((p.mode, "fsdp")),
        times,
        dict.fromkeys(max(1, microbatch // share) for share in (1, 2, 4, 8)),
        (1, 2, 4),
    ):
        if mode == "fsdp" and p.replicas * wider == 1:
            continue
        parallel = with_schedule(p, name)
        balance = parallel.balance if longer == 1 else "model"
        with suppress(MHCError):  # numbers that do not go together
            yield replace(
                recipe,
                parallel=replace(parallel, mode=mode, stages=p.stages * longer, data=p.data * wider, balance=balance),
                recompute=RecomputeTable(blocks=blocks),
                train=replace(recipe.train, microbatch=size),
            )


def changes(recipe: Recipe, other: Recipe) -> dict[str, object]:
    """Return the fields of `other` that differ from those of `recipe`, by their names."""
    before, after = recipe.plain(), other.plain()
    return {
        f"{section}.{name}": value
        for section, table in after.items()
        for name, value in table.items()
        if before[section].get(name) != value
    }


def _distance(recipe: Recipe, other: Recipe) -> tuple[int, int]:
    changed = changes(recipe, other).keys() - {*_WITH_THE_SCHEDULE}
    return len(changed), other.parallel.world


def does_not_fit(compared: Compared) -> MHCError:
    """Return MHC641 with the nearest recipe that fits."""
    hardware = compared.hardware
    sizes = bytes_text(compared.chosen.fullest), bytes_text(hardware.memory)
    detail = f"{sizes[0]} on the fullest rank, of {sizes[1]} of `{hardware.name}`"
    if compared.nearest is None:
        return MHCError("MHC641", detail)
    other = compared.nearest.recipe
    way_out = f"it fits with {changes_text(compared.recipe, other)} ({other.parallel.world} ranks)"
    return MHCError("MHC641", detail, way_out=way_out)


def changes_text(recipe: Recipe, other: Recipe) -> str:
    """Return the changes as a command line takes them."""
    return " ".join(f"{name}={value}" for name, value in changes(recipe, other).items())
