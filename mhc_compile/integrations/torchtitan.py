"""torchtitan as the engine of a recipe: its trainer, data parallelism, checkpoints and logs around our stages.

`torchtitan_stages` and `torchtitan_parts` have what it is given; they are imported where torchtitan is installed alone.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from mhc_compile.diagnostics import MHCError
from mhc_compile.runtime.checkpoint.folder import RunFolder
from mhc_compile.runtime.launch import check_world
from mhc_compile.runtime.loop import check_data, verify_data
from mhc_compile.runtime.recipe import Recipe

CHECKPOINTS = "checkpoint"
"""torchtitan's folder of them, in the recipe's."""
OLDEST_TORCH = "2.14"
SERIES = "0.3"


def train(recipe: Recipe, *, accept_changes: bool = False) -> None:
    """Run the recipe in this process, one rank of `recipe.parallel.world`, with torchtitan's trainer.

    It goes on from its newest checkpoint, on any number of stages and replicas. `accept_changes`: also with other data.

    Raises what `trainer_config`, `check_world`, `check_data` and `verify_data` raise, MHC608 for a checkpoint of a run
    on other data, and MHC618 for gradients that are not finite.
    """
    config = trainer_config(recipe, accept_changes=accept_changes)
    import torch.distributed as dist
    from torchtitan.tools.logging import init_logger, logger

    # Alone, without torchrun. The system chooses the port.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(alone if "RANK" not in os.environ else {})
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    check_world(recipe.parallel, world)
    check_data(recipe)
    if not (Path(recipe.checkpoint.folder) / CHECKPOINTS).is_dir():
        verify_data(recipe, rank, world)
    init_logger()
    if rank:
        logger.setLevel("WARNING")
    logging.getLogger("mhc_compile").setLevel("WARNING")  # which tells of every pass where the root logger informs
    trainer = None
    try:
        trainer = config.build()
        trainer.train()
    finally:
        if trainer is not None:
            trainer.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def trainer_config(recipe: Recipe, *, accept_changes: bool = False) -> Any:
    """Return the `Trainer.Config` of a recipe. What torchtitan adds (profiling, HSDP) may be changed in it.

    Raises MHC650 where torchtitan cannot be used here, and MHC651 for a field that it does not carry; the trainer
    itself raises MHC651 for a setting that our stages do not.
    """
    check(recipe)
    from torchtitan.config import CommConfig, DebugConfig, ParallelismConfig, TrainingConfig
    from torchtitan.trainer import Trainer

    from mhc_compile.integrations import torchtitan_parts as parts
    from mhc_compile.integrations import torchtitan_stages as stages

    p, t = recipe.parallel, recipe.train
    sharded = p.mode == "fsdp"
    return Trainer.Config(
        model_spec=stages.model_spec(recipe),
        hf_assets_path=recipe.model.folder,
        dump_folder=recipe.checkpoint.folder,
        tokenizer=parts.NoTokenizer.Config(),
        loss=stages.TokenLoss.Config(tokens=t.batch * recipe.data.sequence),
        dataloader=parts.Batches.Config(recipe=recipe, accept_changes=accept_changes),
        optimizer=parts.Optimizers.Config(),
        lr_scheduler=parts.Rates.Config(train=t, warmup_steps=t.warmup),
        training=TrainingConfig(
            steps=t.steps,
            seq_len=recipe.data.sequence,
            global_batch_size=t.batch,
            local_batch_size=t.microbatch * (recipe.microbatches if p.stages > 1 else 1),
            max_norm=math.inf,  # `Optimizers` clips: tables, too, and what is tied once
            mixed_precision_param="float32",  # stages cast their weights themselves
            disable_cuda_graphs=True,
        ),
        parallelism=ParallelismConfig(
            spmd_backend="partial_dtensor",
            data_parallel_shard_degree=p.data if sharded else 1,
            data_parallel_replicate_degree=1 if sharded else p.data,
            pipeline_parallel_degree=p.stages,
            pipeline_parallel_schedule=stages.schedule_of(p),
            pipeline_parallel_microbatch_size=t.microbatch,
        ),
        checkpoint=_checkpoints(recipe),
        activation_checkpoint=None,  # [recompute] is in the stages
        metrics=parts.Figures.Config(
            recipe=recipe,
            log_freq=recipe.metrics.every,
            enable_tensorboard=recipe.metrics.tensorboard,
            save_tb_folder=str(recipe.metrics_folder / "tensorboard"),
        ),
        validator=parts.HeldOut.Config(enable=t.evaluate_every > 0, freq=t.evaluate_every or 1, recipe=recipe),
        comm=CommConfig(init_timeout_seconds=math.ceil(p.patience), train_timeout_seconds=math.ceil(p.timeout)),
        debug=DebugConfig(seed=t.seed),
    )


def _checkpoints(recipe: Recipe) -> Any:
    from torchtitan.components.checkpoint import CheckpointManager

    saves = recipe.checkpoint
    return CheckpointManager.Config(
        enable=True,
        folder=CHECKPOINTS,
        interval=saves.every or recipe.train.steps,
        keep_latest_k=saves.keep,
        async_mode="async" if saves.asynchronous else "disabled",
        initial_load_model_only=False,
        last_save_model_only=False,
    )


def check(recipe: Recipe, *, exports: bool = False) -> None:
    """Raise MHC651 for a field that torchtitan does not carry, or an export, and MHC650 where it cannot be used."""
    for name, reason in _not_carried(recipe):
        raise MHCError("MHC651", f"{name}: {reason}")
    if exports:
        way_out = "read its checkpoint into the model: docs/train.md, torchtitan"
        raise MHCError("MHC651", "--export: checkpoints of torchtitan are not read", way_out=way_out)
    require()


def require() -> None:
    """Raise MHC650 unless torchtitan can be used here."""
    if Version(torch.__version__) < Version(OLDEST_TORCH):
        raise MHCError("MHC650", f"torch {torch.__version__} is older than {OLDEST_TORCH}")
    try:
        version = Version(metadata.version("torchtitan"))
    except metadata.PackageNotFoundError as error:
        raise MHCError("MHC650", "torchtitan is not installed") from error
    if f"{version.major}.{version.minor}" != SERIES:
        raise MHCError("MHC650", f"torchtitan {version} is installed")
    from torchtitan.tools.utils import device_type

    if device_type == "cuda" and not torch.cuda.is_available():
        raise MHCError("MHC650", "this machine has no accelerator", way_out="train on CPUs without --engine torchtitan")


def _not_carried(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield the fields that torchtitan does not carry, each with the reason."""
    p, t = recipe.parallel, recipe.train
    if recipe.diffusion is not None:
        yield "[diffusion]", "its loader gives next tokens"
    if p.engram > 1:
        yield f"parallel.engram = {p.engram}", "its checkpoints hold tables whole"
    if p.stages == 1 and p.stages_per_rank > 1:
        yield f"parallel.stages_per_rank = {p.stages_per_rank}", "it has no schedule on one rank"
    if t.on_nonfinite != "stop":
        yield f'train.on_nonfinite = "{t.on_nonfinite}"', "it leaves no step out"
    if t.explode:
        yield f"train.explode = {t.explode}", "it compares no losses"
    if recipe.checkpoint.keep < 2:
        yield "checkpoint.keep = 1", "it keeps two at least"
    if t.profile:
        yield f'train.profile = "{t.profile}"', "it has a profiler of its own"
    if recipe.metrics.wandb is not None:
        yield f'metrics.wandb = "{recipe.metrics.wandb}"', "it has a logger of its own"
    if recipe.metrics.probes_every:
        yield f"metrics.probes_every = {recipe.metrics.probes_every}", "it measures no streams"
    if RunFolder(Path(recipe.checkpoint.folder)).steps():
        yield f"checkpoint.folder = {recipe.checkpoint.folder}", "it holds checkpoints of the other engine"
