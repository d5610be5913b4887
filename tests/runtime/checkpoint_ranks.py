"""What each rank does in tests of checkpoints: a model whose every value follows from its name, cut in any way."""

from __future__ import annotations

import resource
import signal
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mhc_compile import MHCError, TableAdamW
from mhc_compile.memory.sharded import ShardedTable
from mhc_compile.memory.tables import MemoryTable
from mhc_compile.runtime.checkpoint.checkpoints import Checkpoints, _pieces
from mhc_compile.runtime.checkpoint.folder import RunFolder
from mhc_compile.runtime.checkpoint.pieces import piece_of
from mhc_compile.runtime.state import _piece, restore, training_state

Cut = tuple[int, int, int]
"""Stages, data replicas, shards of the tables."""
SHAPES = {"embed.weight": (7, 4), **{f"layers.{i}.weight": (10, 3) for i in range(4)}, "scale": ()}
ROWS, WIDTH = 11, 4


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    """The values of a tensor of this name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if name.endswith("row_step"):
        return torch.randint(0, 50, shape, generator=generator, dtype=torch.int32)
    return torch.randn(shape, generator=generator)


class Part:
    """A stage: its share of the layers, and what both ends tie."""

    def __init__(self, stage: int, stages: int, mesh: DeviceMesh | None) -> None:
        own = [i for i in range(4) if i * stages // 4 == stage]
        names = ["embed.weight", "scale", *(f"layers.{i}.weight" for i in own)]
        self.parameters: dict[str, nn.Parameter] = {}
        for name in names:
            p: Tensor = torch.zeros(SHAPES[name])
            if mesh is not None and name.startswith("layers"):
                p = distribute_tensor(p, mesh["data", "engram"], [Shard(0), Replicate()])
            self.parameters[name] = nn.Parameter(p)
        self.tables: dict[str, MemoryTable] = {}
        if stage == 0:
            if mesh is not None and mesh["engram"].size() > 1:
                self.tables["memory.table"] = ShardedTable(ROWS, WIDTH, mesh["engram"].get_group(), device="cpu")
            else:
                self.tables["memory.table"] = MemoryTable(ROWS, WIDTH, device="cpu")
            self.tables["memory.table"].weight.data.zero_()

    def named_parameters(self) -> Any:
        yield from self.parameters.items()
        for name, table in self.tables.items():
            yield f"{name}.weight", table.weight


def build(cut: Cut) -> tuple[Part, torch.optim.Optimizer]:
    """This rank's stage, all zero, and an optimizer without state."""
    mesh = None
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", cut, mesh_dim_names=("pipe", "data", "engram"))
    stage = 0 if mesh is None else mesh["pipe"].get_local_rank()
    part = Part(stage, cut[0], mesh)
    groups: list[dict[str, Any]] = [{"params": list(part.parameters.values())}]
    if part.tables:
        groups.append({"params": [t.weight for t in part.tables.values()], "table": True})
    return part, TableAdamW(groups, lr=0.1)


def fill(part: Part, optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter but `scale` its values, and the moments of a few steps."""
    for name, p in part.named_parameters():
        table = part.tables.get(name.removesuffix(".weight"))
        _set(name, p, table)
        if name == "scale":  # has never had a gradient
            continue
        like = {"dtype": torch.float32, "requires_grad": False}
        state = optimizer.state[p]
        state["step"] = torch.tensor(3.0)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.empty_like(p, **like)
            _set(f"{name}.{key}", state[key], table)
        if table is not None:
            state["row_step"] = torch.empty(p.shape[0], dtype=torch.int32)
            _set(f"{name}.row_step", state["row_step"], table)


def wrong(part: Part, optimizer: torch.optim.Optimizer) -> list[str]:
    """What this rank holds that is not what its name says."""
    found = []
    for name, p in part.named_parameters():
        table = part.tables.get(name.removesuffix(".weight"))
        held = {name: p, **{f"{name}.{k}": t for k, t in optimizer.state.get(p, {}).items() if k != "step"}}
        wanted = 1 if name == "scale" else 3 + (table is not None)
        if len(held) != wanted or (name != "scale" and float(optimizer.state[p]["step"]) != 3.0):
            found.append(f"{name} has {sorted(held)}")
        if isinstance(p, DTensor):
            found += [n for n, t in held.items() if not isinstance(t, DTensor)]
        found += [n for n, t in held.items() if not torch.equal(_local(t, table), _expected(n, t, table))]
    return found


def save(cut: Cut, folder: str, asynchronous: bool) -> list[str]:
    """Save step 7 on these ranks, what they held when `save` was called; return what this one copies and writes."""
    part, optimizer = build(cut)
    fill(part, optimizer)
    checkpoints = Checkpoints(folder, asynchronous=asynchronous, timeout=60)
    state = training_state([part], optimizer, {"data": {"seed": 1}})
    own = [f"{name}{piece.offsets}" for name, piece in checkpoints._own(_pieces(state)).items() if piece.tensor.numel()]
    checkpoints.save(7, state)
    with torch.no_grad():
        for _, p in part.named_parameters():
            p.zero_()
    checkpoints.close()
    return own


def load(cut: Cut, folder: str) -> list[str]:
    """Load on these ranks; what is wrong."""
    part, optimizer = build(cut)
    checkpoints = Checkpoints(folder, timeout=60)
    found = restore(checkpoints, [part], optimizer, {"data": {"seed": 1}})
    checkpoints.close()
    assert found == {"data": {"seed": 1}}
    return wrong(part, optimizer)


def troubles(cut: Cut, folder: str) -> dict[str, Any]:
    """One rank's disk is full during the second save; then a file of the third is damaged, then the data differ."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    part, optimizer = build(cut)
    fill(part, optimizer)
    checkpoints = Checkpoints(folder, every=2, keep=2, timeout=60)
    said: dict[str, Any] = {"due": [s for s in range(5) if checkpoints.due(s)]}
    state = training_state([part], optimizer, {"data": {"seed": 1}})
    checkpoints.save(1, state)
    checkpoints.wait()
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        checkpoints.save(2, state)
        checkpoints.wait()
    said["warned"] = [str(w.message) for w in told]
    said["after full"] = checkpoints.latest()
    said["close"] = _code(checkpoints.close)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    checkpoints = Checkpoints(folder, every=2, keep=2, timeout=60)
    for step in (3, 4, 5):
        checkpoints.save(step, state)
    checkpoints.wait()
    said["kept"] = sorted(p.name for p in Path(folder).iterdir())
    said["other data"] = _code(lambda: restore(checkpoints, [part], optimizer, {"data": {"seed": 2}}))
    if dist.get_rank() == 0:
        file = Path(folder, "step-00000005", "rank-00001.safetensors")
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    dist.barrier()
    said["damaged"] = _code(lambda: restore(checkpoints, [part], optimizer, {"data": {"seed": 1}}))
    said["set aside"] = sorted(p.name for p in Path(folder).iterdir())
    checkpoints.close()
    return said


def _code(fn: Any) -> str:
    try:
        fn()
    except MHCError as error:
        return error.code
    return ""


def _local(t: Tensor, table: MemoryTable | None) -> Tensor:
    return _piece(t.detach(), table).tensor


def _expected(name: str, t: Tensor, table: MemoryTable | None) -> Tensor:
    piece = _piece(t.detach(), table) if table is not None else piece_of(t.detach())
    whole = value(name, piece.shape)
    return whole[tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.tensor.shape, strict=True))]


@torch.no_grad()
def _set(name: str, t: Tensor, table: MemoryTable | None) -> None:
    _local(t, table).copy_(_expected(name, t, table))


def claim(folder: str) -> str:
    """What another process is told that wants the folder of a run."""
    try:
        RunFolder(Path(folder)).claim()
    except MHCError as error:
        return f"{error.code} {error.detail}"
    return ""
