"""One rank's part of a training run but for data, checkpoints and metrics: stages, their schedule, the optimizer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from mhc_compile.diagnostics import MHCError
from mhc_compile.integrations.transformers import IDS, POSITIONS
from mhc_compile.passes.base import value
from mhc_compile.passes.stages import counters_of, split_graph
from mhc_compile.runtime.balance import cuts
from mhc_compile.runtime.denoiser import Denoiser
from mhc_compile.runtime.experts import balance, check_biases
from mhc_compile.runtime.launch import World
from mhc_compile.runtime.model import hollow_model
from mhc_compile.runtime.optimizer import RunAdamW
from mhc_compile.runtime.program import Program, capture_program
from mhc_compile.runtime.recipe import Recipe
from mhc_compile.runtime.schedules import Pipeline
from mhc_compile.runtime.stage import Stage, build_stages, materialise_all, tied
from mhc_compile.runtime.tables import look_up_early, table_factory
from mhc_compile.runtime.weights import initialise, load_folder, seed_of


@dataclass(frozen=True)
class Step:
    """The result of a step; the same on all ranks."""

    loss: float
    """The mean over all tokens of the batch, with the auxiliary loss."""
    auxiliary: float
    """The part of it that the model adds to the tokens' losses, to spread tokens over experts; 0 where it adds none."""
    norm: float
    """Of all gradients, before clipping."""
    stop: bool
    """Whether a rank wants to stop after it."""
    loads: Mapping[str, Tensor]
    """How many tokens each expert of each router got in it, float64 `[experts]` by the router's name."""


@dataclass(frozen=True)
class Engine:
    """This rank's stages with their weights, their schedule and optimizer."""

    recipe: Recipe
    world: World
    program: Program
    starts: tuple[int, ...]
    """The first site of every stage but the first."""
    stages: list[Stage]
    pipeline: Pipeline
    optimizer: RunAdamW
    denoiser: Denoiser | None = None
    """With `[diffusion]` what corrupts batches."""

    @property
    def sharded(self) -> list[FSDPModule]:
        """What FSDP has wrapped."""
        return [m for stage in self.stages for m in stage.modules() if isinstance(m, FSDPModule)]

    def reshard(self) -> None:
        """Replace gathered parameters by FSDP's shards, which the optimizer and checkpoints use, after forward passes.

        A training step does so itself.
        """
        for module in self.sharded:
            module.reshard()

    def compile(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Compile the stages, and wait until all ranks have: a step's timeout is too short for that.

        `say` is called with a line for each of them.
        """
        # torch would leave the backward to its first call.
        at_once = functorch_config.patch(force_non_lazy_backward_lowering=True)
        with self.world.patience("compiling"), at_once:
            # All messages before the first compilation, which takes a different time on each rank.
            for module in self.sharded:
                module.unshard()
            for training in (False, True) if self.recipe.train.evaluate_every else (True,):
                purpose = "training" if training else "evaluation"
                for stage in self.stages:
                    say(f"compiling stage {stage.index + 1} of {stage.count} for {purpose}")
                    stage.train(training)
                    stage.prepare(**example_batch(self.recipe, self.world.device))
            self.reshard()
            self.world.meet()

    def inputs(
        self, batch: Mapping[str, Tensor], step: int, *, evaluates: bool = False
    ) -> Sequence[Mapping[str, Tensor]]:
        """Return what the passes of a step read: `batch`, or with `[diffusion]` its corruptions, with their weights."""
        return (batch,) if self.denoiser is None else self.denoiser.inputs(batch, step, evaluates=evaluates)

    def gradients(self, batch: Mapping[str, Tensor], step: int, *, stop: bool = False) -> Step:
        """Run the passes of this replica's share of a step, forward and backward; `input_ids` and `labels` `[b, S]`.

        Gradients are left for `optimizer.update` or `skip`. `stop`: whether this rank wants to stop afterwards.
        Random numbers (dropout) depend on the recipe's seed, the step and the rank alone. Raises MHC605.
        """
        torch.manual_seed(seed_of(self.recipe.train.seed, step, self.world.rank))
        with self.world.doing("forward and backward passes", step):
            given = self.inputs(batch, step)
            losses = []
            for i, inputs in enumerate(given):
                on_device = {name: t.to(self.world.device, non_blocking=True) for name, t in inputs.items()}
                done = self.optimizer.begin if i == len(given) - 1 else None
                losses.append(self.pipeline.step(on_device, done))
            loss = torch.stack(losses).sum(0)
        with self.world.doing("gradients over ranks", step):
            self.optimizer.reduce()
            (total, auxiliary), norm, stops = over_ranks(loss, self.optimizer.norm(), stop)
            loads = self._counted()
        replicas = self.world.parallel.replicas
        return Step(total / replicas, auxiliary / replicas, norm, stops, loads)

    def update(self, step: int, done: Step) -> float:
        """Update the weights after `gradients`, and the biases that balance experts; return the learning rate."""
        rate = self.optimizer.update(step, done.norm)
        for stage in self.stages:
            for name, bias in stage.biases.items():
                load = torch.stack([done.loads[counter] for counter in self.program.biases[name]]).sum(0)
                balance(bias, load, self.recipe.train.balance_rate)
        return rate

    def _counted(self) -> dict[str, Tensor]:
        """Return the sums of all counters over the microbatches of a step and all ranks, by name. A collective."""
        shapes = {name: value(node).shape for name, node in counters_of(self.program.graph.graph).items()}
        if not shapes:
            return {}
        sums = {name: torch.zeros(s, dtype=torch.float64, device=self.world.device) for name, s in shapes.items()}
        for stage in self.stages:
            sums |= stage.take_counted()
        flat = torch.cat([t.flatten() for t in sums.values()])
        dist.all_reduce(flat)
        parts = flat.split([s.numel() for s in shapes.values()])
        return {name: t.view(shape) for (name, shape), t in zip(shapes.items(), parts, strict=True)}


def over_ranks(losses: Tensor, norm: Tensor, stop: bool) -> tuple[list[float], float, bool]:
    """Return the sums of all ranks' losses, the norm (NaN if any rank's is not finite), and whether any rank stops.

    A collective. Afterwards all ranks treat the step alike: a rank that alone skipped a step would diverge. Nowhere
    else does a step wait for its device.
    """
    stops = torch.full((), float(stop), dtype=losses.dtype, device=losses.device)
    sums = torch.cat([losses, torch.stack([stops, (~norm.isfinite()).to(losses)])])
    dist.all_reduce(sums)
    *totals, stopped, bad, own = torch.cat([sums.double(), norm.double().reshape(1)]).tolist()
    return totals, math.nan if bad else own, stopped > 0


def build_engine(recipe: Recipe, world: World, *, weights: bool = True) -> Engine:
    """Return this rank's stages of the recipe's model, with their weights read or drawn. A collective.

    Without `weights` no value is set: a checkpoint will set them all.

    Raises what `Denoiser`, `hollow_model`, `capture_program`, `build_stages`, `initialise` and `load_folder` raise.
    """
    parallel = recipe.parallel
    denoiser = None if recipe.diffusion is None else Denoiser(recipe, world.replica)
    program = capture(recipe, world.device)
    with world.patience("cutting the model"):
        # The first rank's cuts: a measurement differs from rank to rank.
        first: list[Any] = [cuts(program, parallel.stage_count, parallel.balance) if world.rank == 0 else None]
        dist.broadcast_object_list(first, src=0, group=world.patient)
    starts: list[int] = first[0]
    sharded = parallel.mode == "fsdp"
    stages = build_stages(
        program,
        starts,
        indices=parallel.local_stages(world.pipe),
        options=recipe.options,
        device=world.device,
        units="blocks" if sharded else "stage",
        split=splits(recipe),
        make_table=table_factory(world.engram_group),
    )
    if sharded:
        for stage in stages:
            _shard(stage, world, torch.bfloat16 if recipe.model.dtype == "bfloat16" else torch.float32)
            stage.materialise()
    else:
        materialise_all(stages)
    with world.patience("reading the weights" if recipe.model.start == "checkpoint" else "drawing the weights"):
        if weights and recipe.model.start == "checkpoint":
            load_folder(stages, program, Path(recipe.model.folder), recipe.train.seed)
        elif weights:
            initialise(stages, program, recipe.train.seed)
        world.meet()
    ties = tied(program, split_graph(program.graph, starts))
    return Engine(
        recipe, world, program, tuple(starts), stages, Pipeline(stages, world, recipe.microbatches),
        RunAdamW(stages, ties, world, recipe.train), denoiser,
    )  # fmt: skip


def capture(recipe: Recipe, device: torch.device, change: Callable[[torch.nn.Module], None] | None = None) -> Program:
    """Return the recipe's model as a graph for one microbatch; its weights are not read. `change`: `hollow_model`."""
    model = hollow_model(recipe, device, change)
    if recipe.data.documents and POSITIONS not in inspect.signature(model.forward).parameters:
        detail = f"data.documents = true, but {type(model).__name__} takes no positions"
        raise MHCError("MHC602", detail, way_out="leave data.documents out")
    if recipe.parallel.engram > 1:
        look_up_early(model)
    program = capture_program(model, example_batch(recipe, device))
    check_biases(program, recipe.train.balance_rate)
    return program


def example_batch(recipe: Recipe, device: torch.device) -> dict[str, Tensor]:
    """Return inputs of the model for one microbatch."""
    shape = (recipe.train.microbatch, recipe.data.sequence)
    batch = {IDS: torch.zeros(shape, dtype=torch.int64, device=device)}
    if recipe.data.documents:
        batch[POSITIONS] = torch.arange(shape[1], device=device).expand(shape).contiguous()
    return batch


def splits(recipe: Recipe) -> bool:
    """Return whether weights' gradients are computed apart from the others, for V-shaped schedules to fill gaps with.

    FSDP needs whole backward passes, and the inner compiler `eager` has no backward graph to split.
    """
    p = recipe.parallel
    return p.is_v_shaped and p.mode == "replicate" and recipe.model.inner != "eager"


def _shard(stage: Stage, world: World, dtype: torch.dtype) -> None:
    """Spread every parameter of a stage over the replicas, one message a unit; tables and biases stay as they are.

    Units gather their parameters in `dtype`, in which their graphs take them, and sum gradients in float32.
    """
    whole = {p for t in stage.tables.values() for p in t.parameters()} | set(stage.biases.values())
    # Whole from a step's first use to its end: between a forward and its backward other microbatches use them, too.
    how: dict[str, Any] = {"mesh": world.replica_mesh, "reshard_after_forward": False, "ignored_params": whole}
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in stage.units:
        fully_shard(unit, mp_policy=policy, **how)
    fully_shard(stage, **how)
