"""`emit_folder`: a folder that transformers loads by itself, in a process that does not have this package."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folders import make
from safetensors.torch import load_file, save_file
from tiny_models import ids, shake
from transformers import AutoModelForCausalLM

import mhc_compile
from mhc_compile import MHCError
from mhc_compile.cli import main
from mhc_compile.emitting.folder import refuse_missing
from mhc_compile.emitting.vendor import refuse_others, vendored

_ELSEWHERE = """
import sys
sys.modules["mhc_compile"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
folder, given = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(folder)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("loaded without its streams")
model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
known = load_file(given)
torch.testing.assert_close(model(known["ids"]).logits, known["logits"], rtol=0, atol=0)
assert model.generate(known["ids"], max_new_tokens=2, pad_token_id=0, eos_token_id=None).shape == (2, 10)
loss = model.train()(input_ids=known["ids"], labels=known["ids"]).loss
loss.backward()
assert all(p.grad is not None for name, p in model.named_parameters() if ".mhc_" in name and name.endswith("bias"))
model.save_pretrained(sys.argv[1] + "-again")
"""


def loads_elsewhere(folder: Path, model: Any, tmp_path: Path, python: str = sys.executable) -> None:
    """Assert that another process computes what `model` does."""
    with torch.no_grad():
        save_file({"ids": ids(), "logits": model(ids()).logits.contiguous()}, tmp_path / "given.safetensors")
    words = [python, "-c", _ELSEWHERE, str(folder), str(tmp_path / "given.safetensors")]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.compat
def test_a_residual_folder(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "residual")
    (tmp_path / "residual" / "tokenizer.json").write_text("{}")
    folder = mhc_compile.emit_folder(tmp_path / "residual", tmp_path / "out", evaluation={"perplexity": 12.5})
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_mhc.MHCLlamaForCausalLM"
    assert config["mhc"]["spec"] == str(mhc_compile.StreamSpec())
    assert (folder / "tokenizer.json").read_text() == "{}"
    card = (folder / "README.md").read_text()
    assert "Converted from `residual`" in card
    assert "| perplexity | 12.5 |" in card
    converted = mhc_compile.convert(AutoModelForCausalLM.from_pretrained(tmp_path / "residual").eval(), inner="eager")
    loads_elsewhere(folder, converted, tmp_path)


@pytest.mark.slow  # it installs PyTorch
@pytest.mark.timeout(1800)
def test_an_environment_with_torch_and_transformers_alone(tmp_path: Path) -> None:
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    wanted = [f"torch=={torch.__version__.partition('+')[0]}", f"transformers=={transformers.__version__}"]
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-compile", *wanted], check=True)
    model = make("llama")
    model.save_pretrained(tmp_path / "residual")
    folder = mhc_compile.emit_folder(tmp_path / "residual", tmp_path / "out")
    loads_elsewhere(folder, mhc_compile.convert(model, inner="eager"), tmp_path, python)


@pytest.mark.parametrize("name", ["gpt2", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_a_converted_folder_keeps_its_trained_streams(name: str, tmp_path: Path) -> None:
    model = mhc_compile.convert(make(name), streams=2, inner="eager")
    shake(model)
    mhc_compile.save_pretrained(model, tmp_path / "converted")
    folder = mhc_compile.emit_folder(tmp_path / "converted", tmp_path / "out")
    loads_elsewhere(folder, mhc_compile.from_pretrained(tmp_path / "converted", inner="eager"), tmp_path)


def test_a_vendored_folder_has_the_files_of_the_classes(tmp_path: Path) -> None:
    model = make("gpt2")
    model.save_pretrained(tmp_path / "residual")
    folder = mhc_compile.emit_folder(tmp_path / "residual", tmp_path / "out", vendor=True)
    original = inspect.getsource(sys.modules[type(model).__module__])
    copied = (folder / "vendored_modeling_gpt2.py").read_text()
    assert copied.count("\n") == original.count("\n")
    assert copied.partition('"""')[0] == original.partition('"""')[0]  # the licence
    assert not [line for line in copied.splitlines() if line.startswith("from .")]
    source = (folder / "modeling_mhc.py").read_text()
    assert "modeling_gpt2 import" in source
    assert "transformers.models.gpt2.modeling_gpt2" not in source
    assert not (folder / "__pycache__").exists()
    loads_elsewhere(folder, mhc_compile.convert(model, inner="eager"), tmp_path)


def test_copies_that_compute_something_else_are_found(tmp_path: Path) -> None:
    model = make("gpt2")
    text = "from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel as Known\n"
    text, files = vendored(model, text + "class Model(Known):\n    pass\n")
    refuse_others(model, {**files, "model.py": text}, "model", "Model", {"input_ids": ids()})
    wrong = {
        name: code.replace("* 0.5 *", "* 0.25 *").replace("residual +", "residual -") for name, code in files.items()
    }
    assert wrong != files
    with pytest.raises(MHCError, match="MHC709"):
        refuse_others(model, {**wrong, "model.py": text}, "model", "Model", {"input_ids": ids()})


def test_tied_weights_in_half_precision_are_kept(tmp_path: Path) -> None:
    make("llama-bf16-tied").save_pretrained(tmp_path / "residual")
    folder = mhc_compile.emit_folder(tmp_path / "residual", tmp_path / "out")
    stored = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert stored["model.layers.0.mhc_mlp.phi"].dtype == torch.float32


def test_the_command_and_what_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("gpt2").save_pretrained(tmp_path / "residual")
    words = ["convert", str(tmp_path / "residual"), str(tmp_path / "out"), "--standalone"]
    assert main([*words, "--to", "residual"]) == 2
    assert main(["convert", str(tmp_path / "residual"), str(tmp_path / "out"), "--vendor"]) == 2
    assert main([*words, "--convention", "deepseek_v4"]) == 3
    assert "MHC708" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "--streams", "2"]) == 0
    assert "trust_remote_code=True" in capsys.readouterr().out
    assert (tmp_path / "out" / "modeling_mhc.py").exists()
    assert main(words) == 3


def test_weights_that_are_missing(tmp_path: Path) -> None:
    make("gpt2").config.save_pretrained(tmp_path / "empty")
    with pytest.raises(MHCError, match="MHC40"):
        mhc_compile.emit_folder(tmp_path / "empty", tmp_path / "out")


def test_a_weight_that_was_not_saved_is_found(tmp_path: Path) -> None:
    model = make("llama-bf16-tied")
    model.save_pretrained(tmp_path)
    refuse_missing(model, tmp_path)
    model.more = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(MHCError, match=r"MHC404.*more"):
        refuse_missing(model, tmp_path)
