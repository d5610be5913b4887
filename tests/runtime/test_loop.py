"""Whole runs: what they write, that they go on bit by bit, that they stop when asked, and what is refused before."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from data_folders import documents, make_tokenizer, write_lines
from rich.console import Console
from safetensors.torch import load_file
from torch.nn import functional as F
from training import TIMES, model_folder
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

import mhc_compile
from mhc_compile.diagnostics import MHCError, MHCWarning
from mhc_compile.runtime.data.loader import Loader
from mhc_compile.runtime.data.prepare import prepare
from mhc_compile.runtime.loop import Result, train
from mhc_compile.runtime.metrics import Metrics
from mhc_compile.runtime.recipe import Recipe, parse_recipe


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model that drops values at random, its tokenizer, and data."""
    folder = tmp_path_factory.mktemp("material")
    model_folder(folder / "model", vocab_size=300, attention_dropout=0.1, num_hidden_layers=2)
    make_tokenizer(folder / "model")
    for name, seed in (("tokens", 0), ("held-out", 1)):
        lines = write_lines(folder / f"{name}.jsonl", documents(150, seed))
        prepare([str(lines)], folder / name, tokenizer=folder / "model")
    return folder


def recipe(material: Path, folder: Path, **tables: dict[str, Any]) -> Recipe:
    content: dict[str, Any] = {
        "model": {"folder": str(material / "model"), "inner": "eager"},
        "data": {"folder": str(material / "tokens"), "validation": str(material / "held-out"), "sequence": 16},
        "train": {"steps": 6, "batch": 4, "microbatch": 2, "lr": 1e-2, "evaluate_every": 3, "evaluate_batches": 2},
        "parallel": {"timeout": 60},
        "checkpoint": {"folder": str(folder / "run"), "every": 2},
        "metrics": {"every": 1},
    }
    for name, fields in tables.items():
        content[name] = content.get(name, {}) | fields
    return parse_recipe(content, folder)


def lines(folder: Path) -> dict[int, dict[str, float]]:
    """The metrics by step, without those of time."""
    found = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return {m["step"]: {k: v for k, v in m.items() if k not in TIMES} for m in found}


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    files = (folder / "run" / f"step-{step:08d}").glob("*.safetensors")
    return {name: t for file in sorted(files) for name, t in load_file(file).items()}


def on_ranks(given: Recipe, folder: Path) -> None:
    """The run in as many processes as it wants, as torchrun starts them."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(given.plain()))
    program = "import json, sys; from pathlib import Path; from mhc_compile.runtime.loop import train; "
    program += "from mhc_compile.runtime.recipe import parse_recipe; p = Path(sys.argv[1]); "
    program += "train(parse_recipe(json.loads(p.read_text()), p.parent), accept_changes=True)"
    (folder / "run.py").write_text(program)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*torchrun, str(given.parallel.world), str(folder / "run.py"), str(folder / "recipe.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_run_writes_what_it_was_asked_for(material: Path, tmp_path: Path) -> None:
    out = io.StringIO()
    asked = recipe(material, tmp_path, metrics={"every": 1, "probes_every": 4})
    result = train(asked, console=Console(file=out, width=120))
    assert out.getvalue().index("compiling stage 1 of 1 for training") < out.getvalue().index("step 1/6")
    found = lines(tmp_path)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert result == Result(6, found[6]["loss"], "done")
    assert all(math.isfinite(found[step][name]) for step in found for name in ("loss", "lr", "grad_norm"))
    assert [step for step in found if "evaluation_loss" in found[step]] == [3, 6]
    assert [step for step in found if "composite_gain/forward_max" in found[step]] == [4]
    assert sorted(p.name for p in (tmp_path / "run").glob("step-*")) == ["step-00000004", "step-00000006"]
    # Nothing is left to do.
    assert train(recipe(material, tmp_path)) == Result(6, None, "done")


def test_prompts_are_not_learnt_and_a_window_is_profiled(material: Path, tmp_path: Path) -> None:
    """The loss is the mean over the answers' tokens; the profiler leaves a trace of the second step."""
    pairs = [{"prompt": text[::-1], "text": text} for text in documents(150, 4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    prepare([str(tmp_path / "pairs.jsonl")], tmp_path / "pairs", tokenizer=material / "model", prompt="prompt")
    data = {"folder": str(tmp_path / "pairs"), "mixture": [str(material / "tokens")], "weights": [1, 1]}
    steps = {"steps": 2, "lr": 1e-9, "profile": "2", "evaluate_every": 0}
    model = mhc_compile.from_pretrained(material / "model", inner="eager")
    config = json.loads((material / "model" / "config.json").read_text()) | {"attention_dropout": 0.0}
    shutil.copytree(material / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    train(recipe(material, tmp_path, data=data, train=steps, model={"folder": str(tmp_path / "model")}))
    with Loader([tmp_path / "pairs", material / "tokens"], weights=(1, 1), sequence=16, batch=4) as loader:
        batch = loader.batch(1)
    counts = batch["weights"] > 0
    assert 0 < int(counts.sum()) < counts.numel()
    with torch.no_grad():
        wanted = F.cross_entropy(model(batch["input_ids"]).logits[counts], batch["labels"][counts])
    assert lines(tmp_path)[2]["loss"] == pytest.approx(float(wanted), rel=1e-5)
    figures = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < figures["mfu"] < 1
    assert figures["peak_memory"] > 1e6
    trace = json.loads((tmp_path / "run" / "profile" / "rank-00000.json").read_text())
    assert any("aten::" in event.get("name", "") for event in trace["traceEvents"])


def test_an_evaluation_is_the_loss_on_held_out_data(material: Path, tmp_path: Path) -> None:
    train(recipe(material, tmp_path, train={"steps": 1, "lr": 1e-9, "evaluate_batches": 3}))
    model = mhc_compile.from_pretrained(material / "model", inner="eager")  # in eval mode: nothing is dropped
    batches = [Loader(material / "held-out", sequence=16, batch=4).batch(step) for step in range(3)]
    with torch.no_grad():
        wanted = [F.cross_entropy(model(b["input_ids"]).logits.flatten(0, 1), b["labels"].flatten()) for b in batches]
    assert lines(tmp_path)[1]["evaluation_loss"] == pytest.approx(float(torch.stack(wanted).mean()), rel=1e-6)


def test_a_run_that_goes_on_is_an_unbroken_one(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(recipe(material, whole))
    progress = Metrics.progress

    def asked_to_stop(self: Metrics, step: int, loss: float, tokens: int) -> None:
        progress(self, step, loss, tokens)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Metrics, "progress", asked_to_stop)
        before = signal.getsignal(signal.SIGTERM)
        assert train(recipe(material, broken)).ended == "stopped"
        assert signal.getsignal(signal.SIGTERM) is before
    assert sorted(p.name for p in (broken / "run").glob("step-*")) == ["step-00000002", "step-00000003"]
    shutil.rmtree(broken / "run" / "step-00000003")  # as if it had been killed in step 3
    assert train(recipe(material, broken)).ended == "done"
    assert lines(broken) == lines(whole)
    one, other = weights(broken, 6), weights(whole, 6)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


ULTRAMEM = {"preset": "v2", "side": 6, "key_width": 8, "value_width": 8, "input_width": 4, "top": 3}


def residual(material: Path, folder: Path) -> Path:
    """The same material with a residual model that drops nothing."""
    copied = without_dropout(material, folder)
    config = LlamaConfig(**json.loads((copied / "model" / "config.json").read_text()))
    shutil.rmtree(copied / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(copied / "model")
    make_tokenizer(copied / "model")
    return copied


@pytest.mark.parametrize("streams", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ultramem_of_a_recipe_goes_on_bit_by_bit(material: Path, tmp_path: Path, streams: int) -> None:
    given = recipe(residual(material, tmp_path), tmp_path, ultramem=ULTRAMEM, mhc={"streams": streams})
    train(given)
    wanted = weights(tmp_path, 6)
    shutil.rmtree(tmp_path / "run" / "step-00000006")
    train(given)
    assert all(torch.equal(t, wanted[name]) for name, t in weights(tmp_path, 6).items())
    (table,) = (name for name in wanted if name.startswith("tables/"))
    moved = (wanted[table] != weights(tmp_path, 4)[table]).any(1)
    assert 0 < int(moved.sum()) < 2 * 36  # of two layers' values those that were found


@pytest.mark.slow
def test_ultramem_on_two_stages(material: Path, tmp_path: Path) -> None:
    """Both layers read one pool of values, which lies in both stages."""
    copied, two = residual(material, tmp_path), tmp_path / "two"
    tables = {"ultramem": ULTRAMEM, "train": {"microbatch": 1}}
    train(recipe(copied, tmp_path / "one", **tables))
    given = recipe(copied, two, **tables, parallel={"stages": 2})
    on_ranks(given, two)
    wanted, found = lines(tmp_path / "one"), lines(two)
    assert list(found) == list(wanted)
    for step in wanted:
        for name in wanted[step]:
            assert found[step][name] == pytest.approx(wanted[step][name], rel=2e-5), (step, name)
    whole = weights(two, 6)
    shutil.rmtree(two / "run" / "step-00000006")
    on_ranks(given, two)
    assert all(torch.equal(t, whole[name]) for name, t in weights(two, 6).items())


def test_another_course_is_asked_for(material: Path, tmp_path: Path) -> None:
    train(recipe(material, tmp_path, train={"steps": 2}))
    changed = {"train": {"steps": 4, "batch": 2, "lr": 2e-2}}
    with pytest.raises(MHCError, match=r"MHC608.*train.batch is 4 there and 2 here; train.lr .*; train.steps is 2"):
        train(recipe(material, tmp_path, **changed))
    train(recipe(material, tmp_path, metrics={"every": 2}, train={"steps": 2, "evaluate_every": 1}))  # no other course
    seen: list[torch.Tensor] = []
    read = Loader.batch
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Loader, "batch", lambda self, step: seen.append(read(self, step)) or seen[-1])
        assert train(recipe(material, tmp_path, **changed), accept_changes=True).step == 4
    # The smaller batches follow the larger ones in the data.
    wanted = Loader(material / "tokens", sequence=16, batch=2)
    ids = [b["input_ids"] for b in seen]
    assert any(torch.equal(batch, wanted.batch(4)["input_ids"]) for batch in ids)
    assert any(torch.equal(batch, wanted.batch(5)["input_ids"]) for batch in ids)


def without_dropout(material: Path, folder: Path) -> Path:
    """What is dropped depends on the rank."""
    copied = Path(shutil.copytree(material, folder / "material"))
    config = json.loads((copied / "model" / "config.json").read_text())
    (copied / "model" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.0}))
    return copied


@pytest.mark.compat
def test_two_ranks_make_the_same_run(material: Path, tmp_path: Path) -> None:
    copied = without_dropout(material, tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    train(recipe(copied, one))
    parallel = {"stages": 2, "schedule": "dualpipev", "stages_per_rank": 2}
    given = recipe(copied, two, train={"microbatch": 1}, parallel=parallel, metrics={"every": 1, "probes_every": 4})
    on_ranks(given, two)
    wanted, found = lines(one), lines(two)
    for step in wanted:
        for name in wanted[step]:
            assert found[step][name] == pytest.approx(wanted[step][name], rel=2e-5), (step, name)
    assert "composite_gain/forward_max" in found[4]


@pytest.mark.slow
def test_sharded_ranks_go_on_from_one_and_one_from_them(material: Path, tmp_path: Path) -> None:
    copied = without_dropout(material, tmp_path)
    constant = {"schedule": "constant", "microbatch": 1}
    train(recipe(copied, tmp_path / "whole", train=constant | {"steps": 9}))
    mixed = tmp_path / "mixed"
    parallel = {"stages": 2, "mode": "fsdp", "schedule": "zbv", "stages_per_rank": 2}
    train(recipe(copied, mixed, train=constant | {"steps": 3}))
    on_ranks(recipe(copied, mixed, train=constant | {"steps": 6}, parallel=parallel), mixed)
    on_ranks(recipe(copied, mixed, train=constant | {"steps": 7}, parallel={"data": 2, "mode": "fsdp"}), mixed)
    train(recipe(copied, mixed, train=constant | {"steps": 9}), accept_changes=True)
    wanted, found = lines(tmp_path / "whole"), lines(mixed)
    assert list(found) == list(range(1, 10))
    for step in wanted:
        assert found[step]["loss"] == pytest.approx(wanted[step]["loss"], rel=2e-5), step


def test_bfloat16_trains_float32_weights(material: Path, tmp_path: Path) -> None:
    train(recipe(material, tmp_path, model={"dtype": "bfloat16"}))
    train(recipe(material, tmp_path / "precise"))
    found, precise = lines(tmp_path), lines(tmp_path / "precise")
    assert found[6]["loss"] != precise[6]["loss"]
    assert found[6]["loss"] == pytest.approx(precise[6]["loss"], rel=0.03)
    assert {t.dtype for t in weights(tmp_path, 6).values()} == {torch.float32}


def test_a_loss_that_is_not_finite_stops_the_run(material: Path, tmp_path: Path) -> None:
    with pytest.raises(MHCError, match="MHC618"):
        train(recipe(material, tmp_path, train={"lr": 1e30}))
    assert list((tmp_path / "run").glob("failed-step-*"))


def test_the_first_error_is_reported_where_the_disk_is_full_too(material: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits on the sizes of files are those of POSIX")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    chosen = recipe(material, tmp_path, train={"lr": 1e30}, checkpoint={"every": 1, "keep": 2})
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.warns(MHCWarning, match="MHC616"), pytest.raises(MHCError, match="MHC618"):
            train(chosen)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_from_scratch(material: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(material, tmp_path / "material"))
    for name in ("mhc.json", *(p.name for p in (copied / "model").glob("*.safetensors*"))):
        (copied / "model" / name).unlink()
    train(recipe(copied, tmp_path, model={"start": "scratch"}, mhc={"streams": 2}))
    assert lines(tmp_path)[1]["loss"] == pytest.approx(math.log(300), rel=0.1)


@pytest.mark.parametrize("damage", ["shard", "tokenizer", "few", "long", "world", "data", "byte"])
def test_mistakes_are_found_before_the_first_step(
    material: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(material, tmp_path / "material"))
    tables: dict[str, Any] = {}
    match damage:
        case "shard":
            next((copied / "model").glob("*.safetensors")).unlink()
            code = "MHC402"
        case "tokenizer":
            make_tokenizer(copied / "model", vocabulary=280)
            code = "MHC612"
        case "few":
            tables["train"] = {"batch": 40_000}
            code = "MHC613"
        case "long":
            tables["data"] = {"sequence": 65}
            code = "MHC602"
        case "world":
            tables["parallel"] = {"data": 2}
            code = "MHC603"
        case "byte":
            file = next((copied / "tokens").glob("tokens-*.bin"))
            held = bytearray(file.read_bytes())
            held[10] ^= 1
            file.write_bytes(held)
            code = "MHC611"
        case _:
            next((copied / "tokens").glob("*.bin")).unlink()
            code = "MHC611"
    monkeypatch.setattr(Metrics, "progress", lambda *_: pytest.fail("a step was made"))
    with pytest.raises(MHCError, match=code):
        train(recipe(copied, tmp_path, **tables))
    assert not list((tmp_path / "run").glob("step-*"))


@pytest.mark.slow
def test_documents_of_a_sequence_do_not_see_each_other(material: Path, tmp_path: Path) -> None:
    """The first loss is the model's own with positions that begin again, not the one of a single text."""
    shutil.copytree(material / "model", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.0}))
    short = write_lines(tmp_path / "short.jsonl", [text[:6] for text in documents(150, 2)])
    prepare([str(short)], tmp_path / "short", tokenizer=material / "model")
    data = {"folder": str(tmp_path / "short"), "documents": True}
    given = recipe(material, tmp_path, model={"folder": str(tmp_path / "model")}, data=data, train={"steps": 1})
    train(given)
    with Loader(
        tmp_path / "short", sequence=16, batch=4, seed=given.data.seed, replicas=1, replica=0, documents=True
    ) as loader:
        batch = loader.batch(0)
    assert (batch["position_ids"][:, 1:] == 0).any()
    model = mhc_compile.from_pretrained(tmp_path / "model", inner="eager")
    labels, weights = batch.pop("labels").flatten(), batch.pop("weights").flatten()
    assert (weights == 0).any()  # what would be a document's first token, from the one before it

    def loss(**inputs: torch.Tensor) -> float:
        with torch.no_grad():
            losses = F.cross_entropy(model(**inputs, use_cache=False).logits.flatten(0, 1), labels, reduction="none")
        return float((losses * weights).sum() / weights.sum())

    found = lines(tmp_path)[1]["loss"]
    assert found == pytest.approx(loss(**batch), rel=1e-5)
    assert found != pytest.approx(loss(input_ids=batch["input_ids"]), rel=1e-4)


@pytest.mark.slow
def test_documents_need_a_model_that_is_told_positions(tmp_path: Path, material: Path) -> None:
    config = MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=300, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if (material / "model" / file).exists():
            shutil.copy(material / "model" / file, tmp_path / "model")
    with pytest.raises(MHCError, match=r"MHC602.*data\.documents"):
        train(recipe(material, tmp_path, model={"folder": str(tmp_path / "model")}, data={"documents": True}))
