"""The loss on held-out data: forward passes alone through the stages that train."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mhc_compile.integrations.transformers import IDS
from mhc_compile.runtime.data.loader import Loader
from mhc_compile.runtime.engine import Engine
from mhc_compile.runtime.schedules import Pipeline, cross_entropy, place_of
from mhc_compile.runtime.stage import Stage


def evaluate(engine: Engine, loader: Loader, batches: int, step: int) -> float:
    """The mean loss over all tokens of the first `batches` batches of `loader`, the same on all ranks. A collective.

    Stages are in eval mode meanwhile; random states stay as they are. Raises MHC605.
    """
    total = torch.zeros((), dtype=torch.float64, device=engine.world.device)
    for stage in engine.stages:
        stage.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(), engine.world.doing("evaluation", step):
            for number in range(batches):
                total += forward_only(engine.pipeline, loader.batch(number))
            dist.all_reduce(total)
    finally:
        engine.reshard()
        for stage in engine.stages:
            stage.train()
    return float(total) / (batches * engine.recipe.train.batch * engine.recipe.data.sequence)


def forward_only(pipeline: Pipeline, batch: dict[str, Tensor]) -> Tensor:
    """The sum of this replica's token losses on the rank with the last stage, 0 on the others; float64.

    All microbatches pass a rank's first stage, then all of them its second one, and so on: every message has been sent
    before a rank waits for a later one.
    """
    device = pipeline.world.device
    cut = {name: t.to(device).tensor_split(pipeline.microbatches) for name, t in batch.items()}
    labels = cut.pop("labels")
    total = torch.zeros((), dtype=torch.float64, device=device)
    kept: dict[int, list[Any]] = {}
    sent: list[dist.Work] = []
    for stage in pipeline.stages:
        last = stage.index == stage.count - 1
        local = last or place_of(pipeline.world.parallel, stage.index + 1) == pipeline.world.pipe
        before = kept.pop(stage.index, None)
        for number in range(pipeline.microbatches):
            inputs = {name: parts[number] for name, parts in cut.items()}
            if stage.index == 0:
                crossing: tuple[Tensor, ...] = (inputs[IDS],)
            else:
                crossing = _received(pipeline, stage) if before is None else before[number]
            with torch.no_grad():  # a graph that runs eagerly switches gradients on behind what it runs without them
                found = stage(*crossing, **inputs)
            out = (found.detach(),) if last else tuple(t.detach() for t in found)
            if last:
                total += cross_entropy(out[0], labels[number]).double()
            elif local:
                kept.setdefault(stage.index + 1, []).append(out)
            else:
                peer = place_of(pipeline.world.parallel, stage.index + 1)
                sent += [_sent(t, peer, pipeline) for t in out]
            pipeline.world.watch.beat()
    for work in sent:
        work.wait()
    return total


def _received(pipeline: Pipeline, stage: Stage) -> tuple[Tensor, ...]:
    peer = place_of(pipeline.world.parallel, stage.index - 1)
    found = tuple(torch.empty_like(t, device=pipeline.world.device, requires_grad=False) for t in stage.example_inputs)
    for t in found:
        dist.recv(t, group=pipeline.world.pipe_group, group_src=peer)
    return found


def _sent(tensor: Tensor, peer: int, pipeline: Pipeline) -> dist.Work:
    work = dist.isend(tensor, group=pipeline.world.pipe_group, group_dst=peer)
    assert work is not None
    return work
