"""A recipe as it is, every other schedule beside it, and the nearest recipe that fits where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from mhc_compile.diagnostics import MHCError
from mhc_compile.runtime.engine import splits
from mhc_compile.runtime.plan.estimate import Estimate, Way, cut_stages, estimate, least
from mhc_compile.runtime.plan.hardware import GIB, Hardware
from mhc_compile.runtime.plan.model import Counted
from mhc_compile.runtime.plan.schedules import SCHEDULES, ScheduleName
from mhc_compile.runtime.recipe import Recipe

MOST = 40
"""Ways that are simulated before none is said to fit."""


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


def way_of(recipe: Recipe) -> Way:
    """The recipe's own choices."""
    p = recipe.parallel
    return Way(
        schedule=p.schedule,
        stages=p.stages,
        stages_per_rank=p.stages_per_rank,
        data=p.data,
        engram=p.engram,
        mode=p.mode,
        blocks=recipe.recompute.blocks,
        microbatch=recipe.train.microbatch,
        batch=recipe.train.batch,
        balance=p.balance if isinstance(p.balance, tuple) else None,
        split=splits(recipe),
    )


def compare(recipe: Recipe, counted: Counted, hardware: Hardware) -> Compared:
    """Plan the recipe, counted already. Raises what `estimate` raises for the recipe's own schedule."""
    dtype, way = recipe.model.dtype, way_of(recipe)
    chosen = estimate(counted, hardware, way, dtype)
    others: dict[ScheduleName, Estimate | MHCError] = {}
    for name in SCHEDULES:
        try:
            other = with_schedule(way, name, recipe)
            others[name] = chosen if other == way else estimate(counted, hardware, other, dtype)
        except MHCError as error:
            others[name] = error
    nearest = None if chosen.fullest <= hardware.memory else _nearest(counted, hardware, way, recipe)
    return Compared(recipe, counted, hardware, chosen, others, nearest)


def with_schedule(way: Way, name: ScheduleName, recipe: Recipe) -> Way:
    """The same ranks and microbatches under another schedule, with as few stages a rank as it takes."""
    if name == way.schedule:
        return way
    each = 1 if name == "1f1b" else 2
    parallel = replace(recipe.parallel, schedule=name, stages_per_rank=each, balance="model")
    return replace(way, schedule=name, stages_per_rank=each, balance=None, split=_splits(recipe, parallel.mode, name))


def _splits(recipe: Recipe, mode: str, name: str) -> bool:
    return name in ("zbv", "dualpipev") and mode == "replicate" and recipe.model.inner != "eager"


def _nearest(counted: Counted, hardware: Hardware, way: Way, recipe: Recipe) -> Estimate | None:
    """The first way that fits of those with the fewest changes, then the fewest ranks, then the shortest step."""
    tried = 0
    best: Estimate | None = None
    order: tuple[int, int] | None = None
    for candidate in sorted(_candidates(way, recipe, len(counted.works)), key=lambda c: _distance(way, c)):
        at = _distance(way, candidate)
        if tried >= MOST or (order is not None and at > order):
            break
        try:
            stages = cut_stages(counted, hardware, candidate, recipe.model.dtype)
            if least(candidate, stages) > hardware.memory:
                continue  # without simulating it
            tried += 1
            found = estimate(counted, hardware, candidate, recipe.model.dtype)
        except MHCError:
            continue
        if found.fullest <= hardware.memory and (best is None or found.seconds < best.seconds):
            best, order = found, at
    return best


def _candidates(way: Way, recipe: Recipe, sites: int) -> Iterator[Way]:
    times = [2**k for k in range(8) if way.stages * 2**k <= sites]
    for blocks, name, mode, longer, share, wider in product(
        {way.blocks, "auto", "stage"}, SCHEDULES, {way.mode, "fsdp"}, times, (1, 2, 4, 8), (1, 2, 4)
    ):
        made = with_schedule(way, name, recipe)
        made = replace(
            made,
            blocks=blocks,
            mode=mode,
            stages=way.stages * longer,
            data=way.data * wider,
            microbatch=max(1, way.microbatch // share),
            balance=made.balance if longer == 1 else None,
            split=_splits(recipe, mode, name),
        )
        if (mode == "fsdp" and made.replicas == 1) or made.stages * made.stages_per_rank > sites:
            continue
        if way.microbatch % made.microbatch or made.batch % (made.replicas * made.microbatch):
            continue
        yield made


def changes(way: Way, other: Way) -> dict[str, object]:
    """What of a recipe to change to get from one way to another, by the names of its fields."""
    names = {
        "schedule": "parallel.schedule", "stages": "parallel.stages", "stages_per_rank": "parallel.stages_per_rank",
        "data": "parallel.data", "mode": "parallel.mode", "blocks": "recompute.blocks",
        "microbatch": "train.microbatch",
    }  # fmt: skip
    pairs = {text: (getattr(way, field), getattr(other, field)) for field, text in names.items()}
    return {text: after for text, (before, after) in pairs.items() if before != after}


def _distance(way: Way, other: Way) -> tuple[int, int]:
    changed = changes(way, other)
    changed.pop("parallel.stages_per_rank", None)  # goes with the schedule
    return len(changed), other.ranks


def does_not_fit(compared: Compared) -> MHCError:
    """MHC641 with the nearest recipe that fits."""
    chosen, hardware = compared.chosen, compared.hardware
    have, want = hardware.memory / GIB, chosen.fullest / GIB
    detail = f"{want:.4g} GiB on the fullest rank, of {have:.4g} GiB of `{hardware.name}`"
    if compared.nearest is None:
        return MHCError("MHC641", detail)
    changed = changes(chosen.way, compared.nearest.way)
    text = " ".join(f"{name}={value}" for name, value in changed.items())
    return MHCError("MHC641", detail, way_out=f"it fits with {text} ({compared.nearest.way.ranks} ranks)")
