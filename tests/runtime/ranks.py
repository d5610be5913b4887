"""Run a function on several ranks of a gloo group, in processes forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed.checkpoint", "mhc_compile.runtime.state"])


def run_ranks(world: int, fn: Callable[..., Any], folder: Path, *args: Any, timeout: float = 300.0) -> list[Any]:
    """`fn(*args)` on each of `world` ranks; what each returned, or the text of what it raised, as an exception.

    `folder` takes the file by which the ranks find each other.
    """
    meeting = folder / f"meeting-{os.urandom(4).hex()}"
    answers = CONTEXT.SimpleQueue()
    processes = [
        CONTEXT.Process(target=_rank, args=(rank, world, str(meeting), fn, args, answers)) for rank in range(world)
    ]
    for p in processes:
        p.start()
    try:
        for p in processes:
            p.join(timeout)
            assert p.exitcode == 0, f"exit code {p.exitcode}"
        found = dict(answers.get() for _ in processes)
    finally:
        for p in processes:
            p.kill()
    for rank in range(world):
        good, value = found[rank]
        assert good, f"rank {rank}: {value}"
    return [found[rank][1] for rank in range(world)]


def _rank(rank: int, world: int, meeting: str, fn: Callable[..., Any], args: tuple[Any, ...], answers: Any) -> None:
    torch.set_num_threads(1)
    try:
        if world > 1:
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
        answer = (True, fn(*args))
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:  # whatever it was, the test is to see it
        answer = (False, traceback.format_exc())
    answers.put((rank, answer))
