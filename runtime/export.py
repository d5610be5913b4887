"""The trained model of a run's checkpoint as a Hugging Face folder, in one process, with files in place of memory."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mhc_compile.checkpoint.manifest import NAME as MANIFEST
from mhc_compile.checkpoint.saving import save_pretrained
from mhc_compile.checkpoint.shards import Shard, TensorInfo, copy_file, read_shard
from mhc_compile.checkpoint.source import Checkpoint, companions
from mhc_compile.checkpoint.staging import check_target, staged
from mhc_compile.diagnostics import MHCError
from mhc_compile.memory.parameters import tables
from mhc_compile.memory.rows import FileRows, MappedRows
from mhc_compile.memory.tables import MemoryTable, row_bytes
from mhc_compile.runtime.checkpoint.folder import RunFolder
from mhc_compile.runtime.checkpoint.format import (
    Description,
    StoredChunk,
    chunk_key,
    form_of,
    read_description,
    verify_file,
)
from mhc_compile.runtime.model import hollow_model
from mhc_compile.runtime.recipe import Recipe

CONFIG = "config.json"


def export_checkpoint(recipe: Recipe, out: str | os.PathLike[str]) -> Path:
    """Write the model of the newest checkpoint of `recipe.checkpoint.folder` as the new folder `out`.

    The folder is that of a converted model, for `mhc_compile.from_pretrained`: its weights are the float32 masters, its
    configuration and tokenizer those of `recipe.model.folder`. It appears complete or not at all. Weights are mapped
    from the checkpoint's files, parts of several ranks joined in an unnamed file beside `out`, so that no more than a
    shard of the result is in memory; rows of tables are copied in pieces.

    Raises MHC615 where there is no checkpoint or it is damaged, MHC617 where it is not of the recipe's model, MHC412
    and 413 where `out` cannot be written, and what reading `recipe.model.folder` raises.
    """
    stored = Stored.newest(Path(recipe.checkpoint.folder))
    model = hollow_model(recipe)
    _refuse_another(stored, model)
    source = Path(recipe.model.folder)
    size = sum(shard.size for shard in stored.headers.values())
    target = check_target(Path(out), source, size=size)
    with staged(target) as staging:
        _fill(model, stored, staging.parent)
        # A folder of its own inside: saving replaces the folder that it is given.
        save_pretrained(model, staging / "model")
        for path in (staging / "model").iterdir():
            path.rename(staging / path.name)
        (staging / "model").rmdir()
        _copy_companions(source, staging)
    return target


@dataclass(frozen=True)
class Stored:
    """The newest checkpoint of a run, every file of it checked."""

    folder: Path
    description: Description
    headers: dict[str, Shard]
    """Of its safetensors files, by name."""

    @classmethod
    def newest(cls, path: Path) -> Stored:
        """Open the newest checkpoint. Raises MHC615 where there is none, or it is damaged."""
        run = RunFolder(path)
        steps = run.steps()
        if not steps:
            raise MHCError("MHC615", f"{path} holds no whole checkpoint")
        folder = run.whole(steps[-1])
        description = read_description(folder)
        for name in description.files:
            verify_file(folder, description, name)
        files = {chunk.file for t in description.tensors.values() for chunk in t.chunks}
        return cls(folder, description, {name: read_shard(folder / name) for name in files})

    def place(self, name: str, chunk: StoredChunk) -> TensorInfo:
        """Return where the bytes of a part of tensor `name` lie in its file."""
        return self.headers[chunk.file].tensors[chunk_key(name, chunk.offsets)]

    def tensor(self, name: str, near: Path) -> Tensor:
        """Return a tensor whose memory is a file: the checkpoint's, or one in `near` that joins several parts."""
        stored = self.description.tensors[name]
        parts = [self._part(name, chunk) for chunk in stored.chunks]
        if len(parts) == 1:
            return parts[0]
        dtype = stored.torch_dtype
        size = math.prod(stored.shape) * dtype.itemsize
        with tempfile.TemporaryFile(dir=near) as file:  # without a name: its room is free when the tensor is gone
            raw = np.memmap(file, np.uint8, "w+", shape=(size,))
        whole = torch.from_numpy(raw).view(dtype).view(stored.shape)
        for chunk, part in zip(stored.chunks, parts, strict=True):
            whole[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.shape, strict=True))] = part
        return whole

    def table(self, name: str) -> MemoryTable:
        """Return a table over the checkpoint's files, in which ranks have left runs of whole rows."""
        stored = self.description.tensors[name]
        (rows, width), dtype = stored.shape, stored.torch_dtype
        files = [
            FileRows(self.folder / chunk.file, chunk.shape[0], (self.place(name, chunk).start,))
            for chunk in sorted(stored.chunks, key=lambda c: c.offsets)
        ]
        mapped = MappedRows(files, row_bytes(width, dtype))
        return MemoryTable(rows, width, dtype=dtype, storage="mapped", files=mapped)

    def _part(self, name: str, chunk: StoredChunk) -> Tensor:
        info, dtype = self.place(name, chunk), self.description.tensors[name].torch_dtype
        if info.end == info.start:  # nothing to map
            return torch.empty(chunk.shape, dtype=dtype)
        # Each its own map, which copies what is written to: transformers takes tensors that share one for tied.
        raw = np.memmap(self.folder / chunk.file, np.uint8, "c", offset=info.start, shape=(info.end - info.start,))
        return torch.from_numpy(raw).view(dtype).view(chunk.shape)


def _refuse_another(stored: Stored, model: nn.Module) -> None:
    weights = {
        # A run keeps floating-point parameters as float32 masters, whatever the graph computes in.
        f"model/{name}": form_of(p.shape, torch.float32 if p.is_floating_point() else p.dtype)
        for name, p in _weights(model, stored).items()
    }
    weights |= {f"tables/{name}.weight": form_of((t.rows, t.width), t.dtype) for name, t in tables(model)}
    if differences := stored.description.differences(weights):
        raise MHCError("MHC617", f"{stored.folder}: {'; '.join(differences)}")


def _weights(model: nn.Module, stored: Stored) -> dict[str, Tensor]:
    """Return the parameters that are not of tables, a tied one by its first name, and the buffers that a run moves."""
    of_tables = {id(p) for _, t in tables(model) for p in t.parameters()}
    weights = {name: p for name, p in model.named_parameters() if id(p) not in of_tables}
    moved = {name: b for name, b in model.named_buffers() if f"model/{name}" in stored.description.tensors}
    return weights | moved


def _fill(model: nn.Module, stored: Stored, near: Path) -> None:
    """Put the checkpoint's values, mapped from files, into the place of the model's parameters and tables."""
    values = {p: stored.tensor(f"model/{name}", near) for name, p in _weights(model, stored).items()}
    mapped = {  # a tied weight stays tied
        p: nn.Parameter(value, requires_grad=p.requires_grad)
        for p, value in values.items()
        if isinstance(p, nn.Parameter)
    }
    for name, _ in list(tables(model)):
        parent, _, attribute = name.rpartition(".")
        model.get_submodule(parent).add_module(attribute, stored.table(f"tables/{name}.weight"))
    for module in model.modules():
        module._parameters |= {name: mapped[p] for name, p in module._parameters.items() if p in mapped}
        module._buffers |= {name: values[b] for name, b in module._buffers.items() if b in values}


def _copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, generation settings and the like; `config.json` is the saved model's."""
    paths, _ = companions(Checkpoint(source, {}, (), None, {}))
    for relative in paths:
        if str(relative) in (CONFIG, MANIFEST):
            continue
        (target / relative).unlink(missing_ok=True)
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        copy_file(source / relative, target / relative)
