"""The part of a tensor that a rank holds, and the planners that save and load such parts.

torch.distributed.checkpoint works out who writes what (a part that several ranks hold is written once, by the one with
the least to write) and which stored boxes a rank's own part is read from. That is what makes a checkpoint of any number
of ranks loadable on any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Piece:
    """This rank's part of a tensor of shape `shape`: `tensor`, which lies at `offsets`."""

    tensor: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Return the box of the part; nothing where this rank has nothing of a tensor that is not empty."""
        is_absent = self.tensor.numel() == 0 and 0 not in self.shape
        return [] if is_absent else [ChunkStorageMetadata(torch.Size(self.offsets), self.tensor.shape)]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        """Return what is to be written: the coordinator leaves each box with one of its holders."""
        properties = TensorProperties(dtype=self.tensor.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(self.shape)),
            )
            for chunk in self.__create_chunk_list__()
        ]


def piece_of(value: Tensor | Piece) -> Piece:
    """Return what this rank holds of `value`: all of a Tensor, the local part of a DTensor, or the piece itself.

    Raises RuntimeError, of torch, for a DTensor that holds partial sums.
    """
    if isinstance(value, Piece):
        return value
    if isinstance(value, DTensor):
        (chunk,) = value.__create_chunk_list__()
        return Piece(value.to_local(), tuple(chunk.offsets), tuple(value.shape))
    return Piece(value, (0,) * value.ndim, tuple(value.shape))


def copied(pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    """Return the pieces in CPU memory of their own, so that training may change the originals while they are saved."""
    copies = {}
    for name, p in pieces.items():
        # Into pinned memory a GPU copies all of them without waiting in between.
        copy = torch.empty(p.tensor.shape, dtype=p.tensor.dtype, pin_memory=p.tensor.is_cuda)
        copies[name] = Piece(copy.copy_(p.tensor.detach(), non_blocking=p.tensor.is_cuda), p.offsets, p.shape)
    if any(p.tensor.is_cuda for p in pieces.values()):
        torch.cuda.synchronize()
    return copies


class SavePlanner(DefaultSavePlanner):
    """torch's planner for a flat dictionary of pieces."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return the piece's values."""
        return self.state_dict[index.fqn].tensor


class LoadPlanner(DefaultLoadPlanner):
    """torch's planner for a flat dictionary of pieces, whose tensors are filled."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the pieces as they are."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return the tensor to fill."""
        return self.state_dict[index.fqn].tensor
