"""Text to shards: packed as the plain reference packs, whatever the source and the workers, or refused with a code."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_folders import END, documents, make_tokenizer, packed, tree, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer

from mhc_compile.diagnostics import MHCError
from mhc_compile.runtime.data import encoding
from mhc_compile.runtime.data.prepare import prepare
from mhc_compile.runtime.data.shards import DataFolder
from mhc_compile.runtime.data.sources import cut

TEXTS = documents(120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `lines.jsonl` and `texts`."""
    found = tmp_path_factory.mktemp("data")
    make_tokenizer(found / "model")
    write_lines(found / "lines.jsonl", TEXTS)
    (found / "texts" / "b").mkdir(parents=True)
    for name, text in {"b/1.md": TEXTS[1], "a.txt": TEXTS[0], "b/2.py": TEXTS[2]}.items():
        (found / "texts" / name).write_bytes(text.encode())
    return found


def tokenizer(folder: Path) -> Tokenizer:
    found = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    found.no_truncation()
    found.no_padding()
    return found


def contents(data: DataFolder) -> tuple[list[int], list[int]]:
    return data.read(0, data.tokens).tolist(), data.starts(0, data.tokens).tolist()


def single(folder: Path, sources: list[Path | str], out: Path, **options: object) -> DataFolder:
    done = prepare([*map(str, sources)], out, tokenizer=folder / "model", **options)  # type: ignore[arg-type]
    (data,) = done.folders
    return data


def refused(folder: Path, source: Path | str, out: Path, **options: object) -> str:
    with pytest.raises(MHCError) as caught:
        single(folder, [source], out, **options)
    assert not out.exists()
    assert caught.value.code == "MHC610"
    return str(caught.value)


# --- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_tokens", [1 << 28, 1000, 1])
def test_packing_is_the_references(folder: Path, tmp_path: Path, shard_tokens: int) -> None:
    data = single(folder, [folder / "lines.jsonl"], tmp_path / "out", shard_tokens=shard_tokens)
    assert contents(data) == packed(tokenizer(folder), TEXTS)
    assert data.documents == len(TEXTS) if shard_tokens > 1 else len(data.shards)
    assert data.dtype == "uint16"
    data.verify()
    tokens, starts = contents(data)
    whole = np.array(tokens)
    for start, count in ((0, 1), (990, 30), (5, 2500), (data.tokens, 0), (data.tokens - 1, 1)):
        assert data.read(start, count).tolist() == whole[start : start + count].tolist()
        assert data.starts(start, count).tolist() == [s for s in starts if start <= s < start + count]
    with pytest.raises(IndexError):
        data.read(data.tokens - 1, 2)


def test_workers_change_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BATCH", 500)
    sources = [folder / "lines.jsonl", folder / "texts"]
    alone = single(folder, sources, tmp_path / "alone", shard_tokens=2000)
    told: list[tuple[int, int, int, str]] = []
    several = single(
        folder, sources, tmp_path / "several", shard_tokens=2000, workers=3, progress=lambda *a: told.append(a)
    )
    assert tree(tmp_path / "alone") == tree(tmp_path / "several")
    assert len(alone.shards) > 1
    assert told[-1][2] == several.tokens
    for name in (str(s) for s in sources):
        done = [(d, size) for d, size, _, n in told if n == name]
        assert done == sorted(done)
        assert done[-1][0] == done[-1][1] > 0


def test_a_folder_is_its_text_files_in_order(folder: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    (texts / ".hidden").mkdir(parents=True)
    (texts / "sub").mkdir()
    (texts / ".hidden" / "a.txt").write_text("never")
    (texts / ".b").write_text("never")
    (texts / "c.bin").write_bytes(b"\xff\xfe\x00")
    (texts / "zeros").write_bytes(b"\0" * 10)
    (texts / "latin.txt").write_bytes("né".encode("latin-1"))
    (texts / "a.txt").write_bytes(b"\xef\xbb\xbfwith a mark\r\nof byte order")
    (texts / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "\\ud800two"}\n{"text": ""}\n')
    (texts / "sub" / "a.txt").write_bytes(b"three")
    (texts / "empty").write_bytes(b"")
    (texts / "sub" / "back").symlink_to(texts)
    done = prepare([str(texts)], tmp_path / "out", tokenizer=folder / "model")
    known = ["with a mark\r\nof byte order", "one", "?two", "three"]
    assert contents(done.folders[0]) == packed(tokenizer(folder), known)
    assert sorted(p.name for p in done.left_out) == ["c.bin", "latin.txt", "zeros"]


def test_validation_is_chosen_by_the_text(folder: Path, tmp_path: Path) -> None:
    twice = write_lines(tmp_path / "twice.jsonl", [*TEXTS, *TEXTS[::-1]])
    done = prepare([str(twice)], tmp_path / "out", tokenizer=folder / "model", validation=0.2)
    parts = [contents(data) for data in done.folders]
    assert [data.folder.name for data in done.folders] == ["train", "validation"]
    bpe = tokenizer(folder)
    split = [sum(tokens.count(bpe.token_to_id(END)) for tokens, _ in parts), parts[1][0].count(bpe.token_to_id(END))]
    assert split[0] == 240
    assert 20 < split[1] < 80
    # Equal documents are on the same side: each side has every one of its documents twice.
    for (tokens, starts), data in zip(parts, done.folders, strict=True):
        texts = [tuple(part.tolist()) for part in np.split(np.array(tokens), starts[1:])]
        assert data.documents == len(texts) == 2 * len(set(texts))
        assert texts == texts[::-1]
    said = refused(folder, folder / "texts" / "a.txt", tmp_path / "none", validation=0.5)
    assert "no document for" in said
    assert "by documents" in said


def test_many_ids_take_four_bytes(tmp_path: Path) -> None:
    vocabulary = {END: 0, "far": 70_000}
    words = Tokenizer(models.WordLevel({**vocabulary, **{f"w{i}": i for i in range(1, 70_000)}}, unk_token=END))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "model").mkdir()
    words.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "config.json").write_text('{"eos_token_id": [0]}')
    (tmp_path / "a.txt").write_text("w1 far w69999")
    data = single(tmp_path, [tmp_path / "a.txt"], tmp_path / "out")
    assert (data.dtype, data.vocabulary, data.largest, data.eos) == ("uint32", 70_001, 70_000, 0)
    assert data.read(0, 4).tolist() == [1, 70_000, 69_999, 0]
    assert (tmp_path / "out" / "tokens-00000.bin").read_bytes()[:8] == b"\1\0\0\0\x70\x11\1\0"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_tokenizer_that_only_transformers_has(tmp_path: Path, workers: int) -> None:
    slow = ByT5Tokenizer()
    slow.save_pretrained(tmp_path / "model")
    write_lines(tmp_path / "a.jsonl", ["né", "two"])
    data = single(tmp_path, [tmp_path / "a.jsonl"], tmp_path / "out", workers=workers)
    known = [*slow("né", add_special_tokens=False)["input_ids"], 1, *slow("two", add_special_tokens=False)["input_ids"]]
    assert data.read(0, data.tokens).tolist() == [*known, 1]


# --- long documents -------------------------------------------------------------------------------------------------

GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA3 = pre_tokenizers.Split(
    Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
    behavior="isolated",
)


@given(st.text(alphabet="ab1é;' \n\r\t", max_size=300), st.integers(1, 40))
@settings(max_examples=80, deadline=None)
def test_pieces_are_the_document(text: str, size: int) -> None:
    pieces = list(cut(io.StringIO(text, newline=""), size))
    assert "".join(part for part, _, _ in pieces) == text
    assert all(len(part) <= size for part, _, _ in pieces)
    assert [(first, last) for _, first, last in pieces] == [(i == 0, i == len(pieces) - 1) for i in range(len(pieces))]


lines = st.lists(st.text(alphabet="ab1é;' \t", min_size=1, max_size=10).map(str.strip).filter(bool), max_size=40)


@given(lines, st.sampled_from(["\n", "\n\n", " \n"]), st.sampled_from([GPT2, LLAMA3]))
@settings(max_examples=80, deadline=None)
def test_words_of_pieces_are_the_documents(held: list[str], other: str, splitter: pre_tokenizers.PreTokenizer) -> None:
    # Two kinds of line breaks in turn: places where a cut would change words lie beside those where it does not.
    text = "".join(line + ("\n" if i % 2 else other) for i, line in enumerate(held)) + "end"
    found = [word for part, _, _ in cut(io.StringIO(text), 64) for word, _ in splitter.pre_tokenize_str(part)]
    assert found == [word for word, _ in splitter.pre_tokenize_str(text)]


def test_long_documents_are_packed_as_one(folder: Path, tmp_path: Path) -> None:
    text = "\n".join(TEXTS * 85)
    assert len(text) > 1.1 * 2**20
    write_lines(tmp_path / "a.jsonl", [text, "between"])
    (tmp_path / "b.txt").write_bytes(text.encode())
    known, (_, second) = packed(tokenizer(folder), [text, "between"])
    data = single(folder, [tmp_path / "a.jsonl", tmp_path / "b.txt"], tmp_path / "out", workers=2)
    assert contents(data) == ([*known, *known[:second]], [0, second, len(known)])


def test_memory_does_not_grow_with_the_text(folder: Path, tmp_path: Path) -> None:
    line = (" ".join(TEXTS[:3]).replace("\n", " ") + "\n").encode()
    (tmp_path / "large.txt").write_bytes(line * (5_000_000 // len(line)))
    peak = """
import resource, sys
from mhc_compile.runtime.data.prepare import prepare
prepare([sys.argv[1]], sys.argv[3], tokenizer=sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prepare([sys.argv[4]], sys.argv[5], tokenizer=sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    (tmp_path / "small.txt").write_bytes(line * (1_200_000 // len(line)))
    names = [tmp_path / "small.txt", folder / "model", tmp_path / "one", tmp_path / "large.txt", tmp_path / "two"]
    run = subprocess.run([sys.executable, "-c", peak, *names], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 10_000  # KB; the tokens of 3.8 MB of text, as the library gives them, are more than 100 MB


# --- datasets -------------------------------------------------------------------------------------------------------


def test_datasets_of_hugging_face(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"number": list(range(len(TEXTS))), "content": TEXTS})
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows, "test": rows.select([5])}).save_to_disk(tmp_path / "splits")
    rows.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "files").mkdir()
    rows.to_parquet(tmp_path / "files" / "train.parquet")
    known = packed(tokenizer(folder), TEXTS)
    for i, name in enumerate(["saved", "splits", "splits:train", "rows.parquet", "files", "files:train"]):
        data = single(folder, [f"hf:{tmp_path / name}"], tmp_path / f"out{i}", field="content")
        assert contents(data) == known
    data = single(folder, [f"hf:{tmp_path / 'splits'}:test"], tmp_path / "test", field="content")
    assert contents(data) == packed(tokenizer(folder), [TEXTS[5]])
    for name, said in {
        "saved": "fields with text: content",
        "splits:nowhere": "splits: train, test",
        "missing": "does not exist",
        "saved/state.json": "no text under",
        "../data.xyz": "",
    }.items():
        assert said in refused(folder, f"hf:{tmp_path / name}", tmp_path / "refused")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 it is not")
    assert "rows.parquet" in refused(folder, f"hf:{tmp_path / 'rows.parquet'}", tmp_path / "refused", field="content")


def test_without_datasets_the_extra_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'mhc-compile[data]'" in refused(folder, "hf:some/name", tmp_path / "out")


# --- refusals -------------------------------------------------------------------------------------------------------


def test_what_is_no_text_is_refused(folder: Path, tmp_path: Path) -> None:
    cases = {
        "missing.txt": (None, "No such file"),
        "binary.txt": (b"\xff\xfe\0", "not UTF-8"),
        "late.txt": (b"fine " * 20_000 + b"\xff", "not UTF-8"),
        "empty.txt": (b"", "no text"),
        "a.jsonl": (b'{"text": "fine"}\n{"text": 1, "content": "x"}\n', "a.jsonl:2 has no text under 'text'; fields "
                    "with text: content"),
        "b.jsonl": (b'{"text": "fine"}\nnot\n', "b.jsonl:2 is not JSON"),
        "c.jsonl": (b'["text"]\n', "c.jsonl:1 is not a JSON object"),
        "d.jsonl": (b"[" * 100_000, "d.jsonl:1 is not JSON"),
        "e.jsonl": (b'{"text": "\xff"}\n', "e.jsonl:1 is not JSON"),
    }  # fmt: skip
    for name, (held, said) in cases.items():
        if held is not None:
            (tmp_path / name).write_bytes(held)
        assert said in refused(folder, tmp_path / name, tmp_path / "out")
    (tmp_path / "bare").mkdir()
    assert "has no text file" in refused(folder, tmp_path / "bare", tmp_path / "out")


def test_folders_that_cannot_be_written_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    for out in (tmp_path / "full", folder / "texts" / "out", folder / "texts"):
        with pytest.raises(MHCError, match="MHC412"):
            single(folder, [folder / "texts"], out)
    with pytest.raises(ValueError, match="fraction"):
        single(folder, [folder / "texts"], tmp_path / "out", validation=1.0)


def test_tokenizers_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    model = tmp_path / "model"
    for change, said in (
        (lambda: None, "is not a folder"),
        (model.mkdir, "model"),
        (lambda: (model / "tokenizer.json").write_text("{"), "model"),
        (lambda: make_tokenizer(model) and (model / "tokenizer_config.json").unlink(), "no end-of-text token"),
        (lambda: (model / "config.json").write_text('{"eos_token_id": 5000}'), "no end-of-text token"),
        (lambda: (model / "tokenizer_config.json").write_text("[]"), "no end-of-text token"),
    ):
        change()
        with pytest.raises(MHCError, match="MHC614") as caught:
            single(tmp_path, [tmp_path / "a.txt"], tmp_path / "out")
        assert said in str(caught.value)
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": END}}))
    assert single(tmp_path, [tmp_path / "a.txt"], tmp_path / "out").eos == 0
