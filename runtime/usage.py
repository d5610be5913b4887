"""How well a run uses its devices: the part of their operations, their memory, and torch's profiler."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from mhc_compile.diagnostics import warn
from mhc_compile.passes.flops import node_flops
from mhc_compile.runtime.plan.hardware import KNOWN
from mhc_compile.runtime.program import Program
from mhc_compile.runtime.recipe import Recipe

FOLDER = "profile"
"""The folder of the profiler's traces, beside `metrics.jsonl`."""


def flops_per_token(program: Program, recipe: Recipe) -> float:
    """Return the operations of a training step for each token: the backward pass takes two forward passes.

    Recomputation is not counted, matrix products are.
    """
    return 3 * sum(node_flops(program.graph).values()) / (recipe.train.microbatch * recipe.data.sequence)


def peak_flops(device: torch.device, dtype: str) -> float:
    """Return the operations a second of a device: the published peak, or of an unknown one, measured on matrices."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower()
        if known := next((hardware for key, hardware in KNOWN.items() if key in name), None):
            return known.rate(dtype)
    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=getattr(torch, dtype))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times)


def peak_memory(device: torch.device) -> float:
    """Return the most bytes that a rank's device, or on a CPU its process, has had in use so far. A collective."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
    else:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    most = torch.tensor(float(used), dtype=torch.float64, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return float(most)


def profiler(recipe: Recipe, rank: int, start: int, say: Callable[[str], None]) -> profile:
    """Return torch's profiler over the steps of `train.profile` after `start`; one trace a rank.

    It is stepped after every step. What cannot be written is left out with a warning, MHC607.
    """
    first, last = recipe.train.profiled
    first = max(first, start + 1)
    path = recipe.metrics_folder / FOLDER / f"rank-{rank:05}.json"

    def write(done: profile) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            done.export_chrome_trace(str(path))
        except OSError as error:
            warn("MHC607", f"{path}: {error}")
        else:
            say(f"the profiler's trace is {path}")

    def action(step: int) -> ProfilerAction:
        number = start + 1 + step
        if not first <= number <= last:
            return ProfilerAction.NONE
        return ProfilerAction.RECORD_AND_SAVE if number == last else ProfilerAction.RECORD

    cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return profile(activities=[ProfilerActivity.CPU, *cuda], schedule=action, on_trace_ready=write)
