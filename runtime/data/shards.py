"""A folder of data: raw tokens in shards, where documents begin in them, and a manifest of what there must be."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from mhc_compile.checkpoint.shards import sha256
from mhc_compile.diagnostics import MHCError

MANIFEST = "data.json"
FORMAT = 2
"""Written where there are masks, which a reader of format 1 would pass over; 1 otherwise."""
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
STARTS: np.dtype[Any] = np.dtype("<u8")

Tokens = NDArray[np.unsignedinteger[Any]]
Index = NDArray[np.int64]


def tokens_name(shard: int) -> str:
    """Return the name of a shard's file of tokens, little endian, without a header."""
    return f"tokens-{shard:05}.bin"


def starts_name(shard: int) -> str:
    """Return the name of a shard's file of document starts, uint64, little endian, without a header."""
    return f"documents-{shard:05}.bin"


def masks_name(shard: int) -> str:
    """Return the name of a shard's file of masks, a byte a token: 1 where the loss counts it, 0 where it does not."""
    return f"masks-{shard:05}.bin"


@dataclass(frozen=True)
class Shard:
    """What the manifest says of one shard, whose documents are whole."""

    tokens: PositiveInt
    documents: PositiveInt
    tokens_sha256: str
    documents_sha256: str
    masks_sha256: str = ""
    """Empty where all tokens count."""

    def files(self, number: int) -> dict[str, str]:
        """Return the sha256 of each of its files, by name."""
        files = {tokens_name(number): self.tokens_sha256, starts_name(number): self.documents_sha256}
        return files | ({masks_name(number): self.masks_sha256} if self.masks_sha256 else {})


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What data.json says, beside totals for people."""

    format: Literal[1, 2]
    dtype: Literal["uint16", "uint32"]
    eos: NonNegativeInt
    vocabulary: NonNegativeInt
    """How many ids the tokenizer has."""
    largest: NonNegativeInt
    """The largest id that occurs."""
    tokenizer: str
    """The fingerprint of the tokenizer, see `FolderTokenizer.sha256`."""
    shards: Annotated[tuple[Shard, ...], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class DataFolder(Manifest):
    """An opened folder: the tokens of its documents one after another, each document ended by `eos`."""

    folder: Path
    sha256: str
    """Of the manifest, and so of all contents."""

    @property
    def tokens(self) -> int:
        """All tokens, the ends of documents included."""
        return int(self._first[-1])

    @property
    def documents(self) -> int:
        """All documents."""
        return sum(shard.documents for shard in self.shards)

    def read(self, start: int, count: int) -> Tokens:
        """Return the tokens [count] from `start` on, in the folder's dtype. Raises IndexError beyond the last one."""
        if not 0 <= start <= start + count <= self.tokens:
            raise IndexError(f"tokens {start} to {start + count} of {self.tokens}")
        parts = [self._tokens[shard][low:high] for shard, low, high in self._overlaps(start, count)]
        return np.concatenate(parts) if parts else np.empty(0, DTYPES[self.dtype])

    @property
    def masked(self) -> bool:
        """Whether the loss leaves tokens out."""
        return bool(self.shards[0].masks_sha256)

    def counted(self, start: int, count: int) -> Tokens:
        """Return 1 for tokens [count] from `start` on that the loss counts, 0 for the others, uint8."""
        if not self.masked:
            return np.ones(count, np.uint8)
        return np.concatenate([self._masks[shard][low:high] for shard, low, high in self._overlaps(start, count)])

    def starts(self, start: int, count: int) -> Index:
        """Return the places from `start` to `start + count`, that one excluded, where documents begin, int64."""
        places = [np.empty(0, np.int64)]
        for shard, low, high in self._overlaps(start, count):
            starts = self._starts[shard]
            begin, end = np.searchsorted(starts, np.array([low, high], dtype=STARTS))
            places.append(starts[begin:end].astype(np.int64) + self._first[shard])
        return np.concatenate(places)

    def verify(self, rank: int = 0, ranks: int = 1) -> None:
        """Read everything, or a rank's share of it. Raises MHC611 where a file's bytes are not those written."""
        for i, shard in list(enumerate(self.shards))[rank::ranks]:
            for name, expected in shard.files(i).items():
                if sha256(self.folder / name) != expected:
                    raise MHCError("MHC611", f"{self.folder / name} is not what was written: its sha256 differs")

    def _overlaps(self, start: int, count: int) -> list[tuple[int, int, int]]:
        """Return the shards that hold any of these tokens, with the first place in the shard and the end."""
        overlaps = []
        shard = int(np.searchsorted(self._first, start, side="right")) - 1
        while count > 0 and shard < len(self.shards):
            low = start - int(self._first[shard])
            high = min(low + count, self.shards[shard].tokens)
            overlaps.append((shard, low, high))
            start, count, shard = start + high - low, count - (high - low), shard + 1
        return overlaps

    @cached_property
    def _first(self) -> Index:
        return np.cumsum([0, *(shard.tokens for shard in self.shards)])

    @cached_property
    def _tokens(self) -> list[np.memmap[Any, Any]]:
        dtype = DTYPES[self.dtype]
        return [np.memmap(self.folder / tokens_name(i), dtype, mode="r") for i in range(len(self.shards))]

    @cached_property
    def _masks(self) -> list[np.memmap[Any, Any]]:
        return [np.memmap(self.folder / masks_name(i), np.uint8, mode="r") for i in range(len(self.shards))]

    @cached_property
    def _starts(self) -> list[np.memmap[Any, Any]]:
        return [np.memmap(self.folder / starts_name(i), STARTS, mode="r") for i in range(len(self.shards))]


def open_data(folder: str | Path) -> DataFolder:
    """Open the folder that `mhc-compile data` wrote, its files mapped into memory for reading.

    Raises MHC611 where the manifest or a shard is missing, damaged or of another format. The contents of the shards are
    not read: that is `DataFolder.verify`.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except OSError as error:
        detail = str(error)
        if (folder / "train" / MANIFEST).is_file():
            raise MHCError("MHC611", detail, way_out=f"name {folder / 'train'}, the part to train on") from error
        raise MHCError("MHC611", detail) from error
    try:
        manifest = TypeAdapter(Manifest).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise MHCError("MHC611", f"{path}: {place}: {first['msg']}") from error
    data = DataFolder(folder=folder, sha256=hashlib.sha256(text).hexdigest(), **vars(manifest))
    if any(bool(shard.masks_sha256) != data.masked for shard in data.shards):
        raise MHCError("MHC611", f"{path}: masks of some shards alone")
    expected: dict[str, int] = {}
    for i, shard in enumerate(data.shards):
        expected[tokens_name(i)] = shard.tokens * DTYPES[data.dtype].itemsize
        expected[starts_name(i)] = shard.documents * STARTS.itemsize
        if data.masked:
            expected[masks_name(i)] = shard.tokens
    try:
        for name, size in expected.items():
            if (present := (folder / name).stat().st_size) != size:
                raise MHCError("MHC611", f"{folder / name} has {present:,} bytes instead of {size:,}")
        maps = (data._tokens, data._starts, data._masks if data.masked else data._starts)
        assert all(len(files) == len(data.shards) for files in maps)  # maps the files, so that none can vanish later
    except OSError as error:
        raise MHCError("MHC611", str(error)) from error
    return data
