"""Trainer of transformers: checkpoints that are resumed, figures that are logged, models that are compiled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sharded_trainer
import torch
from memories import tokenizer, with_memory
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import ids, llama, t5, variants
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from mhc_compile import (
    MHCError,
    TableAdamW,
    UltraMemSettings,
    convert,
    convert_folder,
    emit_folder,
    from_pretrained,
    parameter_groups,
)
from mhc_compile.integrations.trainer import ProbeCallback, shard

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


def assert_resumes(make: Callable[[], nn.Module], tmp_path: Path, trainer: Callable[..., Trainer] = trainer) -> Trainer:
    """Everything that a run of four steps leaves is there in the same bits where it was broken off after two."""
    whole = trainer(make(), tmp_path / "whole")  # which seeds, also for the order of the data
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "broken" / "checkpoint-2")
    resumed = trainer(other_weights(make()), tmp_path / "broken")
    resumed.train(resume_from_checkpoint=True)
    assert moved(state(whole.model), state(resumed.model)) == []
    assert losses(whole) == losses(resumed)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        files = [tmp_path / run / "checkpoint-4" / name for run in ("whole", "broken")]
        assert moved(*(torch.load(file, weights_only=False) for file in files)) == [], name
    return resumed


def dropped() -> nn.Module:
    return convert(llama(attention_dropout=0.3), inner="eager")


def small() -> nn.Module:
    return llama(num_hidden_layers=1)


def experts() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(num_hidden_layers=1, vocab_size=64, num_local_experts=2, **sizes)
    return convert(MixtralForCausalLM(config), inner="eager")


def adapted_last() -> nn.Module:
    torch.manual_seed(0)
    return convert(get_peft_model(small(), lora()), inner="eager")


def adapted_first() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(convert(small(), inner="eager"), lora(modules_to_save=["mhc"]))


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


@pytest.mark.compat
def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path) -> None:
    assert_resumes(dropped, tmp_path)
    shape = set((tmp_path / "broken" / "checkpoint-4").glob("*.json"))
    assert {"mhc.json", "config.json", "trainer_state.json"} < {path.name for path in shape}


# transformers saves a model's experts one by one, and its Trainer would not find them in the module that holds all.
@pytest.mark.slow
def test_a_model_whose_weights_had_other_names_is_resumed(tmp_path: Path) -> None:
    resumed = assert_resumes(experts, tmp_path)
    again = from_pretrained(tmp_path / "broken" / "checkpoint-4", inner="eager")
    assert moved(state(again), state(resumed.model)) == []


@pytest.mark.parametrize("make", variants(adapted_first, adapted_last))
def test_adapters_are_resumed_with_their_streams(make: Any, tmp_path: Path) -> None:
    resumed = assert_resumes(make, tmp_path)
    again = PeftModel.from_pretrained(convert(small(), inner="eager"), str(tmp_path / "broken" / "checkpoint-4"))
    assert moved(state(again), state(resumed.model)) == []


def fine_tuning(model: nn.Module, folder: Path) -> Trainer:
    """TRL's trainer, with its checkpointed layers and packed rows, under autocast."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "learning_rate": 1e-2}
    arguments = SFTConfig(
        output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, max_length=16,
        packing=True, **settings,
    )  # fmt: skip
    texts = Dataset.from_dict({"text": ["abcdefgh"[: i % 5 + 3] for i in range(32)]})
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), pad_token="<pad>", eos_token="</s>")
    return SFTTrainer(model=model, args=arguments, train_dataset=texts, processing_class=words)


@pytest.mark.slow
@pytest.mark.parametrize("make", [dropped, adapted_first])
def test_fine_tuning_is_resumed(make: Any, tmp_path: Path) -> None:
    streams = state(make())
    resumed = assert_resumes(make, tmp_path, fine_tuning)
    phis = [f".{name}" for name in streams if name.endswith(".phi") and ".original_module." not in name]
    assert phis
    assert set(phis) <= set(moved(streams, state(resumed.model)))
    assert resumed.evaluate(resumed.train_dataset)["eval_entropy"] > 0
    callback = ProbeCallback(resumed, every=1)
    resumed.add_callback(callback)
    resumed.args.max_steps = 2
    resumed.train()
    logged = [entry for entry in resumed.state.log_history if "mhc/separation" in entry or "loss" in entry]
    # TRL's own averages are in the entries of the loss alone.
    assert ["entropy" in entry for entry in logged] == [False, True] * 2


@pytest.mark.parametrize("make", variants(dropped, adapted_first))
def test_the_best_model_is_loaded_at_the_end(make: Any, tmp_path: Path) -> None:
    # The larger loss is to count as the better one: that of the second step.
    metric = {"metric_for_best_model": "loss", "greater_is_better": True}
    settings = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    trained = trainer(make(), tmp_path, **settings, **metric)
    trained.train()
    best, last = [
        from_pretrained(tmp_path / f"checkpoint-{step}", inner="eager")
        if make is dropped
        else PeftModel.from_pretrained(convert(small(), inner="eager"), str(tmp_path / f"checkpoint-{step}"))
        for step in (2, 4)
    ]
    assert trained.state.best_global_step == 2
    assert moved(state(best), state(trained.model)) == []
    assert moved(state(best), state(last))


def test_the_index_for_trainer_stands_for_no_residual_model(tmp_path: Path) -> None:
    saved, name = tmp_path / "saved", "model.safetensors.index.json"
    model = experts()
    model.save_pretrained(saved)
    assert json.loads((saved / name).read_text())["weight_map"].keys() == model.state_dict().keys()
    model.save_pretrained(tmp_path / "original", save_original_format=True)
    assert not (tmp_path / "original" / name).exists()
    done = convert_folder(saved, tmp_path / "residual", to="residual")
    assert name not in map(str, done.left_out)
    assert not (tmp_path / "residual" / name).exists()
    (saved / "mhc.json").unlink()
    with pytest.raises(MHCError, match=r"MHC402.*mhc\.json is missing"):
        from_pretrained(saved)


# Their rows are in files of their own, which Trainer does not know.
def test_a_model_with_tables_is_not_resumed(tmp_path: Path) -> None:
    model = with_memory(small(), layers=(0,))
    model.save_pretrained(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        trainer(model, tmp_path).train(resume_from_checkpoint=True)


def test_tables_are_trained_by_an_optimizer_that_knows_them(tmp_path: Path) -> None:
    values = UltraMemSettings.preset("v2", side=6, key_width=8, value_width=8, input_width=4, top=3)
    model: Any = convert(small(), ultramem=values, inner="eager")
    table = model.model.mhc.table("ultra-mem")
    before = table.weight.detach().clone()
    adamw = TableAdamW(parameter_groups(model, lr=1e-2, steps=4))
    trainer(model, tmp_path, optimizers=(adamw, None), save_strategy="no").train()
    assert adamw.state[table.weight]["step"] == adamw.param_groups[-1]["falls_over"] == 4
    assert 0 < int((table.weight != before).any(1).sum()) < len(before)


def test_a_probed_run(tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 2, "save_strategy": "no", "logging_steps": 2}
    plain = trainer(dropped(), tmp_path / "plain", **settings)
    plain.train()
    probed = trainer(dropped(), tmp_path / "probed", report_to=["tensorboard"], **settings)
    callback = ProbeCallback(probed, every=2)
    probed.add_callback(callback)
    probed.train()
    assert moved(state(plain.model), state(probed.model)) == []
    assert losses(plain) == losses(probed)
    logged = {entry["step"]: entry for entry in probed.state.log_history if "mhc/gain_forward_max" in entry}
    assert list(logged) == [sample.step for sample in callback.probes.samples] == [1, 2, 4]
    last = callback.probes.samples[-1]
    assert last.tokens == 2 * 2 * 8  # two microbatches of two rows of eight tokens
    assert logged[4]["mhc/gain_forward_max"] == last.values["gain_forward_max"].max().item()
    assert logged[4]["mhc/separation"] == last.values["separation"].mean().item() > 0
    assert {f"mhc/{name}" for name in last.summary()} == {name for name in logged[4] if name.startswith("mhc/")}
    assert not {"mhc/mix", "mhc/gates"} & logged[4].keys()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # the oldest stack has none

    events = EventAccumulator(str(next((tmp_path / "probed").rglob("events.out.*")).parent)).Reload()
    shown = {event.step: event.value for event in events.Scalars("train/mhc/separation")}
    assert shown == pytest.approx({step: entry["mhc/separation"] for step, entry in logged.items()})


@pytest.mark.slow
def test_a_probed_run_that_failed_leaves_the_model_unprobed(tmp_path: Path) -> None:
    model = convert(t5(num_layers=1), inner="eager")
    rows: Any = [{"input_ids": ids(1)[0], "labels": ids(1)[0]}] * 4
    run = trainer(model, tmp_path, save_strategy="no", max_steps=2)
    run.train_dataset = rows
    callback = ProbeCallback(run, every=1)
    run.add_callback(callback)

    def fail(*_: Any) -> None:
        raise InterruptedError

    handle = model.lm_head.register_forward_hook(fail)
    with pytest.raises(InterruptedError):
        run.train()
    handle.remove()
    assert callback.probes.samples == []
    run.train()
    assert [(sample.step, sample.owner) for sample in callback.probes.samples] == [
        (1, "encoder"), (1, "decoder"), (2, "encoder"), (2, "decoder"),
    ]  # fmt: skip
    logged = [entry for entry in run.state.log_history if "mhc/separation/decoder" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]


def test_compiled_by_this_backend_it_trains_as_it_is(tmp_path: Path) -> None:
    plain, compiled = (trainer(convert(small(), inner="eager"), tmp_path / name) for name in ("plain", "compiled"))
    plain.train()
    compiled.model.compile(backend="mhc", options={"inner": "eager"})
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled.train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
    assert moved(state(plain.model), state(compiled.model)) == []
    again = from_pretrained(tmp_path / "compiled" / "checkpoint-4", inner="eager")
    assert moved(state(again), state(compiled.model)) == []


def test_what_trainer_compiles_itself_is_refused(tmp_path: Path) -> None:
    model = convert(small(), inner="eager")
    with pytest.raises(Exception, match=r"(?s)MHC301.*leave torch_compile and"):
        trainer(model, tmp_path, torch_compile_backend="eager").train()
    with pytest.raises(ValueError, match="'MHC' is not a valid DynamoBackend"):
        trainer(model, tmp_path, torch_compile_backend="mhc")


_ELSEWHERE = """
import sys
sys.modules["mhc_compile"] = None
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
torch.set_num_threads(1)
folder, runs = sys.argv[1:]
rows = [{"input_ids": t, "labels": t} for t in torch.randint(64, (8, 8), generator=torch.Generator().manual_seed(0))]

def train(run, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    arguments = TrainingArguments(
        output_dir=runs + run, max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
        use_cpu=True, report_to=[], disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train(**options)
    return model.state_dict()

first = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).state_dict()
whole, resumed = train("/whole"), train("/resumed", resume_from_checkpoint=runs + "/whole/checkpoint-2")
assert any(".mhc_" in name for name in whole)
assert all(torch.equal(whole[name], resumed[name]) for name in whole)
assert all(not torch.equal(whole[name], first[name]) for name in whole if name.endswith(".phi"))
"""


@pytest.mark.slow
def test_an_emitted_model_is_resumed_without_this_package(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "residual")
    emit_folder(tmp_path / "residual", tmp_path / "emitted")
    words = [sys.executable, "-c", _ELSEWHERE, str(tmp_path / "emitted"), str(tmp_path)]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_sharded_model_is_saved_whole(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = Path(sharded_trainer.__file__)
    done = subprocess.run(
        [*torchrun, str(program), str(tmp_path / "two")], env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    saved = from_pretrained(tmp_path / "two" / "saved", inner="eager").state_dict()
    wanted = sharded_trainer.trained(tmp_path / "one", batch=4, sharded=False).state_dict()
    assert saved.keys() == wanted.keys()
    for name, t in wanted.items():
        torch.testing.assert_close(saved[name], t, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    with pytest.raises(MHCError, match="MHC501"):
        shard(nn.Linear(2, 2), None)  # type: ignore[arg-type]
