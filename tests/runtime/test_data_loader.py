"""Batches of a run: by step alone, however many replicas and threads read them; and data that does not fit."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_folders import documents, make_tokenizer, packed, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mhc_compile.diagnostics import MHCError
from mhc_compile.runtime.data.loader import Loader, check_tokenizer
from mhc_compile.runtime.data.order import BLOCK, Mixture, Order
from mhc_compile.runtime.data.prepare import prepare
from mhc_compile.runtime.data.shards import MANIFEST, open_data

TEXTS = documents(150, seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("loader") / "model"
    make_tokenizer(found)
    return found


@pytest.fixture(scope="module")
def folder(model: Path) -> Path:
    """Several small shards, so that windows cross from one to the next."""
    source = write_lines(model.parent / "lines.jsonl", TEXTS)
    prepare([str(source)], model.parent / "data", tokenizer=model, shard_tokens=700)
    return model.parent / "data"


@pytest.fixture(scope="module")
def known(model: Path) -> tuple[list[int], list[int]]:
    bpe = Tokenizer.from_file(str(model / "tokenizer.json"))
    bpe.no_truncation()
    bpe.no_padding()
    return packed(bpe, TEXTS)


def positions(starts: list[int], begin: int, size: int) -> list[int]:
    """The plain reference: count up from the window's or the document's beginning."""
    found: list[int] = []
    for at in range(begin, begin + size):
        found.append(0 if at == begin or at in starts else found[-1] + 1)
    return found


def test_batches_are_windows_of_the_packed_tokens(folder: Path, known: tuple[list[int], list[int]]) -> None:
    tokens, starts = known
    assert len(open_data(folder).shards) > 3
    loader = Loader(folder, sequence=50, batch=6, seed=3, documents=True)
    assert loader.samples == (len(tokens) - 1) // 50
    seen: list[int] = []
    for step in range(3 * loader.samples // 6):
        batch = loader.batch(step)
        assert {name: (v.dtype, v.shape) for name, v in batch.items()} == dict.fromkeys(
            ("input_ids", "labels", "position_ids"), (torch.int64, (6, 50))
        ) | {"weights": (torch.float32, (6, 50))}
        samples = Order(loader.samples, 3)(step * 6, 6).tolist()
        seen += samples
        for row, sample in enumerate(samples):
            begin = sample * 50
            assert batch["input_ids"][row].tolist() == tokens[begin : begin + 50]
            assert batch["labels"][row].tolist() == tokens[begin + 1 : begin + 51]
            assert batch["position_ids"][row].tolist() == positions(starts, begin, 50)
            first = [place in starts for place in range(begin + 1, begin + 51)]
            assert (batch["weights"][row] == 0).tolist() == first  # not predicted from the document before
        assert float(batch["weights"].mean()) == pytest.approx(1)
    assert sorted(seen[: loader.samples]) == sorted(seen[loader.samples : 2 * loader.samples])
    assert len(set(seen[: loader.samples])) == loader.samples
    assert set(Loader(folder, sequence=50, batch=6).batch(0)) == {"input_ids", "labels"}


@pytest.mark.parametrize("workers", [0, 2])
def test_prompts_do_not_count(model: Path, tmp_path: Path, workers: int) -> None:
    pairs = [{"question": text, "answer": f" {text[::-1]}"} for text in documents(60, seed=5)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    how: dict[str, Any] = {"tokenizer": model, "field": "answer", "prompt": "question", "shard_tokens": 500}
    prepare([str(tmp_path / "pairs.jsonl")], tmp_path / "data", workers=workers, **how)
    bpe = Tokenizer.from_file(str(model / "tokenizer.json"))
    bpe.no_truncation()
    bpe.no_padding()
    tokens, mask = [], []
    for pair in pairs:
        question, answer = (bpe.encode(pair[name], add_special_tokens=False).ids for name in ("question", "answer"))
        tokens += [*question, *answer, bpe.token_to_id("<|end|>")]
        mask += [0] * len(question) + [1] * (len(answer) + 1)
    data = open_data(tmp_path / "data")
    assert json.loads((tmp_path / "data" / MANIFEST).read_text())["format"] == 2
    assert data.read(0, data.tokens).tolist() == tokens
    assert data.counted(0, data.tokens).tolist() == mask
    batch = Loader(tmp_path / "data", sequence=20, batch=6, seed=3).batch(1)
    for row, sample in enumerate(Order((len(tokens) - 1) // 20, 3)(6, 6).tolist()):
        labels = slice(sample * 20 + 1, sample * 20 + 21)
        assert batch["labels"][row].tolist() == tokens[labels]
        assert (batch["weights"][row] > 0).tolist() == [bool(m) for m in mask[labels]]
    assert float(batch["weights"].mean()) == pytest.approx(1)
    file = tmp_path / "data" / "masks-00001.bin"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    with pytest.raises(MHCError, match=r"MHC611.*masks-00001"):
        data.verify()
    with pytest.raises(MHCError, match=r"MHC610.*prompts"):
        prepare([__file__], tmp_path / "other", **how)


@pytest.mark.parametrize(("first", "count", "weights"), [(0, 7, [1, 1, 1]), (1234, 40, [6, 3, 1])])
def test_a_mixture_has_exact_parts(first: int, count: int, weights: list[int]) -> None:
    mixture = Mixture([70, 100, 3000], weights, seed=4)
    assert mixture.places.sum() == BLOCK
    assert all(abs(n - BLOCK * w / sum(weights)) <= 1 for n, w in zip(mixture.places, weights, strict=True))
    everything = mixture(0, first + count)
    assert mixture(first, count) == everything[first:]
    block = mixture(2 * BLOCK, BLOCK)
    assert [sum(k == folder for k, _ in block) for folder in range(3)] == mixture.places.tolist()
    for folder, samples in enumerate((70, 100, 3000)):
        own, places = [sample for k, sample in block if k == folder], int(mixture.places[folder])
        assert sorted(own) == sorted(Order(samples, 4)(2 * places, places).tolist())  # the next ones of its own order


def test_a_mixture_of_folders(folder: Path, model: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "lines.jsonl", documents(40, seed=9))
    prepare([str(source)], tmp_path / "other", tokenizer=model)
    both = Loader([folder, tmp_path / "other"], weights=(3, 1), sequence=20, batch=4, seed=1)
    whole = [both.batch(step)["input_ids"] for step in range(8)]
    again = Loader([folder, tmp_path / "other"], weights=(3, 1), sequence=20, batch=4, seed=1)
    assert torch.equal(again.batch(7)["input_ids"], whole[7])
    for place, row in enumerate(torch.cat(whole).tolist()):
        k, sample = Mixture([data.tokens // 20 for data in both.folders], (3, 1), 1)(place, 1)[0]
        assert row == both.folders[k].read(sample * 20, 20).tolist()
    assert both.describe() != Loader([folder, tmp_path / "other"], sequence=20, batch=4, seed=1).describe()


@given(
    step=st.integers(0, 10_000),
    replicas=st.sampled_from([1, 2, 3, 4, 6, 12]),
    seed=st.integers(0, 9),
    sequence=st.integers(1, 120),
)
@settings(max_examples=25, deadline=None)
def test_replicas_cut_the_same_batch(folder: Path, step: int, replicas: int, seed: int, sequence: int) -> None:
    how: dict[str, Any] = {"sequence": sequence, "batch": 12, "seed": seed, "documents": True}
    whole = Loader(folder, **how).batch(step)
    parts = [Loader(folder, **how, replicas=replicas, replica=r).batch(step) for r in range(replicas)]
    for name, values in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), values)


def test_a_run_goes_on_at_the_exact_sample(folder: Path) -> None:
    first = Loader(folder, sequence=20, batch=4, seed=1)
    unbroken = [first.batch(step)["input_ids"] for step in range(60)]
    again = Loader(folder, sequence=20, batch=4, seed=1)
    assert all(torch.equal(again.batch(step)["input_ids"], unbroken[step]) for step in range(31, 60))
    assert again.describe() == first.describe()
    assert first.describe() == json.loads(json.dumps(first.describe()))
    for other in (Loader(folder, sequence=20, batch=4, seed=2), Loader(folder, sequence=21, batch=4, seed=1)):
        assert other.describe() != first.describe()
        assert not torch.equal(other.batch(0)["input_ids"][0, :20], unbroken[0][0])


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_change_nothing_and_end(folder: Path, workers: int) -> None:
    alone = Loader(folder, sequence=20, batch=4, documents=True)
    with Loader(folder, sequence=20, batch=4, documents=True, workers=workers) as ahead:
        # Back and forth, as a run that skips steps or loads an earlier checkpoint reads.
        for step in [*range(10), 3, 4, 5, 200, 100, 101, 102, 0]:
            batch, expected = ahead.batch(step), alone.batch(step)
            assert all(torch.equal(batch[name], expected[name]) for name in expected)
            assert len(ahead._coming) <= 2 * workers
        assert any(t.name.startswith("data") for t in threading.enumerate())
    assert not any(t.name.startswith("data") for t in threading.enumerate())
    assert torch.equal(ahead.batch(7)["labels"], alone.batch(7)["labels"])
    ahead.close()


def test_too_little_data(folder: Path) -> None:
    tokens = open_data(folder).tokens
    assert Loader(folder, sequence=tokens - 1, batch=1).batch(5)["input_ids"].shape == (1, tokens - 1)
    for sequence, batch in ((tokens, 1), (tokens - 1, 2), (100, tokens)):
        with pytest.raises(MHCError, match="MHC613"):
            Loader(folder, sequence=sequence, batch=batch)
    for replicas, replica in ((3, 0), (2, 2), (2, -1)):
        with pytest.raises(ValueError, match="replica"):
            Loader(folder, sequence=10, batch=4, replicas=replicas, replica=replica)


# --- damage ---------------------------------------------------------------------------------------------------------


def test_damage_is_found_before_the_first_step(folder: Path, tmp_path: Path) -> None:
    held = json.loads((folder / MANIFEST).read_text())
    first = held["shards"][0]
    changes = {
        "no folder": lambda f: shutil.rmtree(f),
        "no manifest": lambda f: (f / MANIFEST).unlink(),
        "not JSON": lambda f: (f / MANIFEST).write_text("{"),
        "not an object": lambda f: (f / MANIFEST).write_text("[]"),
        "missing shard": lambda f: (f / "tokens-00001.bin").unlink(),
        "missing documents": lambda f: (f / "documents-00000.bin").unlink(),
        "short": lambda f: (f / "tokens-00001.bin").write_bytes((f / "tokens-00001.bin").read_bytes()[:-2]),
        "long": lambda f: (f / "documents-00001.bin").write_bytes(b"\0" * 8000),
        "a folder": lambda f: ((f / "tokens-00000.bin").unlink(), (f / "tokens-00000.bin").mkdir()),
        **{
            f"{change}": lambda f, change=change: (f / MANIFEST).write_text(json.dumps({**held, **change}))
            for change in (
                {"format": 3}, {"dtype": "float32"}, {"dtype": "uint32"}, {"shards": []}, {"shards": 3}, {"eos": -1},
                {"shards": [{**first, "tokens": 0}]}, {"shards": [{**first, "tokens": "1"}]}, {"largest": None},
                {"shards": [{"tokens": 5}]}, {"dtype": ["uint16"]},
            )
        },
    }  # fmt: skip
    for name, change in changes.items():
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        change(copy)
        with pytest.raises(MHCError) as caught:
            Loader(copy, sequence=10, batch=2)
        assert caught.value.code == "MHC611", name
        shutil.rmtree(copy, ignore_errors=True)


def test_changed_bytes_are_found_by_reading_them(folder: Path, tmp_path: Path) -> None:
    for i, name in enumerate(("tokens-00002.bin", "documents-00001.bin")):
        copy = tmp_path / f"copy{i}"
        shutil.copytree(folder, copy)
        open_data(copy).verify()
        held = bytearray((copy / name).read_bytes())
        held[17] ^= 1
        (copy / name).write_bytes(held)
        with pytest.raises(MHCError, match="MHC611"):
            open_data(copy).verify()
    held = np.fromfile(copy / "tokens-00000.bin", "<u2")
    held[5] = 60_000
    held.tofile(copy / "tokens-00000.bin")
    loader = Loader(copy, sequence=10, batch=4)
    step = loader._order(0, loader.samples).index((0, 0)) // 4
    with pytest.raises(MHCError, match="token 60000"):
        loader.batch(step)


def test_the_part_to_train_on_is_named(model: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "lines.jsonl", TEXTS)
    prepare([str(source)], tmp_path / "data", tokenizer=model, validation=0.5)
    with pytest.raises(MHCError, match="MHC611") as caught:
        Loader(tmp_path / "data", sequence=10, batch=1)
    assert str(tmp_path / "data" / "train") in str(caught.value)


# --- the model's tokenizer ------------------------------------------------------------------------------------------


def test_data_of_another_tokenizer_is_refused(folder: Path, model: Path, tmp_path: Path) -> None:
    check_tokenizer(folder, model)
    check_tokenizer(folder, tmp_path)  # has nothing to compare with
    other = tmp_path / "other"
    make_tokenizer(other, vocabulary=290)
    with pytest.raises(MHCError, match=r"MHC612(.|\n)*300 ids, the model's 290"):
        check_tokenizer(folder, other)
    # Two tokens have changed places: as many ids, other texts.
    held = json.loads((model / "tokenizer.json").read_text())
    vocabulary = held["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(held))
    with pytest.raises(MHCError, match=r"MHC612(.|\n)*other texts"):
        check_tokenizer(folder, other)
    # Another spelling of the same file is the same tokenizer.
    (other / "tokenizer.json").write_text(json.dumps(json.loads((model / "tokenizer.json").read_text()), indent=3))
    check_tokenizer(folder, other)


def test_without_a_tokenizer_the_vocabulary_decides(folder: Path, tmp_path: Path) -> None:
    largest = open_data(folder).largest
    for config in ({"vocab_size": largest + 1}, {"text_config": {"vocab_size": largest + 1}}, {}, []):
        (tmp_path / "config.json").write_text(json.dumps(config))
        check_tokenizer(folder, tmp_path)
    for config in ({"vocab_size": largest}, {"text_config": {"vocab_size": largest}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(MHCError, match="MHC612"):
            check_tokenizer(folder, tmp_path)
