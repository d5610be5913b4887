"""Check the simulator: measure a small recipe's stages on this machine, predict every schedule, and run it for real.

Every rank is a local process with one thread. For each schedule the ranks build the recipe's stages, then take turns:
all ranks measure the passes of their own stages at the same time, without talking to each other, and all ranks run a
whole step. Means of the passes go into `runtime.plan.simulate`, with a message's time measured between two of the
processes; what comes out is compared with the mean of the steps. Means, because what slows a pass down now and then on
a machine that does other things as well slows a step by as much.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mhc_compile.diagnostics import MHCError
from mhc_compile.integrations.transformers import IDS
from mhc_compile.runtime.engine import Engine, build_engine, splits
from mhc_compile.runtime.launch import World, launch
from mhc_compile.runtime.plan.schedules import SCHEDULES, schedule
from mhc_compile.runtime.plan.simulate import Link, StageCost, simulate
from mhc_compile.runtime.recipe import Recipe, parse_recipe
from mhc_compile.runtime.stage import Stage

ROUNDS = 10
TOLERANCE = 1e-4
"""By which losses of the schedules may differ, relative to the loss: sums in another order."""


def measure(recipe: Recipe, rounds: int = ROUNDS) -> dict[str, Any]:
    """Measure and predict the step of every schedule that the recipe's ranks and microbatches allow.

    Returns, by the schedule's name, `measured` and `predicted` seconds of the passes of a step, the ratios of both to
    1f1b, the `loss` of the first step, and what was measured of the stages. Raises MHC644 for a recipe that has
    replicas, for which this machine has too few processors, or whose processes fail, and MHC643 where the schedules'
    losses differ.
    """
    p = recipe.parallel
    if p.replicas > 1:
        raise MHCError("MHC644", f"parallel.data x parallel.engram = {p.replicas}; one replica is measured")
    if p.stages > (os.cpu_count() or 1):
        raise MHCError("MHC644", f"parallel.stages = {p.stages} ranks on {os.cpu_count()} processors")
    with tempfile.TemporaryDirectory() as folder:
        path, result = Path(folder) / "job.json", Path(folder) / "result.json"
        job = {"recipe": recipe.plain(), "rounds": rounds, "result": str(result)}
        path.write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(p.stages)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "-m", "mhc_compile.runtime.measure_step", str(path)],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode or not result.is_file():
            raise MHCError("MHC644", f"a process failed: {_reason(done.stderr)}")
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    check_losses({name: made["loss"] for name, made in found.items()})
    if "1f1b" in found:
        base = found["1f1b"]
        for made in found.values():
            made["measured_ratio"] = made["measured"] / base["measured"]
            made["predicted_ratio"] = made["predicted"] / base["predicted"]
    return found


def check_losses(losses: Mapping[str, float]) -> None:
    """Raise MHC643 unless all schedules computed the same loss from the same weights and tokens."""
    first = next(iter(losses), None)
    for name, loss in losses.items():
        assert first is not None
        if not abs(loss - losses[first]) <= TOLERANCE * abs(losses[first]):
            raise MHCError("MHC643", f"{name} gives {loss:.8g}, {first} {losses[first]:.8g}")


def show_measured(found: Mapping[str, Any], console: Console) -> None:
    """Print what `measure` returned."""
    table = Table(title="forward and backward passes of a step, in ms; ratios to 1f1b", title_justify="left", box=None)
    for name in ("schedule", "measured", "predicted", "ratio", "predicted ratio", "off by"):
        table.add_column(name, justify="left" if name == "schedule" else "right")
    for name, m in found.items():
        cells = [f"{1e3 * m['measured']:,.0f}", f"{1e3 * m['predicted']:,.0f}"]
        if "measured_ratio" in m:
            off = m["predicted_ratio"] / m["measured_ratio"] - 1
            cells += [f"{m['measured_ratio']:.3f}", f"{m['predicted_ratio']:.3f}", f"{off:+.1%}"]
        table.add_row(name, *cells)
    console.print(table)


def _reason(text: str) -> str:
    """The coded error, or the last line that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if "MHC" in line[:12] or "Error" in line]
    return (said or lines or ["no message"])[-1]


# --- one rank -------------------------------------------------------------------------------------------------------


def _rank(path: Path) -> None:
    job = json.loads(path.read_text(encoding="utf-8"))
    recipe = parse_recipe(job["recipe"], path.parent)
    torch.set_num_threads(1)
    with launch(recipe.parallel) as world:
        engines = {}
        for name, mine in _recipes(recipe).items():
            engines[name] = build_engine(mine, replace(world, parallel=mine.parallel))
            engines[name].compile()
        found = {name: _Measured(engine) for name, engine in engines.items()}
        for number in range(job["rounds"] + 1):
            for measured in found.values():
                measured.round(number)
        link = _link(world, found["1f1b"]) if "1f1b" in found else _link(world, next(iter(found.values())))
        results = {name: measured.result(link) for name, measured in found.items()}
        if world.rank == 0:
            Path(job["result"]).write_text(json.dumps(results), encoding="utf-8")


def _recipes(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe under every schedule that it allows."""
    found: dict[str, Recipe] = {}
    for name in SCHEDULES:
        each = recipe.parallel.stages_per_rank if name == recipe.parallel.schedule else 1 if name == "1f1b" else 2
        balance = recipe.parallel.balance if name == recipe.parallel.schedule else "model"
        try:
            parallel = replace(recipe.parallel, schedule=name, stages_per_rank=each, balance=balance)
            found[name] = replace(recipe, parallel=parallel)
        except MHCError as error:
            if error.code != "MHC604":
                raise
    return found


class _Measured:
    """One schedule's engine on this rank, and the seconds of its passes and steps."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.passes: dict[int, dict[str, list[float]]] = {s.index: {} for s in engine.stages}
        self.steps: list[float] = []
        self.loss = 0.0
        recipe = engine.recipe
        generator = torch.Generator().manual_seed(0)
        config: Any = engine.program.model.config
        shape = (recipe.train.batch, recipe.data.sequence + 1)
        tokens = torch.randint(0, int(config.vocab_size), shape, generator=generator)
        self.batch = {IDS: tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}

    def round(self, number: int) -> None:
        """Measure every pass twice, then a step; the round numbered 0 warms up."""
        self.engine.world.meet()
        for stage in self.engine.stages:
            for _ in range(2):
                seconds = _pass_seconds(stage, self.engine, self.batch)
                for kind, took in seconds.items() if number else ():
                    self.passes[stage.index].setdefault(kind, []).append(took)
        self.engine.optimizer.skip()
        self.engine.world.meet()
        begin = time.perf_counter()
        loss = self.engine.pipeline.step(self.batch)
        dist.barrier(group=self.engine.world.pipe_group)
        if number:
            self.steps.append(time.perf_counter() - begin)
        dist.all_reduce(loss)
        self.loss = float(loss)  # weights stay as they are: the same at every step
        self.engine.optimizer.skip()

    def result(self, link: Link) -> dict[str, Any]:
        """What rank 0 writes down; a collective."""
        engine = self.engine
        mine = {
            str(s.index): {kind: fmean(t) for kind, t in self.passes[s.index].items()} | {"sent": _sent(s)}
            for s in engine.stages
        }
        everyone: list[dict[str, Any]] = [{} for _ in range(engine.world.size)]
        dist.all_gather_object(everyone, {"stages": mine, "step": fmean(self.steps)})
        stages = {int(k): v for rank in everyone for k, v in rank["stages"].items()}
        parallel = engine.recipe.parallel
        costs = [StageCost(**stages[k]) for k in range(parallel.stage_count)]
        made = schedule(
            parallel.schedule,
            ranks=parallel.stages,
            stages_per_rank=parallel.stages_per_rank,
            microbatches=engine.recipe.microbatches,
        )
        return {
            "measured": max(rank["step"] for rank in everyone),
            "predicted": simulate(made, costs, link).seconds,
            "loss": self.loss,
            "stages": [stages[k] for k in range(len(costs))],
            "latency": link.latency,
            "bandwidth": link.bandwidth,
        }


def _pass_seconds(stage: Stage, engine: Engine, batch: Mapping[str, Tensor]) -> dict[str, float]:
    """Of one microbatch: forward; backward, or the two halves of it."""
    size = engine.recipe.train.microbatch
    ids = {name: t[:size] for name, t in batch.items() if name != "labels"}
    inputs = [_made(t, ids) for t in stage.example_inputs]
    begin = time.perf_counter()
    out = stage(*inputs, **ids)
    last = stage.index == stage.count - 1
    if last:
        out = engine.pipeline._loss(out, batch["labels"][:size])
    middle = time.perf_counter()
    results = [out] if last else [t for t in out if t.requires_grad]
    torch.autograd.backward(results, None if last else [torch.full_like(t, 1e-3) for t in results])
    end = time.perf_counter()
    if not splits(engine.recipe):
        return {"forward": middle - begin, "input": end - middle, "weight": 0.0}
    stage.dw_builder()()
    return {"forward": middle - begin, "input": end - middle, "weight": time.perf_counter() - end}


def _made(like: Tensor, ids: Mapping[str, Tensor]) -> Tensor:
    """Real values like what crosses."""
    if not like.is_floating_point():
        return ids[IDS]
    generator = torch.Generator().manual_seed(1)
    return torch.randn(like.shape, generator=generator).to(like.dtype).requires_grad_()


def _sent(stage: Stage) -> int:
    last = stage.index == stage.count - 1
    return 0 if last else sum(t.numel() * t.dtype.itemsize for t in stage.example_outputs)


def _link(world: World, measured: _Measured) -> Link:
    """A message between the first two ranks: a few bytes, and one of the streams'. The same on all ranks."""
    if world.size == 1:
        return Link()
    size = max(_sent(s) for s in measured.engine.stages)
    said = torch.tensor([float(size)])
    dist.all_reduce(said, dist.ReduceOp.MAX)
    size = int(said)
    small, large = (_there_and_back(world, torch.zeros(n, dtype=torch.uint8)) / 2 for n in (8, size))
    times = torch.tensor([small, large], dtype=torch.float64)
    dist.broadcast(times, 0)
    small, large = times.tolist()
    return Link(latency=small, bandwidth=size / max(large - small, 1e-9))


def _there_and_back(world: World, message: Tensor) -> float:
    took = []
    for _ in range(20):
        dist.barrier()
        begin = time.perf_counter()
        if world.rank == 0:
            dist.send(message, 1)
            dist.recv(message, 1)
        elif world.rank == 1:
            dist.recv(message, 0)
            dist.send(message, 0)
        took.append(time.perf_counter() - begin)
    return min(took)  # whatever else the machine does only adds to it


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
