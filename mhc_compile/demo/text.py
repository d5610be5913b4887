"""Real text that every machine has: the sources of Python's standard library, as tokens of a BPE trained on them."""

from __future__ import annotations

import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhc_compile.demo.settings import DemoError, Settings
from mhc_compile.trial.training import even_windows, random_windows

HELD_OUT_EVERY = 10
"""Every tenth file is held out of the tokenizer and of the training."""
END = "<|endoftext|>"
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
_LEAST_BYTES = 200_000


@dataclass(frozen=True)
class Corpus:
    """The tokenized text and its tokenizer (a `PreTrainedTokenizerFast`)."""

    tokenizer: Any
    train: Tensor
    """Token ids `[N]`."""
    held_out: Tensor
    files: int
    size: int
    """Bytes read."""


def build_corpus(settings: Settings) -> Corpus:
    """Read, train the tokenizer and encode. The same standard library gives the same corpus."""
    texts = source_texts(settings.text_bytes)
    train, held_out = divided(texts)
    tokenizer = train_tokenizer(train, settings.vocabulary)
    bpe = tokenizer.backend_tokenizer
    size = sum(len(text.encode()) for text in texts)
    return Corpus(tokenizer, encoded(bpe, train), encoded(bpe, held_out), len(texts), size)


def divided(texts: list[str]) -> tuple[list[str], list[str]]:
    """Return the texts to train on, and those held out."""
    return [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY], texts[::HELD_OUT_EVERY]


def divided_by_name(texts: dict[str, str]) -> tuple[list[str], list[str]]:
    """Return the texts to train on, and those held out: the same files with every version of Python."""
    held_out = {name for name in texts if not zlib.crc32(name.encode()) % HELD_OUT_EVERY}
    return [t for n, t in texts.items() if n not in held_out], [t for n, t in texts.items() if n in held_out]


def train_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """Train a byte-level BPE of so many tokens; return it as a `PreTrainedTokenizerFast`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, bos_token=END, pad_token=END)


def source_texts(limit: int) -> list[str]:
    """Return whole modules of the standard library in a fixed order spread over it, up to `limit` bytes."""
    return list(named_sources(limit).values())


def named_sources(limit: int) -> dict[str, str]:
    """Return the same modules by their paths inside the library."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in root.rglob("*.py") if not _SKIPPED & set(p.relative_to(root).parts))
    # A stride through the sorted list mixes packages; a prefix would be `_pyrepl` and `asyncio` alone.
    stride = 7
    texts: dict[str, str] = {}
    size = 0
    for path in (p for start in range(stride) for p in paths[start::stride]):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if size + len(text) > limit or not text.strip():
            continue
        texts[path.relative_to(root).as_posix()] = text
        size += len(text)
    if size < _LEAST_BYTES:
        raise DemoError(
            f"only {size} bytes of Python's standard library were found as source files under {root}; "
            "run the demo with a Python that has its library unpacked"
        )
    return texts


def encoded(bpe: Any, texts: list[str]) -> Tensor:
    """Return the token ids of all texts `[N]`, each followed by the token of an end."""
    end = bpe.token_to_id(END)
    ids: list[int] = []
    for encoding in bpe.encode_batch(texts, add_special_tokens=False):
        ids += [*encoding.ids, end]
    return torch.tensor(ids)


def training_batches(corpus: Corpus, settings: Settings, *, stream: int) -> list[Tensor]:
    """Return a batch `[batch, length]` of random windows for every step; `stream` tells the two phases apart."""
    return random_windows(corpus.train, settings.steps, settings.batch, settings.length, settings.seed * 2 + stream)


def held_out_batches(corpus: Corpus, settings: Settings) -> list[Tensor]:
    """Return windows spread evenly over the held-out text, the same for every seed."""
    return even_windows(corpus.held_out, settings.held_out_batches, settings.batch, settings.length)
