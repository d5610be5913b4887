"""The state of a run as checkpoints hold it, and putting it back, whatever the number of stages and replicas."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mhc_compile.diagnostics import MHCError
from mhc_compile.memory.sharded import ShardedTable
from mhc_compile.memory.tables import MemoryTable
from mhc_compile.parameters import names
from mhc_compile.runtime.checkpoint.checkpoints import Checkpoints, State
from mhc_compile.runtime.checkpoint.format import Description
from mhc_compile.runtime.checkpoint.pieces import Piece, piece_of

SAME = ("model", "data")
"""What of a run's progress must be the same in a checkpoint that it goes on from, where both say it."""


class Part(Protocol):
    """What is asked of a pipeline stage: parameters under the names of the unsplit model, and tables by name."""

    tables: dict[str, MemoryTable]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module; the weights of tables may be among them."""


def training_state(stages: Sequence[Part], optimizer: torch.optim.Optimizer, progress: Mapping[str, Any]) -> State:
    """What `Checkpoints.save` takes: this rank's parameters, the optimizer's tensors for them, and its random states.

    `progress`: plain JSON, of which `model` (what the graph computes beyond shapes: conventions, sites) and `data` (the
    loader's description) must be the same wherever the run is gone on from. Nothing is copied here.
    """
    weights = _held(stages)
    state: State = {"model": {}, "optimizer": {}, "tables": {}, "progress": dict(progress), "random": random_state()}
    for name, ((p, *_), table) in weights.items():
        state["tables" if table else "model"][name] = _piece(p.detach(), table)
        for key, value in optimizer.state.get(p, {}).items():
            state["optimizer"][f"{name}.{key}"] = _piece(value, table)
    return state


def restore(
    checkpoints: Checkpoints,
    stages: Sequence[Part],
    optimizer: torch.optim.Optimizer,
    progress: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Go on from the newest checkpoint, in place; returns its progress, or None where there is none. A collective.

    The checkpoint may come from any number of ranks. Random states return where as many ranks saved them; otherwise
    each rank's generators are seeded by step and rank.

    Raises MHC615 for a missing or damaged file, MHC617 where the checkpoint is of another model or of other data, on
    all ranks alike and before anything is changed.
    """
    description = checkpoints.open()
    if description is None:
        return None
    weights = _held(stages)
    given: dict[str, Piece] = {}
    for name, ((p, *_), table) in weights.items():
        given[f"{'tables' if table else 'model'}/{name}"] = _piece(p.detach(), table)
    _refuse_another(checkpoints, description, given, progress)
    state: State = {"model": {}, "tables": {}, "optimizer": {}}
    for full, piece in given.items():
        section, _, name = full.partition("/")
        state[section][name] = piece
    moments: dict[str, list[str]] = {}
    for full in description.tensors:
        section, _, rest = full.partition("/")
        name, _, key = rest.rpartition(".")
        if section == "optimizer":
            moments.setdefault(name, []).append(key)
    for name, ((p, *_), table) in weights.items():
        for key in moments.get(name, []):
            stored = description.tensors[f"optimizer/{name}.{key}"]
            value = optimizer.state[p][key] = _like(p, table, stored.shape, stored.dtype)
            state["optimizer"][f"{name}.{key}"] = _piece(value, table)
    step = checkpoints.load(state)
    with torch.no_grad():
        for (p, *others), _ in weights.values():
            for other in others:
                other.copy_(p)
                if p in optimizer.state:
                    optimizer.state[other] = {key: t.clone() for key, t in optimizer.state[p].items()}
    if state["random"] is not None:
        set_random_state(state["random"])
    else:
        _seed(step, checkpoints.rank)
    found: dict[str, Any] = state["progress"]
    return found


def random_state() -> dict[str, Any]:
    """The generators of python, numpy and torch as plain JSON."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _hex(torch.get_rng_state()),
        "cuda": [_hex(t) for t in cuda],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put `random_state()` back."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_bytes(text) for text in state["cuda"]])


def _seed(step: int, rank: int) -> None:
    seed = (step * 1_000_003 + rank) & (2**63 - 1)
    random.seed(seed)
    np.random.seed(seed & (2**32 - 1))
    torch.manual_seed(seed)


def _held(stages: Sequence[Part]) -> dict[str, tuple[list[nn.Parameter], MemoryTable | None]]:
    """Every parameter by name, with its table where it is one's.

    A tied one may be there more than once, of several stages, with the same values.
    """
    tables = {name: t for stage in stages for name, t in stage.tables.items() if t.storage != "mapped"}
    found: dict[str, tuple[list[nn.Parameter], MemoryTable | None]] = {
        f"{name}.{n}": ([p], t) for name, t in tables.items() for n, p in t.named_parameters()
    }
    for stage in stages:
        for name, p in stage.named_parameters():
            held, _ = found.setdefault(name, ([], None))
            if all(p is not other for other in held):
                held.append(p)
    return found


def _piece(value: Tensor, table: MemoryTable | None) -> Piece:
    """This rank's part of a tensor; those of a table's weight and moments are runs of rows."""
    if table is None or value.ndim == 0:
        return piece_of(value)
    first = table.begin if isinstance(table, ShardedTable) else 0
    return Piece(value, (first, *(0 for _ in value.shape[1:])), (table.rows, *value.shape[1:]))


def _like(p: nn.Parameter, table: MemoryTable | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Room for a tensor of the optimizer that has `shape` over all ranks: laid out as `p`, rows as its rows."""
    if shape == tuple(p.shape) and table is None:
        return torch.empty_like(p, dtype=dtype, requires_grad=False, memory_format=torch.preserve_format)
    if table is not None and shape:
        return torch.empty((p.shape[0], *shape[1:]), dtype=dtype, device=p.device)
    return torch.empty(shape, dtype=dtype)


def _refuse_another(
    checkpoints: Checkpoints, description: Description, given: Mapping[str, Piece], progress: Mapping[str, Any]
) -> None:
    """Raises MHC617, with both sides, where names, shapes, dtypes or what `SAME` names differ."""
    own: dict[str, tuple[tuple[int, ...], str]] = {}
    for part in checkpoints.gather({name: (p.shape, _dtype(p.tensor.dtype)) for name, p in given.items()}):
        own.update(part)
    there = {
        name: (t.shape, _dtype(t.dtype)) for name, t in description.tensors.items() if not name.startswith("optimizer/")
    }
    said = []
    if lost := sorted(own.keys() - there.keys()):
        said.append(f"only in this run: {names(lost)}")
    if more := sorted(there.keys() - own.keys()):
        said.append(f"only in the checkpoint: {names(more)}")
    if wrong := sorted(name for name in own.keys() & there.keys() if own[name] != there[name]):
        one = [f"{n} is {list(there[n][0])} {there[n][1]} there and {list(own[n][0])} {own[n][1]} here" for n in wrong]
        said.append(names(one))
    for section in SAME:
        if section in progress and section in description.progress:
            said += list(_differences(section, description.progress[section], _plain(progress[section])))
    if said:
        folder = checkpoints.folder.whole(description.step)
        raise MHCError("MHC617", f"{folder}: {'; '.join(said)}")


def _differences(path: str, there: Any, here: Any) -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted({*there, *here}):
            yield from _differences(f"{path}.{key}", there.get(key), here.get(key))
    elif there != here:
        yield f"{path} is {there!r} there and {here!r} here"


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _hex(state: Tensor) -> str:
    raw: Any = state.cpu().numpy()
    return raw.tobytes().hex()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8).clone()
