"""Where torch.distributed.checkpoint puts its parts: one safetensors file a rank, described in JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from mhc_compile.checkpoint.shards import write_text
from mhc_compile.runtime.checkpoint.format import (
    NAME,
    NAMES,
    Description,
    StoredChunk,
    StoredFile,
    StoredTensor,
    chunk_key,
    write_tensors,
)


class _Folder:
    """What torch asks of a storage, of one that is used once and whose constructor takes the folder."""

    def reset(self, checkpoint_id: Any = None) -> None:
        """Do nothing."""

    def prepare_local_plan(self, plan: Any) -> Any:
        """Return `plan`."""
        return plan

    def prepare_global_plan(self, plans: Any) -> Any:
        """Return `plans`."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:  # noqa: ARG003
        """Return False."""
        return False


class Writer(_Folder, StorageWriter):
    """Writes into `folder`, which the coordinator makes; `publish()` is called there when all ranks have written.

    `progress`: plain JSON, of which the coordinator's is kept.
    """

    def __init__(
        self, folder: Path, *, step: int, rank: int, world: int, progress: dict[str, Any], publish: Callable[[], None]
    ) -> None:
        self.folder, self.step, self.rank, self.world = folder, step, rank, world
        self.progress, self.publish = progress, publish

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        """Make the folder; the other ranks write only after the coordinator has answered."""
        if is_coordinator:
            self.folder.mkdir()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file to the disk itself."""
        results: list[WriteResult] = []
        if plan.items:
            tensors: Any = {chunk_key(i.index.fqn, i.index.offset or ()): planner.resolve_data(i) for i in plan.items}
            name = f"rank-{self.rank:05d}.safetensors"
            stored = name, write_tensors(self.folder / name, tensors)
            results = [WriteResult(item.index, stored[1].bytes, stored) for item in plan.items]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Describe what all ranks wrote, and publish it."""
        where: dict[MetadataIndex, tuple[str, StoredFile]] = {
            r.index: r.storage_data for of_rank in results for r in of_rank
        }
        tensors = {}
        for name, t in metadata.state_dict_metadata.items():
            assert isinstance(t, TensorStorageMetadata)
            chunks = (
                StoredChunk(tuple(c.offsets), tuple(c.sizes), where[MetadataIndex(name, c.offsets)][0])
                for c in t.chunks
            )
            tensors[name] = StoredTensor(NAMES[t.properties.dtype], tuple(t.size), tuple(chunks))
        description = Description(
            step=self.step,
            world=self.world,
            progress=self.progress,
            files=dict(where.values()),
            tensors=tensors,
        )
        write_text(self.folder / NAME, description.text())
        self.publish()


class Reader(_Folder, StorageReader):
    """Reads the boxes that a plan asks for out of the files of a checkpoint whose description was read."""

    def __init__(self, folder: Path, description: Description) -> None:
        self.folder, self.description = folder, description

    def read_metadata(self) -> Metadata:
        """Return the description as torch's planner reads it."""
        return Metadata({name: t.metadata for name, t in self.description.tensors.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Do nothing: the files are opened as they are read."""

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
