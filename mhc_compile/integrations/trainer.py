"""Trainer of transformers: log what the streams do while it trains, and train sharded models. Nothing of this package
imports this file."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel, Trainer, TrainerCallback

from mhc_compile.diagnostics import MHCError
from mhc_compile.parameters import owners
from mhc_compile.probes import Probes


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
    """Shard a converted model by FSDP2, in place, for a `Trainer` on the ranks of `mesh`.

        shard(model, init_device_mesh("cuda", (torch.distributed.get_world_size(),)))
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)

    Trainer then wraps it no more, and all ranks save it together. Leave `fsdp` out of the arguments, and set
    `save_only_model=True`: Trainer does not resume such models. Raises MHC501 for a model that is not converted.
    """
    if not owners(model):
        raise MHCError("MHC501", f"{type(model).__name__} holds no stream parameters")
    fully_shard(model, mesh=mesh)
    model._is_distributed_loading_by_transformers = True  # so that Trainer knows: it is sharded already
    return model


class ProbeCallback(TrainerCallback):
    """Sample the streams in the first step and every `every`-th, and log the figures through the trainer.

        callback = ProbeCallback(trainer, every=50)
        trainer.add_callback(callback)

    They go into the trainer's log history and wherever its `report_to` leads, as `mhc/QUANTITY`: one number for each
    quantity of `Sample.summary`, or `mhc/QUANTITY/OWNER` where several modules hold streams. `callback.probes` keeps
    the samples themselves, numbered as the trainer numbers its steps.

    `trainer` may be of a subclass; its model is converted. Raises MHC204 for `every` below 1.
    """

    def __init__(self, trainer: Trainer, every: int = 50) -> None:
        self.trainer = trainer
        self.probes = Probes(trainer.model, every)
        self._step = ExitStack()

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Begin a step of the probes, under the number that the trainer will give it."""
        # A step that failed has not reached its end: without a reference it is closed, and nothing is sampled.
        self._step = ExitStack()
        self.probes.model = self.trainer.model
        self.probes.steps = state.global_step + 1
        self._step.enter_context(self.probes.step())

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        """End the step, and log what was sampled in it."""
        before = len(self.probes.samples)
        self._step.close()
        samples = self.probes.samples[before:]
        figures = {
            f"mhc/{quantity}" + (f"/{sample.owner}" if len(samples) > 1 else ""): figure
            for sample in samples
            for quantity, figure in sample.summary().items()
        }
        if figures:
            due = control.should_log
            # Of the base class: those of subclasses add averages of their own since the last call, and begin new ones.
            Trainer.log(self.trainer, figures)
            control.should_log = due  # the trainer's own figures of this step, which are logged next
