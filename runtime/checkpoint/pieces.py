"""The part of a tensor that a rank holds, and the planners that save and load such parts.

torch.distributed.checkpoint works out who writes what (a part that several ranks hold is written once, by the one with
the least to write) and which stored boxes a rank's own part is read from. That is what makes a checkpoint of any number
of ranks loadable on any other.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Piece:
    """This rank's part of a tensor of shape `shape`: `tensor`, which lies at `offsets`."""

    tensor: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Its box."""
        return ChunkStorageMetadata(torch.Size(self.offsets), self.tensor.shape)

    @property
    def is_absent(self) -> bool:
        """Whether this rank has nothing of a tensor that is not empty."""
        return self.tensor.numel() == 0 and 0 not in self.shape


def piece_of(value: Tensor | Piece) -> Piece:
    """What this rank holds of `value`: all of a Tensor, the local part of a DTensor, or the piece itself.

    Raises RuntimeError, of torch, for a DTensor that holds partial sums.
    """
    if isinstance(value, Piece):
        return value
    if isinstance(value, DTensor):
        (chunk,) = value.__create_chunk_list__()
        return Piece(value.to_local(), tuple(chunk.offsets), tuple(value.shape))
    return Piece(value, (0,) * value.ndim, tuple(value.shape))


def copied(pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    """The same values in memory of their own, on the CPU: what training may change meanwhile is not what is saved."""
    return {
        name: Piece(p.tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format), p.offsets, p.shape)
        for name, p in pieces.items()
    }


class SavePlanner(DefaultSavePlanner):
    """Torch's planner for a flat dictionary of pieces."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """Every piece that this rank holds; the coordinator leaves each with one of its holders."""
        items = [
            WriteItem(
                index=MetadataIndex(name, p.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=p.chunk, properties=TensorProperties(dtype=p.tensor.dtype), size=torch.Size(p.shape)
                ),
            )
            for name, p in self.state_dict.items()
            if not p.is_absent
        ]
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The piece's values."""
        return self.state_dict[index.fqn].tensor


class LoadPlanner(DefaultLoadPlanner):
    """Torch's planner for a flat dictionary of pieces, whose tensors are filled."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the pieces as they are."""
        self.state_dict = self.original_state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """What must be read of which stored boxes."""
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, p in self.state_dict.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            if not p.is_absent:
                items += create_read_items_for_chunk_list(name, stored, [p.chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Where the values go."""
        return self.state_dict[index.fqn].tensor

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:  # noqa: ARG002
        """Refuse: torch's own planner unpickles them, and a checkpoint of ours holds none."""
        raise AssertionError(f"{read_item.dest_index.fqn}: bytes in a checkpoint of tensors")
