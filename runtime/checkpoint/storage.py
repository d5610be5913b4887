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
    StorageMeta,
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
    write_json,
    write_tensors,
)


class Writer(StorageWriter):
    """Writes into `folder`, which the coordinator makes; `publish()` is called there when all ranks have written.

    `progress` is the coordinator's, `random` each rank's own; both are plain JSON.
    """

    def __init__(
        self,
        folder: Path,
        *,
        step: int,
        rank: int,
        world: int,
        progress: dict[str, Any],
        random: dict[str, Any] | None,
        publish: Callable[[], None],
    ) -> None:
        self.folder, self.step, self.rank, self.world = folder, step, rank, world
        self.progress, self.random, self.publish = progress, random, publish

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A writer writes once."""

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        """Make the folder; the other ranks write only after the coordinator has answered."""
        if is_coordinator:
            self.folder.mkdir()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files to the disk itself."""
        found: list[WriteResult] = []
        if plan.items:
            tensors: Any = {chunk_key(i.index.fqn, i.index.offset or ()): planner.resolve_data(i) for i in plan.items}
            stored = write_tensors(self.folder / f"rank-{self.rank:05d}.safetensors", tensors)
            found += [WriteResult(item.index, stored.size, stored) for item in plan.items]
        if self.random is not None:
            stored = write_json(self.folder / random_name(self.rank), self.random)
            found.append(WriteResult(MetadataIndex(stored.name), stored.size, stored))
        future: Future[list[WriteResult]] = Future()
        future.set_result(found)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Describe what all ranks wrote, and publish it."""
        where: dict[MetadataIndex, StoredFile] = {r.index: r.storage_data for given in results for r in given}
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

    def storage_meta(self) -> StorageMeta | None:
        """None."""
        return None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003
        """Folders are given to the constructor."""
        return False


class Reader(StorageReader):
    """Reads the boxes that a plan asks for out of the files of a checkpoint whose description was read."""

    def __init__(self, folder: Path, description: Description) -> None:
        self.folder, self.description = folder, description

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A reader reads once."""

    def read_metadata(self) -> Metadata:
        """The description in torch's words."""
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
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read file by file, only the bytes that are asked for."""
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
        """Folders are given to the constructor."""
        return False


def random_name(rank: int) -> str:
    """The file of a rank's random states."""
    return f"rank-{rank:05d}.json"
