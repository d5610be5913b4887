"""What every rank of a pipeline does in a step, in order: taken from torch's own schedule classes.

    1f1b              one stage a rank; a rank waits for what it has sent, as `Schedule1F1B` does
    interleaved1f1b   two or more stages a rank, rank r holding r, r + P, ... (arXiv 2104.04473)
    zbv               two stages a rank in a V; backward passes split into inputs' and weights' (arXiv 2401.10241)
    dualpipev         the same V; a forward and a backward of one rank run as one action (arXiv 2412.19437)

No process group is needed: the classes compute the order of all ranks from the numbers alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from torch.distributed.pipelining.schedules import FORWARD, FULL_BACKWARD, _Action, _add_send_recv

from mhc_compile.runtime.recipe_tables import ScheduleName
from mhc_compile.runtime.schedules import CLASSES

Pass = Literal["forward", "backward", "input", "weight"]
"""`backward` is `input` (gradients of what came in) and `weight` (gradients of parameters) in one."""
_PASSES: dict[str, Pass] = {"F": "forward", "B": "backward", "I": "input", "W": "weight"}


class Work(NamedTuple):
    """One pass of one stage over one microbatch."""

    kind: Pass
    stage: int
    microbatch: int


Run = tuple[Work, ...]
"""Passes that begin together, when all has arrived that they read: one, or a forward and a backward."""


class Message(NamedTuple):
    """What a pass of `stage` reads of a neighbouring stage. As an action: begin to receive it, and go on."""

    backward: bool
    """Gradients from the stage after it, not streams from the one before."""
    stage: int
    microbatch: int

    @property
    def source(self) -> int:
        """The stage that sends it."""
        return self.stage + 1 if self.backward else self.stage - 1


@dataclass(frozen=True)
class Schedule:
    """The actions of every rank in one step. What a pass computes is sent to another rank at once."""

    ranks: tuple[tuple[Run | Message, ...], ...]
    owner: tuple[int, ...]
    """The rank of every stage."""
    blocking: bool
    """Whether a rank waits for what it has sent, before a pass of the other kind and before it sends again."""


@lru_cache(maxsize=64)
def schedule(name: ScheduleName, *, ranks: int, stages_per_rank: int, microbatches: int) -> Schedule:
    """Return the schedule called `name` for so many pipeline ranks, stages a rank and microbatches a step.

    Raises ValueError for numbers that torch's class rejects; a `Recipe` has none of them.
    """
    if name == "1f1b":  # for which torch has no such list
        owner = tuple(range(ranks))
        order = {rank: _one_forward_one_backward(rank, ranks, microbatches) for rank in owner}
    else:
        # The classes read these numbers of their stages and nothing else until a step runs.
        stage = SimpleNamespace(group_rank=0, group_size=ranks, num_stages=ranks * stages_per_rank, submod=None)
        planned = _without_messages(CLASSES[name])([stage] * stages_per_rank, microbatches)
        owner = tuple(int(planned.stage_index_to_group_rank[s]) for s in range(stage.num_stages))
        order = {rank: [a for a in actions if a is not None] for rank, actions in planned.pipeline_order.items()}
    with_messages: Mapping[int, Sequence[Any]] = _add_send_recv(order, owner.__getitem__, len(owner))
    return Schedule(tuple(tuple(_actions(with_messages[r])) for r in range(ranks)), owner, name == "1f1b")


def _without_messages(schedule: Any) -> Any:
    """Return torch's class without the search for what FSDP gathers ahead, which takes most of the time."""

    def prepare(self: Any, actions: Any, format: str = "compute_only") -> None:  # noqa: ARG001
        self._validate_and_set_stage_mapping(actions)

    return type(schedule.__name__, (schedule,), {"_prepare_schedule_with_comms": prepare})


def _one_forward_one_backward(rank: int, ranks: int, microbatches: int) -> list[_Action]:
    """Return the order in which `Schedule1F1B` runs passes."""
    forwards = [_Action(rank, FORWARD, m) for m in range(microbatches)]
    ahead = min(microbatches, ranks - rank)
    order = forwards[:ahead]
    for m in range(microbatches):
        order += [_Action(rank, FULL_BACKWARD, m), *forwards[ahead + m : ahead + m + 1]]
    return order


def _actions(actions: Sequence[Any]) -> Iterator[Run | Message]:
    """Yield passes and receives. What FSDP gathers and reduces is counted for the whole step."""
    for action in actions:
        kind, parts = action.computation_type.value, action.sub_actions or (action,)
        if kind in ("RECV_F", "RECV_B"):
            yield Message(kind == "RECV_B", action.stage_index, action.microbatch_index)
        elif parts[0].computation_type.value in _PASSES:
            yield tuple(Work(_PASSES[a.computation_type.value], a.stage_index, a.microbatch_index) for a in parts)
