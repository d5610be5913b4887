"""The order of messages and collectives in training: torch's schedules, our actions and what follows a step's passes.

Every rank's order is that of the engine itself, run rank by rank on stages that compute next to nothing, over a process
group that carries nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rendezvous_model import Message, Post, Wait, meets
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.fx import Graph, GraphModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from mhc_compile.passes.stages import COUNTER
from mhc_compile.runtime import launch, optimizer
from mhc_compile.runtime.engine import Engine, _shard
from mhc_compile.runtime.optimizer import RunAdamW
from mhc_compile.runtime.recipe_tables import SCHEDULES, ParallelTable, ScheduleName, TrainTable
from mhc_compile.runtime.schedules import Pipeline

Program = list[Post | Wait]
VOCABULARY = 3


def crossing(index: int) -> tuple[Tensor, ...]:
    """What crosses into the stage with a number: one tensor or two. Of logits there is one."""
    return tuple(torch.empty(1, 1, VOCABULARY + i, device="meta") for i in range(1 + index % 2))


class Place(nn.Module):
    """A stage that scales what it is given; the stages after an odd one are given two tensors."""

    device = torch.device("cpu")

    def __init__(self, index: int, count: int, tied: bool) -> None:
        super().__init__()
        self.index, self.count = index, count
        self.own = nn.ParameterDict({f"weight{index}": torch.ones(2)})
        if tied:
            self.own["tied"] = torch.ones(2)
        self.tied = {"own.tied"} if tied else set()
        self.tables: dict[str, Any] = {}
        self.biases: dict[str, Any] = {}

    @property
    def example_inputs(self) -> tuple[Tensor, ...]:
        ids = (torch.empty(1, 1, dtype=torch.int64, device="meta"),)
        return crossing(self.index) if self.index else ids

    @property
    def example_outputs(self) -> tuple[Tensor, ...]:
        return crossing(self.index + 1) if self.index < self.count - 1 else crossing(0)

    def forward(self, *given: Tensor, **_: Tensor) -> Any:
        scale = torch.stack(list(self.own.values())).sum() * sum(t.sum() for t in given)
        out = tuple(torch.zeros(t.shape) * scale for t in self.example_outputs)
        return out if self.index < self.count - 1 else out[0]

    def dw_builder(self) -> Callable[[], None]:
        return lambda: None

    def take_counted(self) -> dict[str, Tensor]:
        return {}


class Recorder:
    """Stands in for what carries messages, and writes down what this process posts and waits for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.program: Program = []
        for name in ("isend", "irecv"):
            alone = self._alone(name == "isend")
            patch.setattr(dist, name, alone)
            patch.setattr(distributed_c10d, name, alone)  # where a P2POp looks
        patch.setattr(dist, "batch_isend_irecv", self._batch)
        for name in ("all_reduce", "all_gather_single", "reduce_scatter_single", "all_gather_into_tensor",
                     "reduce_scatter_tensor", "broadcast"):  # fmt: skip
            if hasattr(dist, name):
                patch.setattr(dist, name, self._collective(name))
        bucket = self._collective("allreduce_coalesced")
        patch.setattr(dist.ProcessGroup, "allreduce_coalesced", lambda g, ts, _: bucket(*ts, group=g, async_op=True))

    def _work(self, post: Post) -> Any:
        self.program.append(post)
        return SimpleNamespace(wait=lambda *_: self.program.append(Wait(post)))

    def _alone(self, sends: bool) -> Callable[..., Any]:
        def post(
            tensor: Tensor,
            dst: int | None = None,
            src: int | None = None,
            group: Any = None,
            tag: int = 0,
            group_dst: int | None = None,
            group_src: int | None = None,
        ) -> Any:
            peer, place = (dst, group_dst) if sends else (src, group_src)
            if peer is None:
                assert place is not None
                peer = dist.get_global_rank(group, place)
            if not sends:
                tensor.data.fill_(1)  # torch's stages vote, by ones
            return self._work(Post(frozenset({dist.get_rank(), peer}), [Message(sends, peer, tuple(tensor.shape))]))

        return post

    def _batch(self, messages: list[Any]) -> list[Any]:
        channel = tuple(dist.get_process_group_ranks(messages[0].group))
        posted = [Message(m.op is dist.isend, m.peer, tuple(m.tensor.shape)) for m in messages]
        return [self._work(Post(channel, posted))]

    def _collective(self, name: str) -> Callable[..., Any]:
        def post(*tensors: Any, group: Any = None, async_op: bool = False, **more: Any) -> Any:
            ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
            first = next(t for t in (*tensors, *more.values()) if isinstance(t, Tensor))
            work = self._work(Post(ranks, collective=(name, tuple(first.shape), frozenset(ranks))))
            if not async_op:
                work.wait()
            return work if async_op else None

        return post


def order_of(rank: int, table: ParallelTable, microbatches: int, patch: pytest.MonkeyPatch, steps: int = 1) -> Program:
    """What a rank posts and waits for in steps of training."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=table.world)
    try:
        new_group = dist.new_group
        with patch.context() as patched:
            patched.setattr(dist, "new_group", lambda ranks=None, **_: new_group(ranks, backend="fake"))
            watch: Any = SimpleNamespace(beat=lambda: None, over=lambda *_: nullcontext())
            world = launch.world_of(table, rank, torch.device("cpu"), watch)
            made = _engine(world, microbatches)
        with patch.context() as patched:
            recorder = Recorder(patched)
            for step in range(1, steps + 1):
                share = torch.ones(microbatches, 1, dtype=torch.int64)
                made.gradients({"input_ids": share, "labels": share}, step)
                made.optimizer.skip()
        return recorder.program
    finally:
        dist.destroy_process_group()


def _engine(world: Any, microbatches: int) -> Engine:
    """An engine of stages that compute next to nothing; the first and the last hold one parameter, as a tied head."""
    table = world.parallel
    last = table.stage_count - 1
    stages: Any = [Place(i, last + 1, tied=i in (0, last)) for i in table.local_stages(world.pipe)]
    if table.mode == "fsdp":
        for stage in stages:
            stage.units = nn.ModuleList([])
            _shard(stage, world, torch.float32)
    graph = Graph()
    counter = graph.placeholder("load")
    counter.meta = {COUNTER: "router", "example_value": torch.empty(4, device="meta")}
    graph.output((counter,))
    program: Any = SimpleNamespace(graph=GraphModule(nn.Module(), graph), biases={})
    train = TrainTable(steps=2, batch=microbatches, microbatch=1, lr=0.1)
    recipe: Any = SimpleNamespace(train=train, parallel=table)
    pipeline = Pipeline(stages, world, microbatches)
    moving = RunAdamW(stages, {"own.tied": (0, last)}, world, train)
    return Engine(recipe, world, program, (), stages, pipeline, moving)


@pytest.mark.parametrize("ranks", range(2, 9))
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_rank_waits_for_itself(name: ScheduleName, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "BUCKET", 8)
    each = 1 if name == "1f1b" else 2
    table = ParallelTable(stages=ranks, schedule=name, stages_per_rank=each)
    programs = {rank: order_of(rank, table, 2 * ranks, monkeypatch) for rank in range(ranks)}
    assert meets(programs)


@pytest.mark.parametrize("mode", ["replicate", "fsdp"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_replicas_meet(name: ScheduleName, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table = ParallelTable(stages=2, data=2, schedule=name, stages_per_rank=1 if name == "1f1b" else 2, mode=mode)
    programs: Any = {rank: order_of(rank, table, 6, monkeypatch, steps=2) for rank in range(4)}
    assert meets(copy.deepcopy(programs))
    collectives = {e.collective[0] for e in programs[0] if isinstance(e, Post) and e.collective}
    assert "all_reduce" in collectives
    assert ("allreduce_coalesced" in collectives) == (mode == "replicate")
    assert any("reduce_scatter" in name for name in collectives) == (mode == "fsdp")
    # Where messages are posted one by one, the pair must agree on their order.
    posts = [i for i, e in enumerate(programs[0]) if isinstance(e, Post) and len(e.messages) == 1]
    directions = {i: programs[0][i].messages[0].sends for i in posts}
    turned = [i for i in posts if directions.get(i + 1, directions[i]) != directions[i]]
    for i in turned[-1:]:
        programs[0][i : i + 2] = reversed(programs[0][i : i + 2])
        assert not meets(programs)
    assert turned or name == "1f1b"
