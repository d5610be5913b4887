"""What a checkpoint of a run says about itself: `checkpoint.json`, and the safetensors files that it names.

    step-00000123/
      checkpoint.json            every tensor: dtype, shape, and which file holds which part of it; progress; hashes
      rank-00000.safetensors     the parts that one rank wrote

Tensors are named `model/NAME`, `optimizer/NAME.exp_avg`, `tables/NAME.weight`, after the parameters of the model as it
is before it is split. Nothing in the folder is unpickled: torch.distributed.checkpoint's own metadata file, which is a
pickle, is not used.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, TypeAdapter
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

from mhc_compile.checkpoint.shards import CHUNK, DTYPES, TensorInfo, header, read_shard, sha256, sync
from mhc_compile.diagnostics import MHCError
from mhc_compile.parameters import names
from mhc_compile.versions import VERSION

NAME = "checkpoint.json"
FORMAT = 1
"""Raised when an older reader could not make sense of the folder."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


Sizes = tuple[NonNegativeInt, ...]


@dataclass(frozen=True)
class StoredFile:
    """A file of the folder as it was written."""

    bytes: NonNegativeInt
    sha256: str


@dataclass(frozen=True)
class StoredChunk:
    """A box of a tensor, which lies in one file."""

    offsets: Sizes
    shape: Sizes
    file: str


@dataclass(frozen=True)
class StoredTensor:
    """A tensor, whose chunks cover it without an overlap."""

    dtype: str
    """As safetensors spells it."""
    shape: Sizes
    chunks: tuple[StoredChunk, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.dtype!r} is no dtype")
        for c in self.chunks:
            ends = [o + n for o, n in zip(c.offsets, c.shape, strict=True)]
            if any(end > size for end, size in zip(ends, self.shape, strict=True)):
                raise ValueError("a part of a tensor lies outside of it")
        if sum(math.prod(c.shape) for c in self.chunks) != math.prod(self.shape) or not self.chunks:
            raise ValueError("the parts of a tensor do not cover it")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype."""
        return DTYPES[self.dtype]

    @property
    def metadata(self) -> TensorStorageMetadata:
        """The tensor as torch's planner reads it."""
        chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.shape)) for c in self.chunks]
        return TensorStorageMetadata(TensorProperties(dtype=self.torch_dtype), torch.Size(self.shape), chunks)


@dataclass(frozen=True, kw_only=True)
class Description:
    """The contents of `checkpoint.json`."""

    step: NonNegativeInt
    """Optimizer steps done."""
    world: NonNegativeInt
    """Ranks that wrote it."""
    progress: dict[str, Any]
    """Plain JSON: the position in the data, the recipe, whatever the run needs to go on."""
    files: dict[str, StoredFile]
    tensors: dict[str, StoredTensor]

    def __post_init__(self) -> None:
        if strange := [n for n in self.files if Path(n).name != n or Path(n).suffix != ".safetensors"]:
            raise ValueError(f"{strange[0]!r} is not a file of a checkpoint")
        if absent := {c.file for t in self.tensors.values() for c in t.chunks} - self.files.keys():
            raise ValueError(f"{absent} are not listed")

    def differences(self, weights: Mapping[str, str]) -> list[str]:
        """Return how the stored weights differ from `weights`, whose values are `form_of` them."""
        stored = {
            name: form_of(t.shape, t.torch_dtype)
            for name, t in self.tensors.items()
            if not name.startswith("optimizer/")
        }
        common = sorted(weights.keys() & stored.keys())
        kinds = {
            "only here: ": sorted(weights.keys() - stored.keys()),
            "only in the checkpoint: ": sorted(stored.keys() - weights.keys()),
            "": [f"{n} is {stored[n]} there and {weights[n]} here" for n in common if stored[n] != weights[n]],
        }
        return [f"{kind}{names(which)}" for kind, which in kinds.items() if which]

    def text(self) -> str:
        """Return the file's contents."""
        content = {"format": FORMAT, "mhc_compile": VERSION, **asdict(self)}
        return json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def form_of(shape: Sequence[int], dtype: torch.dtype) -> str:
    """Return a tensor's shape and dtype as text."""
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


def chunk_key(name: str, offsets: Iterable[int]) -> str:
    """Return the name of a tensor's part inside its file."""
    places = list(offsets)
    return f"{name}@{','.join(map(str, places))}" if any(places) else name


def read_description(folder: Path) -> Description:
    """Read `checkpoint.json`. Raises MHC615 where it is missing or damaged, MHC619 where it is of another format."""
    path = folder / NAME
    try:
        text = path.read_bytes()
        content = json.loads(text)
        if content["format"] != FORMAT:
            detail = f"{path}: format {content['format']!r}, this version reads {FORMAT}"
            raise MHCError("MHC619", detail, way_out="use the version of mhc-compile that wrote it, or a later one")
        digest = content.pop("sha256", None)  # folders of earlier versions have none
        if digest is not None and digest != _digest(content):
            raise ValueError("it is not what was written (sha256)")
        return TypeAdapter(Description).validate_json(text, strict=True)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise MHCError("MHC615", f"{path}: {type(error).__name__} {error}") from error


def verify_file(folder: Path, description: Description, name: str) -> None:
    """Compare a file with what was written: its length, its sha256, and the tensors in it.

    Raises MHC615 where it is missing or differs.
    """
    said, path = description.files[name], folder / name
    try:
        if (size := path.stat().st_size) != said.bytes:
            raise MHCError("MHC615", f"{path} has {size:,} bytes, {said.bytes:,} were written")
        if sha256(path) != said.sha256:
            raise MHCError("MHC615", f"{path} is not the file that was written (sha256)")
        tensors = read_shard(path).tensors
    except OSError as error:
        raise MHCError("MHC615", f"{path}: {error.strerror}") from error
    except MHCError as error:
        raise error if error.code == "MHC615" else MHCError("MHC615", error.detail) from error
    for tensor_name, tensor in description.tensors.items():
        for chunk in (c for c in tensor.chunks if c.file == name):
            info = tensors.get(chunk_key(tensor_name, chunk.offsets))
            if info is None or (info.dtype, info.shape) != (tensor.dtype, chunk.shape):
                raise MHCError("MHC615", f"{path} does not hold the part of {tensor_name} that {NAME} names")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> StoredFile:
    """Write a safetensors file to the disk itself, a piece of a tensor in memory at a time."""
    # Wider elements first: each tensor then begins at a multiple of its element size, as mapping it wants.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    head = header([(name, TensorInfo(NAMES[t.dtype], tuple(t.shape), 0, t.nbytes)) for name, t in ordered])
    digest = hashlib.sha256()
    with path.open("xb") as out:
        for piece in _pieces(head, (t for _, t in ordered)):
            out.write(piece)
            digest.update(piece)
        sync(out)
        return StoredFile(out.tell(), digest.hexdigest())


def _pieces(head: bytes, tensors: Iterable[Tensor]) -> Iterable[Any]:
    yield head
    for t in tensors:
        flat = t.detach().contiguous().reshape(-1)
        step = CHUNK // t.dtype.itemsize
        for begin in range(0, flat.numel(), step):
            raw: Any = flat[begin : begin + step].cpu().view(torch.uint8).numpy()
            yield memoryview(raw)
