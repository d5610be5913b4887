"""The tokenizer of a folder: what it needs to encode in another process, its end-of-text token, and its fingerprint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhc_compile.diagnostics import MHCError
from mhc_compile.memory.compression import fingerprint

_FILE = "tokenizer.json"
_NAMED = ("tokenizer_config.json", "special_tokens_map.json")
_NUMBERED = ("config.json", "generation_config.json")


@dataclass(frozen=True, kw_only=True)
class FolderTokenizer:
    """A tokenizer as data."""

    folder: str
    serialised: str | None
    """What the library tokenizers writes; None for one that only transformers can build."""
    vocabulary: int
    """The largest id plus one."""
    eos: int | None
    """The id of the end-of-text token."""
    mask: int | None
    """The id of the mask token."""
    sha256: str
    """Of the texts of all ids, in order: the same for equal tokenizers in different files."""


def read_tokenizer(folder: str | Path) -> FolderTokenizer:
    """Return the tokenizer of `tokenizer.json`, or the one that transformers reads without running the folder's code.

    The end-of-text token is the one that tokenizer_config.json or special_tokens_map.json names, else the id in
    config.json or generation_config.json; the mask token is one that the former name. Raises MHC614 where there is no
    tokenizer, MHC415 without the packages.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MHCError("MHC614", f"{folder} is not a folder")
    serialised: str | None = None
    try:
        tokenizer = _open(folder)
        if hasattr(tokenizer, "to_str"):  # of the library tokenizers
            # What a checkpoint keeps for inference batches would cut documents.
            tokenizer.no_truncation()
            tokenizer.no_padding()
            serialised = tokenizer.to_str()
        size, digest = fingerprint(tokenizer)
    except ImportError as error:
        raise MHCError("MHC415", str(error)) from error
    except Exception as error:  # what these readers raise for files that are none has no narrower class
        reason = str(error).partition("\n")[0]
        raise MHCError("MHC614", f"{folder}: {reason}") from error
    if size < 1:
        raise MHCError("MHC614", f"the tokenizer in {folder} has no tokens")
    eos = _special(folder, tokenizer, "eos_token")
    eos = _numbered_eos(folder, size) if eos is None else eos
    mask = _special(folder, tokenizer, "mask_token")
    return FolderTokenizer(
        folder=str(folder), serialised=serialised, vocabulary=size, eos=eos, mask=mask, sha256=digest
    )


def _open(folder: Path) -> Any:
    if (folder / _FILE).is_file():
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(folder / _FILE))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    return getattr(tokenizer, "backend_tokenizer", None) or tokenizer


def _special(folder: Path, tokenizer: Any, kind: str) -> int | None:
    """Return the id of the token that the folder's files name as `eos_token`, or another kind; None without one."""
    for name in _NAMED:
        token = _json(folder / name).get(kind)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            backend = hasattr(tokenizer, "token_to_id")
            number = tokenizer.token_to_id(token) if backend else tokenizer.get_vocab().get(token)
            if number is not None:
                return int(number)
    return None


def _numbered_eos(folder: Path, size: int) -> int | None:
    """Return the id of the end-of-text token in the configuration of the model."""
    for name in _NUMBERED:
        number = _json(folder / name).get("eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if type(number) is int and 0 <= number < size:
            return number
    return None


def model_vocabulary(folder: str | Path) -> int | None:
    """Return how many ids the model in `folder` has embeddings for: `vocab_size` of config.json, or None."""
    return _configured(folder, "vocab_size")


def model_positions(folder: str | Path) -> int | None:
    """Return the longest text of the model in `folder`: `max_position_embeddings` of config.json, or None."""
    return _configured(folder, "max_position_embeddings")


def _configured(folder: str | Path, name: str) -> int | None:
    config = _json(Path(folder) / "config.json")
    inner = config.get("text_config")
    size = config.get(name, inner.get(name) if isinstance(inner, dict) else None)
    return size if type(size) is int else None


def has_tokenizer(folder: str | Path) -> bool:
    """Return whether any file of a tokenizer lies in `folder`."""
    names = (_FILE, *_NAMED, "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
    return any((Path(folder) / name).is_file() for name in names)


def _json(path: Path) -> dict[str, Any]:
    """Return the file's object; an empty one for a file that is missing or holds no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
