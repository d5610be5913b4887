"""What a recipe takes: its stages, their times, the memory of every rank, and the simulated step.

Times are the rates' bound (`runtime.plan.hardware`); nothing waits for a host, a compiler or a kernel's launch.
What ranks hold follows this package's own runtime:

    weights, gradients    float32, whole on every replica; under FSDP shards, and whole ones while a step runs, of which
                          weights have the graph's dtype
    moments               two float32 values a weight, sharded under FSDP
    casts                 of whole replicas weights in the graph's dtype where that is narrower, cast once a step
    buffers               what FSDP gathers into and reduces from: the two largest units' values in float32
    tables                rows and two moments in float32, spread over parallel.engram
    activations           what the schedule keeps at its fullest: branches, streams in recompute blocks, stage outputs
    transient             a block that is recomputed, the largest branch's gradients, those of the logits
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache
from itertools import accumulate, pairwise

from mhc_compile.kernels.memory.engram import layers_of
from mhc_compile.runtime.engine import splits
from mhc_compile.runtime.plan.count import total
from mhc_compile.runtime.plan.hardware import Hardware
from mhc_compile.runtime.plan.model import Counted, Table
from mhc_compile.runtime.plan.schedules import schedule
from mhc_compile.runtime.plan.simulate import Link, Simulated, StageCost, simulate
from mhc_compile.runtime.recipe import Recipe
from mhc_compile.runtime.recipe_tables import ParallelTable

FLOAT32 = 4
ROW = 3 * FLOAT32
"""Bytes of one value of a table with its two moments."""


@dataclass(frozen=True)
class StageEstimate:
    """One stage."""

    index: int
    rank: int
    """Its place in the pipeline."""
    first: str
    """The name of its first site."""
    sites: int
    parameters: int
    tables: tuple[Table, ...]
    """All shards together; several stages may hold one."""
    blocks: tuple[int, ...]
    """Sites of each recompute block; the rest keeps everything."""
    streams_kept: int
    """Bytes of the stream part for one microbatch."""
    branches_kept: int
    """Bytes of branches' own activations for one microbatch."""
    recompute: float
    """Seconds of the backward pass in which streams are recomputed."""
    casts: int
    """Bytes of weights in the graph's dtype."""
    transient: int
    units: int
    """Parameters of its two largest recompute blocks, or layers: FSDP exchanges one while it still holds another."""
    flops: float
    """Operations of one microbatch's passes, without recomputation."""
    cost: StageCost


@dataclass(frozen=True)
class RankMemory:
    """The memory of one rank of a pipeline at its peak, in bytes."""

    weights: int
    gradients: int
    moments: int
    casts: int
    buffers: int
    tables: int
    activations: int
    transient: int

    @property
    def total(self) -> int:
        """All of it: buffers are needed before the first pass and after the last one, when nothing is kept."""
        passes = self.activations + self.transient
        return sum(astuple(self)) - min(passes, self.buffers)


@dataclass(frozen=True)
class Estimate:
    """What a recipe takes."""

    recipe: Recipe
    stages: tuple[StageEstimate, ...]
    memory: tuple[RankMemory, ...]
    """By place in the pipeline."""
    simulated: Simulated
    reduction: float
    """Seconds in which gradients are summed over replicas, after the last pass."""
    optimizer: float
    """Seconds of the optimizer's step."""
    stream_bytes: int
    """The most that one rank sends to others of its pipeline in a step."""
    residual_bytes: int
    """The same for a residual model: C values per token instead of n*C."""
    table_bytes: int
    """The most that one rank exchanges of rows in a step."""
    mfu: float
    """The operations of the passes, without recomputation, over those that the devices could do in a step."""

    @property
    def limit(self) -> int:
        """The rank of a pipeline that computes longest, for which the others wait."""
        return self.simulated.busy.index(max(self.simulated.busy))

    @property
    def host(self) -> int:
        """The most bytes of host memory that one rank's copies for a checkpoint take; 0 where saves are synchronous."""
        replicas = self.recipe.parallel.replicas  # what several hold one of them copies
        parameters = [sum(s.parameters for s in self.stages if s.rank == r) for r in range(len(self.memory))]
        copies = [3 * FLOAT32 * -(-n // replicas) + m.tables for n, m in zip(parameters, self.memory, strict=True)]
        return max(copies) if self.recipe.checkpoint.asynchronous else 0

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.simulated.seconds + self.reduction + self.optimizer

    @property
    def fullest(self) -> int:
        """Bytes of the rank that holds most."""
        return max(m.total for m in self.memory)


def estimate(counted: Counted, hardware: Hardware, recipe: Recipe) -> Estimate:
    """Return what `recipe` takes on `hardware`; the model was counted already.

    It may have been counted for another size of microbatch, which scales what is proportional to tokens. Raises MHC620
    for more stages than sites, MHC626 for a byte budget that nothing fits.
    """
    p = recipe.parallel
    stages = cut_stages(counted, hardware, recipe)
    planned = schedule(p.schedule, ranks=p.stages, stages_per_rank=p.stages_per_rank, microbatches=recipe.microbatches)
    links = cache(lambda a, b: Link(latency=hardware.latency, bandwidth=hardware.between(a, b, p.replicas)))
    simulated = simulate(planned, [s.cost for s in stages], links)
    scale = _scale(counted, recipe)
    parameters, row_bytes = [0] * p.stages, [0.0] * p.stages
    first = 0
    for s in stages:
        parameters[s.rank] += s.parameters
        row_bytes[s.rank] += _row_bytes(counted, (first, first + s.sites)) * scale
        first += s.sites
    # A sum over a ring moves every value twice, FSDP's gather and scatter one way each.
    share = (p.replicas - 1) / p.replicas
    spared = (counted.streams - 1) * counted.hidden * counted.itemsize * int(counted.tokens * scale)
    updated = max(parameters) / (p.replicas if p.mode == "fsdp" else 1)
    there_and_back = FLOAT32 + (2 if p.mode == "fsdp" and recipe.model.dtype == "bfloat16" else FLOAT32)
    reduction = max(
        count * there_and_back * share / hardware.among(rank * p.replicas, p.replicas)
        for rank, count in enumerate(parameters)
    )
    optimizer = updated * 7 * FLOAT32 / hardware.bandwidth
    rate = hardware.rate(recipe.model.dtype) * p.stages
    flops = recipe.microbatches * sum(s.flops for s in stages)
    return Estimate(
        recipe=recipe,
        stages=stages,
        memory=tuple(
            replace(_without_activations(p, [s for s in stages if s.rank == rank]), activations=simulated.kept[rank])
            for rank in range(p.stages)
        ),
        simulated=simulated,
        reduction=reduction,
        optimizer=optimizer,
        mfu=flops / rate / (simulated.seconds + reduction + optimizer),
        stream_bytes=max(simulated.sent),
        residual_bytes=max(b - spared * n for b, n in zip(simulated.sent, simulated.messages, strict=True)),
        table_bytes=int(max(row_bytes) * 2 * recipe.microbatches * (p.engram - 1) / p.engram),
    )


def cut_stages(counted: Counted, hardware: Hardware, recipe: Recipe) -> tuple[StageEstimate, ...]:
    """Return the stages of `recipe`, without simulating it. Raises MHC620 and MHC626."""
    p = recipe.parallel
    if isinstance(p.balance, tuple):
        starts = tuple(accumulate(p.balance[:-1]))
    else:
        starts = counted.starts(p.stage_count)
    crossing, bounds = (*(counted.crossing[s - 1] for s in starts), 0), (0, *starts, len(counted.works))
    return tuple(
        _stage(counted, hardware, recipe, k, (bounds[k], bounds[k + 1]), crossing[k]) for k in range(p.stage_count)
    )


def least(recipe: Recipe, stages: Sequence[StageEstimate]) -> int:
    """Return the least bytes of the fullest rank: what is no activation, and one microbatch of each of its stages."""
    p = recipe.parallel
    by_rank = [[s for s in stages if s.rank == rank] for rank in range(p.stages)]
    return max(_without_activations(p, some).total + sum(s.cost.kept for s in some) for some in by_rank)


def _scale(counted: Counted, recipe: Recipe) -> float:
    """Return the tokens of the recipe's microbatch over those of the one that was counted."""
    return recipe.train.microbatch * counted.length / counted.tokens


def _stage(
    counted: Counted, hardware: Hardware, recipe: Recipe, index: int, sites: tuple[int, int], sent: int
) -> StageEstimate:
    parallel, scale, split = recipe.parallel, _scale(counted, recipe), splits(recipe)
    works = counted.works[slice(*sites)]
    flops, bandwidth = hardware.rate(recipe.model.dtype), hardware.bandwidth
    blocks = counted.blocks(*sites, recipe.recompute.blocks)
    names = set().union(*counted.names[slice(*sites)])
    sizes = [size for run in blocks.sizes for size in run]
    values = sum(counted.sizes[name] for name in names)
    cast = sum(counted.sizes[name] for name in names & counted.cast)
    forward = sum(total((*w.branch.forward, w.forward), flops, bandwidth) for w in works)
    backward = sum(total((*w.branch.input, w.backward), flops, bandwidth) for w in works)
    weight = sum(total(w.branch.weight, flops, bandwidth) for w in works)
    again = blocks.extra / bandwidth
    narrow = 2 if recipe.model.dtype == "bfloat16" else FLOAT32
    # A weight is read and its cast written once a step; a gradient is read and added to a float32 one.
    casting = cast * (FLOAT32 + narrow) / bandwidth / recipe.microbatches
    adding = values * (narrow + 2 * FLOAT32) / bandwidth
    branches = sum(w.branch.kept for w in works)
    deferred = sum(w.branch.deferred for w in works)
    transient = max(w.branch.kept for w in works) + blocks.transient
    rows_by = hardware.link if hardware.node % parallel.engram == 0 else hardware.network
    exchanged = _row_bytes(counted, sites) * (parallel.engram - 1) / parallel.engram / rows_by
    kept = branches + blocks.kept + sent
    if sites[1] == len(counted.works):  # the loss, in float32 outside the graph: logits, their logarithms, gradients
        logits, logit_bytes = counted.logits
        forward += (logit_bytes + 4 * FLOAT32 * logits) / bandwidth
        backward += (logit_bytes + 4 * FLOAT32 * logits) / bandwidth
        kept += logit_bytes + FLOAT32 * logits
        transient += 2 * FLOAT32 * logits
    first, second = (backward + again + exchanged) * scale, weight * scale + adding
    return StageEstimate(
        index=index,
        rank=parallel.place_of(index),
        first=works[0].name,
        sites=len(works),
        parameters=values,
        tables=tuple(t for t in counted.tables if t.look_ups(sites)),
        blocks=tuple(sizes),
        streams_kept=int(blocks.kept * scale),
        branches_kept=int(branches * scale),
        recompute=again * scale,
        casts=cast * narrow,
        transient=int(transient * scale),
        units=_largest_units(counted, sites, sizes),
        flops=sum(o.flops for w in works for o in w.operations) * scale,
        cost=StageCost(
            forward=(forward + exchanged) * scale + casting,
            input=first if split else first + second,
            weight=second if split else 0.0,
            sent=int(sent * scale),
            kept=int(kept * scale),
            deferred=int(deferred * scale) if split else 0,
        ),
    )


def _without_activations(parallel: ParallelTable, stages: Sequence[StageEstimate]) -> RankMemory:
    """Return the memory of a rank with these stages, without activations."""
    values = sum(s.parameters for s in stages)
    tables = {t.name: t.rows * t.width for s in stages for t in s.tables}
    sharded = parallel.mode == "fsdp" and parallel.replicas > 1
    shard = -(-values // parallel.replicas) if sharded else 0
    casts = sum(s.casts for s in stages)  # 2 bytes a value: what one spares that is gathered in 2 bytes, not in 4
    return RankMemory(
        weights=FLOAT32 * (values + shard) - (casts if sharded else 0),  # gathered as the graph takes them
        gradients=FLOAT32 * (values + shard),
        moments=2 * FLOAT32 * (shard if sharded else values),
        casts=0 if sharded else casts,
        buffers=_buffers(parallel, stages),
        tables=ROW * -(-sum(tables.values()) // parallel.engram),
        activations=0,
        transient=max(s.transient for s in stages),
    )


def _buffers(parallel: ParallelTable, stages: Sequence[StageEstimate]) -> int:
    """Return the bytes in which weights are gathered and gradients are reduced."""
    sharded = parallel.replicas > 1 and parallel.mode == "fsdp"
    return FLOAT32 * max(s.units for s in stages) if sharded else 0


def _largest_units(counted: Counted, sites: tuple[int, int], blocks: Sequence[int]) -> int:
    """Return the parameters of a stage's two largest blocks, or where it recomputes nothing, of its layers."""
    names = [counted.works[i].name for i in range(*sites)]
    first = set(layers_of(names).values())
    begins = accumulate(blocks) if blocks else (i for i, name in enumerate(names) if name in first)
    bounds = dict.fromkeys((0, *begins, len(names)))
    units = [set().union(*counted.names[sites[0] + a : sites[0] + b]) for a, b in pairwise(bounds)]
    return sum(sorted(sum(counted.sizes[name] for name in unit) for unit in units)[-2:])


def _row_bytes(counted: Counted, sites: tuple[int, int]) -> int:
    """Return the bytes of rows that one microbatch looks up in a stage's tables, in one direction."""
    values = sum(t.width * t.reads * t.look_ups(sites) for t in counted.tables)
    return values * FLOAT32 * counted.tokens
