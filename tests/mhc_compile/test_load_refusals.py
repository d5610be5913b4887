"""`from_pretrained`: its keywords, and the folders that it refuses, by code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import llama

import mhc_compile
from mhc_compile import MHCError, from_pretrained
from mhc_compile.checkpoint.manifest import FORMAT
from mhc_compile.parameters import owners


def test_transformers_own_keywords(saved: Path) -> None:
    model = from_pretrained(saved, inner="eager", dtype=torch.bfloat16, attn_implementation="eager", device_map="cpu")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert {p.dtype for p in mhc_compile.stream_parameters(model).values()} == {torch.float32}
    assert owners(model)["model"].options.inner == "eager"
    assert owners(from_pretrained(saved))["model"].options.inner is None


@pytest.mark.parametrize(
    ("keywords", "code"),
    [
        ({"trust_remote_code": True}, "MHC204"),
        ({"variant": "fp16"}, "MHC204"),
        ({"state_dict": {}}, "MHC204"),
        ({"inner": "outer"}, "MHC204"),
        ({"streams": 4}, "MHC304"),
    ],
)
def test_keywords_that_are_refused(keywords: dict[str, Any], code: str, saved: Path) -> None:
    with pytest.raises(MHCError, match=code):
        from_pretrained(saved, **keywords)


def test_a_model_spread_over_devices(saved: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    with pytest.raises(MHCError, match=r"MHC204.*cpu, disk"):
        from_pretrained(saved, device_map={**places, "lm_head": "cpu"}, offload_folder=tmp_path)


def test_a_residual_folder(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "residual")
    with pytest.raises(MHCError, match="MHC410"):
        from_pretrained(tmp_path / "residual")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MHCError, match="MHC401"):
        from_pretrained(tmp_path / "no")


def edit(folder: Path, **entries: Any) -> None:
    path = folder / "mhc.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def owner(**entries: Any) -> dict[str, Any]:
    return {"model": {"spec": {"streams": 4}, "sites": {"layers.0#0": 32}} | entries}


def streams_file(folder: Path) -> Path:
    return folder / json.loads((folder / "mhc.json").read_text())["streams_file"]


DAMAGE: dict[str, tuple[Any, str, str]] = {
    "no mhc.json": (lambda f: (f / "mhc.json").unlink(), "MHC402", "mhc.json is missing"),
    "mhc.json not JSON": (lambda f: (f / "mhc.json").write_text("{"), "MHC414", "is not JSON"),
    "mhc.json of nothing": (lambda f: (f / "mhc.json").write_text("{}"), "MHC414", "no format"),
    "mhc.json nested too deeply": (
        lambda f: (f / "mhc.json").write_text('{"a":' * 100_000), "MHC414", "is not JSON",
    ),
    "iterations without end": (
        lambda f: edit(f, owners=owner(spec={"iterations": 10_000_000})), "MHC414", "iterations=10000000",
    ),
    "a later format": (lambda f: edit(f, format=FORMAT + 1), "MHC414", f"format {FORMAT + 1}"),
    "no owners": (lambda f: edit(f, owners={}), "MHC414", "no owners"),
    "no sites": (lambda f: edit(f, owners=owner(sites={})), "MHC414", "without sites"),
    "a site without a name": (lambda f: edit(f, owners=owner(sites={"": 32})), "MHC414", "not a site's name"),
    "a size out of bounds": (lambda f: edit(f, owners=owner(sites={"a#0": 1 << 40})), "MHC414", "not a hidden size"),
    "an unknown field": (lambda f: edit(f, owners=owner(spec={"lanes": 4})), "MHC414", "lanes"),
    "an unknown convention": (lambda f: edit(f, owners=owner(spec={"convention": "x"})), "MHC414", "MHC202"),
    "fewer sites": (lambda f: edit(f, owners=owner()), "MHC414", "differ in model.mhc.layers.0#1"),
    "streams elsewhere": (lambda f: edit(f, streams_file="../x.safetensors"), "MHC414", "not a file's name"),
    "another architecture": (lambda f: edit(f, architecture="GPT2LMHeadModel"), "MHC414", "GPT2LMHeadModel"),
    "streams missing": (lambda f: edit(f, streams_file="model.mhc-9.safetensors"), "MHC402", "is missing"),
    "a shard missing": (lambda f: min(f.glob("*.safetensors")).unlink(), "MHC402", "which is missing"),
    "streams cut short": (lambda f: streams_file(f).write_bytes(streams_file(f).read_bytes()[:-4]), "MHC403", ""),
    "streams exchanged": (
        lambda f: save_file({n: t + 1 for n, t in load_file(streams_file(f)).items()}, streams_file(f)),
        "MHC414", "sha256",
    ),
    "another width": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('_size": 64', '_size": 56')),
        "MHC404", "of another shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder(case: str, saved_copy: Path) -> None:
    damage, code, text = DAMAGE[case]
    damage(saved_copy)
    with pytest.raises(MHCError) as caught:
        from_pretrained(saved_copy, inner="eager")
    assert caught.value.code == code
    assert text in str(caught.value)


def test_an_owner_that_the_model_does_not_have(saved_copy: Path) -> None:
    manifest = json.loads((saved_copy / "mhc.json").read_text())
    edit(saved_copy, owners={"other": manifest["owners"]["model"]}, sha256={})
    streams = {n.replace("model.", "other."): t for n, t in load_file(streams_file(saved_copy)).items()}
    save_file(streams, streams_file(saved_copy))
    index = saved_copy / "mhc.safetensors.index.json"
    index.write_text(index.read_text().replace("model.mhc.layers", "other.mhc.layers"))
    with pytest.raises(MHCError, match=r"MHC414.*no module 'other'"):
        from_pretrained(saved_copy, inner="eager")


@pytest.mark.parametrize("missing", ["transformers", "accelerate"])
def test_without_what_loading_needs(saved: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MHCError, match="MHC415"):
        from_pretrained(saved)
