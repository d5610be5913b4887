"""Folders with UltraMem: converted, loaded from every storage, saved again, taken back, damaged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ultramem import V2, shake_values
from tiny_models import close, ids, llama, shake

from mhc_compile import MHCError, convert, convert_folder, from_pretrained
from mhc_compile.cli import main

TABLE = "ultra-mem.model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def trained() -> Any:
    model = convert(llama(num_hidden_layers=1), streams=2, ultramem=V2, inner="eager")
    shake(model, 0.5)
    return shake_values(model)


@pytest.fixture(scope="module")
def saved(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    trained.save_pretrained(folder)
    return folder


def test_a_converted_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, there, back = tmp_path / "source", tmp_path / "there", tmp_path / "back"
    llama().save_pretrained(source)
    fields = "v1,layers=0,skip=1,side=8,key_width=8,value_width=8,top=4"
    assert main(["convert", str(source), str(there), "--ultramem", fields]) == 0
    said = json.loads((there / "mhc.json").read_text())
    assert said["format"] == 2
    assert said["owners"]["model"]["ultramem"]["layers"] == [["layers.0", "layers.1"]]
    model: Any = from_pretrained(there, inner="eager")
    with torch.no_grad():
        assert close(model(ids()).logits, llama()(ids()).logits)
    table = model.model.mhc.table("ultra-mem")
    assert float(table.weight.std()) == pytest.approx(0.02, rel=0.2)
    assert table.ratio == 4.0
    assert main(["inspect", str(there)]) == 0
    assert "4 of 16^2 x 1" in capsys.readouterr().out
    convert_folder(there, back, to="residual")
    assert (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert not list(back.glob("ultra-mem*"))
    capsys.readouterr()
    for wrong in ("v3", "v1,side", "v1,side=x", "v1,width=3", "v1,top=0", "side=8", "v1,"):
        assert main(["convert", str(source), str(tmp_path / "no"), "--ultramem", wrong]) == 2
        assert "MHC220" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("storage", ["device", "host", "mapped"])
def test_every_storage_says_the_same(trained: Any, saved: Path, storage: Any) -> None:
    model: Any = from_pretrained(saved, inner="eager", tables=storage)
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, trained(ids()).logits)
    assert model.model.mhc.table("ultra-mem").storage == storage


def test_narrow_rows_and_layouts(trained: Any, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path / "narrow", table_dtype=torch.bfloat16)
    model: Any = from_pretrained(tmp_path / "narrow", inner="eager")
    with torch.no_grad():
        assert close(model(ids()).logits, trained(ids()).logits, 0.05)
    with pytest.raises(MHCError, match=r"MHC418.*look-ups: ultramem"):
        convert_folder(tmp_path / "narrow", tmp_path / "out", layout="megatron")


def test_folders_in_use_and_damaged_ones(trained: Any, saved: Path) -> None:
    trained.save_pretrained(saved)
    assert [p.name for p in saved.glob("ultra-mem*")] == [TABLE]
    with pytest.raises(MHCError, match="MHC411"):
        convert_folder(saved, saved.parent / "never", to="residual")
    said = json.loads((saved / "mhc.json").read_text())
    entry = said["owners"]["model"]["ultramem"]
    for change, code in (
        ({"settings": entry["settings"] | {"top": 3}}, "MHC223"),  # the same tensors, looked up otherwise
        ({"settings": entry["settings"] | {"top": 99}}, "MHC414"),
        ({"settings": {"depth": 1}}, "MHC414"),
        ({"layers": [["layers.7", "layers.7"]]}, "MHC414"),
        ({"layers": []}, "MHC414"),
        ({"hidden": 31}, "MHC414"),
    ):
        changed = copy.deepcopy(said)
        changed["owners"]["model"]["ultramem"] |= change
        (saved / "mhc.json").write_text(json.dumps(changed))
        with pytest.raises(MHCError, match=code):
            from_pretrained(saved, inner="eager")
    (saved / "mhc.json").write_text(json.dumps(said))
    (saved / TABLE).unlink()
    with pytest.raises(MHCError, match="MHC224"):
        from_pretrained(saved, inner="eager")


def test_arguments_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MHCError, match=r"MHC204.*ultramem"):
        convert_folder(tmp_path, tmp_path / "out", to="residual", ultramem="v1")
