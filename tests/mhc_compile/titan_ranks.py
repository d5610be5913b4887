"""torchtitan on CPUs: what it lacks there, and runs of it in several processes; started by file path."""

from __future__ import annotations

import os
import sys
import traceback
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mhc_compile.runtime.recipe import Recipe


def patch() -> None:
    """Let torchtitan 0.3 run on a CPU. It asks at its import which device there is."""
    torch._utils._get_available_device_type = lambda: "cpu"
    # Of the device module it wants what only accelerators have: for its figures,
    torch.cpu.get_device_name = lambda *_: "cpu"
    torch.cpu.get_device_properties = lambda *_: SimpleNamespace(total_memory=1 << 34)
    torch.cpu.reset_peak_memory_stats = torch.cpu.empty_cache = lambda *_: None
    torch.cpu.memory_stats = lambda *_: {}
    # and for a barrier, a number.
    torch.cpu.current_device = lambda: 0


def on_ranks(runs: dict[str, Recipe]) -> None:
    """Train by every recipe with torchtitan, one after the other, in as many processes as the largest needs."""
    world = max(r.parallel.world for r in runs.values())
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in runs]
    mp.start_processes(_rank, (runs, [store.port for store in stores]), nprocs=world, start_method="spawn")


def _rank(rank: int, runs: dict[str, Recipe], ports: list[int]) -> None:
    torch.set_num_threads(1)
    patch()
    import torchtitan.trainer  # noqa: F401  (once for all runs)

    from mhc_compile.integrations.torchtitan import train

    for port, (name, recipe) in zip(ports, runs.items(), strict=True):
        if rank >= recipe.parallel.world:
            continue
        if pid := os.fork():  # a trainer has its process to itself
            if os.waitpid(pid, 0)[1]:
                raise RuntimeError(f"{name} failed on rank {rank}")
            continue
        where: dict[str, Any] = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True,
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": recipe.parallel.world,
        }  # fmt: skip
        os.environ |= {k: str(v) for k, v in where.items()}
        failed = 0
        try:
            train(recipe)
        except BaseException:  # whatever it was: the parent cannot see it
            print(f"{name}, rank {rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            failed = 1
        sys.stdout.flush()
        os._exit(failed)
