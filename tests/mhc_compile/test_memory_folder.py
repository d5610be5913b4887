"""Checkpoint folders with memories: converted, loaded from every storage, saved again, and refused when they lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from memories import shake_memory, small
from safetensors.torch import load_file, save_file
from test_memory_convert import tables, tokenizer
from tiny_models import ids, llama

from mhc_compile import MHCError, convert_folder, from_pretrained
from mhc_compile.cli import main
from mhc_compile.memory.tables import Storage
from mhc_compile.parameters import owners

TABLE = "engram.model.layers.0-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A residual model with a tokenizer."""
    folder = tmp_path_factory.mktemp("source") / "model"
    llama().save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    """The same with a memory at its start."""
    folder = source.parent / "converted"
    convert_folder(source, folder, engram=small("paper"))
    return folder


@pytest.fixture(scope="module")
def trained(converted: Path) -> tuple[Path, torch.Tensor]:
    """The same with a memory that says something, and what it says."""
    model = from_pretrained(converted, inner="eager")
    shake_memory(model)
    folder = converted.parent / "trained"
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(ids()).logits


def test_the_folder_s_own_tokenizer_compresses(converted: Path) -> None:
    said = json.loads((converted / "mhc.json").read_text())
    assert said["format"] == 2
    memory = said["owners"]["model"]["memory"]
    assert memory["compression"]["size"] == 28
    model: Any = from_pretrained(converted, inner="eager")
    held = owners(model)["model"].get_buffer("engram.compression")
    assert torch.equal(held[torch.arange(2, 28)], held[torch.arange(28, 54)])
    with torch.no_grad():
        wanted = llama()(ids()).logits
        assert float((model(ids()).logits - wanted).abs().max() / wanted.abs().max()) < 2e-6
    rows = tables(model)[0].weight
    assert float(rows.std()) == pytest.approx(0.02, rel=0.1)  # drawn, though never in memory as a whole


@pytest.mark.parametrize("storage", ["device", "host", "mapped"])
@pytest.mark.parametrize("hot_rows", [0, 64])
def test_every_storage_says_the_same(trained: tuple[Path, torch.Tensor], storage: Storage, hot_rows: int) -> None:
    folder, wanted = trained
    model = from_pretrained(folder, inner="eager", tables=storage, hot_rows=hot_rows)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(ids()).logits, wanted)
    table = tables(model)[0]
    assert table.storage == storage
    assert (table.hot is not None) == (hot_rows > 0 and storage != "device")
    if table.hot is not None:
        assert table.hot.hit_rate > 0


def test_mapped_models_are_saved_again(trained: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, wanted = trained
    from_pretrained(folder, inner="eager", tables="mapped").save_pretrained(tmp_path / "again")  # type: ignore[operator]
    again = from_pretrained(tmp_path / "again", inner="eager", tables="host")
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, wanted)
    # Into a folder in use.
    again.save_pretrained(tmp_path / "again")  # type: ignore[operator]
    assert len(list((tmp_path / "again").glob("engram.*"))) == 2
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path / "again", inner="eager")(ids()).logits, wanted)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.01), (torch.float8_e4m3fn, 0.1)], ids=str)
def test_narrow_rows(trained: tuple[Path, torch.Tensor], tmp_path: Path, dtype: torch.dtype, error: float) -> None:
    folder, wanted = trained
    model: Any = from_pretrained(folder, inner="eager")
    model.save_pretrained(tmp_path / "narrow", table_dtype=dtype)
    for storage in ("device", "host", "mapped"):
        narrow = from_pretrained(tmp_path / "narrow", inner="eager", tables=storage)
        assert tables(narrow)[0].dtype == dtype
        with torch.no_grad():
            found = narrow(ids()).logits
        assert not torch.equal(found, wanted)
        assert float((found - wanted).abs().max() / wanted.abs().max()) < error


@pytest.mark.compat
def test_back_to_residual(converted: Path, trained: tuple[Path, torch.Tensor], source: Path, tmp_path: Path) -> None:
    convert_folder(converted, tmp_path / "residual", to="residual")
    assert (tmp_path / "residual" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    with pytest.raises(MHCError, match="MHC411"):
        convert_folder(trained[0], tmp_path / "never", to="residual")
    assert not (tmp_path / "never").exists()


def copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def refused(folder: Path, code: str, *, storage: Storage = "mapped") -> None:
    with pytest.raises(MHCError, match=code):
        from_pretrained(folder, inner="eager", tables=storage)


def test_damaged_and_foreign_tables_are_refused(trained: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, _ = trained
    cut = copy(folder, tmp_path / "cut")
    (cut / TABLE).write_bytes((cut / TABLE).read_bytes()[:-5])
    refused(cut, "MHC224")
    missing = copy(folder, tmp_path / "missing")
    (missing / TABLE).unlink()
    refused(missing, "MHC224")
    noise = copy(folder, tmp_path / "noise")
    (noise / TABLE).write_bytes(b"not a file of tensors")
    refused(noise, "MHC224")
    foreign = copy(folder, tmp_path / "foreign")
    save_file({"weight": torch.zeros(3, 4)}, foreign / TABLE)
    refused(foreign, "MHC224")
    swapped = copy(folder, tmp_path / "swapped")
    (swapped / TABLE).write_bytes((swapped / TABLE.replace("layers.0", "layers.1")).read_bytes())
    refused(swapped, "MHC223")
    bits = copy(folder, tmp_path / "bits")
    raw = bytearray((bits / TABLE).read_bytes())
    raw[-3] ^= 1
    (bits / TABLE).write_bytes(bytes(raw))
    refused(bits, "MHC224", storage="device")


def test_a_manifest_that_does_not_fit_the_tables(trained: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder = copy(trained[0], tmp_path / "other")
    said = json.loads((folder / "mhc.json").read_text())
    for change in ({"rows": 5}, {"hash": "no"}, {"site": "layers.9#0"}):
        changed = json.loads(json.dumps(said))
        changed["owners"]["model"]["memory"]["layers"][0] |= change
        (folder / "mhc.json").write_text(json.dumps(changed))
        refused(folder, "MHC223" if "rows" in change else "MHC414")


def test_another_tokenizer_is_refused(trained: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder = copy(trained[0], tmp_path / "retold")
    tokenizer().save(str(folder / "tokenizer.json"))
    from_pretrained(folder, inner="eager")
    said = json.loads((folder / "tokenizer.json").read_text())
    vocab = said["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(said))
    refused(folder, "MHC222")


def test_without_a_tokenizer_there_is_no_compression(tmp_path: Path) -> None:
    llama(num_hidden_layers=1).save_pretrained(tmp_path / "bare")
    with pytest.raises(MHCError, match=r"MHC222.*tokenizer.json is missing"):
        convert_folder(tmp_path / "bare", tmp_path / "out", engram=small("v41", layers=(0,)))
    assert not (tmp_path / "out").exists()
    convert_folder(tmp_path / "bare", tmp_path / "out", engram=small("v41", layers=(0,), compress=False))
    assert load_file(next((tmp_path / "out").glob("engram.*")))["weight"].shape[1] == 4


def test_the_command_adds_memories(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["convert", str(source), str(out), "--engram", "v41", "--engram-layers", "0,layers.1"]
    assert main([*arguments, "--engram-rows", "50"]) == 0
    assert sorted(p.name.split("-")[0] for p in out.glob("engram.*")) == [
        "engram.model.layers.0", "engram.model.layers.1"
    ]  # fmt: skip
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    assert "2..4 x 8" in capsys.readouterr().out
    assert main(["convert", str(source), str(tmp_path / "no"), "--engram-rows", "50"]) == 2
    assert "MHC220" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "no"), "--engram", "v41", "--engram-layers", "7",
                 "--engram-rows", "50"]) == 3  # fmt: skip
    assert "MHC226" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
