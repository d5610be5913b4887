"""transformers alone and folders of converted models: no way to load one leaves the streams out in silence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from memories import tokenizer
from tiny_models import ids, llama
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    dynamic_module_utils,
    pipeline,
)

import mhc_compile
from mhc_compile.parameters import is_converted

PLAIN_LOADS: dict[str, Any] = {
    "AutoModel": AutoModel.from_pretrained,
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
    "variant": lambda f: AutoModel.from_pretrained(f, variant="mhc"),
    "variant of a causal model": lambda f: AutoModelForCausalLM.from_pretrained(f, variant="mhc"),
    "another head": lambda f: AutoModelForSequenceClassification.from_pretrained(f, variant="mhc"),
    "the class": LlamaForCausalLM.from_pretrained,
    "variant of the class": lambda f: LlamaForCausalLM.from_pretrained(f, variant="mhc"),
    "variant of the base": lambda f: LlamaModel.from_pretrained(f, variant="mhc", device_map="cpu"),
    "another head by remote code": lambda f: AutoModel.from_pretrained(f, trust_remote_code=True),
    "its configuration": lambda f: LlamaModel.from_pretrained(f, config=LlamaConfig.from_pretrained(f), variant="mhc"),
    "pipeline": lambda f: pipeline("text-generation", model=str(f), model_kwargs={"variant": "mhc"}),
    "plain pipeline": lambda f: pipeline("text-generation", model=str(f)),
}


@pytest.mark.parametrize("load", PLAIN_LOADS)
def test_transformers_alone_does_not_load_it(load: str, saved_copy: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer()).save_pretrained(saved_copy)
    with pytest.raises((OSError, ValueError), match=r"mhc_compile\.from_pretrained"):
        PLAIN_LOADS[load](saved_copy)


@pytest.fixture
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.mark.usefixtures("modules_cache")
@pytest.mark.parametrize("how", ["saved", "converted"])
def test_its_auto_class_loads_it_by_remote_code(how: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(how)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert is_converted(model.model)
    expected = mhc_compile.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, expected(ids()).logits, rtol=0, atol=0)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text().count("auto_map") == 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(again(ids()).logits, expected(ids()).logits, rtol=0, atol=0)


@pytest.mark.usefixtures("modules_cache")
def test_remote_code_says_what_to_install(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mhc_compile", None)
    with pytest.raises(ImportError, match="pip install mhc-compile"):
        AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)


def test_transformers_alone_reads_what_is_beside_the_weights(saved_copy: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer()).save_pretrained(saved_copy)
    assert AutoTokenizer.from_pretrained(saved_copy)("ab").input_ids
    assert AutoConfig.from_pretrained(saved_copy).hidden_size == 32
    assert GenerationConfig.from_pretrained(saved_copy).pad_token_id == 0


# In a folder that `save_pretrained` wrote it finds the index for Trainer, which is none for `from_pretrained`.
@pytest.mark.parametrize("variant", [None, "mhc"])
def test_a_configuration_from_elsewhere_finds_no_weights(variant: str | None, saved: Path, converted: Path) -> None:
    for folder in (saved, converted):
        for cls in (AutoModel, AutoModelForCausalLM, LlamaForCausalLM):
            with pytest.raises((OSError, KeyError), match=r"no file named model|^'metadata'$"):
                cls.from_pretrained(folder, config=llama().config, variant=variant)
