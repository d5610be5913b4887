"""What one of two ranks does in the tests of overlapping: a V-shaped schedule over its two stages of four."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from pipelines import gradients, ids, loss_of, program_of, stages_of, tiny
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, ScheduleDualPipeV, ScheduleZBVZeroBubble

from mhc_compile.config import Options
from mhc_compile.runtime import overlap
from mhc_compile.runtime.stage import Stage

STARTS, MICROBATCHES = [1, 2, 3], 6
SCHEDULES: dict[str, Any] = {"dualpipev": ScheduleDualPipeV, "zbv": ScheduleZBVZeroBubble}
OPTIONS = Options(inner="aot_eager", kernels="none", recompute="stage")


class LocalStage(PipelineStage):
    """Also under torch 2.11, which sends a rank's own neighbours greetings that gloo refuses."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


def scheduled(name: str, stages: list[Stage]) -> Any:
    """The schedule over this rank's stages."""
    made = [
        LocalStage(
            s, s.index, s.count, torch.device("cpu"),
            input_args=tuple(_learning(t) for t in s.example_inputs),
            output_args=tuple(_learning(t) for t in s.example_outputs),
            dw_builder=s.dw_builder,
        )
        for s in stages
    ]  # fmt: skip
    return SCHEDULES[name](made, MICROBATCHES, loss_fn=loss_of, scale_grads=False)


def _learning(example: Tensor) -> Tensor:
    return example.requires_grad_(example.is_floating_point())


def step(schedule: Any, tokens: Tensor) -> list[Tensor]:
    """One step; the losses of the microbatches on the rank with the last stage."""
    losses: list[Tensor] = []
    if dist.get_rank() == 0:
        schedule.step(tokens, target=tokens, losses=losses, return_outputs=False, input_ids=tokens)
    else:
        schedule.step(return_outputs=False, input_ids=tokens)
    return [t.detach() for t in losses]


def train(folder: Path) -> None:
    """Two steps of every schedule, by torch's own runtime and overlapped.

    Saves in `folder`, by schedule and how it ran, what the steps left and what happened in the second.
    """
    rank = dist.get_rank()
    model = tiny()
    stages = stages_of(model, program_of(model), STARTS, [rank, 3 - rank], OPTIONS, split=True)
    found: dict[str, Any] = {}
    for name in SCHEDULES:
        for how in ("torch", "in turn"):
            for stage in stages:
                stage.zero_grad()
            schedule = scheduled(name, stages)
            if how != "torch":
                overlap.register(schedule)
            losses = step(schedule, ids(MICROBATCHES, 1))
            with watching(schedule) as events:
                losses += step(schedule, ids(MICROBATCHES, 2))
            found[f"{name} {how}"] = {"losses": losses, "gradients": gradients(stages), "events": events}
    torch.save(found, folder / f"{rank}.pt")


@contextmanager
def watching(schedule: Any) -> Iterator[list[str]]:
    """What the schedule's stages do, in its order: each begin and end."""
    events: list[str] = []
    with ExitStack() as patched:

        def note(owner: Any, method: str, text: str) -> None:
            call = getattr(owner, method)

            def noted(*args: Any, **kwargs: Any) -> Any:
                events.append(text)
                found = call(*args, **kwargs)
                events.append(f"{text} done")
                return found

            patched.enter_context(mock.patch.object(owner, method, noted))

        note(overlap, "_wait_batch_p2p", "wait")
        for stage in schedule._stages:
            i = stage.stage_index
            note(stage, "forward_one_chunk", f"F{i}")
            note(stage, "backward_one_chunk", f"B{i}")
            note(stage, "backward_weight_one_chunk", f"W{i}")
            note(stage, "get_fwd_send_ops", f"send{i}")
            note(stage.submod, "begin_recompute", f"R{i}")
            for function in (f for unit in stage.submod.units for f in unit.functions):
                note(function, "_finish", f"weights{i}")
        yield events
