"""Trainer of transformers and its like: checkpoints that are resumed, figures that are logged, models that are compiled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import ids, llama, shake, t5
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from mhc_compile import (
    MemorySettings,
    MHCError,
    convert,
    emit_folder,
    from_pretrained,
    parameter_groups,
    stream_parameters,
)
from mhc_compile.integrations.trainer import ProbeCallback

DATA: Any = [{"input_ids": ids(1, seed=i)[0], "labels": ids(1, seed=i)[0]} for i in range(8)]


def trainer(model: nn.Module, folder: Path, **options: Any) -> Trainer:
    """A trainer of four steps, which saves after the second and the fourth."""
    more = {name: options.pop(name) for name in ("optimizers",) if name in options}
    settings: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "learning_rate": 1e-2, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "warmup_steps": 2,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **(settings | options))
    return Trainer(model=model, args=arguments, train_dataset=DATA, eval_dataset=DATA, **more)


def other_weights(model: nn.Module) -> nn.Module:
    """The model as it is not to be when training goes on."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(0.5)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def moved(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two nested values differ in a bit."""
    if isinstance(one, Tensor):
        return [] if torch.equal(one, other) else [path]
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return [place for key in one for place in moved(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, (list, tuple)):
        return [place for i, pair in enumerate(zip(one, other, strict=True)) for place in moved(*pair, f"{path}.{i}")]
    return [] if str(one) == str(other) else [path]


def losses(of: Trainer) -> list[float]:
    return [entry["loss"] for entry in of.state.log_history if "loss" in entry]


def assert_resumes(make: Callable[[], nn.Module], tmp_path: Path, **options: Any) -> Trainer:
    """Everything that a run of four steps leaves is there in the same bits where it was broken off after two."""
    whole = trainer(make(), tmp_path / "whole", **options)  # which seeds, also for the order of the data
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "broken" / "checkpoint-2")
    resumed = trainer(other_weights(make()), tmp_path / "broken", **options)
    resumed.train(resume_from_checkpoint=True)
    assert moved(state(whole.model), state(resumed.model)) == []
    assert losses(whole) == losses(resumed)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        files = [tmp_path / run / "checkpoint-4" / name for run in ("whole", "broken")]
        assert moved(*(torch.load(file, weights_only=False) for file in files)) == [], name
    return resumed


def dropped() -> nn.Module:
    return convert(llama(attention_dropout=0.3), inner="eager")


def experts() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(num_hidden_layers=1, vocab_size=64, num_local_experts=2, **sizes)
    return convert(MixtralForCausalLM(config), inner="eager")


def adapted_last() -> nn.Module:
    torch.manual_seed(0)
    return convert(get_peft_model(llama(), lora()), inner="eager")


def adapted_first() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(convert(llama(), inner="eager"), lora(modules_to_save=["mhc"]))


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


@pytest.mark.compat
def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path) -> None:
    assert_resumes(dropped, tmp_path)
    shape = set((tmp_path / "broken" / "checkpoint-4").glob("*.json"))
    assert {"mhc.json", "config.json", "trainer_state.json"} < {path.name for path in shape}


# transformers saves a model's experts one by one, and its Trainer would not find them in the module that holds all.
def test_a_model_whose_weights_had_other_names_is_resumed(tmp_path: Path) -> None:
    resumed = assert_resumes(experts, tmp_path)
    again = from_pretrained(tmp_path / "broken" / "checkpoint-4", inner="eager")
    assert moved(state(again), state(resumed.model)) == []


@pytest.mark.parametrize("make", [adapted_first, adapted_last])
def test_adapters_are_resumed_with_their_streams(make: Any, tmp_path: Path) -> None:
    assert_resumes(make, tmp_path)
