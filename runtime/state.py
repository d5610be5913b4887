"""The state of a run as checkpoints hold it, and putting it back, whatever the number of stages and replicas.

Random states are none of it: what a step draws depends on the seed, the step and the rank alone (`Engine.gradients`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mhc_compile.diagnostics import MHCError
from mhc_compile.memory.sharded import ShardedTable
from mhc_compile.memory.tables import MemoryTable
from mhc_compile.runtime.checkpoint.checkpoints import Checkpoints, State
from mhc_compile.runtime.checkpoint.format import Description, form_of
from mhc_compile.runtime.checkpoint.pieces import Piece, piece_of

SAME = ("model",)
"""What of a run's progress must be the same in a checkpoint that it resumes from, where both say it."""
ASKED = ("data", "settled")
"""What may differ if the user says so."""


Weight = tuple[list[nn.Parameter], MemoryTable | None]
"""The parameters of one name, and the table that they belong to, if any."""


class Part(Protocol):
    """A pipeline stage: parameters under the names of the unsplit model, and tables by name."""

    tables: dict[str, MemoryTable]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield parameters as any module does; the weights of tables may be among them."""


def training_state(stages: Sequence[Part], optimizer: torch.optim.Optimizer, progress: Mapping[str, Any]) -> State:
    """Return what `Checkpoints.save` takes: this rank's parameters and the optimizer's tensors for them.

    `progress`: plain JSON, of which `model` (what the graph computes beyond shapes: conventions, sites) must be the
    same wherever the run is resumed; so must `data` (the loader's description) and `settled` (fields of the recipe)
    where the user does not want them changed. Nothing is copied here.
    """
    weights = _held(stages)
    state = _weights_of(weights)
    for name, ((p, *_), table) in weights.items():
        for key, value in optimizer.state.get(p, {}).items():
            state["optimizer"][f"{name}.{key}"] = _piece(value, table)
    return {**state, "progress": dict(progress)}


def restore(
    checkpoints: Checkpoints,
    stages: Sequence[Part],
    optimizer: torch.optim.Optimizer,
    progress: Mapping[str, Any],
    *,
    accept_changes: bool = False,
) -> dict[str, Any] | None:
    """Resume from the newest checkpoint, in place; return its progress, or None without a checkpoint. A collective.

    The checkpoint may come from any number of ranks.

    Raises MHC615 for a missing or damaged file, MHC617 where the checkpoint is of another model, and MHC608 where its
    data or recipe are others and no `accept_changes` says that they may be; on all ranks alike and before anything is
    changed.
    """
    description = checkpoints.open()
    if description is None:
        return None
    weights = _held(stages)
    state = _weights_of(weights)
    pieces = {f"{section}/{name}": piece for section in state for name, piece in state[section].items()}
    _refuse_another(checkpoints, description, pieces, progress)
    if changes := [] if accept_changes else _changes(description, progress, ASKED):
        raise MHCError("MHC608", f"{checkpoints.folder.whole(description.step)}: {'; '.join(changes)}")
    for full, stored in description.tensors.items():
        section, _, moment = full.partition("/")
        name, _, key = moment.rpartition(".")
        if section == "optimizer" and name in weights:
            (p, *_), table = weights[name]
            value = optimizer.state[p][key] = _like(p, table, stored.shape, stored.torch_dtype)
            state["optimizer"][moment] = _piece(value, table)
    checkpoints.load(description, state)
    with torch.no_grad():
        for (p, *others), _ in weights.values():
            for other in others:
                other.copy_(p)
                if p in optimizer.state:
                    optimizer.state[other] = {key: t.clone() for key, t in optimizer.state[p].items()}
    return description.progress


def _weights_of(weights: Mapping[str, Weight]) -> State:
    state: State = {"model": {}, "tables": {}, "optimizer": {}}
    for name, ((p, *_), table) in weights.items():
        state["tables" if table else "model"][name] = _piece(p.detach(), table)
    return state


def _held(stages: Sequence[Part]) -> dict[str, Weight]:
    """Return every parameter by name, with its table where it is one's.

    A tied one may be there more than once, of several stages, with the same values.
    """
    tables = {name: t for stage in stages for name, t in stage.tables.items() if t.storage != "mapped"}
    weights: dict[str, Weight] = {
        f"{name}.{n}": ([p], t) for name, t in tables.items() for n, p in t.named_parameters()
    }
    for stage in stages:
        for name, p in stage.named_parameters():
            parameters, _ = weights.setdefault(name, ([], None))
            if all(p is not other for other in parameters):
                parameters.append(p)
    return weights


def _piece(value: Tensor, table: MemoryTable | None) -> Piece:
    """Return this rank's part of a tensor; those of a table's weight and moments are runs of rows."""
    if table is None or value.ndim == 0:
        return piece_of(value)
    first = table.begin if isinstance(table, ShardedTable) else 0
    return Piece(value, (first, *(0 for _ in value.shape[1:])), (table.rows, *value.shape[1:]))


def _like(p: nn.Parameter, table: MemoryTable | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an empty tensor for a moment that has `shape` over all ranks: laid out as `p`, rows as its rows."""
    if shape == tuple(p.shape) and table is None:
        return torch.empty_like(p, dtype=dtype, requires_grad=False, memory_format=torch.preserve_format)
    if table is not None and shape:
        return torch.empty((p.shape[0], *shape[1:]), dtype=dtype, device=p.device)
    return torch.empty(shape, dtype=dtype)


def _refuse_another(
    checkpoints: Checkpoints, description: Description, pieces: Mapping[str, Piece], progress: Mapping[str, Any]
) -> None:
    """Raise MHC617, with both sides, where names, shapes, dtypes or what `SAME` names differ."""
    by_rank = checkpoints.gather({name: form_of(p.shape, p.tensor.dtype) for name, p in pieces.items()})
    differences = description.differences({name: form for forms in by_rank for name, form in forms.items()})
    differences += _changes(description, progress, SAME)
    if differences:
        folder = checkpoints.folder.whole(description.step)
        raise MHCError("MHC617", f"{folder}: {'; '.join(differences)}")


def _changes(description: Description, progress: Mapping[str, Any], sections: Sequence[str]) -> list[str]:
    """Return what differs between a checkpoint's progress and this run's."""
    here = json.loads(json.dumps(progress))  # as the checkpoint has it: tuples are lists
    both = (section for section in sections if section in here and section in description.progress)
    return [d for name in both for d in _differences(name, description.progress[name], here[name])]


def _differences(path: str, there: Any, here: Any) -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted({*there, *here}):
            within = key if path == "settled" else f"{path}.{key}"  # by the names that a recipe has
            yield from _differences(within, there.get(key), here.get(key))
    elif there != here:
        yield f"{path} is {there!r} there and {here!r} here"
