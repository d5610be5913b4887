"""Run a schedule on paper: when every rank computes, waits and sends, and what it holds meanwhile.

A discrete-event simulation over the actions of `runtime.plan.schedules`. A rank performs its actions in order. A
transfer begins when both sides have posted it and the link between the two ranks, one for each direction, is free; it
takes `latency + bytes / bandwidth` and costs no computing.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, get_args

from mhc_compile.runtime.plan.schedules import Pass, Post, Schedule, Transfer, Wait, Work


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one stage costs for one microbatch. Times in seconds, sizes in bytes."""

    forward: float
    input: float
    """Backward: gradients of what came in, recomputation included."""
    weight: float
    """Backward: gradients of parameters."""
    sent: int = 0
    """To the next stage, forward; the gradients that come back are as large."""
    kept: int = 0
    """For the backward pass, from the forward on."""
    deferred: int = 0
    """What the gradients of parameters still need once those of what came in are there."""

    def seconds(self, kind: str) -> float:
        """Return the seconds of one pass."""
        return self.input + self.weight if kind == "backward" else float(getattr(self, kind))


@dataclass(frozen=True, kw_only=True)
class Link:
    """Between two ranks."""

    latency: float = 0.0
    """Seconds."""
    bandwidth: float = float("inf")
    """Bytes a second, each way."""


Links = Callable[[int, int], Link]
"""The link from one rank of a pipeline to another."""


class Timed(NamedTuple):
    """One pass with the rank that ran it, and when, in seconds from the step's beginning."""

    work: Work
    rank: int
    begin: float
    end: float


@dataclass
class Simulated:
    """One step."""

    works: list[Timed]
    ends: list[float]
    """When each rank has done its last action."""
    busy: list[float]
    """Seconds each rank computes."""
    kept: list[int]
    """The most bytes each rank keeps for backward passes at a time."""
    live: list[int]
    """The most microbatches that each stage keeps something of at a time."""
    sent: list[int]
    """Bytes that each rank sends."""
    messages: list[int]
    """In how many transfers."""

    @property
    def seconds(self) -> float:
        """From the first pass to the end of the last, optimizer and reduction of gradients apart."""
        return max(self.ends)

    @property
    def bubbles(self) -> list[float]:
        """The part of the step in which each rank computes nothing."""
        return [1 - busy / self.seconds if self.seconds else 0.0 for busy in self.busy]

    @property
    def bubble(self) -> float:
        """The part of all ranks' time in which nothing is computed."""
        return sum(self.bubbles) / len(self.bubbles)


@dataclass
class _Transfers:
    """What has been posted, and when what both sides have posted arrives."""

    costs: Sequence[StageCost]
    links: Links
    owner: Sequence[int]
    posted: dict[tuple[Transfer, int], float] = field(default_factory=dict)
    arrived: dict[Transfer, float] = field(default_factory=dict)
    queues: dict[tuple[int, int], deque[Transfer]] = field(default_factory=dict)
    free: dict[tuple[int, int], float] = field(default_factory=dict)

    def post(self, transfer: Transfer, rank: int, now: float) -> None:
        """Post that `rank`, one of its two sides, is ready. Transfers from one rank to another arrive in order."""
        self.posted[transfer, rank] = now
        ends = self.owner[transfer.stage], self.owner[transfer.target]
        if rank == ends[0]:
            self.queues.setdefault(ends, deque()).append(transfer)
        queue = self.queues.get(ends, deque())
        while queue and (queue[0], ends[1]) in self.posted:
            first = queue.popleft()
            ready = max(self.posted[first, ends[0]], self.posted[first, ends[1]], self.free.get(ends, 0.0))
            link = self.links(*ends)
            self.arrived[first] = ready + link.latency + self.size(first) / link.bandwidth
            self.free[ends] = self.arrived[first]

    def size(self, transfer: Transfer) -> int:
        """Return the bytes: gradients are as large as the values that they belong to."""
        return self.costs[transfer.target if transfer.backward else transfer.stage].sent


def simulate(schedule: Schedule, costs: Sequence[StageCost], link: Link | Links) -> Simulated:
    """Run one step of `schedule`, whose stages cost `costs`, over one `link` or those of each two ranks.

    A forward and a backward that are one action take as long as one after the other.
    """
    assert len(costs) == len(schedule.owner)
    count = len(schedule.ranks)
    transfers = _Transfers(costs, (lambda *_: link) if isinstance(link, Link) else link, schedule.owner)
    seconds_of = [{kind: cost.seconds(kind) for kind in get_args(Pass)} for cost in costs]
    now, at, busy = [0.0] * count, [0] * count, [0.0] * count
    timed: list[list[Timed]] = [[] for _ in range(count)]
    moving = True
    while moving:
        moving = False
        for rank, actions in enumerate(schedule.ranks):
            while at[rank] < len(actions):
                action = actions[at[rank]]
                if isinstance(action, Wait):
                    if any(t not in transfers.arrived for t in action.transfers):
                        break
                    now[rank] = max(now[rank], *(transfers.arrived[t] for t in action.transfers))
                elif isinstance(action, Post):
                    for t in action.transfers:
                        transfers.post(t, rank, now[rank])
                else:
                    for i, work in enumerate(action.works):
                        seconds = seconds_of[work.stage][work.kind]
                        timed[rank].append(Timed(work, rank, now[rank], now[rank] + seconds))
                        now[rank] += seconds
                        busy[rank] += seconds
                        for t in action.sends if i == 0 else ():
                            transfers.post(t, rank, now[rank])
                at[rank] += 1
                moving = True
    assert at == [len(actions) for actions in schedule.ranks], "ranks wait for one another"
    watched = [_watch(works, costs) for works in timed]
    live = {stage: most for _, by_stage in watched for stage, most in by_stage.items()}
    return Simulated(
        works=sorted((w for works in timed for w in works), key=lambda w: (w.begin, w.rank)),
        ends=now,
        busy=busy,
        kept=[most for most, _ in watched],
        live=[live[s] for s in range(len(costs))],
        sent=[sum(transfers.size(t) for t in transfers.arrived if schedule.owner[t.stage] == r) for r in range(count)],
        messages=[sum(schedule.owner[t.stage] == r for t in transfers.arrived) for r in range(count)],
    )


def _watch(works: Sequence[Timed], costs: Sequence[StageCost]) -> tuple[int, Mapping[int, int]]:
    """Return the most bytes that a rank keeps, and the most microbatches of each of its stages, at a time."""
    kept = most_kept = 0
    live: Counter[int] = Counter()
    most_live: Counter[int] = Counter()
    for work in (timed.work for timed in works):
        cost = costs[work.stage]
        if work.kind == "forward":
            live[work.stage] += 1
            most_live[work.stage] = max(most_live[work.stage], live[work.stage])
            kept += cost.kept
        elif work.kind == "input":  # what the gradients of parameters need is there before the rest is freed
            most_kept = max(most_kept, kept + cost.deferred)
            kept += cost.deferred - cost.kept
        else:
            live[work.stage] -= 1
            kept -= cost.deferred if work.kind == "weight" else cost.kept
        most_kept = max(most_kept, kept)
    return most_kept, most_live
