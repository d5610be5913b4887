"""Where text comes from: files, folders, lines of JSON and Hugging Face datasets, as a stream of pieces."""

from __future__ import annotations

import codecs
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from mhc_compile.diagnostics import MHCError

PIECE = 1 << 20
"""Characters that are tokenised at a time: a longer document is cut after a line break."""
DATASET = "hf:"
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}
_PROBED = 1 << 16

LeftOut = Callable[[Path], None]


@dataclass(frozen=True)
class Piece:
    """A document's text or, of a document longer than `PIECE`, a part of it."""

    text: str
    first: bool
    last: bool
    read: int
    """How much of the source was read for it: bytes of a file, rows of a dataset."""
    counts: bool = True
    """Whether the loss counts its tokens: those of a prompt it does not."""


@dataclass(frozen=True)
class Source:
    """One thing that a user named, found and ready to be read."""

    name: str
    size: int
    """Bytes of all files, or rows of a dataset; 0 where a dataset does not know."""
    pieces: Callable[[], Iterator[Piece]]


def open_source(name: str, *, field: str, left_out: LeftOut, prompt: str | None = None) -> Source:
    """Return the source that `name` means; `left_out` is called with files of a folder that are not text.

    A text file is one document. A `.jsonl` file has one a line: an object with a string under `field`. A folder is its
    files, sorted by path, those below included and those whose names begin with a dot left out. `hf:NAME[:SPLIT]` is a
    folder saved by the library datasets, a local file or folder that it reads, or a name on its hub. With `prompt` rows
    have a text under that name, too, which begins their documents and does not count in the loss.

    Raises MHC610 for what is missing or not text, here or while it is read.
    """
    if name.startswith(DATASET):
        return _dataset(name, field, prompt)
    path = Path(name)
    try:
        files = list(_files(path, left_out)) if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files)
    except OSError as error:
        raise MHCError("MHC610", str(error)) from error
    if not files:
        raise MHCError("MHC610", f"{path} has no text file in it")
    return Source(name, size, lambda: (piece for file in files for piece in _file(file, field, prompt)))


def _files(folder: Path, left_out: LeftOut) -> Iterator[Path]:
    """Yield the text files below `folder`, in an order that does not depend on the file system."""
    for entry in sorted(folder.iterdir(), key=lambda p: p.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if not entry.is_symlink():  # which might lead back up
                yield from _files(entry, left_out)
        elif entry.is_file():
            if _is_text(entry):
                yield entry
            else:
                left_out(entry)


def _is_text(path: Path) -> bool:
    """Return whether the file begins as UTF-8 text does."""
    with path.open("rb") as file:
        head = file.read(_PROBED)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < _PROBED)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _file(path: Path, field: str, prompt: str | None) -> Iterator[Piece]:
    try:
        if path.suffix == ".jsonl":
            yield from _lines(path, field, prompt)
        elif prompt is not None:
            raise MHCError("MHC610", f"{path} has no rows with prompts", way_out="name .jsonl files or a dataset")
        elif not _is_text(path):
            raise MHCError("MHC610", f"{path} is not UTF-8 text")
        else:
            # Line breaks are data: none is translated.
            with path.open(encoding="utf-8-sig", newline="") as file:
                position = 0
                for text, first, last in cut(file):
                    reached = os.lseek(file.fileno(), 0, os.SEEK_CUR)
                    yield Piece(text, first, last, reached - position)
                    position = reached
    except OSError as error:
        raise MHCError("MHC610", str(error)) from error
    except UnicodeDecodeError as error:
        raise MHCError("MHC610", f"{path} is not UTF-8 text: {error}") from error


def _lines(path: Path, field: str, prompt: str | None) -> Iterator[Piece]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise MHCError("MHC610", f"{place} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise MHCError("MHC610", f"{place} is not a JSON object")
            yield from _document(row, field, prompt, place, len(line))


def _text(row: dict[str, Any], field: str, place: str) -> str:
    text = row.get(field)
    if isinstance(text, str):
        # Halves of surrogate pairs, which JSON can spell, are no text to any tokenizer.
        return text.encode("utf-8", "replace").decode()
    known = ", ".join(name for name, value in row.items() if isinstance(value, str)) or "none"
    raise MHCError(
        "MHC610",
        f"{place} has no text under {field!r}; fields with text: {known}",
        way_out="name --field (and --prompt)",
    )


def _document(row: dict[str, Any], field: str, prompt: str | None, place: str, read: int) -> Iterator[Piece]:
    text = _text(row, field, place)
    if prompt is not None:
        for part, first, _ in cut(io.StringIO(_text(row, prompt, place), newline="")):
            yield Piece(part, first, False, 0, counts=False)
    for part, first, last in cut(io.StringIO(text, newline="")):
        yield Piece(part, first and prompt is None, last, read if first else 0)


def cut(file: TextIO, size: int = PIECE) -> Iterator[tuple[str, bool, bool]]:
    """Yield a document in pieces of at most `size` characters, and whether each is the first and the last one.

    A piece ends after its last line break that stands alone between visible characters: tokenizers that split text into
    words and spaces before they merge (GPT-2's, Llama 3's) have no token across that place, so that the tokens are
    those of the whole document. A text without such a place is cut after any line break, else anywhere.
    """
    text, first = "", True
    while True:
        text += file.read(size - len(text))
        if len(text) < size:
            yield text, first, True
            return
        end = _place(text)
        yield text[:end], first, False
        text, first = text[end:], False


def _place(text: str) -> int:
    """Return where to cut `text`, see `cut`."""
    at = text.rfind("\n", 1, -1)
    while at > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at + 1
        at = text.rfind("\n", 1, at)
    return text.rfind("\n") + 1 or len(text)


def _dataset(name: str, field: str, prompt: str | None) -> Source:
    """Return a dataset of Hugging Face as a source, whose rows are documents."""
    try:
        import datasets
    except ImportError as error:
        raise MHCError("MHC610", f"{name}: {error}", way_out="pip install 'mhc-compile[data]'") from error
    with _coded(name):
        rows = _rows(datasets, name.removeprefix(DATASET))
        wanted = [field] if prompt is None else [prompt, field]
        if rows.column_names is not None and {*wanted} <= {*rows.column_names}:
            rows = rows.select_columns(wanted)
        size = len(rows) if isinstance(rows, datasets.Dataset) else 0

    def pieces() -> Iterator[Piece]:
        with _coded(name):  # files of a dataset are only read now
            for number, row in enumerate(rows):
                yield from _document(row, field, prompt, f"{name}, row {number}", 1)

    return Source(name, size, pieces)


@contextmanager
def _coded(name: str) -> Iterator[None]:
    try:
        yield
    except MHCError:
        raise
    except Exception as error:  # the library's readers raise classes of their own, without a common base
        raise MHCError("MHC610", f"{name}: {type(error).__name__}: {error}") from error


def _rows(datasets: Any, name: str) -> Any:
    """Return the rows in their order, streamed where they are not memory-mapped; without a split, those of `train`."""
    path, split = Path(name), "train"
    if not path.exists() and ":" in name:
        name, _, split = name.rpartition(":")
        path = Path(name)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(str(path))
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if split not in saved:
            raise MHCError("MHC610", f"{name} has no split {split!r}; splits: {', '.join(saved)}")
        return saved[split]
    if path.is_file():
        if path.suffix not in _BUILDERS:
            raise MHCError("MHC610", f"{name}: files of datasets end in {', '.join(_BUILDERS)}")
        return datasets.load_dataset(_BUILDERS[path.suffix], data_files=[str(path)], split="train", streaming=True)
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~"))):
        raise MHCError("MHC610", f"{path} does not exist")
    return datasets.load_dataset(name, split=split, streaming=True)
