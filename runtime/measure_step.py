"""Check the simulator: measure a small recipe's stages on this machine, predict every schedule, and run it for real.

Every rank is a local process with one thread. For each schedule all ranks measure the passes of their stages at the
same time, without messages, and in turn run whole steps. The means of the passes, and the time of a message between two
processes, go into `runtime.plan.simulate`; the result is compared with the mean of the steps.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
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
from mhc_compile.runtime.plan.compare import with_schedule
from mhc_compile.runtime.plan.schedules import schedule
from mhc_compile.runtime.plan.simulate import Link, StageCost, simulate
from mhc_compile.runtime.recipe import Recipe, parse_recipe
from mhc_compile.runtime.recipe_tables import SCHEDULES
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
        schedules: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    check_losses({name: measured["loss"] for name, measured in schedules.items()})
    if base := schedules.get("1f1b"):
        for measured in schedules.values():
            measured |= {f"{kind}_ratio": measured[kind] / base[kind] for kind in ("measured", "predicted")}
    return schedules


def check_losses(losses: Mapping[str, float]) -> None:
    """Raise MHC643 unless all schedules computed the same loss from the same weights and tokens."""
    (first, expected), *others = losses.items()
    for name, loss in others:
        if not math.isclose(loss, expected, rel_tol=TOLERANCE):
            raise MHCError("MHC643", f"{name} gives {loss:.8g}, {first} {expected:.8g}")


def show_measured(schedules: Mapping[str, Any], console: Console) -> None:
    """Print what `measure` returned."""
    table = Table(title="forward and backward passes of a step, in ms; ratios to 1f1b", title_justify="left", box=None)
    for name in ("schedule", "measured", "predicted", "ratio", "predicted ratio", "off by"):
        table.add_column(name, justify="left" if name == "schedule" else "right")
    for name, m in schedules.items():
        cells = [f"{1e3 * m['measured']:,.0f}", f"{1e3 * m['predicted']:,.0f}"]
        if "measured_ratio" in m:
            off = m["predicted_ratio"] / m["measured_ratio"] - 1
            cells += [f"{m['measured_ratio']:.3f}", f"{m['predicted_ratio']:.3f}", f"{off:+.1%}"]
        table.add_row(name, *cells)
    console.print(table)


def _reason(text: str) -> str:
    """Return the coded error, or the last line that says what went wrong."""
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
        schedules = {name: _Measured(engine) for name, engine in engines.items()}
        for number in range(job["rounds"] + 1):
            for measured in schedules.values():
                measured.round(number)
        link = _link(world, next(iter(schedules.values())))
        results = {name: measured.result(link) for name, measured in schedules.items()}
        if world.rank == 0:
            Path(job["result"]).write_text(json.dumps(results), encoding="utf-8")


def _recipes(recipe: Recipe) -> dict[str, Recipe]:
    """Return the recipe under every schedule that it allows."""
    recipes: dict[str, Recipe] = {}
    for name in SCHEDULES:
        with suppress(MHCError):
            recipes[name] = replace(recipe, parallel=with_schedule(recipe.parallel, name))
    return recipes


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
        self.loss = float(loss[0])  # weights stay as they are: the same at every step
        self.engine.optimizer.skip()

    def result(self, link: Link) -> dict[str, Any]:
        """Return what rank 0 writes down; a collective."""
        engine = self.engine
        mine = {
            s.index: {kind: fmean(t) for kind, t in self.passes[s.index].items()} | {"sent": _sent(s)}
            for s in engine.stages
        }
        everyone: list[Any] = [None] * engine.world.parallel.world
        dist.all_gather_object(everyone, (mine, fmean(self.steps)))
        by_index = {index: stage for stages, _ in everyone for index, stage in stages.items()}
        stages = [by_index[index] for index in sorted(by_index)]
        p = engine.recipe.parallel
        planned = schedule(
            p.schedule, ranks=p.stages, stages_per_rank=p.stages_per_rank, microbatches=engine.recipe.microbatches
        )
        return {
            "measured": max(seconds for _, seconds in everyone),
            "predicted": simulate(planned, [StageCost(**stage) for stage in stages], link).seconds,
            "loss": self.loss,
            "stages": stages,
            **asdict(link),
        }


def _pass_seconds(stage: Stage, engine: Engine, batch: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the seconds of one microbatch's forward and of its backward, or of the two halves of it."""
    size = engine.recipe.train.microbatch
    ids = batch[IDS][:size]
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(t.shape, generator=generator).to(t.dtype).requires_grad_() if t.is_floating_point() else ids
        for t in stage.example_inputs
    ]
    begin = time.perf_counter()
    out = stage(*inputs, **{IDS: ids})
    last = stage.index == stage.count - 1
    if last:
        out = engine.pipeline._loss(out, batch["labels"][:size])
    middle = time.perf_counter()
    results = [out] if last else [t for t in out if t.requires_grad]
    torch.autograd.backward(results, None if last else [torch.full_like(t, 1e-3) for t in results])
    end = time.perf_counter()
    stage.dw_builder()()  # nothing to do where the backward was not split
    weight = time.perf_counter() - end if splits(engine.recipe) else 0.0
    return {"forward": middle - begin, "input": end - middle, "weight": weight}


def _sent(stage: Stage) -> int:
    last = stage.index == stage.count - 1
    return 0 if last else sum(t.nbytes for t in stage.example_outputs)


def _link(world: World, measured: _Measured) -> Link:
    """Measure the link between the first two ranks by a message of a few bytes and one of the streams' size.

    The result is the same on all ranks.
    """
    if world.parallel.world == 1:
        return Link()
    size = max(_sent(s) for s in measured.engine.stages)
    largest = torch.tensor(size)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    size = int(largest)
    times = torch.tensor(
        [_round_trip(world, torch.zeros(n, dtype=torch.uint8)) / 2 for n in (8, size)], dtype=torch.float64
    )
    dist.broadcast(times, 0)
    small, large = times.tolist()
    return Link(latency=small, bandwidth=size / max(large - small, 1e-9))


def _round_trip(world: World, message: Tensor) -> float:
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
