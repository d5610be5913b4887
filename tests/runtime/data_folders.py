"""Small tokenizers, texts and folders of data for tests, and the packing that they must have, written out plainly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

END = "<|end|>"
WORDS = (
    "the",
    "stream",
    "is",
    "read",
    "mixed",
    "and",
    "written",
    "again,",
    "höher\n",
    "  twice;\n\n",
    "x = f(x)\n",
    "né",
)


def documents(count: int, seed: int = 0) -> list[str]:
    """Different texts of 1 to 60 words."""
    generator = np.random.default_rng(seed)
    return [f"{i} " + " ".join(generator.choice(WORDS, generator.integers(1, 60)).tolist()) for i in range(count)]


def make_tokenizer(folder: Path, *, vocabulary: int = 300) -> Tokenizer:
    """A byte-level BPE in `folder`, as save_pretrained leaves one, which would truncate and pad if it were let."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents(50), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.enable_truncation(8)
    bpe.enable_padding(length=8)
    bpe.save(str(folder / "tokenizer.json"))
    bpe.no_truncation()
    bpe.no_padding()
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return bpe


def write_lines(path: Path, texts: list[str], field: str = "text") -> Path:
    """One document a line."""
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def packed(tokenizer: Tokenizer, texts: list[str]) -> tuple[list[int], list[int]]:
    """All tokens, and where documents begin."""
    tokens: list[int] = []
    starts = []
    for text in texts:
        starts.append(len(tokens))
        tokens += [*tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.token_to_id(END)]
    return tokens, starts


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
