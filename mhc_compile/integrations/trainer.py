"""Trainer of transformers: log what the streams do while it trains. Nothing of this package imports this file."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from transformers import Trainer, TrainerCallback

from mhc_compile.probes import Probes


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
