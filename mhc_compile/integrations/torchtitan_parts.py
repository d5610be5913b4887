"""The parts that torchtitan's trainer builds for a recipe: batches, optimizer and rates, figures, evaluations."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer
from torchtitan.components.optimizer.utils import get_flat_optim_state_dict, load_flat_optim_state_dict
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.components.validate import BaseValidator

from mhc_compile.diagnostics import MHCError
from mhc_compile.integrations.torchtitan_stages import Run, TitanStage
from mhc_compile.integrations.transformers import IDS
from mhc_compile.memory.gradient import RowGradient
from mhc_compile.passes.stages import split_graph
from mhc_compile.runtime.engine import Engine
from mhc_compile.runtime.evaluate import evaluate
from mhc_compile.runtime.loop import open_loader
from mhc_compile.runtime.metrics import FILE, drop_after
from mhc_compile.runtime.optimizer import RunAdamW, learning_rate
from mhc_compile.runtime.recipe import Recipe
from mhc_compile.runtime.recipe_tables import TrainTable
from mhc_compile.runtime.stage import tied


class Batches(BaseDataLoader):
    """The recipe's batches, microbatch by microbatch: the same for any number of replicas."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """Read the data of `recipe`; with `accept_changes` resume a checkpoint of a run on other data, too."""

        recipe: Recipe
        accept_changes: bool = False

    def __init__(self, config: Config, *, dp_rank: int, local_batch_size: int, **_: Any) -> None:
        data = config.recipe.data
        self._loader = open_loader(config.recipe, dp_rank, data.folders, data.workers)
        self._rows, self._accepts, self._step = local_batch_size, config.accept_changes, 0

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield inputs and next tokens. All stages get the token ids: memories in any of them look them up."""
        while True:
            batch = self._loader.batch(self._step)
            self._step += 1
            for i in range(0, len(batch[IDS]), self._rows):
                part = {name: t[i : i + self._rows] for name, t in batch.items()}
                labels = part.pop("labels")
                if (weights := part.pop("weights", None)) is not None:
                    labels = labels.masked_fill(weights == 0, IGNORE_INDEX)
                yield {"input": part[IDS], **part}, labels

    def state_dict(self) -> dict[str, Any]:
        """Return how far the run is, and in which data."""
        data = json.dumps(self._loader.describe(), sort_keys=True)
        return {"step": self._step, "samples": self._loader.samples_before(self._step), "data": data}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was. Raises MHC608 for other data."""
        self._step, here = state_dict["step"], self.state_dict()["data"]
        same = state_dict["data"] == here
        if not same and not self._accepts:
            raise MHCError("MHC608", f"data: {state_dict['data']} in the checkpoint, {here} here")
        self._loader.resume(self._step, state_dict["samples"] if same else 0)


class TitanAdamW(RunAdamW):
    """The optimizer of this rank's stages, whose state has the names of the model that is not split."""

    def __init__(self, run: Run, stages: Sequence[TitanStage]) -> None:
        ties = tied(run.program, split_graph(run.program.graph, run.starts))
        super().__init__(stages, ties, run.world, run.recipe.train)
        names = {id(p): name for name, parameters in self.parameters.items() for p in parameters}
        names |= {id(t.weight): f"{name}.weight" for name, t in self.tables.items()}
        for group in self.param_groups:
            group["param_names"] = [names[id(p)] for p in group["params"]]

    def reduce(self) -> None:
        """Do as its base, with sums over replicas, as FSDP's are: the loss is divided by the tokens of all of them."""
        super().reduce()
        assert self._taken is not None
        replicas = self.world.parallel.replicas
        self._taken = {name: g and RowGradient(g.rows, g.values * replicas) for name, g in self._taken.items()}

    def start(self) -> None:
        """Make the state of parameters that have none: a checkpoint holds that of all of them."""
        for group in self.param_groups:
            for p in group["params"]:
                if group["table"]:
                    self.table_state(p)
                elif not self.state[p]:
                    device = p.device if group["fused"] else None
                    zeros = (torch.zeros_like(p, memory_format=torch.preserve_format) for _ in range(2))
                    moments = zip(("exp_avg", "exp_avg_sq"), zeros, strict=True)
                    self.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=device), **dict(moments)}


class Optimizers(OptimizersContainer):
    """One optimizer for all stages of this rank. It clips: tables as well, and what several stages hold once."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """Without choices: the recipe has them."""

    def __init__(self, config: Config, *, model_parts: list[TitanStage]) -> None:  # noqa: ARG002
        self.model_parts: list[nn.Module] = [*model_parts]
        self.adamw = TitanAdamW(model_parts[0].run, model_parts)
        self.optimizers = [self.adamw]
        self.norm = self.rate = 0.0
        """The gradients' norm before clipping, and the learning rate, of the last step."""
        torch.optim.Optimizer.__init__(self, [p for group in self.adamw.param_groups for p in group["params"]], {})

    def step(self, closure: None = None) -> None:  # noqa: ARG002
        """Update the weights. Raises MHC618 on all ranks for a norm that is not finite."""
        self.adamw.reduce()
        self.norm = float(self.adamw.norm())
        if not math.isfinite(self.norm):
            raise MHCError("MHC618", f"the norm of the gradients is {self.norm}; the newest checkpoint is from before")
        group = self.adamw.param_groups[0]
        self.rate = float(group["lr"]) / group["ratio"]
        self.adamw.apply(self.norm)

    def state_dict(self) -> dict[str, Any]:
        """Return the state by names, as torchtitan's checkpoints have it."""
        self.adamw.start()
        flat: dict[str, Any] = get_flat_optim_state_dict(self.adamw)
        return flat

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returns."""
        self.adamw.start()
        load_flat_optim_state_dict(self.adamw, state_dict)
        for first, *others in self.adamw.parameters.values():  # two stages of a rank that hold one parameter
            for other in others:
                self.adamw.state[other] = {name: t.clone() for name, t in self.adamw.state[first].items()}


class Rates(LRSchedulersContainer):
    """The recipe's learning rates."""

    @dataclass(kw_only=True, slots=True)
    class Config(LRSchedulersContainer.Config):
        """Take the rates from `train`."""

        train: TrainTable

        def build(self, *, optimizers: Any, training_steps: int) -> Rates:  # noqa: ARG002
            """Return the rates of the optimizers."""
            return Rates(optimizers, lambda done: learning_rate(done + 1, self.train) / self.train.lr)


class Figures(MetricsProcessor):
    """torchtitan's figures, with the loss of the last stage on all ranks and the norm of all gradients, and a file of
    lines as the other engine writes it."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        """Take the settings from `recipe`."""

        recipe: Recipe

    _begun = False

    def should_log(self, step: int) -> bool:
        """Return whether a step is logged: every so many, and the last."""
        recipe = self.config.recipe
        return step % recipe.metrics.every == 0 or step == recipe.train.steps

    def log(self, step: int, global_avg_loss: float, global_max_loss: float, *_: float, **more: Any) -> None:
        """Log a step. A collective of a pipeline's ranks."""
        world = self.model_parts[0].run.world
        losses = torch.tensor([global_avg_loss, global_max_loss], dtype=torch.float64, device=world.device)
        place = world.parallel.place_of(world.parallel.stage_count - 1)
        dist.broadcast(losses, group=world.pipe_group, group_src=place)
        mean, largest = losses.tolist()
        super().log(step, mean, largest, self.optimizers.norm, **more)
        self._write(step, {"loss": mean, "lr": self.optimizers.rate, "grad_norm": self.optimizers.norm})

    def log_validation(self, loss: float, step: int, **more: Any) -> None:
        """Log an evaluation."""
        super().log_validation(loss, step, **more)
        self._write(step, {"evaluation_loss": loss})

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line; before the first, drop those of steps that are taken once more."""
        if dist.get_rank():
            return
        path = self.config.recipe.metrics_folder / FILE
        if not self._begun:
            path.parent.mkdir(parents=True, exist_ok=True)
            drop_after(path, step - 1)
            self._begun = True
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


class HeldOut(BaseValidator):
    """The recipe's evaluations, whose messages between stages go in one order on all ranks."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseValidator.Config):
        """Take the settings from `recipe`."""

        recipe: Recipe
        enable: bool = False

    def __init__(self, config: Config, *, dp_rank: int, metrics_processor: Figures, **_: Any) -> None:
        super().__init__(config)
        assert config.recipe.data.validation is not None
        self._figures = metrics_processor
        self._loader = open_loader(config.recipe, dp_rank, (config.recipe.data.validation,), 0)

    def should_validate(self, step: int) -> bool:
        """Return whether to evaluate after a step: every so many, and the last."""
        return step % self.config.freq == 0 or step == self.config.recipe.train.steps

    def validate(self, model_parts: list[TitanStage], step: int) -> None:
        """Log the loss on held-out data. A collective."""
        run = model_parts[0].run
        adamw = self._figures.optimizers.adamw
        engine = Engine(run.recipe, run.world, run.program, run.starts, [*model_parts], run.pipeline, adamw)
        loss = evaluate(engine, self._loader, run.recipe.train.evaluate_batches, step)
        self._figures.log_validation(loss, step)


class NoTokenizer(BaseTokenizer):
    """In the place of a tokenizer: data are tokens already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        """As its base."""

    def __init__(self, config: Config, **_: Any) -> None:  # noqa: ARG002
        super().__init__()

    def encode(self, *_: Any, **__: Any) -> list[int]:
        """Raise NotImplementedError."""
        raise NotImplementedError

    def decode(self, *_: Any, **__: Any) -> str:
        """Raise NotImplementedError."""
        raise NotImplementedError

    def get_vocab_size(self) -> int:
        """Raise NotImplementedError."""
        raise NotImplementedError
