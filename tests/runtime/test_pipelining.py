"""Forward passes alone: every value arrives, and no order of messages that waits for itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mhc_compile.runtime import pipelining
from mhc_compile.runtime.recipe_tables import SCHEDULES, ParallelTable, ScheduleName


@dataclass
class Place:
    """What `forward_passes` asks of a stage."""

    index: int
    device = torch.device("cpu")

    @property
    def example_inputs(self) -> tuple[Tensor, ...]:
        return (torch.empty(1, device="meta"), torch.empty(2, device="meta"))[: 1 + self.index % 2]


@dataclass
class Message:
    sends: bool
    peer: int
    tensor: Tensor


def batches_of(
    table: ParallelTable, rank: int, microbatches: int, monkeypatch: pytest.MonkeyPatch
) -> list[list[Message]]:
    """The batches that a rank posts, in order; messages are not carried."""
    posted: list[list[Message]] = []

    def post(messages: list[Message]) -> list[Any]:
        posted.append(messages)
        return []

    def run(stage: Place, crossing: tuple[Tensor, ...], number: int) -> tuple[Tensor, ...]:
        assert len(crossing) == (len(stage.example_inputs) if stage.index else 0)
        return tuple(torch.zeros(t.shape) for t in Place(stage.index + 1).example_inputs)

    monkeypatch.setattr(dist, "get_rank", lambda _: rank)
    monkeypatch.setattr(dist, "P2POp", lambda op, t, *, group_peer, **_: Message(op is dist.isend, group_peer, t))
    monkeypatch.setattr(dist, "batch_isend_irecv", post)
    places = [table.place_of(stage) for stage in range(table.stage_count)]
    stages: Any = [Place(index) for index in table.local_stages(rank)]
    pipelining.forward_passes(stages, places, object(), microbatches, run)  # type: ignore[arg-type]
    return posted


def meets(programs: dict[int, list[list[Message]]]) -> bool:
    """Whether all batches end where a send is over when it is received, and messages of a pair keep their order.

    A batch ends when every message of it has met its partner in the batch that the peer is in.
    """
    at: Counter[int] = Counter()
    open_: dict[int, list[Message]] = {}
    while True:
        for rank, batches in programs.items():
            if rank not in open_ and at[rank] < len(batches):
                open_[rank] = list(batches[at[rank]])
        moved = False
        for rank, messages in open_.items():
            for message in list(messages):
                there = open_.get(message.peer, [])
                partners = [m for m in there if m.peer == rank and m.sends != message.sends]
                if message.sends and partners:
                    first = next(m for m in messages if m.sends and m.peer == message.peer)
                    assert first.tensor.shape == partners[0].tensor.shape
                    messages.remove(first)
                    there.remove(partners[0])
                    moved = True
        for rank in [r for r, messages in open_.items() if not messages]:
            del open_[rank]
            at[rank] += 1
            moved = True
        if not moved:
            return all(at[rank] == len(batches) for rank, batches in programs.items())


@pytest.mark.parametrize("ranks", range(2, 9))
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_rank_waits_for_itself(name: ScheduleName, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    each = 1 if name == "1f1b" else 2
    for stages_per_rank in (each, 3) if name == "interleaved1f1b" else (each,):
        table = ParallelTable(stages=ranks, schedule=name, stages_per_rank=stages_per_rank)
        for microbatches in (1, 2, 5):
            programs = {rank: batches_of(table, rank, microbatches, monkeypatch) for rank in range(ranks)}
            assert meets(programs)


def test_an_order_that_waits_for_itself_is_found() -> None:
    """Two ranks that both send before they receive; and what the passes of two interleaved ranks did before."""
    x = torch.zeros(1)
    send, take = (lambda peer: [Message(True, peer, x)]), (lambda peer: [Message(False, peer, x)])
    assert not meets({0: [send(1), take(1)], 1: [send(0), take(0)]})
    assert not meets({0: [send(1), send(1), take(1), take(1)], 1: [take(0), send(0), take(0), send(0)]})
    assert meets({0: [send(1), take(1)], 1: [take(0), send(0)]})
