"""The loss on held-out data: forward passes alone through the stages that train."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from mhc_compile.integrations.transformers import IDS
from mhc_compile.runtime.data.loader import Loader
from mhc_compile.runtime.engine import Engine
from mhc_compile.runtime.pipelining import forward_passes
from mhc_compile.runtime.schedules import TARGETS, Pipeline, target_of, token_losses
from mhc_compile.runtime.stage import Stage


def evaluate(engine: Engine, loader: Loader, batches: int, step: int) -> float:
    """Return the mean loss over all tokens of the first `batches` batches of `loader`, the same on all ranks.

    With `[diffusion]` it is the loss of masked tokens, with the same masks in every evaluation.

    A collective. Stages are in eval mode meanwhile; random states stay as they are. Raises MHC605.
    """
    device = engine.world.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    forked = [device] if device.type == "cuda" else []  # the state of every other GPU is none of this rank's
    for stage in engine.stages:
        stage.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=forked), engine.world.doing("evaluation", step):
            for number in range(batches):
                for batch in engine.inputs(loader.batch(number), number, evaluates=True):
                    total += _forward(engine.pipeline, batch)
            dist.all_reduce(total)
    finally:
        engine.reshard()
        for stage in engine.stages:
            stage.train()
    return float(total) / (batches * engine.recipe.train.batch * engine.recipe.data.sequence)


def _forward(pipeline: Pipeline, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of this replica's token losses on the rank with the last stage, 0 on the others; float64."""
    world = pipeline.world
    given = {name: t.to(world.device) for name, t in batch.items() if name not in TARGETS}
    microbatches = {name: t.tensor_split(pipeline.microbatches) for name, t in given.items()}
    targets = target_of(batch).to(world.device).tensor_split(pipeline.microbatches)
    total = torch.zeros((), dtype=torch.float64, device=world.device)

    def run(stage: Stage, crossing: tuple[Tensor, ...], number: int) -> tuple[Tensor, ...]:
        inputs = {name: parts[number] for name, parts in microbatches.items()}
        with torch.no_grad():  # a graph that runs eagerly leaves gradients on after what it runs without them
            out = stage(*(crossing if stage.index else (inputs[IDS],)), **inputs)
        world.watch.beat()
        if stage.index < stage.count - 1:
            return tuple(t.detach() for t in out)
        logits = out[0] if isinstance(out, tuple) else out  # without an auxiliary loss
        total.add_(token_losses(logits.detach(), targets[number]))
        return ()

    places = [world.parallel.place_of(index) for index in range(world.parallel.stage_count)]
    forward_passes(pipeline.stages, places, world.pipe_group, pipeline.microbatches, run)
    return total
