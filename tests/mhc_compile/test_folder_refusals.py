"""Everything that may be wrong with a checkpoint folder or with where its conversion is to go."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import make, snapshot_of
from safetensors.torch import load_file, save_file

import mhc_compile
from mhc_compile import MHCError, convert_folder
from mhc_compile.checkpoint.staging import check_target, staged

# --- what is refused -----------------------------------------------------------------------------------------------


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_config(**entries: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda c: c.update(entries))


def edit_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "model.safetensors.index.json", change)


def edit_shard(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model-00002-of-00003.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        kept = {name: file for name, file in content["weight_map"].items() if file != path.name}
        index.write_text(json.dumps({"metadata": {}, "weight_map": kept | dict.fromkeys(tensors, path.name)}))

    return edit


def first(tensors: dict[str, torch.Tensor]) -> str:
    return min(name for name, t in tensors.items() if t.ndim == 2)


def poison(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[first(tensors)][1].fill_(value)


def repeat(folder: Path) -> None:
    here, there = (folder / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    save_file(load_file(here) | load_file(there), there, metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def empty_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def damage(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model-00002-of-00003.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return edit


def nested_header(depth: int = 100_000) -> bytes:
    text = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
    return len(text).to_bytes(8, "little") + text


FOLDERS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "empty": (lambda f: [shutil.rmtree(f), f.mkdir()], "MHC401", "neither config.json"),
    "not there": (shutil.rmtree, "MHC401", "is not there"),
    "a file": (lambda f: [shutil.rmtree(f), f.write_text("x")], "MHC401", "is a file"),
    "no config": (lambda f: (f / "config.json").unlink(), "MHC402", "config.json is missing"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "MHC402", "is not JSON"),
    "config nested too deeply": (lambda f: (f / "config.json").write_text("[" * 100_000), "MHC402", "is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "MHC402", "no JSON object"),
    "no weights": (empty_weights, "MHC402", "does not hold model.safetensors or model.safetensors.index.json"),
    "missing shard": (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), "MHC402", "00002-of-00003"),
    "index names too much": (
        edit_index(lambda i: i["weight_map"].update(ghost="model-00001-of-00003.safetensors")), "MHC402", "ghost",
    ),
    "index without a map": (edit_index(lambda i: i.pop("weight_map")), "MHC402", "no weight_map"),
    "index leads out": (
        edit_index(lambda i: i["weight_map"].update(ghost="../ghost.safetensors")), "MHC402", "not a safetensors file",
    ),
    "tensor twice": (repeat, "MHC402", "repeats tensors"),
    "cut short": (damage(lambda b: b[:-1]), "MHC403", "00002-of-00003"),
    "empty file": (damage(lambda _: b""), "MHC403", "00002-of-00003"),
    "header nested too deeply": (damage(lambda _: nested_header()), "MHC403", "00002-of-00003"),
    "header of noise": (damage(lambda _: b"\x10" + b"\0" * 7 + b"?" * 64), "MHC403", "00002-of-00003"),
    "tensor missing": (edit_shard(lambda t: t.pop(first(t))), "MHC404", "missing: "),
    "tensor too many": (edit_shard(lambda t: t.update(ghost=torch.ones(3))), "MHC404", "unexpected: ghost"),
    "another shape": (edit_shard(lambda t: t.update({first(t): torch.ones(5, 7)})), "MHC404", "[5, 7] for ["),
    "another width": (edit_config(intermediate_size=56), "MHC404", "of another shape"),
    "fewer layers": (edit_config(num_hidden_layers=1), "MHC404", "unexpected: model.layers.1"),
    "code of its own": (edit_config(auto_map={"AutoModel": "modeling.Mine"}), "MHC405", "auto_map"),
    "code further down": (edit_config(text_config={"auto_map": {"AutoConfig": "c.C"}}), "MHC405", "auto_map"),
    "unknown architecture": (edit_config(architectures=["MineForCausalLM"]), "MHC405", "no model MineForCausalLM"),
    "not a model": (edit_config(architectures=["AutoTokenizer"]), "MHC405", "no model AutoTokenizer"),
    "no architecture": (edit_config(architectures=None), "MHC405", "no architectures"),
    "unknown type": (edit_config(model_type="mine"), "MHC405", "cannot be built"),
    "impossible values": (edit_config(hidden_size="wide"), "MHC405", "cannot be built"),
    "a file of its own": (edit_config(transformers_weights="w.safetensors"), "MHC405", "transformers_weights"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "MHC405", "adapter"),
    "quantised": (edit_config(quantization_config={"quant_method": "gptq"}), "MHC406", "gptq"),
    "float8": (edit_shard(lambda t: t.update({first(t): t[first(t)].to(torch.float8_e4m3fn)})), "MHC406", "F8_E4M3"),
    "pickled": (pickled, "MHC407", "pytorch_model.bin"),
    "NaN": (edit_shard(poison(float("nan"))), "MHC408", "model-00002-of-00003"),
    "infinite": (edit_shard(poison(float("-inf"))), "MHC408", "model-00002-of-00003"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_cannot_be_converted(case: str, copied: Path, tmp_path: Path) -> None:
    change, code, text = FOLDERS[case]
    change(copied)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(MHCError) as caught:
        convert_folder(copied, tmp_path / "out")
    assert caught.value.code == code
    assert text in str(caught.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == (["copied"] if copied.exists() else [])


def test_merged_weights_that_do_not_fit_together(tmp_path: Path) -> None:
    make("mixtral").save_pretrained(tmp_path / "mixtral")
    path = tmp_path / "mixtral" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.block_sparse_moe.experts.1.w1.weight"] = torch.ones(5, 5)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(MHCError, match=r"MHC404.*parts of model\.layers\.0\.mlp\.experts\.gate_up_proj do not fit"):
        convert_folder(tmp_path / "mixtral", tmp_path / "out")


def test_a_converted_folder_is_not_converted_again(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(MHCError, match="MHC409"):
        convert_folder(converted, tmp_path / "out")


def test_a_residual_folder_is_not_taken_back(original: Path, tmp_path: Path) -> None:
    with pytest.raises(MHCError, match="MHC410"):
        convert_folder(original, tmp_path / "out", to="residual")


def test_trained_streams_have_no_way_back(converted: Path, tmp_path: Path) -> None:
    model = mhc_compile.from_pretrained(converted, inner="eager")
    with torch.no_grad():
        next(iter(mhc_compile.stream_parameters(model).values()))[0, 0] = 1e-6
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(MHCError, match="MHC411"):
        convert_folder(tmp_path / "trained", tmp_path / "out", to="residual")


def test_changed_weights_are_not_given_back_as_the_original(converted: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(converted, tmp_path / "changed"))
    path = folder / "model.mhc-00001-of-00004.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(MHCError, match="MHC414"):
        convert_folder(folder, tmp_path / "out", to="residual")
    assert [p.name for p in tmp_path.iterdir()] == ["changed"]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"stream": 4}, "MHC204"),
        ({"inner": "eager"}, "MHC204"),
        ({"to": "hyper"}, "MHC204"),
        ({"to": "residual", "streams": 4}, "MHC204"),
        ({"iterations": -1}, "MHC204"),
        ({"streams": 9}, "MHC201"),
        ({"convention": "mine"}, "MHC202"),
        ({"manifold": "kronecker", "streams": 3}, "MHC203"),
    ],
)
def test_options_are_checked_first(options: dict[str, Any], code: str, original: Path, tmp_path: Path) -> None:
    with pytest.raises(MHCError) as caught:
        convert_folder(original, tmp_path / "out", **options)
    assert caught.value.code == code
    assert not any(tmp_path.iterdir())


def occupied(folder: Path) -> Path:
    (folder / "full").mkdir()
    (folder / "full" / "precious").write_text("x")
    return folder / "full"


TARGETS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "not empty": (occupied, "not empty"),
    "a file": (lambda t: t / "copied" / "config.json", "inside the input"),
    "another file": (lambda t: (t / "f").write_text("x") and t / "f", "is a file"),
    "under a file": (lambda t: (t / "f").write_text("x") and t / "f" / "out", "not a folder"),
    "the input": (lambda t: t / "copied", "is the input itself"),
    "the input, spelt otherwise": (lambda t: t / "x" / ".." / "copied", "is the input itself"),
    "inside the input": (lambda t: t / "copied" / "out", "inside the input"),
    "around the input": (lambda t: t, "not empty"),
}


@pytest.mark.parametrize("case", TARGETS)
def test_an_output_folder_that_cannot_be_used(case: str, copied: Path, tmp_path: Path) -> None:
    choose, text = TARGETS[case]
    target = choose(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(MHCError) as caught:
        convert_folder(copied, target)
    assert caught.value.code == "MHC412"
    assert text in str(caught.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_location_that_is_read_only(original: Path, tmp_path: Path) -> None:
    target = tmp_path / "locked" / "out"
    target.parent.mkdir()
    target.parent.chmod(0o555)
    if os.access(target.parent, os.W_OK):
        target = Path("/proc/mhc-out")  # permissions do not bind an administrator, the kernel's own folders do
    with pytest.raises(MHCError, match="MHC412"):
        convert_folder(original, target)


LINKS: dict[str, Callable[[Path], Path]] = {
    "a companion": lambda f: f / "notes.txt",
    "the tokenizer": lambda f: f / "tokenizer.json",
    "further down": lambda f: f / "extra" / "notes.txt",
    "the configuration": lambda f: f / "config.json",
    "weights": lambda f: f / "model-00002-of-00003.safetensors",
}


@pytest.mark.parametrize("case", LINKS)
def test_a_link_out_of_the_folder(case: str, copied: Path, tmp_path: Path) -> None:
    link, secret = LINKS[case](copied), tmp_path / "secret"
    secret.write_bytes(link.read_bytes() if link.exists() else b"secret")
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    with pytest.raises(MHCError, match=rf"MHC416.*{link.name}.*secret"):
        convert_folder(copied, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_out_of_a_converted_folder(converted: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(converted, tmp_path / "changed"))
    (tmp_path / "secret").write_text("x")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(MHCError, match="MHC416"):
        convert_folder(folder, tmp_path / "out", to="residual")


def test_blobs_of_another_model_in_the_cache(original: Path, tmp_path: Path) -> None:
    snapshot = snapshot_of(original, tmp_path / "models--a")
    snapshot_of(original, tmp_path / "models--b")
    (snapshot / "notes.txt").symlink_to(tmp_path / "models--b" / "blobs" / "config.json")
    with pytest.raises(MHCError, match=r"MHC416.*notes\.txt"):
        convert_folder(snapshot, tmp_path / "out")


def test_a_disk_that_is_too_small(original: Path, tmp_path: Path) -> None:
    with pytest.raises(MHCError, match=r"MHC413.* are free"):
        check_target(tmp_path / "out", original, size=1 << 60)


def test_two_conversions_into_one_folder(original: Path, tmp_path: Path) -> None:
    with staged(tmp_path / "out") as staging:
        (staging / "mine").write_text("x")
        with pytest.raises(MHCError, match=r"MHC412.*another process"):
            convert_folder(original, tmp_path / "out")
        assert (staging / "mine").exists()
    assert (tmp_path / "out" / "mine").exists()


def test_a_link_in_place_of_the_temporary_folder_is_not_followed(original: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    (tmp_path / ".out.mhc-partial").symlink_to(tmp_path / "precious")
    with pytest.raises(MHCError, match="MHC412"):
        convert_folder(original, tmp_path / "out")
    assert (tmp_path / "precious" / "file").read_text() == "x"
