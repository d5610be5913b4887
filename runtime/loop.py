"""A training run from its recipe: data, steps, evaluations, figures, checkpoints, and going on from the last one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from mhc_compile.diagnostics import MHCError
from mhc_compile.parameters import owners
from mhc_compile.runtime.checkpoint.checkpoints import Checkpoints
from mhc_compile.runtime.data.loader import Loader, check_tokenizer
from mhc_compile.runtime.data.shards import open_data
from mhc_compile.runtime.data.tokenizer import model_positions
from mhc_compile.runtime.denoiser import Denoiser
from mhc_compile.runtime.engine import Engine, build_engine
from mhc_compile.runtime.evaluate import evaluate
from mhc_compile.runtime.experts import imbalance
from mhc_compile.runtime.guard import Guard
from mhc_compile.runtime.launch import World, launch
from mhc_compile.runtime.metrics import Metrics, check_writers
from mhc_compile.runtime.probes import stream_figures
from mhc_compile.runtime.recipe import Recipe
from mhc_compile.runtime.schedules import TARGETS
from mhc_compile.runtime.state import restore, training_state
from mhc_compile.runtime.summary import summary
from mhc_compile.runtime.usage import flops_per_token, peak_flops, peak_memory, profiler


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int
    """Optimizer steps done, those of earlier starts included."""
    loss: float | None
    """Of the last step done now; None where there was nothing to do."""
    ended: Literal["done", "stopped"]
    """`stopped`: by SIGTERM, with a checkpoint to resume from."""


def train(recipe: Recipe, *, accept_changes: bool = False, console: Console | None = None) -> Result:
    """Run the recipe in this process, one rank of `recipe.parallel.world`, from its newest checkpoint if there is one.

    `accept_changes`: go on from a checkpoint of a recipe with other data or another course of training; other data are
    read from their beginning, and a batch of another size begins where the last one ended. `console`: where the first
    rank prints, by default standard output.

    Everything that a user can get wrong is checked before the first step. SIGTERM ends the run after the current step,
    with a checkpoint.

    Raises what `launch`, `build_engine`, `Loader`, `check_tokenizer`, `Checkpoints`, `restore` and `Guard` raise.
    """
    with ExitStack() as stack:
        stop = stack.enter_context(_stop_signal())
        world = stack.enter_context(launch(recipe.parallel))
        check_data(recipe)
        check_writers(recipe.metrics)
        loader = stack.enter_context(open_loader(recipe, world.replica, recipe.data.folders, recipe.data.workers))
        held_out = None
        if recipe.train.evaluate_every and recipe.data.validation is not None:
            held_out = stack.enter_context(open_loader(recipe, world.replica, (recipe.data.validation,), 0))
        console = console or Console(highlight=False, soft_wrap=True)
        console.quiet |= world.rank > 0
        checkpoints = Checkpoints(
            recipe.checkpoint.folder,
            every=recipe.checkpoint.every,
            keep=recipe.checkpoint.keep,
            asynchronous=recipe.checkpoint.asynchronous,
            timeout=recipe.parallel.patience,
        )
        stack.push(_closing(checkpoints, world))
        resumes = checkpoints.latest() is not None
        if not resumes:
            with world.patience("reading the data"):
                verify_data(recipe, world.rank, world.parallel.world)
        engine = build_engine(recipe, world, weights=not resumes)
        console.print("\n".join(summary(recipe, engine.program, engine.starts)))
        run = _Run(engine, loader, held_out, checkpoints, stop)
        start = run.restore(accept_changes=accept_changes) if resumes else 0
        if resumes:
            console.print(f"resuming after step {start:,} of {recipe.train.steps:,}")
        if start >= recipe.train.steps:
            return Result(start, None, "done")
        engine.compile(console.print)
        metrics = Metrics(
            recipe.metrics_folder,
            total_steps=recipe.train.steps,
            start=start,
            shows=world.rank == 0,
            tensorboard=recipe.metrics.tensorboard,
            wandb=recipe.metrics.wandb,
            recipe=recipe.plain(),
            devices=world.parallel.world,
            console=console,
        )
        if metrics.shows:
            metrics.flops = flops_per_token(engine.program, recipe)
            metrics.peak = peak_flops(world.device, recipe.model.dtype) * world.parallel.world
        return run.steps(start, stack.enter_context(metrics))


def check_data(recipe: Recipe) -> None:
    """Raise MHC611 to 614 where the data are damaged, too few, or made with another tokenizer than the model's.

    Raises MHC602 for sequences longer than the model's positions.

    With `[diffusion]` also what `Denoiser` raises.
    """
    if recipe.diffusion is not None:
        Denoiser(recipe, 0)
    longest = model_positions(recipe.model.folder)
    if longest is not None and recipe.data.sequence > longest:
        detail = f"data.sequence = {recipe.data.sequence}; wanted: at most {longest}, the positions of the model"
        raise MHCError("MHC602", detail, way_out="change max_position_embeddings in config.json if it may read more")
    d = recipe.data
    folders = (*d.folders, *([d.validation] if d.validation is not None else []))
    for folder in folders:
        check_tokenizer(folder, recipe.model.folder)
    if len({open_data(folder).tokenizer for folder in folders}) > 1:
        raise MHCError("MHC612", f"{', '.join(folders)}: not all of one tokenizer")
    for together in (d.folders, *((one,) for one in folders[len(d.folders) :])):
        loader = open_loader(recipe, 0, together, 0)
        loader.close()
        if recipe.diffusion is not None and loader.weighs:
            raise MHCError("MHC602", f"[diffusion] with the masks of {', '.join(together)}", way_out="leave one out")


def verify_data(recipe: Recipe, rank: int = 0, ranks: int = 1) -> None:
    """Read all data, or a rank's share of them, once. Raises MHC611 where their bytes are not those written."""
    for folder in (*recipe.data.folders, recipe.data.validation):
        if folder is not None:
            open_data(folder).verify(rank, ranks)


class _Run:
    """The steps of a run."""

    def __init__(
        self,
        engine: Engine,
        loader: Loader,
        held_out: Loader | None,
        checkpoints: Checkpoints,
        stop: threading.Event,
    ) -> None:
        self.engine, self.recipe, self.world = engine, engine.recipe, engine.world
        self.loader, self.held_out, self.checkpoints, self.stop = loader, held_out, checkpoints, stop
        train = self.recipe.train
        self.guard = Guard(train.on_nonfinite, self.recipe.checkpoint.folder, explode=train.explode)

    def restore(self, *, accept_changes: bool) -> int:
        """Restore everything from the newest checkpoint; return its step."""
        engine, here = self.engine, self._progress(0)
        with self.world.patience("reading the checkpoint"):
            there = restore(self.checkpoints, engine.stages, engine.optimizer, here, accept_changes=accept_changes)
        assert there is not None, "there is a checkpoint"
        self.guard.load_state(there["guard"])
        step = int(there["step"])
        same_data = there["data"]["data"] == here["data"]["data"]
        self.loader.resume(step, int(there["samples"]) if same_data else 0)
        return step

    def steps(self, start: int, metrics: Metrics) -> Result:
        """Run the steps after `start`, to the last one or to a signal."""
        recipe, optimizer = self.recipe, self.engine.optimizer
        ended: Literal["done", "stopped"] = "done"
        with profiler(recipe, self.world.rank, start, metrics.say) as profiling:
            for step in range(start + 1, recipe.train.steps + 1):
                batch = self.loader.batch(step - 1)
                result = self.engine.gradients(batch, step, stop=self.stop.is_set())
                verdict = self.guard.check(
                    step,
                    result.loss,
                    result.norm,
                    batch if self.world.pipe == 0 else None,
                    {"step": step, "replica": self.world.replica, **self.loader.describe()},
                )
                figures = {"loss": result.loss, "grad_norm": result.norm}
                if self.engine.program.auxiliary:
                    figures["auxiliary_loss"] = result.auxiliary
                if verdict == "ok":
                    figures["lr"] = self.engine.update(step, result)
                else:
                    optimizer.skip()
                metrics.progress(step, result.loss, recipe.train.batch * recipe.data.sequence)
                self._measure(step, batch, figures, metrics, result.loads)
                profiling.step()
                if result.stop or step == recipe.train.steps or self.checkpoints.due(step):
                    state = training_state(self.engine.stages, optimizer, self._progress(step))
                    with self.world.patience(f"saving after step {step}"):
                        self.checkpoints.save(step, state)
                if result.stop and step < recipe.train.steps:
                    metrics.say(f"stopped after step {step}; the same command resumes from there")
                    ended = "stopped"
                    break
        with self.world.patience("writing the last checkpoint"):
            self.checkpoints.wait()
        return Result(step, result.loss, ended)

    def _measure(
        self,
        step: int,
        batch: dict[str, Tensor],
        figures: dict[str, float],
        metrics: Metrics,
        loads: Mapping[str, Tensor],
    ) -> None:
        """Evaluate, measure and log where the recipe says so."""
        recipe = self.recipe
        last = step == recipe.train.steps
        due = step % recipe.metrics.every == 0 or last
        if self.held_out is not None and (step % recipe.train.evaluate_every == 0 or last):
            figures["evaluation_loss"] = evaluate(self.engine, self.held_out, recipe.train.evaluate_batches, step)
            due = True
        if recipe.metrics.probes_every and step % recipe.metrics.probes_every == 0:
            rows = {name: t[: recipe.train.microbatch] for name, t in batch.items() if name not in TARGETS}
            with self.world.patience(f"measuring the streams after step {step}"):
                figures |= stream_figures(self.engine.stages, rows, self.world.pipe_group)
            due = True
        if due:
            with self.world.doing("figures of all ranks", step):
                figures["peak_memory"] = peak_memory(self.world.device)
            lists = {f"expert_load/{name}": load.tolist() for name, load in loads.items()}
            metrics.log(step, figures | imbalance(loads), lists)

    def _progress(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint says besides tensors, see `training_state`."""
        streams = {
            owner: {"spec": str(parameters.spec), "sites": list(parameters.sites)}
            for owner, parameters in owners(self.engine.program.model).items()
        }
        return {
            "step": step,
            "model": streams,
            "data": self.loader.describe(),
            "samples": self.loader.samples_before(step),
            "settled": self.recipe.settled,
            "guard": self.guard.state(),
            "recipe": self.recipe.plain(),
        }


def _closing(checkpoints: Checkpoints, world: World) -> Callable[[Any, BaseException | None, Any], None]:
    """Return an exit callback that finishes the present save, unless a rank is lost, for which no other may wait."""

    def end(_: Any, error: BaseException | None, __: Any) -> None:
        if error is None:
            checkpoints.close()
        elif isinstance(error, MHCError) and error.code != "MHC605":
            with suppress(MHCError):  # of a save that failed, which has warned: the first error is the one to report
                checkpoints.close()
        elif world.rank == 0:
            checkpoints.folder.release()

    return end


def open_loader(recipe: Recipe, replica: int, folders: Sequence[str], workers: int) -> Loader:
    """Return the batches of one replica from folders of the recipe, mixed."""
    return Loader(
        folders,
        weights=recipe.data.weights if len(folders) > 1 else (),
        sequence=recipe.data.sequence,
        batch=recipe.train.batch,
        seed=recipe.data.seed,
        replicas=recipe.parallel.replicas,
        replica=replica,
        workers=workers,
        documents=recipe.data.documents,
        pin=torch.cuda.is_available(),
    )


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets. A second signal changes nothing: a scheduler and torchrun may both send one."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
