"""torchtitan on CPUs: what it lacks there, and runs of it in several processes."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from mhc_compile.runtime.recipe import Recipe

Runs = dict[str, Recipe]
REASON = "rank-{}.txt"
Train = Callable[[Runs], None]


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


@contextmanager
def ranks() -> Iterator[Train]:
    """A function that trains by every recipe with torchtitan, one after the other, on as many ranks as each wants.

    They are forked from one process, which imports everything once.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_fork, args=(there,), daemon=False)
    process.start()

    def train(runs: Runs) -> None:
        here.send(runs)
        while not here.poll(1):
            assert process.is_alive()
        failed = here.recv()
        assert not failed, failed

    try:
        yield train
    finally:
        here.send(None)
        process.join()


def _fork(pipe: Any) -> None:
    torch.set_num_threads(1)
    patch()
    import torchtitan.trainer  # noqa: F401

    while (runs := pipe.recv()) is not None:
        failed = ""
        for name, recipe in runs.items():
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            children = [os.fork() or _rank(rank, recipe, store.port) for rank in range(recipe.parallel.world)]
            if any([os.waitpid(child, 0)[1] for child in children]):  # noqa: C419  (all of them)
                reasons = sorted(Path(recipe.checkpoint.folder).glob(REASON.format("*")))
                failed = "\n".join([name, *(path.read_text() for path in reasons)])
                break
        pipe.send(failed)


def _rank(rank: int, recipe: Recipe, port: int) -> int:
    from mhc_compile.integrations.torchtitan import train

    where: dict[str, Any] = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True,
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": recipe.parallel.world,
    }  # fmt: skip
    os.environ |= {k: str(v) for k, v in where.items()}
    failed = 0
    try:
        train(recipe)
    except BaseException:  # whatever it was: the process that forked cannot see it
        path = Path(recipe.checkpoint.folder) / REASON.format(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc())
        failed = 1
    sys.stdout.flush()
    os._exit(failed)
