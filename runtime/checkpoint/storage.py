"""Where torch.distributed.checkpoint puts its parts: one safetensors file a rank, described in JSON."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Size
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from mhc_compile.checkpoint.shards import write_text
from mhc_compile.runtime.checkpoint.format import (
    NAME,
    Description,
    StoredChunk,
    StoredFile,
    StoredTensor,
    chunk_key,
    write_tensors,
)


class Writer(StorageWriter):
    """Writes into `folder`, which the coordinator makes; `publish()` is called there when all ranks have written.

    `progress`: plain JSON, of which the coordinator's is kept.
    """

    def __init__(
        self, folder: Path, *, step: int, rank: int, world: int, progress: dict[str, Any], publish: Callable[[], None]
    ) -> None:
        self.folder, self.step, self.rank, self.world = folder, step, rank, world
        self.progress, self.publish = progress, publish

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a writer writes once."""

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        """Make the folder; the other ranks write only after the coordinator has answered."""
        if is_coordinator:
            self.folder.mkdir()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return `plan`."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Return `plans`."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file to the disk itself."""
        results: list[WriteResult] = []
        if plan.items:
            tensors: Any = {chunk_key(i.index.fqn, i.index.offset or ()): planner.resolve_data(i) for i in plan.items}
            stored = write_tensors(self.folder / f"rank-{self.rank:05d}.safetensors", tensors)
            results = [WriteResult(item.index, stored.size, stored) for item in plan.items]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Describe what all ranks wrote, and publish it."""
        where: dict[MetadataIndex, StoredFile] = {r.index: r.storage_data for of_rank in results for r in of_rank}
        tensors = {}
        for name, t in metadata.state_dict_metadata.items():
            assert isinstance(t, TensorStorageMetadata)
            chunks = [
                StoredChunk(tuple(c.offsets), tuple(c.sizes), where[MetadataIndex(name, c.offsets)].name)
                for c in t.chunks
            ]
            tensors[name] = StoredTensor(t.properties.dtype, tuple(t.size), tuple(chunks))
        description = Description(
            step=self.step,
            world=self.world,
            progress=self.progress,
            files={f.name: f for f in where.values()},
            tensors=tensors,
        )
        write_text(self.folder / NAME, description.text())
        self.publish()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003
        """Return False: the constructor takes the folder."""
        return False


class Reader(StorageReader):
    """Reads the boxes that a plan asks for out of the files of a checkpoint whose description was read."""

    def __init__(self, folder: Path, description: Description) -> None:
        self.folder, self.description = folder, description

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a reader reads once."""

    def read_metadata(self) -> Metadata:
        """Return the description in torch's words."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=t.dtype),
                    Size(t.shape),
                    [ChunkStorageMetadata(Size(c.offsets), Size(c.shape)) for c in t.chunks],
                )
                for name, t in self.description.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Do nothing: the files are opened as they are read."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return `plan`."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return `plans`."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read only the bytes that are asked for, file by file."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            chunks = self.description.tensors[item.storage_index.fqn].chunks
            at = tuple(item.storage_index.offset or ())
            by_file.setdefault(next(c.file for c in chunks if c.offsets == at), []).append(item)
        for name, items in by_file.items():
            with safe_open(self.folder / name, framework="pt") as file:
                for item in items:
                    index = item.storage_index
                    stored = file.get_slice(chunk_key(index.fqn, index.offset or ()))
                    box = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(stored[box])
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003
        """Return False: the constructor takes the folder."""
        return False
