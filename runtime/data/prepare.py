"""Text to a folder of data: read, tokenised, an end-of-text token after every document, packed into shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mhc_compile.checkpoint.shards import sync, write_text
from mhc_compile.checkpoint.staging import check_target, staged
from mhc_compile.diagnostics import MHCError
from mhc_compile.runtime.data.encoding import encode
from mhc_compile.runtime.data.shards import (
    DTYPES,
    FORMAT,
    MANIFEST,
    STARTS,
    DataFolder,
    Shard,
    masks_name,
    open_data,
    starts_name,
    tokens_name,
)
from mhc_compile.runtime.data.sources import Source, open_source
from mhc_compile.runtime.data.tokenizer import FolderTokenizer, read_tokenizer

SHARD = 1 << 28
"""Tokens after which a shard ends with its document: 512 MB of uint16."""
TRAIN, VALIDATION = "train", "validation"
_SPLIT_WAY_OUT = "the split is by documents: give more of them (a text file is one), or another fraction"

Progress = Callable[[int, int, int, str], None]
"""Told how much of a source was read, its size (0: unknown), all tokens so far, and the source's name."""


@dataclass(frozen=True)
class Prepared:
    """What was written: one folder, or two with a validation fraction."""

    folders: tuple[DataFolder, ...]
    left_out: tuple[Path, ...]
    """Files of source folders that are not text."""


def prepare(
    sources: Sequence[str],
    out: str | Path,
    *,
    tokenizer: str | Path,
    field: str = "text",
    prompt: str | None = None,
    workers: int = 0,
    validation: float = 0.0,
    progress: Progress | None = None,
    shard_tokens: int = SHARD,
) -> Prepared:
    """Tokenise `sources` (see `open_source`) with the tokenizer of a folder and write them to `out`.

    What is written does not depend on `workers`, the number of processes that tokenise. With `validation` > 0, that
    fraction of the documents, chosen by a hash of their text so that equal documents stay together, goes to
    OUT/validation and the rest to OUT/train. `out` appears when all of it is on the disk, or not at all. Texts are
    read in pieces (`PIECE`): memory does not depend on their size. With `prompt` rows are pairs: a document is the text
    under `prompt` and that under `field`, of which the loss counts the second and the end of the document.

    Raises MHC610 for sources that cannot be read or hold no text, MHC614 for a tokenizer that cannot be used, MHC412
    and MHC413 for the output folder.
    """
    if not 0.0 <= validation < 1.0:
        raise ValueError(f"a fraction of {validation} for validation")
    target = check_target(Path(out))
    folder_tokenizer = read_tokenizer(tokenizer)
    if folder_tokenizer.eos is None:
        raise MHCError("MHC614", f"{tokenizer} names no end-of-text token")
    left_out: list[Path] = []
    opened = [open_source(name, field=field, prompt=prompt, left_out=left_out.append) for name in sources]
    for name in sources:
        if Path(name).is_dir():
            check_target(target, Path(name))
    parts = (TRAIN, VALIDATION) if validation else ("",)
    with staged(target) as staging, ExitStack() as stack:
        how: dict[str, Any] = {"shard_tokens": shard_tokens, "masks": prompt is not None}
        writers = [stack.enter_context(_Writer(staging, part, folder_tokenizer, **how)) for part in parts]
        for source in opened:
            _fill(writers, source, folder_tokenizer, workers, validation, progress)
        for writer in writers:
            writer.finish()
    return Prepared(tuple(open_data(target / part) for part in parts), tuple(left_out))


def _fill(
    writers: list[_Writer],
    source: Source,
    tokenizer: FolderTokenizer,
    workers: int,
    validation: float,
    progress: Progress | None,
) -> None:
    """Write one source's documents."""
    writer, done = writers[0], 0
    # Closed at once where something fails, not when the garbage is collected: it ends the workers.
    with closing(encode(source.pieces(), tokenizer, workers)) as encoded:
        for piece, ids in encoded:
            if piece.first and validation:
                writer = writers[_share(piece.text) < validation]
            writer.write(ids, last=piece.last, counts=piece.counts)
            done += piece.read
            if progress is not None:
                progress(done, source.size, sum(w.tokens for w in writers), source.name)


def _share(text: str) -> float:
    """Return a number in [0, 1) that looks random and depends on the text alone."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=6).digest()
    return int.from_bytes(digest, "little") / 2**48


class _Writer(AbstractContextManager["_Writer"]):
    """Writes one folder of data; as a context it closes its files however the block ends."""

    def __init__(self, folder: Path, part: str, tokenizer: FolderTokenizer, *, shard_tokens: int, masks: bool) -> None:
        self.folder = folder / part
        self.folder.mkdir(exist_ok=True)
        self._part = part
        self.tokens = 0
        self._tokenizer = tokenizer
        self._dtype = "uint16" if tokenizer.vocabulary <= 1 << 16 else "uint32"
        self._limit, self._masks = shard_tokens, masks
        self._largest = 0
        self._shards: list[Shard] = []
        self._open: list[_Hashed] | None = None
        self._in_document = False

    def __exit__(self, *_: object) -> None:
        for file in self._open or ():
            file.close()

    def write(self, ids: np.ndarray[Any, Any], *, last: bool, counts: bool) -> None:
        """Write a piece of a document; `last` ends it. A document without tokens is left out."""
        if len(ids):
            self._largest = max(self._largest, int(ids.max()))
            self._append(ids, counts)
        if last and self._in_document:
            assert self._tokenizer.eos is not None
            self._append(np.array([self._tokenizer.eos]), counts=True)
            self._in_document = False
            assert self._open is not None
            if self._open[0].count >= self._limit:
                self._end_shard()

    def finish(self) -> None:
        """Write the last shard and the manifest. Raises MHC610 where no document was written."""
        if self._open is not None:
            self._end_shard()
        if not self._shards:
            if self._part:
                raise MHCError("MHC610", f"no document for {self._part}", way_out=_SPLIT_WAY_OUT)
            raise MHCError("MHC610", "the sources have no text")
        t = self._tokenizer
        assert t.eos is not None
        manifest = {
            "format": FORMAT if self._masks else 1,
            "dtype": self._dtype,
            "tokens": self.tokens,  # the totals are for people
            "documents": sum(shard.documents for shard in self._shards),
            "eos": t.eos,
            "vocabulary": t.vocabulary,
            "largest": max(self._largest, t.eos),
            "tokenizer": t.sha256,
            "shards": [{name: v for name, v in vars(shard).items() if v != ""} for shard in self._shards],
        }
        write_text(self.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")

    def _append(self, ids: np.ndarray[Any, Any], counts: bool) -> None:
        if self._open is None:
            number = len(self._shards)
            self._open = [
                _Hashed(self.folder / tokens_name(number), DTYPES[self._dtype]),
                _Hashed(self.folder / starts_name(number), STARTS),
            ]
            if self._masks:
                self._open.append(_Hashed(self.folder / masks_name(number), np.dtype(np.uint8)))
        tokens, starts, *masks = self._open
        if not self._in_document:
            starts.write(np.array([tokens.count]))
            self._in_document = True
        tokens.write(ids)
        for mask in masks:
            mask.write(np.full(len(ids), counts))
        self.tokens += len(ids)

    def _end_shard(self) -> None:
        assert self._open is not None
        tokens, starts, *_ = self._open
        self._shards.append(Shard(tokens.count, starts.count, *(file.finish() for file in self._open)))
        self._open = None


class _Hashed:
    """A new file of numbers that are hashed as they are written."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._file: BinaryIO = path.open("xb")
        self._dtype = dtype
        self._digest = hashlib.sha256()
        self.count = 0

    def write(self, values: np.ndarray[Any, Any]) -> None:
        data = values.astype(self._dtype).tobytes()
        self._digest.update(data)
        self._file.write(data)
        self.count += len(values)

    def finish(self) -> str:
        """Close, with all bytes on the disk, and return the sha256."""
        sync(self._file)
        self._file.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        with suppress(OSError):  # the disk is full: the file goes away with its folder
            self._file.close()
