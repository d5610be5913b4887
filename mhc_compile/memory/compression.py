"""The projection V -> V' of a tokenizer's ids: tokens whose texts differ in case, accents or spacing count as one.

It is made once and kept with the checkpoint, so that no other version of a Unicode table changes what ids mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from mhc_compile.diagnostics import MHCError

# A lone space keeps its own id through the stripping as this character of Unicode's private use area.
_LONE_SPACE = "\ue000"
_UNREADABLE = "\ufffd"


@dataclass(frozen=True, kw_only=True, eq=False)
class Compression:
    """A tokenizer's projection: `Compression.of(tokenizer)` makes it, `check` tells that tokenizer from others.

    Raises `MHCError` MHC220 for a table that is none.
    """

    table: Tensor
    """[V] int64: the new id of every id."""
    size: int
    """V', how many new ids there are."""
    pad: int | None
    """The new id of the padding token, None where the tokenizer has none."""
    eos: int | None
    """The new id of the end-of-text token, None where the tokenizer has none."""
    sha256: str
    """Of the texts of all ids, in order."""

    def __post_init__(self) -> None:
        table = self.table
        if table.dtype != torch.int64 or table.ndim != 1 or not len(table):
            raise MHCError("MHC220", f"compression: a table {list(table.shape)} of {table.dtype}, not [V] of int64")
        if not torch.equal(table.cpu().unique(), torch.arange(self.size)):
            raise MHCError("MHC220", f"compression: the new ids in the table are not 0 to {self.size - 1}")
        for name in ("pad", "eos"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.size:
                raise MHCError("MHC220", f"compression: {name}={value!r} of {self.size} new ids")

    @classmethod
    def of(cls, tokenizer: Any, *, pad: int | None = None, eos: int | None = None) -> Self:
        """Make the projection of a `tokenizers.Tokenizer` or a tokenizer of transformers (arXiv 2601.07372, section 2).

        `pad` and `eos` are ids of the tokenizer, by default those it names itself. MHC221 where they are not.
        """
        texts, tokens = _texts(tokenizer)
        numbers: dict[str, int] = {}
        table = [numbers.setdefault(key, len(numbers)) for key in map(_key, texts, tokens)]
        named = {
            "pad": getattr(tokenizer, "pad_token_id", None) if pad is None else pad,
            "eos": getattr(tokenizer, "eos_token_id", None) if eos is None else eos,
        }
        for name, token in named.items():
            if token is not None and not 0 <= token < len(table):
                raise MHCError("MHC221", f"{name}={token} in a vocabulary of {len(table)}")
        special = {name: None if token is None else table[token] for name, token in named.items()}
        return cls(table=torch.tensor(table), size=len(numbers), sha256=_digest(texts, tokens), **special)

    def check(self, tokenizer: Any) -> None:
        """Raise MHC222 unless every id of `tokenizer` has the same text as in the tokenizer this was made from."""
        ids, sha256 = fingerprint(tokenizer)
        if ids != len(self.table):
            raise MHCError("MHC222", f"{ids} ids instead of {len(self.table)}")
        if sha256 != self.sha256:
            raise MHCError("MHC222", "its ids stand for other texts")

    def plain(self) -> dict[str, Any]:
        """Return the JSON that a checkpoint stores beside the table."""
        return {"ids": len(self.table), "size": self.size, "pad": self.pad, "eos": self.eos, "sha256": self.sha256}

    @classmethod
    def parse(cls, table: Tensor, plain: Mapping[str, Any]) -> Self:
        """Return the projection with this table and `plain`. Raises MHC220, KeyError or TypeError for invalid ones."""
        numbers = {name: plain[name] for name in ("size", "pad", "eos")}
        for name, value in numbers.items():
            if type(value) is not int and (value is not None or name == "size"):
                raise TypeError(f"{name}={value!r} is not an integer")
        return cls(table=table, sha256=str(plain["sha256"]), **numbers)


def fingerprint(tokenizer: Any) -> tuple[int, str]:
    """Return the number of a tokenizer's ids and the sha256 of their texts, as in its `Compression`."""
    texts, tokens = _texts(tokenizer)
    return len(texts), _digest(texts, tokens)


def _texts(tokenizer: Any) -> tuple[list[str], list[str]]:
    """Return the text and the token of every id up to the largest; both are empty for an id that is not used."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "id_to_token"):  # of the library tokenizers
        size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        texts = backend.decode_batch([[i] for i in range(size)], skip_special_tokens=False)
        return texts, [backend.id_to_token(i) or "" for i in range(size)]
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    texts = [tokenizer.decode([i], skip_special_tokens=False) for i in range(size)]
    return texts, [tokenizer.convert_ids_to_tokens(i) or "" for i in range(size)]


def _key(text: str, token: str) -> str:
    """Return the key that equivalent ids share.

    The token itself where the text is part of a character, as the bytes of byte-level vocabularies are, and the text
    where nothing of it is left.
    """
    return token if _UNREADABLE in text else _normalised(text) or text


_NORMALISERS: list[Any] = []


def _normalised(text: str) -> str:
    """Apply the published steps with the library tokenizers: Python's own differ in a few characters."""
    if not _NORMALISERS:
        from tokenizers import Regex, normalizers

        steps = [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), _LONE_SPACE),
            normalizers.Strip(),
            normalizers.Replace(_LONE_SPACE, " "),
        ]
        _NORMALISERS.append(normalizers.Sequence(steps))
    return _NORMALISERS[0].normalize_str(text)


def _digest(texts: list[str], tokens: list[str]) -> str:
    """Hash all texts and tokens, each preceded by its length."""
    digest = hashlib.sha256()
    for pair in zip(texts, tokens, strict=True):
        for part in pair:
            encoded = part.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()
