"""Forward passes alone: every value arrives, and no order of messages that waits for itself."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rendezvous_model import Message, Post, Wait, meets
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


def message(sends: bool, peer: int, tensor: Tensor) -> Message:
    return Message(sends, peer, tuple(tensor.shape))


def batches_of(
    table: ParallelTable, rank: int, microbatches: int, monkeypatch: pytest.MonkeyPatch
) -> list[Post | Wait]:
    """The batches that a rank posts and waits for, in order; messages are not carried."""
    posted: list[Post | Wait] = []

    def post(messages: list[Message]) -> list[Any]:
        posted.append(batch := Post("all", messages))
        return [SimpleNamespace(wait=lambda: posted.append(Wait(batch)))]

    def run(stage: Place, crossing: tuple[Tensor, ...], number: int) -> tuple[Tensor, ...]:
        assert len(crossing) == (len(stage.example_inputs) if stage.index else 0)
        return tuple(torch.zeros(t.shape) for t in Place(stage.index + 1).example_inputs)

    monkeypatch.setattr(dist, "get_rank", lambda _: rank)
    monkeypatch.setattr(dist, "P2POp", lambda op, t, *, group_peer, **_: message(op is dist.isend, group_peer, t))
    monkeypatch.setattr(dist, "batch_isend_irecv", post)
    places = [table.place_of(stage) for stage in range(table.stage_count)]
    stages: Any = [Place(index) for index in table.local_stages(rank)]
    pipelining.forward_passes(stages, places, object(), microbatches, run)  # type: ignore[arg-type]
    return posted


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

    def met(*orders: tuple[bool, ...]) -> bool:
        posts = {rank: [Post("all", [Message(sends, 1 - rank, (1,))]) for sends in orders[rank]] for rank in (0, 1)}
        return meets({rank: list(order) for rank, order in posts.items()})

    send, take = True, False
    assert not met((send, take), (send, take))
    assert not met((send, send, take, take), (take, send, take, send))
    assert met((send, take), (take, send))
