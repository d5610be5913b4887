"""Repositories of the Hub: pushed from a model, loaded by their id, taken by the commands; each in another process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from folders import make
from hub_server import Hub, serving
from safetensors.torch import load_file, save_file
from tiny_models import ids, shake

import mhc_compile
from mhc_compile import MHCError
from mhc_compile.checkpoint.hub import local_folder

_PUSH = """
import mhc_compile, transformers
converted = mhc_compile.from_pretrained("trained")
converted.push_to_hub("me/streams")
converted.push_to_hub("me/streams", revision="v2")
transformers.AutoModelForCausalLM.from_pretrained("residual").push_to_hub("me/residual")
mhc_compile.emit_folder("me/residual", "standalone", streams=2)
transformers.AutoModelForCausalLM.from_pretrained("standalone", trust_remote_code=True).push_to_hub("me/standalone")
"""
_LOAD = """
import sys, torch, mhc_compile, transformers
from safetensors.torch import load_file, save_file
ids = load_file("given.safetensors")["ids"]
logits = {
    "main": mhc_compile.from_pretrained("me/streams")(ids).logits,
    "v2": mhc_compile.from_pretrained("me/streams", revision="v2")(ids).logits,
    "at": mhc_compile.from_pretrained("me/streams@v2")(ids).logits,
}
for name in ("me/streams", "me/standalone"):
    try:
        transformers.AutoModelForCausalLM.from_pretrained(name)
    except (OSError, ValueError) as error:
        assert "mhc" in str(error) or "trust_remote_code" in str(error), error
    else:
        raise AssertionError(name)
try:
    mhc_compile.from_pretrained("me/standalone")
except mhc_compile.MHCError as error:
    assert "MHC4" in str(error), error
else:
    raise AssertionError("code of a repository was run")
sys.modules["mhc_compile"] = None
standalone = transformers.AutoModelForCausalLM.from_pretrained("me/standalone", trust_remote_code=True)
logits["standalone"] = standalone(ids).logits
save_file({name: t.detach().contiguous() for name, t in logits.items()}, "logits.safetensors")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a residual checkpoint, a converted one that is trained, and what both compute."""
    path = tmp_path_factory.mktemp("hub")
    model = make("llama")
    model.save_pretrained(path / "residual")
    given = {"ids": ids(), "residual": model(ids()).logits}
    converted = mhc_compile.convert(model, inner="eager")
    shake(converted)
    converted.save_pretrained(path / "trained")
    given["streams"] = converted(ids()).logits
    save_file({name: t.detach().contiguous() for name, t in given.items()}, path / "given.safetensors")
    return path


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving() as server:
        yield server


def run(folder: Path, hub: Hub, *words: str, code: int = 0) -> str:
    """Run Python beside the server; return what it printed."""
    environment = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_TOKEN": "hf_given", "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == code, done.stderr[-4000:]
    return done.stdout + done.stderr


def test_pushed_and_loaded_by_id(folder: Path, hub: Hub) -> None:
    run(folder, hub, "-c", _PUSH)
    assert {"config.json", "mhc.json", "mhc.safetensors.index.json", "README.md"} <= hub.files("me/streams").keys()
    assert hub.files("me/streams", "v2").keys() == hub.files("me/streams").keys()
    assert {"modeling_mhc.py", "model.safetensors", "config.json"} <= hub.files("me/standalone").keys()
    run(folder, hub, "-c", _LOAD)
    given, found = load_file(folder / "given.safetensors"), load_file(folder / "logits.safetensors")
    for name in ("main", "v2", "at"):
        torch.testing.assert_close(found[name], given["streams"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["standalone"], given["residual"], rtol=1e-5, atol=1e-5)


def test_commands(folder: Path, hub: Hub) -> None:
    hub.branches["org/model"] = {}
    pushed = {path.name: path.read_bytes() for path in (folder / "residual").iterdir()}
    hub.commit("org/model", "main", {**pushed, "evil.py": b"raise SystemExit(3)", "pytorch_model.bin": b"pickle"})
    hub.downloaded.clear()
    command = ("-m", "mhc_compile")
    assert "4 of 4 adds" in run(folder, hub, *command, "inspect", "org/model")
    assert "model.safetensors" not in hub.downloaded  # the graph needs no weights
    run(folder, hub, *command, "convert", "org/model", "converted", "--streams", "2")
    assert (folder / "converted" / "mhc.json").exists()
    assert not {"evil.py", "pytorch_model.bin"} & set(hub.downloaded)
    assert "MHC417" in run(folder, hub, *command, "convert", "org/none", "out", code=3)
    assert "MHC417" in run(folder, hub, *command, "inspect", "org/model@none", code=3)
    assert not (folder / "out").exists()


def test_a_path_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_folder("org/model") == Path("org/model")
    assert local_folder("./org/none") == Path("org/none")
    with pytest.raises(MHCError, match="MHC204"):
        local_folder("org/model", revision="main")
    with pytest.raises(MHCError, match="MHC417"):  # tests have no connection
        local_folder("org/none")
