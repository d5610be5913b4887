"""Run a schedule on paper: when every rank computes, waits and sends, and what it holds meanwhile.

A discrete-event simulation over the actions of `runtime.plan.schedules`. A rank performs its actions in order. A
message begins when one side has sent it, the other receives, and the link between the two ranks, one for each
direction, is free; it takes `latency + bytes / bandwidth` and costs no computing.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, get_args

from mhc_compile.runtime.plan.schedules import Message, Pass, Schedule, Work


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
    """One step. Lists are by rank but for `works` and `live`."""

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
    """How many messages those are."""
    works: list[Timed] = field(default_factory=list)
    """Those of each rank in their order."""

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


def simulate(schedule: Schedule, costs: Sequence[StageCost], link: Link | Links) -> Simulated:
    """Run one step of `schedule`, whose stages cost `costs`, over one `link` or those of each two ranks.

    A forward and a backward that are one action take as long as one after the other.
    """
    owner, count = schedule.owner, len(schedule.ranks)
    between = (lambda *_: link) if isinstance(link, Link) else link
    seconds_of = [{kind: cost.seconds(kind) for kind in get_args(Pass)} for cost in costs]
    done = Simulated([0.0] * count, [0.0] * count, [0] * count, [], [0] * count, [0] * count)
    now = done.ends
    posted: dict[Message, float] = {}
    arrived: dict[Message, float] = {}
    free: defaultdict[tuple[int, int], float] = defaultdict(float)

    def post(message: Message, rank: int) -> None:
        """Say that one side of a message is ready. Those between two ranks are sent and received in one order."""
        if message not in posted:
            posted[message] = now[rank]
            return
        ends = owner[message.source], owner[message.stage]
        size, used = costs[min(message.source, message.stage)].sent, between(*ends)
        begin = max(now[rank], posted[message], free[ends])
        free[ends] = arrived[message] = begin + used.latency + size / used.bandwidth
        done.sent[ends[0]] += size
        done.messages[ends[0]] += 1

    def wait(rank: int, message: Message | None) -> Iterator[None]:
        while message is not None and message not in arrived:
            yield
        now[rank] = max(now[rank], arrived[message] if message is not None else 0.0)

    def run(rank: int) -> Iterator[None]:
        """Perform the actions of a rank, and yield while it waits."""
        before: Work | None = None
        for action in schedule.ranks[rank]:
            if isinstance(action, Message):
                post(action, rank)
                continue
            for work in action:
                yield from wait(rank, _read(work, owner))
            unread = _sent(before, owner) if before is not None and schedule.blocking else None
            if before is not None and before.kind != action[0].kind:
                yield from wait(rank, unread)
            for work in action:
                seconds = seconds_of[work.stage][work.kind]
                done.works.append(Timed(work, rank, now[rank], now[rank] + seconds))
                now[rank] += seconds
                done.busy[rank] += seconds
                yield from wait(rank, unread)
                if (sent := _sent(work, owner)) is not None:
                    post(sent, rank)
            before = action[-1]

    waiting = [run(rank) for rank in range(count)]
    while waiting:
        before = len(done.works) + len(posted)
        waiting = [actions for actions in waiting if not next(actions, True)]
        assert not waiting or before < len(done.works) + len(posted), "ranks wait for one another"
    _watch(done, costs)
    return done


def _crosses(message: Message, owner: Sequence[int]) -> Message | None:
    """Return a message if it goes from one rank to another."""
    ends = message.source, message.stage
    return message if min(ends) >= 0 and max(ends) < len(owner) and owner[ends[0]] != owner[ends[1]] else None


def _read(work: Work, owner: Sequence[int]) -> Message | None:
    """Return what must arrive from another rank before `work` can run."""
    backward = work.kind != "forward"
    return None if work.kind == "weight" else _crosses(Message(backward, work.stage, work.microbatch), owner)


def _sent(work: Work, owner: Sequence[int]) -> Message | None:
    """Return what `work` gives to another rank."""
    backward = work.kind != "forward"
    to = work.stage + (-1 if backward else 1)
    return None if work.kind == "weight" else _crosses(Message(backward, to, work.microbatch), owner)


def _watch(done: Simulated, costs: Sequence[StageCost]) -> None:
    """Find the most bytes that each rank keeps, and the most microbatches of each stage, at a time."""
    kept = [0] * len(done.kept)
    live: Counter[int] = Counter()
    done.live = [0] * len(costs)
    for work, rank, *_ in done.works:
        cost, stage = costs[work.stage], work.stage
        deferred = cost.deferred if work.kind == "input" else 0
        # What the gradients of parameters need is there before the rest is freed.
        done.kept[rank] = max(done.kept[rank], kept[rank] + deferred)
        if work.kind == "forward":
            live[stage] += 1
            kept[rank] += cost.kept
        else:
            live[stage] -= work.kind != "input"
            kept[rank] += deferred - (cost.deferred if work.kind == "weight" else cost.kept)
        done.live[stage] = max(done.live[stage], live[stage])
        done.kept[rank] = max(done.kept[rank], kept[rank])
