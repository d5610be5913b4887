"""Build this rank's stages of a recipe's model for torchtitan's trainer, sharded by its meshes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.protocols import BaseModel
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.utils import get_local_device

from mhc_compile.diagnostics import MHCError
from mhc_compile.integrations.transformers import POSITIONS
from mhc_compile.passes.flops import node_flops
from mhc_compile.runtime.balance import cuts
from mhc_compile.runtime.engine import capture
from mhc_compile.runtime.launch import World, check_world, world_of
from mhc_compile.runtime.program import Program
from mhc_compile.runtime.recipe import Recipe
from mhc_compile.runtime.recipe_tables import ParallelTable
from mhc_compile.runtime.schedules import CLASSES, Pipeline
from mhc_compile.runtime.stage import Stage, build_stages
from mhc_compile.runtime.watch import Watch
from mhc_compile.runtime.weights import initialise, load_folder


class HollowModel(BaseModel):
    """An empty stand-in, built on the meta device; `parallelize` and `pipeline` replace it by stages."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        """Build the model of `recipe`."""

        recipe: Recipe

        def update_from_config(self, *, config: Any, **_: Any) -> None:
            """Raise MHC651 for a setting of torchtitan's that the stages do not carry."""
            for name, wanted in _settings(self.recipe).items():
                value = config
                for part in name.split("."):
                    value = getattr(value, part)
                if value != wanted:
                    raise MHCError("MHC651", f"{name} = {value!r}; wanted: {wanted!r}")

        def get_nparams_and_flops(self, model: HollowModel, seq_len: int) -> tuple[int, int]:
            """Return the number of parameters, and the operations per token of a step."""
            program, rows = model.program, self.recipe.train.microbatch
            operations = sum(node_flops(program.graph).values())
            return sum(p.numel() for p in program.parameters.values()), 3 * round(operations) // (rows * seq_len)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.recipe = config.recipe

    @cached_property
    def program(self) -> Program:
        """The model's graph for one microbatch, on this process's device."""
        device = get_local_device()
        return capture(self.recipe, torch.device("cpu") if device.type == "cpu" else device)


@dataclass(frozen=True)
class Run:
    """The state that the parts of a run share on this rank."""

    recipe: Recipe
    world: World
    """Its `replica_mesh` is that of the ranks that share each parameter's shards."""
    program: Program
    starts: tuple[int, ...]
    pipeline: Pipeline


class TitanStage(Stage):
    """A stage as torchtitan's trainer and checkpoints handle a model."""

    run: Run

    def forward(self, *crossing: Tensor, positions: Tensor | None = None, **inputs: Tensor) -> Any:
        """Run the stage. `positions`, as torchtitan's own loaders give them, are those of tokens in their documents."""
        return super().forward(*crossing, **inputs if positions is None else {**inputs, POSITIONS: positions})

    def to_empty(self, *, device: Any, recurse: bool = True) -> TitanStage:  # noqa: ARG002
        """Allocate parameters, where the stage computes; buffers keep their values."""
        self.materialise()
        return self

    def init_weights(self, **_: Any) -> None:
        """Read or draw the values, as the recipe says."""
        recipe, program = self.run.recipe, self.run.program
        if recipe.model.start == "checkpoint":
            load_folder([self], program, Path(recipe.model.folder), recipe.train.seed)
        else:
            initialise([self], program, recipe.train.seed)

    def _full_names(self) -> dict[str, str]:
        """Return the names of tensors in this stage by those that they have in the model."""
        names = [name for name, _ in nn.Module.named_parameters(self)]
        return dict(zip((name for name, _ in self.named_parameters()), names, strict=True))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return parameters and rows of tables as any module does, under the names of the model that is not split."""
        tensors = super().state_dict(*args, **kwargs)
        return {name: tensors[full] for name, full in self._full_names().items()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` returns; with `strict` nothing may be missing."""
        full = {full: state_dict[name] for name, full in self._full_names().items() if name in state_dict}
        return super().load_state_dict(full, strict, assign)


class TokenLoss(CrossEntropyLoss):
    """torchtitan's loss, which is divided by the tokens of all ranks, and the auxiliary loss of the model."""

    @dataclass(kw_only=True, slots=True)
    class Config(CrossEntropyLoss.Config):
        """Set `tokens`, the tokens per step over all ranks, including those that the loss ignores."""

        tokens: int

    def __init__(self, config: Config, **how: Any) -> None:
        super().__init__(config, **how)
        self._tokens = config.tokens

    def __call__(self, pred: Any, labels: Tensor, global_valid_tokens: Any = None, **_: Any) -> tuple[Tensor, Any]:
        """Return the loss of a microbatch, to be summed, and no figures."""
        logits, *auxiliary = pred if isinstance(pred, tuple) else (pred,)
        loss, figures = super().__call__(logits, labels, global_valid_tokens)
        for other in auxiliary if global_valid_tokens is not None else ():
            loss = loss + other.float() * labels.numel() / self._tokens
        return loss, figures


def model_spec(recipe: Recipe) -> ModelSpec:
    """Return the recipe's model as torchtitan takes one."""
    return ModelSpec(
        name="mhc",
        flavor=Path(recipe.model.folder).name,
        model=HollowModel.Config(recipe=recipe),
        parallelize_fn=parallelize,
        pipelining_fn=pipeline,
        post_optimizer_build_fn=None,
        state_dict_adapter=None,
    )


def parallelize(model: HollowModel, *, parallel_dims: Any, parallelism: Any, **_: Any) -> TitanStage:
    """Return the one stage of a model that is not split."""
    return _build(model, parallel_dims, parallelism, None)[1][0]


def pipeline(
    model: HollowModel, *, parallel_dims: Any, parallelism: Any, loss_fn: Any, **_: Any
) -> tuple[Any, list[TitanStage], bool, bool]:
    """Return the schedule, this rank's stages, and whether the first and the last are among them."""
    run, stages = _build(model, parallel_dims, parallelism, lambda out, target, **kw: loss_fn(out, target, **kw)[0])
    return run.pipeline.schedule, stages, run.pipeline.has_first, run.pipeline.has_last


def _build(model: HollowModel, parallel_dims: Any, parallelism: Any, loss: Any) -> tuple[Run, list[TitanStage]]:
    """Return this rank's stages, without values. A collective."""
    recipe, program = model.recipe, model.program
    if program.biases and recipe.train.balance_rate:
        detail = f"train.balance_rate = {recipe.train.balance_rate}: it moves no biases"
        raise MHCError("MHC651", detail, way_out="set it to 0, or train without --engine torchtitan")
    check_world(recipe.parallel, dist.get_world_size())
    device = next(iter(program.parameters.values())).device
    p = replace(recipe.parallel, mode="fsdp")  # torchtitan has one way for both: replicas are a mesh of more dimensions
    watch = Watch(dist.get_rank(), p.world)  # of nothing: torchtitan has timeouts of its own
    world = replace(world_of(p, dist.get_rank(), device, watch), replica_mesh=parallel_dims.get_mesh("fsdp"))
    first: list[Any] = [cuts(program, p.stage_count, p.balance) if world.rank == 0 else None]
    dist.broadcast_object_list(first, src=0, group=world.patient)
    starts: list[int] = first[0]
    stages: list[Any] = build_stages(
        program,
        starts,
        indices=p.local_stages(world.pipe),
        options=recipe.options,
        device=device,
        units="blocks",
        kind=TitanStage,
    )
    policy = parallelism.fsdp_reshard_after_forward
    reshards = policy == "always" or (policy == "default" and p.stages == 1)
    for stage in stages:
        _shard(stage, parallel_dims, reshards)
    run = Run(recipe, world, program, tuple(starts), Pipeline(stages, world, recipe.microbatches, loss))
    for stage in stages:
        stage.run = run
    return run, stages


def _shard(stage: TitanStage, parallel_dims: Any, reshards: bool) -> None:
    """Spread the parameters of every unit; rows of tables stay as they are. Gradients are sums: the loss is divided."""
    names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    rows = {p for t in stage.tables.values() for p in t.parameters()} | set(stage.biases.values())
    how: dict[str, Any] = {"mesh": parallel_dims.get_mesh(names), "ignored_params": rows}
    for module in (*stage.units, stage):
        fully_shard(module, reshard_after_forward=reshards, **how)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def schedule_of(parallel: ParallelTable) -> str:
    """Return torch's name of the recipe's schedule."""
    name: str = CLASSES[parallel.schedule].__name__
    return name.removeprefix("Schedule")


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of torchtitan's trainer that the stages, or the recipe, leave no choice in."""
    p, t = recipe.parallel, recipe.train
    return {
        # Stages are graphs, without the modules that these would change.
        **{f"parallelism.{name}_parallel_degree": 1 for name in ("tensor", "context", "expert")},
        "parallelism.spmd_backend": "partial_dtensor",
        "parallelism.enable_fsdp_symm_mem": False,
        "parallelism.module_fqns_per_model_part": None,
        "parallelism.pipeline_parallel_schedule_csv": "",
        "parallelism.pipeline_parallel_degree": p.stages,
        "parallelism.pipeline_parallel_schedule": schedule_of(p),
        "parallelism.pipeline_parallel_microbatch_size": t.microbatch,
        "training.seq_len": recipe.data.sequence,
        "training.global_batch_size": t.batch,
        "training.local_batch_size": t.microbatch * (recipe.microbatches if p.stages > 1 else 1),
        "training.dtype": "float32",
        "training.max_norm": math.inf,
        "training.enable_cpu_offload": False,
        "training.disable_cuda_graphs": True,
        "compile.enable": False,
        "activation_checkpoint": None,
        "checkpoint.create_seed_checkpoint": False,
    }
