"""A rank of a small run under torchrun that is killed now and then: by itself where the plan says so, or by the test.

    fault_worker.py FOLDER STEPS EVERY SECONDS PLAN

PLAN: JSON, `[[rank, step, when], ...]`, each done once in the life of FOLDER. `when`: `step` in the midst of one,
`write` while the checkpoint of that step is written, `publish` before it gets its name, `prune` while an old one goes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mhc_compile.runtime.checkpoint import folder as checkpoint_folder
from mhc_compile.runtime.checkpoint import storage
from mhc_compile.runtime.checkpoint.checkpoints import Checkpoints
from mhc_compile.runtime.rendezvous import fresh_store
from mhc_compile.runtime.state import restore, training_state

HIDDEN = 64


class Part(nn.Module):
    """Layers that all ranks hold, and one that each rank has to itself, as a stage has."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tables: dict[str, Any] = {}
        self.shared = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Dropout(0.1))
        torch.manual_seed(1 + rank)
        self.add_module(f"own{rank}", nn.Linear(HIDDEN, HIDDEN))
        self.rank = rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(f"own{self.rank}")(self.shared(x)).square().mean()


def main(folder: Path, steps: int, every: int, seconds: float, plan: list[list[Any]]) -> None:
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = fresh_store(rank, size, timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    part = Part(rank)
    optimizer = torch.optim.AdamW(part.parameters(), lr=1e-2)
    checkpoints = Checkpoints(folder / "run", every=every, keep=2, timeout=60)
    dies = [(step, when) for who, step, when in plan if who == rank]
    arm(folder / f"died-{rank}", dies)
    found = restore(checkpoints, [part], optimizer, {"data": {"seed": 0}})
    begin = 0 if found is None else found["step"]
    if rank == 0:
        log(folder / "starts", [begin, sorted(p.name for p in (folder / "run").glob("step-*"))])
    for step in range(begin, steps):
        x = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(1000 * step + rank))
        torch.manual_seed(1000 * step + rank)  # of dropout
        loss = part(x)
        loss.backward()
        for p in part.shared.parameters():
            dist.all_reduce(p.grad)
        if (step, "step") in dies:
            die(folder / f"died-{rank}", step, "step")
        optimizer.step()
        optimizer.zero_grad()
        log(folder / f"losses-{rank}", [step, loss.item().hex()])
        if checkpoints.due(step + 1):
            checkpoints.save(step + 1, training_state([part], optimizer, {"step": step + 1, "data": {"seed": 0}}))
        time.sleep(seconds)
    checkpoints.close()
    dist.destroy_process_group()


def arm(marker: Path, dies: list[tuple[int, str]]) -> None:
    """Wrap what saves call, so that the process dies there."""
    write, publish, remove = storage.write_tensors, checkpoint_folder.RunFolder.publish, checkpoint_folder.shutil.rmtree
    now = -1

    def dying_write(path: Path, tensors: Any) -> Any:
        stored = write(path, tensors)
        step = int(path.parent.name.split("-")[1].split(".")[0])
        if (step, "write") in dies:
            die(marker, step, "write", lambda: os.truncate(path, stored.size // 2))
        return stored

    def dying_publish(self: Any, step: int, keep: int) -> None:
        nonlocal now
        if (step, "publish") in dies:
            die(marker, step, "publish")
        now = step
        publish(self, step, keep)

    def dying_remove(path: Path, **how: Any) -> None:
        if (now, "prune") in dies and str(path).endswith(".removed"):
            die(marker, now, "prune", lambda: next(iter(sorted(path.iterdir()))).unlink())
        remove(path, **how)

    storage.write_tensors = dying_write
    checkpoint_folder.RunFolder.publish = dying_publish  # type: ignore[method-assign]
    checkpoint_folder.shutil.rmtree = dying_remove  # type: ignore[assignment]


def die(marker: Path, step: int, when: str, first: Callable[[], Any] = lambda: None) -> None:
    """Do `first` and end this process as a crash does, unless it has died so before."""
    try:
        Path(f"{marker}-{step}-{when}").touch(exist_ok=False)
    except FileExistsError:
        return
    first()
    os.kill(os.getpid(), signal.SIGKILL)


def log(path: Path, line: Any) -> None:
    """Append a line of JSON at once."""
    with path.open("a") as out:
        out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), json.loads(sys.argv[5]))
