"""The projection of tokenizers' vocabularies: which texts count as one, every kind of tokenizer, and what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from mhc_compile import MHCError
from mhc_compile.memory.compression import Compression


def words(*texts: str) -> Tokenizer:
    """A tokenizer whose tokens are these texts, as they stand."""
    tokenizer = Tokenizer(models.WordLevel({text: i for i, text in enumerate(texts)}, unk_token=texts[0]))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the", "The", " the", " The", " café", " Cafe", "日本語"] * 5, trainer)
    tokenizer.add_tokens(["Straße", AddedToken(" the ", normalized=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{i:02X}>": 3 + i for i in range(256)}
    for text in ("▁", "a", "A", "▁a", "▁A", "à", "▁À", "▁▁", "é"):
        vocab[text] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@pytest.mark.parametrize(
    "same",
    [
        ("hello", "Hello", "HELLO", " hello", "hello ", "\thello\n", "héllo", "HE\u0301LLO", "ｈｅｌｌｏ"),
        (" ", "  ", "\t", "\n", " \r\n\t ", "\u00a0", "\u3000", "\ue000"),
        ("a b", "a  b", "A\tB", " a\n\nb ", "a\u00a0b"),
        ("fi", "ﬁ", "Fi"),
        ("1", "①", "¹"),
        ("i", "İ", "I"),
        ("οσ", "ΟΣ", "οσ "),  # each character by itself: no sigma of another form at the end
        ("한", "\u1112\u1161\u11ab"),
        ("नम", "नि" + "म"),  # spacing marks are accents, too
    ],
)
def test_texts_that_count_as_one(same: tuple[str, ...]) -> None:
    found = Compression.of(words("other", *same))
    assert found.table.tolist() == [0, *[1] * len(same)]
    assert found.size == 2


@pytest.mark.parametrize(
    "apart",
    [
        ("a", " "),  # a lone space is no empty text
        ("a b", "ab"),
        ("ß", "ss"),  # lowercase, not case folding
        ("ς", "σ"),
        ("\x0b", "\x0c", " "),  # nothing is left of them: each stays what it is
        ("\u0301", "\u0300", "a"),
        ("日本", "日"),
    ],
)
def test_texts_that_stay_apart(apart: tuple[str, ...]) -> None:
    found = Compression.of(words(*apart))
    assert found.table.tolist() == list(range(len(apart)))


def test_new_ids_are_numbered_by_first_appearance() -> None:
    assert Compression.of(words("b", "a", "B", "c", "A", "d")).table.tolist() == [0, 1, 0, 2, 1, 3]


def of_text(tokenizer: Tokenizer, found: Compression, text: str) -> int:
    (number,) = tokenizer.encode(text, add_special_tokens=False).ids
    return int(found.table[number])


def test_byte_level_vocabularies() -> None:
    tokenizer = byte_level()
    found = Compression.of(tokenizer)
    assert len(found.table) == tokenizer.get_vocab_size(with_added_tokens=True)
    assert of_text(tokenizer, found, "the") == of_text(tokenizer, found, " the") == of_text(tokenizer, found, "The")
    assert of_text(tokenizer, found, " the ") == of_text(tokenizer, found, "the")
    assert of_text(tokenizer, found, " café") == of_text(tokenizer, found, " Cafe") != of_text(tokenizer, found, "the")
    # A byte that is no character by itself is its token, whose letter's case means nothing.
    parts = [i for i in range(len(found.table)) if "\ufffd" in tokenizer.decode([i])]
    assert len(parts) > 100
    kept = [tokenizer.id_to_token(i) for i in parts]
    assert any(a != b and a.lower() == b.lower() for a in kept for b in kept)
    assert len(found.table[parts].unique()) == len(parts)


def test_byte_fallback_vocabularies() -> None:
    tokenizer = byte_fallback()
    found = Compression.of(tokenizer)
    a = {int(found.table[tokenizer.token_to_id(t)]) for t in ("a", "A", "▁a", "▁A", "à", "▁À", "<0x41>", "<0x61>")}
    assert len(a) == 1
    space = {int(found.table[tokenizer.token_to_id(t)]) for t in ("▁", "▁▁", "<0x20>", "<0x09>")}
    assert len(space) == 1
    assert space != a
    high = torch.tensor([tokenizer.token_to_id(f"<0x{i:02X}>") for i in range(128, 256)])
    assert len(found.table[high].unique()) == 128


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_transformers_gives_what_tokenizers_gives(make: Any) -> None:
    tokenizer = make()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<s>", eos_token="<s>")
    plain, found = Compression.of(tokenizer), Compression.of(wrapped)
    assert torch.equal(plain.table, found.table)
    assert plain.sha256 == found.sha256
    assert (plain.pad, plain.eos) == (None, None)
    assert found.pad == found.eos == int(found.table[tokenizer.token_to_id("<s>")])
    assert Compression.of(wrapped, pad=5).pad == int(found.table[5])


def test_a_tokenizer_in_python() -> None:
    tokenizer = ByT5Tokenizer()
    found = Compression.of(tokenizer)
    a, b, other = tokenizer.convert_tokens_to_ids(["a", "A", "b"])
    assert found.table[a] == found.table[b] != found.table[other]
    assert found.pad == int(found.table[tokenizer.pad_token_id])
    found.check(tokenizer)


def test_ids_that_a_tokenizer_leaves_out_share_one_new_id() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 3, "A": 5}, unk_token="a"))
    assert Compression.of(tokenizer).table.tolist() == [0, 1, 1, 2, 1, 0]


def test_unknown_special_ids_are_refused() -> None:
    with pytest.raises(MHCError, match="MHC221"):
        Compression.of(words("a"), pad=1)


def test_another_tokenizer_is_refused() -> None:
    found = Compression.of(words("a", "A", "b"))
    found.check(words("a", "A", "b"))
    for other in (words("a", "b", "A"), words("a", "A", "c"), words("a", "A", "b", "c"), words("a", "A")):
        with pytest.raises(MHCError, match="MHC222"):
            found.check(other)
    # Where texts end counts, not only what they are one after the other.
    with pytest.raises(MHCError, match="MHC222"):
        Compression.of(words("ab", "c")).check(words("a", "bc"))


def test_files_give_it_back(tmp_path: Path) -> None:
    found = Compression.of(byte_level(), pad=1, eos=0)
    save_file({"table": found.table}, tmp_path / "table.safetensors")
    table = load_file(tmp_path / "table.safetensors")["table"]
    held = Compression.parse(table, json.loads(json.dumps(found.plain())))
    assert torch.equal(held.table, found.table)
    assert held.plain() == found.plain()
    held.check(byte_level())


@pytest.mark.parametrize(
    ("table", "changed"),
    [
        (torch.tensor([0, 1, 0]), {"size": 3}),
        (torch.tensor([0, 1, 0]), {"pad": 2}),
        (torch.tensor([0, 1, 0]), {"eos": -1}),
        (torch.tensor([0, 1, 0]).int(), {}),
        (torch.tensor([[0, 1, 0]]), {}),
        (torch.tensor([], dtype=torch.int64), {}),
        (torch.tensor([0, 7, 0]), {}),
        (torch.tensor([0, -1, 0]), {}),
    ],
)
def test_what_is_no_projection_is_refused(table: torch.Tensor, changed: dict[str, Any]) -> None:
    with pytest.raises(MHCError, match="MHC220"):
        Compression.parse(table, {"size": 2, "pad": 0, "eos": None, "sha256": ""} | changed)


@pytest.mark.parametrize("size", [None, "2", True, 2.0])
def test_numbers_are_numbers(size: Any) -> None:
    with pytest.raises(TypeError):
        Compression.parse(torch.tensor([0, 1]), {"size": size, "pad": 0, "eos": None, "sha256": ""})
