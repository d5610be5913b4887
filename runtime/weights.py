"""Weights of stages: drawn from a seed, or read from a checkpoint folder, for each stage its tensors alone."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mhc_compile.checkpoint.manifest import is_converted
from mhc_compile.checkpoint.saving import prefix
from mhc_compile.checkpoint.source import open_checkpoint
from mhc_compile.checkpoint.table_files import fill_rows
from mhc_compile.checkpoint.tables import table_name
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.forms import head_values, start_values
from mhc_compile.kernels.start import Start
from mhc_compile.loading import open_converted
from mhc_compile.memory.parameters import DEVIATION, lookup_values
from mhc_compile.memory.parameters import Start as MemoryStart
from mhc_compile.memory.tables import MemoryTable
from mhc_compile.parameters import StreamParameters, names, owners
from mhc_compile.runtime.model import stored_values
from mhc_compile.runtime.program import Program
from mhc_compile.runtime.stage import Stage


def assign(parameter: Tensor, value: Tensor) -> None:
    """Set `parameter` to the whole `value`, or a sharded one (DTensor) to its part of it, without communication."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            whole = value.to(parameter.device, parameter.dtype)
            value = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)


def initialise(stages: Sequence[Stage], program: Program, seed: int) -> None:
    """Draw every value as the model's own code starts it, streams and memories as for a model trained from scratch.

    What a parameter becomes depends on `seed` and its module's name, not on how the model is cut. Raises MHC622 for a
    parameter to which the model's code gives no value.
    """
    for stage in stages:
        for path, parameters in _by_module(stage).items():
            values = _start_of_streams(program, path, seed, scratch=True) or _start_of_module(program, path, seed)
            for name, p in parameters.items():
                assign(p, values[name])
        for name, table in stage.tables.items():
            table.start(seed_of(seed, name), DEVIATION)


def load_folder(stages: Sequence[Stage], program: Program, folder: Path, seed: int) -> None:
    """Read the stages' own tensors from a converted folder, or from a residual one: streams then start at what keeps
    its function, memories at zero and their rows as `seed` draws them.

    Raises MHC401 to 407 and 414 for a folder that cannot be read, MHC404 for a tensor of another shape, and MHC622 for
    tensors that are not there.
    """
    converted = is_converted(folder)
    checkpoint = open_converted(folder)[0] if converted else open_checkpoint(folder)
    wanted: dict[str, list[nn.Parameter]] = {}
    for stage in stages:
        for path, parameters in _by_module(stage).items():
            start = None if converted else _start_of_streams(program, path, seed, scratch=False)
            for name, p in parameters.items():
                if start is not None:
                    assign(p, start[name])
                else:
                    wanted.setdefault(f"{path}.{name}" if path else name, []).append(p)
    for name, value in stored_values(checkpoint, wanted):
        for p in wanted.pop(name):
            if value.shape != p.shape:
                raise MHCError("MHC404", f"{name} is {list(value.shape)}, the configuration wants {list(p.shape)}")
            assign(p, value)
    if wanted:
        raise MHCError("MHC622", f"{checkpoint.folder} has no {names(sorted(wanted))}")
    for stage in stages:
        for name, table in stage.tables.items():
            if converted:
                _read_table(folder, program, name, table)
            else:
                table.start(seed_of(seed, name), DEVIATION)


def _by_module(stage: Stage) -> dict[str, dict[str, nn.Parameter]]:
    """Return the stage's parameters by the path of their module and their name in it, without those of tables."""
    parameters: dict[str, dict[str, nn.Parameter]] = {}
    for name, p in stage.named_parameters():
        path, _, attribute = name.rpartition(".")
        if path not in stage.tables:
            parameters.setdefault(path, {})[attribute] = p
    return parameters


def seed_of(*parts: int | str) -> int:
    """Return a seed that depends on all of the parts and is the same in every process."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:7], "little")


def _start_of_module(program: Program, path: str, seed: int) -> dict[str, Tensor]:
    """Return the values with which the model's own code starts the parameters of one module."""
    hollow = program.model.get_submodule(path)
    module = copy.copy(hollow)
    module._parameters = {
        name: None if p is None else nn.Parameter(torch.full(p.shape, torch.nan, device="cpu"))
        for name, p in hollow._parameters.items()
    }
    draw = getattr(program.model, "_init_weights", None)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed_of(seed, path))
        if callable(draw):
            draw(module)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    values = {name: t.detach() for name, t in (module._parameters | module._buffers).items() if t is not None}
    if unset := [name for name, value in values.items() if value.isnan().any()]:
        way_out = "save a checkpoint with transformers' own start, and train with model.start = 'checkpoint'"
        raise MHCError("MHC622", f"nothing starts {path}.{unset[0]}", module=path, way_out=way_out)
    return values


def _start_of_streams(program: Program, path: str, seed: int, *, scratch: bool) -> dict[str, Tensor] | None:
    """Return the start of the stream parameters at `path`; None for a path that is not below an owner's `mhc`."""
    for owner, parameters in owners(program.model).items():
        root = prefix(owner)
        if f"{path}.".startswith(root):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(seed, path))
                return _stream_values(parameters, path.removeprefix(root), replace(parameters.start, scratch=scratch))
    return None


def _stream_values(parameters: StreamParameters, place: str, start: Start) -> dict[str, Tensor]:
    spec, hidden = parameters.spec, parameters.hidden
    if place in parameters.sites:
        index = list(parameters.sites).index(place)
        return start_values(spec, index, parameters.sites[place], start)
    if place == "head":
        return head_values(spec, len(parameters.sites), hidden, start)
    of_memory: MemoryStart = "paper" if start.scratch else "zero"
    return lookup_values(parameters.memories, spec.streams, hidden, start=of_memory)[place]()


def _read_table(folder: Path, program: Program, name: str, table: MemoryTable) -> None:
    """Fill a table, or the rows of it that this rank holds, from the folder's files."""
    for owner, parameters in owners(program.model).items():
        for table_of, spec in parameters.memories.tables.items():
            if name == f"{prefix(owner)}{spec.place}.table":
                fill_rows(table, folder, table_name(owner, table_of), hash_spec=spec.found_by)
