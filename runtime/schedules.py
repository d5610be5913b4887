"""torch's pipeline schedules over a rank's stages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.nn import functional as F

from mhc_compile.diffusion.objective import weighted_loss
from mhc_compile.integrations.transformers import IDS
from mhc_compile.runtime.launch import World
from mhc_compile.runtime.overlap import register
from mhc_compile.runtime.pipelining import RunStage
from mhc_compile.runtime.stage import Stage

TARGETS = ("labels", "weights")
"""The parts of a batch that no stage takes, but the loss."""
CLASSES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "interleaved1f1b": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}
# Where a step fails torch prints the whole schedule, which would bury the reason.
logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)


class Pipeline:
    """This rank's stages under the recipe's schedule.

    `step` runs the forward and backward passes of one optimizer step and leaves gradients; they are the sum over the
    microbatches, of a loss that is a mean over all tokens of this replica. With another `loss` (outputs, target and
    `loss_kwargs` to a scalar) call `schedule.step` in its place.
    """

    def __init__(
        self, stages: Sequence[Stage], world: World, microbatches: int, loss: Callable[..., Tensor] | None = None
    ) -> None:
        self.stages, self.world, self.microbatches = list(stages), world, microbatches
        self.has_first = stages[0].index == 0
        self.has_last = any(s.index == s.count - 1 for s in stages)
        self._auxiliary = torch.zeros((), device=world.device)
        self._run_stages = run_stages = [RunStage(s, world, defers=world.parallel.is_v_shaped) for s in stages]
        name = world.parallel.schedule
        self.schedule = CLASSES[name](
            run_stages[0] if name == "1f1b" else run_stages,
            n_microbatches=microbatches,
            loss_fn=loss or self._loss,
            scale_grads=False,
        )
        if name != "1f1b" and loss is None:  # what is registered passes on no `loss_kwargs`
            register(self.schedule)

    def step(self, batch: dict[str, Tensor], done: Callable[[Stage], None] | None = None) -> Tensor:
        """Run one step on this replica's share: `input_ids` and `labels` `[b, S]`, and other inputs of the model.

        `done` is called with every stage whose last backward pass has run, before the others' have. With `weights`
        `[b, S]` these multiply the tokens' losses. Gradients add to those that are there.

        Returns the share's mean loss and, as a part of it, the model's auxiliary loss, float32 `[2]`, on the ranks with
        the last stage, and 0 on the others.
        """
        self._auxiliary = torch.zeros((), device=self.world.device)
        for stage in self._run_stages:
            stage.done = done
        losses: list[Tensor] = []
        inputs = {name: t for name, t in batch.items() if name not in TARGETS}
        first = (inputs[IDS],) if self.has_first else ()
        target = {"target": target_of(batch), "losses": losses} if self.has_last else {}
        self.schedule.step(*first, **target, return_outputs=False, **inputs)
        total = sum((loss.detach() for loss in losses), torch.zeros((), device=self.world.device))
        return torch.stack([total, self._auxiliary])

    def _loss(self, out: Tensor | tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        """Return the share of one microbatch in the mean over all of the replica's tokens, auxiliary loss included."""
        logits, *auxiliary = out if isinstance(out, tuple) else (out,)
        loss = token_losses(logits, target) / (logits.shape[:2].numel() * self.microbatches)
        for other in auxiliary:
            share = other.float() / self.microbatches
            self._auxiliary = self._auxiliary + share.detach()
            loss = loss + share
        return loss


def target_of(batch: Mapping[str, Tensor]) -> Tensor:
    """Return what the last stage's loss reads: `labels`, or with `weights` both as one float64 tensor `[b, S, 2]`.

    torch's schedules cut one tensor into microbatches.
    """
    if "weights" not in batch:
        return batch["labels"]
    return torch.stack([batch[name].double() for name in TARGETS], -1)


def token_losses(logits: Tensor, target: Tensor) -> Tensor:
    """Return the sum over tokens, in float32: `logits` `[b, S, V]`, `target` as `target_of` returns it."""
    if target.is_floating_point():
        return weighted_loss(logits, target[..., 0].long(), target[..., 1].float())
    return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="sum")
