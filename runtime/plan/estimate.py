"""One way to run a recipe: stages, their times, what every rank holds, and the simulated step.

Times are the rates' bound (`runtime.plan.hardware`); nothing waits for a host, a compiler or a kernel's launch.
What ranks hold follows this package's own runtime:

    weights, gradients    float32, whole on every replica; under FSDP shards, gathered whole while a step runs
    moments               two float32 values a weight, sharded under FSDP
    casts                 weights in the graph's dtype where that is narrower, made once a step
    tables                rows and two moments in float32, spread over parallel.engram
    activations           what the schedule keeps at its fullest: branches, streams in recompute blocks, stage outputs
    transient             a block that is made again, the largest branch's gradients, those of the logits
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from mhc_compile.runtime.plan.count import total
from mhc_compile.runtime.plan.hardware import Hardware
from mhc_compile.runtime.plan.model import Counted
from mhc_compile.runtime.plan.schedules import Schedule, ScheduleName, schedule
from mhc_compile.runtime.plan.simulate import Link, Simulated, StageCost, simulate
from mhc_compile.runtime.schedules import V_SHAPED

FLOAT32 = 4
ROW = 3 * FLOAT32
"""Bytes of one value of a table with its two moments."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """The choices of a recipe that a plan may vary."""

    schedule: ScheduleName
    stages: int
    """Ranks a pipeline."""
    stages_per_rank: int
    data: int
    engram: int
    mode: str
    blocks: str | int
    microbatch: int
    """Sequences."""
    batch: int
    """Sequences a step, over all ranks."""
    balance: tuple[int, ...] | None
    """Sites a stage, where the recipe says them."""
    split: bool
    """Whether backward passes are computed in halves where the schedule has them: not under FSDP."""

    @property
    def replicas(self) -> int:
        """Ranks that hold the same stages."""
        return self.data * self.engram

    @property
    def ranks(self) -> int:
        """Of the run."""
        return self.stages * self.replicas

    @property
    def microbatches(self) -> int:
        """Of every replica in a step."""
        return self.batch // self.replicas // self.microbatch


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
    rows: int
    """Of tables, all shards together."""
    table_values: int
    blocks: tuple[int, ...]
    """Sites of each recompute block; the rest keeps everything."""
    streams_kept: int
    """Bytes of the stream part for one microbatch."""
    branches_kept: int
    """Bytes of branches' own activations for one microbatch."""
    recompute: float
    """Seconds of the backward pass in which streams are made again."""
    casts: int
    """Bytes of weights in the graph's dtype."""
    transient: int
    cost: StageCost


@dataclass(frozen=True)
class RankMemory:
    """What one rank of a pipeline holds at its fullest. Bytes."""

    weights: int
    gradients: int
    moments: int
    casts: int
    tables: int
    activations: int
    transient: int

    @property
    def total(self) -> int:
        """All of it."""
        parts = (self.weights, self.gradients, self.moments, self.casts, self.tables, self.activations, self.transient)
        return sum(parts)


@dataclass(frozen=True)
class Estimate:
    """One way to run a recipe."""

    way: Way
    stages: tuple[StageEstimate, ...]
    memory: tuple[RankMemory, ...]
    """By place in the pipeline."""
    simulated: Simulated
    reduction: float
    """Seconds in which gradients are summed over replicas, behind the last pass."""
    optimizer: float
    """Seconds of the optimizer's step."""
    stream_bytes: int
    """The most that one rank sends to others of its pipeline in a step."""
    residual_bytes: int
    """The same for a residual model: C values a token instead of n*C."""
    table_bytes: int
    """The most that one rank exchanges of rows in a step."""

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.simulated.seconds + self.reduction + self.optimizer

    @property
    def fullest(self) -> int:
        """Bytes of the rank that holds most."""
        return max(m.total for m in self.memory)


def estimate(counted: Counted, hardware: Hardware, way: Way, dtype: str) -> Estimate:
    """What `way` of running the counted model takes on `hardware`.

    The model was counted at one size of microbatch; another scales what is proportional to tokens. Raises MHC642 for
    numbers that the schedule refuses, MHC620 for more stages than sites, MHC626 for a byte budget that nothing fits.
    """
    stages = cut_stages(counted, hardware, way, dtype)
    made = _schedule(way.schedule, way.stages, way.stages_per_rank, way.microbatches)
    link = Link(latency=hardware.latency, bandwidth=hardware.link)
    simulated = simulate(made, [s.cost for s in stages], link)
    scale = way.microbatch * counted.length / counted.tokens
    held, looked = [0] * way.stages, [0.0] * way.stages
    first = 0
    for s in stages:
        held[s.rank] += s.parameters
        looked[s.rank] += _row_bytes(counted, (first, first + s.sites)) * scale
        first += s.sites
    # A sum over a ring moves every value twice, FSDP's gather and scatter one way each.
    share = (way.replicas - 1) / way.replicas
    spared = (counted.streams - 1) * counted.hidden * counted.itemsize * int(counted.tokens * scale)
    return Estimate(
        way=way,
        stages=stages,
        memory=tuple(_memory(way, stages, simulated, rank) for rank in range(way.stages)),
        simulated=simulated,
        reduction=max(held) * FLOAT32 * 2 * share / hardware.link,
        optimizer=max(held) / (way.replicas if way.mode == "fsdp" else 1) * 7 * FLOAT32 / hardware.bandwidth,
        stream_bytes=max(simulated.sent),
        residual_bytes=max(b - spared * n for b, n in zip(simulated.sent, simulated.messages, strict=True)),
        table_bytes=int(max(looked) * 2 * way.microbatches * (way.engram - 1) / way.engram),
    )


def cut_stages(counted: Counted, hardware: Hardware, way: Way, dtype: str) -> tuple[StageEstimate, ...]:
    """The stages of `way`, without simulating it. Raises MHC620 and MHC626."""
    count = way.stages * way.stages_per_rank
    if way.balance is not None and len(way.balance) == count:
        starts = tuple(sum(way.balance[:k]) for k in range(1, count))
    else:
        starts = counted.starts(count)
    crossing, bounds = (*counted.crossing(starts), 0), (0, *starts, len(counted.works))
    scale = way.microbatch * counted.length / counted.tokens
    return tuple(
        _stage(counted, hardware, way, dtype, scale, k, (bounds[k], bounds[k + 1]), _rank_of(way, k), crossing[k])
        for k in range(count)
    )


def least(way: Way, stages: Sequence[StageEstimate]) -> int:
    """Bytes that the fullest rank holds at least: what is no activation, and one microbatch of each of its stages."""
    own = [[s for s in stages if s.rank == rank] for rank in range(way.stages)]
    return max(replace(_standing(way, held), activations=sum(s.cost.kept for s in held)).total for held in own)


def _rank_of(way: Way, stage: int) -> int:
    if way.schedule in V_SHAPED:
        return min(stage, 2 * way.stages - 1 - stage)
    return stage % way.stages


@lru_cache(maxsize=64)
def _schedule(name: ScheduleName, ranks: int, stages_per_rank: int, microbatches: int) -> Schedule:
    return schedule(name, ranks=ranks, stages_per_rank=stages_per_rank, microbatches=microbatches)


def _stage(
    counted: Counted,
    hardware: Hardware,
    way: Way,
    dtype: str,
    scale: float,
    index: int,
    sites: tuple[int, int],
    rank: int,
    sent: int,
) -> StageEstimate:
    works = counted.works[slice(*sites)]
    flops, bandwidth = hardware.rate(dtype), hardware.bandwidth
    blocks = counted.blocks(*sites, way.blocks)
    names = set().union(*counted.names[slice(*sites)])
    values = sum(counted.sizes[name] for name in names)
    cast = sum(counted.sizes[name] for name in names & counted.cast)
    tables = [t for t in counted.tables if sites[0] <= t.site < sites[1]]
    forward = sum(total((*w.branch.forward, w.forward), flops, bandwidth) for w in works)
    backward = sum(total((*w.branch.input, w.backward), flops, bandwidth) for w in works)
    weight = sum(total(w.branch.weight, flops, bandwidth) for w in works)
    again = blocks.extra / bandwidth
    narrow = 2 if dtype == "bfloat16" else FLOAT32
    # A weight is read and its cast written once a step; a gradient is read and added to a float32 one.
    casting = cast * (FLOAT32 + narrow) / bandwidth / way.microbatches
    adding = values * (narrow + 2 * FLOAT32) / bandwidth
    branches = sum(w.branch.kept for w in works)
    deferred = sum(w.branch.deferred for w in works)
    transient = max(w.branch.kept for w in works) + blocks.transient
    exchanged = _row_bytes(counted, sites) * (way.engram - 1) / way.engram / hardware.link
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
        rank=rank,
        first=works[0].name,
        sites=len(works),
        parameters=values,
        rows=sum(t.rows for t in tables),
        table_values=sum(t.rows * t.width for t in tables),
        blocks=tuple(size for sizes in blocks.sizes for size in sizes),
        streams_kept=int(blocks.kept * scale),
        branches_kept=int(branches * scale),
        recompute=again * scale,
        casts=cast * narrow,
        transient=int(transient * scale),
        cost=StageCost(
            forward=(forward + exchanged) * scale + casting,
            input=first if way.split else first + second,
            weight=second if way.split else 0.0,
            sent=int(sent * scale),
            kept=int(kept * scale),
            deferred=int(deferred * scale) if way.split else 0,
        ),
    )


def _memory(way: Way, stages: Sequence[StageEstimate], simulated: Simulated, rank: int) -> RankMemory:
    return replace(_standing(way, [s for s in stages if s.rank == rank]), activations=simulated.held[rank])


def _standing(way: Way, own: Sequence[StageEstimate]) -> RankMemory:
    """All but the activations of a rank that holds the stages `own`."""
    values = sum(s.parameters for s in own)
    tables = sum(s.table_values for s in own)
    sharded = way.mode == "fsdp" and way.replicas > 1
    shard = -(-values // way.replicas) if sharded else 0
    return RankMemory(
        weights=FLOAT32 * (values + shard),
        gradients=FLOAT32 * (values + shard),
        moments=2 * FLOAT32 * (shard if sharded else values),
        casts=sum(s.casts for s in own),
        tables=ROW * -(-tables // way.engram),
        activations=0,
        transient=max(s.transient for s in own),
    )


def _row_bytes(counted: Counted, sites: tuple[int, int]) -> int:
    """Bytes of rows that one microbatch looks up in a stage's tables, in one direction."""
    values = sum(t.width * t.hashes for t in counted.tables if sites[0] <= t.site < sites[1])
    return values * FLOAT32 * counted.tokens
