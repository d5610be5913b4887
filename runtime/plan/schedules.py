"""What every rank of a pipeline does in a step, in order: taken from torch's own schedule classes.

    1f1b              one stage a rank; a rank waits for its sends and receives together, as `Schedule1F1B` runs
    interleaved1f1b   two or more stages a rank, rank r holding r, r + P, ... (arXiv 2104.04473)
    zbv               two stages a rank in a V; backward passes split into inputs' and weights' (arXiv 2401.10241)
    dualpipev         the same V; a forward and a backward of one rank run as one action (arXiv 2412.19437)

No process group is needed: the classes compute the order of all ranks from the numbers alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from torch.distributed.pipelining.schedules import _add_send_recv

from mhc_compile.runtime.recipe_tables import ScheduleName
from mhc_compile.runtime.schedules import CLASSES

Pass = Literal["forward", "backward", "input", "weight"]
"""`backward` is `input` (gradients of what came in) and `weight` (gradients of parameters) in one."""


class Work(NamedTuple):
    """One pass of one stage over one microbatch."""

    kind: Pass
    stage: int
    microbatch: int


class Transfer(NamedTuple):
    """The streams of one microbatch from `stage` to the next stage, or their gradients to the one before."""

    backward: bool
    stage: int
    microbatch: int

    @property
    def target(self) -> int:
        """The stage that receives it."""
        return self.stage - 1 if self.backward else self.stage + 1


@dataclass(frozen=True)
class Run:
    """Compute; two works are a forward and a backward that may overlap."""

    works: tuple[Work, ...]
    sends: tuple[Transfer, ...] = ()
    """Posted when the first work is done, before the second one is."""


@dataclass(frozen=True)
class Post:
    """Begin sending or receiving, and go on."""

    transfers: tuple[Transfer, ...]


@dataclass(frozen=True)
class Wait:
    """Go on when these have arrived, or have been taken."""

    transfers: tuple[Transfer, ...]


Action = Run | Post | Wait


@dataclass(frozen=True)
class Schedule:
    """The actions of every rank in one step."""

    ranks: tuple[tuple[Action, ...], ...]
    owner: tuple[int, ...]
    """The rank of every stage."""


@lru_cache(maxsize=64)
def schedule(name: ScheduleName, *, ranks: int, stages_per_rank: int, microbatches: int) -> Schedule:
    """Return the schedule called `name` for so many pipeline ranks, stages a rank and microbatches a step.

    Raises ValueError for numbers that torch's class rejects; a `Recipe` has none of them.
    """
    if name == "1f1b":
        lists = [tuple(_one_forward_one_backward(r, ranks, microbatches)) for r in range(ranks)]
        return Schedule(tuple(lists), tuple(range(ranks)))
    count = ranks * stages_per_rank
    # The classes read these numbers of their stages and nothing else until a step runs.
    stage = SimpleNamespace(group_rank=0, group_size=ranks, num_stages=count, submod=None)
    planned: Any = _without_gathers(CLASSES[name])([stage] * stages_per_rank, microbatches)
    owner = tuple(int(planned.stage_index_to_group_rank[s]) for s in range(count))
    lists = [tuple(_with_transfers(planned.pipeline_order_with_comms[r], owner, r)) for r in range(ranks)]
    return Schedule(tuple(lists), owner)


def _without_gathers(schedule: Any) -> Any:
    """Return torch's class without the search for what FSDP gathers ahead, which takes most of the time."""

    def prepare(self: Any, actions: dict[int, list[Any]], format: str = "compute_only") -> None:  # noqa: ARG001
        self._validate_and_set_stage_mapping(actions)
        passes = {rank: [a for a in mine if a is not None] for rank, mine in actions.items()}
        rank_of = self.stage_index_to_group_rank.__getitem__
        self.pipeline_order_with_comms = _add_send_recv(passes, rank_of, self._num_stages)

    return type(schedule.__name__, (schedule,), {"_prepare_schedule_with_comms": prepare})


def _one_forward_one_backward(rank: int, ranks: int, microbatches: int) -> Iterator[Action]:
    """Yield what `Schedule1F1B` does step by step, its waits included."""

    def forward(m: int) -> Run:
        return Run((Work("forward", rank, m),))

    def backward(m: int) -> Run:
        return Run((Work("backward", rank, m),))

    def moved(gradients: bool, stage: int, m: int) -> tuple[Transfer, ...]:
        inside = 0 < stage < ranks if gradients else 0 <= stage < ranks - 1
        return (Transfer(gradients, stage, m),) if inside else ()

    def exchange(*transfers: tuple[Transfer, ...]) -> Iterator[Action]:
        if together := tuple(t for some in transfers for t in some):
            yield Post(together)
            yield Wait(together)

    ahead = min(microbatches, ranks - rank)
    sent: tuple[Transfer, ...] = ()
    for m in range(ahead):
        yield from exchange(moved(False, rank - 1, m))
        yield forward(m)
        if sent:
            yield Wait(sent)
        sent = moved(False, rank, m)
        if m < ahead - 1 and sent:
            yield Post(sent)
    for m in range(microbatches):
        done = ahead + m
        if done <= microbatches:  # the last forward's result and the first gradient travel together
            yield from exchange(moved(False, rank, done - 1), moved(True, rank + 1, m))
        else:
            yield from exchange(moved(True, rank + 1, m))
        yield backward(m)
        gradient = moved(True, rank, m)
        if done < microbatches:
            yield from exchange(gradient, moved(False, rank - 1, done))
            yield forward(done)
        elif gradient:
            if done > microbatches:
                yield Wait(moved(True, rank, m - 1))
            yield Post(gradient)
    if last := moved(True, rank, microbatches - 1):
        yield Wait(last)


_PASSES: dict[str, Pass] = {"F": "forward", "B": "backward", "I": "input", "W": "weight"}


def _with_transfers(actions: Sequence[Any], owner: Sequence[int], rank: int) -> Iterator[Action]:
    """Yield torch's actions with communication, as `mhc_compile.runtime.overlap` performs them.

    A pass waits for its own inputs alone; the result of a forward that runs with a backward is sent at once.
    """
    sent: list[Transfer] = []
    early: set[Transfer] = set()
    for action in actions:
        name = action.computation_type.value
        if name in ("UNSHARD", "RESHARD", "REDUCE_GRAD") or name.startswith("WAIT_"):
            continue  # what FSDP gathers and reduces is counted for the whole step; torch 2.15 waits for sends earlier
        if name.startswith(("SEND", "RECV")):
            gradients = name.endswith("_B")
            source = action.stage_index
            if name.startswith("RECV"):
                source += 1 if gradients else -1
            transfer = Transfer(gradients, source, action.microbatch_index)
            if name.startswith("SEND"):
                sent.append(transfer)
            if transfer not in early or name.startswith("RECV"):
                yield Post((transfer,))
            continue
        parts = action.sub_actions if name == "OVERLAP_F_B" else (action,)
        works = tuple(Work(_PASSES[a.computation_type.value], a.stage_index, a.microbatch_index) for a in parts)
        if needed := tuple(t for w in works if (t := needs(w, owner, rank)) is not None):
            yield Wait(needed)
        sends: tuple[Transfer, ...] = ()
        stage = works[0].stage
        if len(works) > 1 and stage + 1 < len(owner) and owner[stage + 1] != rank:
            sends = (Transfer(False, stage, works[0].microbatch),)
            early.update(sends)
        yield Run(works, sends)
    if sent:
        yield Wait(tuple(sent))


def needs(work: Work, owner: Sequence[int], rank: int) -> Transfer | None:
    """Return what must arrive from another rank before `work` can run on `rank`."""
    if work.kind == "weight":
        return None
    backward = work.kind != "forward"
    source = work.stage + (1 if backward else -1)
    if not 0 <= source < len(owner) or owner[source] == rank:
        return None
    return Transfer(backward, source, work.microbatch)
