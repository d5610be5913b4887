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
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

from mhc_compile.checkpoint.shards import CHUNK, DTYPES, read_shard, sha256, sync
from mhc_compile.diagnostics import MHCError
from mhc_compile.parameters import names
from mhc_compile.versions import VERSION

NAME = "checkpoint.json"
FORMAT = 1
"""Raised when an older reader could not make sense of the folder."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredFile:
    """A file of the folder as it was written."""

    name: str
    size: int
    """Bytes."""
    sha256: str


@dataclass
class StoredChunk(ChunkStorageMetadata):
    """A box of a tensor, which lies in one file."""

    file: str


@dataclass(frozen=True, kw_only=True)
class Description:
    """The contents of `checkpoint.json`."""

    step: int
    """Optimizer steps done."""
    world: int
    """Ranks that wrote it."""
    progress: dict[str, Any]
    """Plain JSON: the position in the data, the recipe, whatever the run needs to go on."""
    files: dict[str, StoredFile]
    tensors: dict[str, TensorStorageMetadata]
    """With `StoredChunk`s, which cover a tensor without an overlap."""

    def differences(self, weights: Mapping[str, str]) -> list[str]:
        """Return how the stored weights differ from `weights`, whose values are `form_of` them."""
        stored = {
            name: form_of(t.size, t.properties.dtype)
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
        tensors = {
            name: {
                "dtype": _NAMES[t.properties.dtype],
                "shape": t.size,
                "chunks": [{"offsets": c.offsets, "shape": c.sizes, "file": file_of(c)} for c in t.chunks],
            }
            for name, t in self.tensors.items()
        }
        files = {f.name: {"bytes": f.size, "sha256": f.sha256} for f in self.files.values()}
        content = {"format": FORMAT, "mhc_compile": VERSION, "step": self.step, "world": self.world}
        content |= {"progress": self.progress, "files": files, "tensors": tensors}
        return json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_of(chunk: ChunkStorageMetadata) -> str:
    """Return the file in which a stored box lies."""
    assert isinstance(chunk, StoredChunk)
    return chunk.file


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
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            detail = f"{path}: format {content['format']!r}, this version reads {FORMAT}"
            raise MHCError("MHC619", detail, way_out="use the version of mhc-compile that wrote it, or a later one")
        digest = content.pop("sha256", None)  # folders of earlier versions have none
        if digest is not None and digest != _digest(content):
            raise ValueError("it is not what was written (sha256)")
        return _parse(content)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise MHCError("MHC615", f"{path}: {type(error).__name__} {error}") from error


def verify_file(folder: Path, description: Description, name: str) -> None:
    """Compare a file with what was written: its length, its sha256, and the tensors in it.

    Raises MHC615 where it is missing or differs.
    """
    said, path = description.files[name], folder / name
    try:
        if (size := path.stat().st_size) != said.size:
            raise MHCError("MHC615", f"{path} has {size:,} bytes, {said.size:,} were written")
        if sha256(path) != said.sha256:
            raise MHCError("MHC615", f"{path} is not the file that was written (sha256)")
        tensors = read_shard(path).tensors
    except OSError as error:
        raise MHCError("MHC615", f"{path}: {error.strerror}") from error
    except MHCError as error:
        raise error if error.code == "MHC615" else MHCError("MHC615", error.detail) from error
    for tensor_name, tensor in description.tensors.items():
        for chunk in (c for c in tensor.chunks if file_of(c) == name):
            info = tensors.get(chunk_key(tensor_name, chunk.offsets))
            if info is None or (DTYPES.get(info.dtype), info.shape) != (tensor.properties.dtype, chunk.sizes):
                raise MHCError("MHC615", f"{path} does not hold the part of {tensor_name} that {NAME} names")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> StoredFile:
    """Write a safetensors file to the disk itself, a piece of a tensor in memory at a time."""
    # Wider elements first: each tensor then begins at a multiple of its element size, as mapping it wants.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {}
    at = 0
    for name, t in ordered:
        header[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("xb") as out:
        for piece in _pieces(struct.pack("<Q", len(text)) + text, (t for _, t in ordered)):
            out.write(piece)
            digest.update(piece)
        sync(out)
        size = out.tell()
    return StoredFile(path.name, size, digest.hexdigest())


def _pieces(head: bytes, tensors: Iterable[Tensor]) -> Iterable[Any]:
    yield head
    for t in tensors:
        flat = t.detach().contiguous().reshape(-1)
        step = CHUNK // t.dtype.itemsize
        for begin in range(0, flat.numel(), step):
            raw: Any = flat[begin : begin + step].cpu().view(torch.uint8).numpy()
            yield memoryview(raw)


def _parse(content: Mapping[str, Any]) -> Description:
    files = {}
    for name, f in content["files"].items():
        if Path(name).name != name or Path(name).suffix != ".safetensors":
            raise ValueError(f"{name!r} is not a file of a checkpoint")
        files[name] = StoredFile(name, _count(f["bytes"]), str(f["sha256"]))
    tensors = {}
    for name, t in content["tensors"].items():
        shape = _sizes(t["shape"])
        chunks = [StoredChunk(_sizes(c["offsets"]), _sizes(c["shape"]), str(c["file"])) for c in t["chunks"]]
        for c in chunks:
            if c.file not in files:
                raise ValueError(f"{name} lies in {c.file!r}, which is not listed")
            ends = [o + s for o, s in zip(c.offsets, c.sizes, strict=True)]
            if len(ends) != len(shape) or any(e > s for e, s in zip(ends, shape, strict=True)):
                raise ValueError(f"a part of {name} lies outside of it")
        if sum(math.prod(c.sizes) for c in chunks) != math.prod(shape) or not chunks:
            raise ValueError(f"the parts of {name} do not cover it")
        tensors[str(name)] = TensorStorageMetadata(TensorProperties(dtype=DTYPES[t["dtype"]]), shape, list(chunks))
    if not isinstance(content["progress"], dict):
        raise TypeError("progress is no object")
    return Description(
        step=_count(content["step"]),
        world=_count(content["world"]),
        progress=content["progress"],
        files=files,
        tensors=tensors,
    )


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{value!r} is not a count")
    return value


def _sizes(value: Any) -> torch.Size:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is not a list of sizes")
    return torch.Size(_count(v) for v in value)
