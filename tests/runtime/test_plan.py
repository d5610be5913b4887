"""`mhc-compile plan RECIPE`: figures against what they must be by hand, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from mhc_compile.cli import main
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.ultramem_settings import UltraMemSettings
from mhc_compile.runtime.balance import cuts
from mhc_compile.runtime.measure_step import check_losses, measure
from mhc_compile.runtime.plan.compare import compare
from mhc_compile.runtime.plan.estimate import estimate
from mhc_compile.runtime.plan.hardware import hardware
from mhc_compile.runtime.plan.model import Counted, count
from mhc_compile.runtime.plan.repeats import leave_out
from mhc_compile.runtime.plan.report import _folded, show
from mhc_compile.runtime.recipe import Recipe, read_recipe
from mhc_compile.runtime.recipe_tables import RecomputeTable, StreamsTable

GOLDEN = Path(__file__).parent / "golden" / "plan.txt"
RATES: dict[str, Any] = {"flops": 1e12, "bandwidth": 1e11, "link": 1e9, "memory": 1e9}
HIDDEN, WIDE, VOCAB, LENGTH = 64, 160, 96, 32
RECIPE = """
[model]
folder = "model"
start = "scratch"
dtype = "bfloat16"
inner = "aot_eager"
[memory]
preset = "paper"
layers = [1]
rows_per_head = 50
[data]
folder = "data"
sequence = 32
[train]
steps = 1
batch = 16
microbatch = 2
lr = 1e-3
[parallel]
stages = 2
engram = 2
[recompute]
blocks = "auto"
[checkpoint]
folder = "run"
every = 1
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a Llama of four layers with a memory, of which there is a configuration and nothing else."""
    folder = tmp_path_factory.mktemp("plan")
    LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, max_position_embeddings=64, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder / "model")  # fmt: skip
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def counted(path: Path) -> Counted:
    return count(read_recipe(path))


@pytest.fixture
def recipe(path: Path) -> Recipe:
    return read_recipe(path)


def test_products_and_bytes_of_an_mlp(counted: Counted) -> None:
    """Forward 2 x tokens x weights; each half of the backward pass the same; gate, up and their product are kept."""
    tokens = 2 * LENGTH
    mlp = counted.works[3].branch
    assert counted.works[3].name == "layers.1#1"
    products = 2 * tokens * 3 * HIDDEN * WIDE
    assert [sum(o.flops for o in part) for part in (mlp.forward, mlp.input, mlp.weight)] == [products] * 3
    assert mlp.kept == 2 * tokens * 3 * WIDE
    # The gradients of gate and up, the product, the branch's input and the gradient of its output.
    assert mlp.deferred == 2 * tokens * (3 * WIDE + 2 * HIDDEN)
    weights = 2 * 3 * HIDDEN * WIDE
    moved = sum(o.moved for o in mlp.forward if o.flops)
    assert moved == weights + 2 * tokens * (3 * HIDDEN + 3 * WIDE)


def test_attention_is_counted_as_a_fused_kernel(counted: Counted) -> None:
    tokens, heads, each = 2 * LENGTH, 4, HIDDEN // 4
    attention = counted.works[4].branch
    scores = 2 * 2 * heads * LENGTH * LENGTH * 2 * each
    projections = 2 * tokens * HIDDEN * (HIDDEN + 2 * HIDDEN // 2 + HIDDEN)
    assert sum(o.flops for o in attention.forward) == scores + projections
    assert sum(o.flops for o in attention.input) == 2.5 * scores + projections
    assert sum(o.flops for o in attention.weight) == projections
    assert attention.kept < 2 * tokens * 8 * HIDDEN  # nothing of S x S is


def test_equal_layers_are_counted_once_and_alike(counted: Counted) -> None:
    works = counted.works
    assert works[4].branch is works[6].branch
    assert works[3].branch is works[5].branch
    assert works[2].branch is not works[4].branch or not counted.tables  # a memory's projections are in front of it
    assert works[7].branch is not works[5].branch  # the head is behind it
    head = sum(o.flops for o in works[7].branch.forward) - sum(o.flops for o in works[5].branch.forward)
    assert head == 2 * 2 * LENGTH * HIDDEN * VOCAB


def test_memory_of_ranks_adds_up(counted: Counted, recipe: Recipe) -> None:
    found = estimate(counted, hardware(None, **RATES), recipe)
    own = sum(s.parameters for s in found.stages)
    embedding = VOCAB * HIDDEN
    assert own == counted.parameters + embedding  # tied: both ends hold it
    begin = cuts(counted.program, 2, accelerated=True)[0]
    assert [s.sites for s in found.stages] == [begin, len(counted.works) - begin]
    for m, s in zip(found.memory, found.stages, strict=True):
        assert (m.weights, m.gradients, m.moments) == (4 * s.parameters, 4 * s.parameters, 8 * s.parameters)
        assert m.activations == s.cost.kept * found.simulated.live[s.index]
        assert m.tables == 12 * sum(t.rows * t.width for t in s.tables) // 2
    assert [t for s in found.stages for t in s.tables] == list(counted.tables)
    wide = 2 * 2 * LENGTH * 4 * HIDDEN
    assert [s.cost.sent for s in found.stages] == [wide, 0]
    assert (found.stream_bytes, found.residual_bytes) == (wide * 4, wide)
    rows = 4 * 2 * LENGTH * 16 * 80
    assert found.table_bytes == 2 * 4 * rows // 2


def test_a_few_of_equal_layers_stand_for_all(path: Path, tmp_path: Path) -> None:
    """What is captured of a long run of layers, or of all of them, gives the same figures."""
    config = LlamaConfig.from_pretrained(path.parent / "model", num_hidden_layers=8)
    config.save_pretrained(tmp_path / "model")
    text = RECIPE[: RECIPE.index("[memory]")] + RECIPE[RECIPE.index("[data]") :]
    (tmp_path / "recipe.toml").write_text(text.replace("engram = 2", ""), encoding="utf-8")
    recipe = read_recipe(tmp_path / "recipe.toml")
    few, all_ = count(recipe), count(recipe, whole=True)
    assert (few.program.sites, all_.program.sites) == (8, 16)
    for name in ("works", "names", "sizes", "cast", "costs", "crossing", "logits", "tables"):
        assert getattr(few, name) == getattr(all_, name), name


def test_layers_that_differ_are_all_captured() -> None:
    def model(*widths: int) -> torch.nn.Module:
        layers = [torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 4)) for width in widths]
        return torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)})

    assert leave_out(model(4, 5, 4, 5, 4, 5, 4, 5)) is None
    short = model(5, *[4] * 8)
    repeats = leave_out(short)
    assert repeats is not None
    assert (repeats.places, repeats.left_out) == ((0, 1, 2, 3, 8), (4, 5, 6, 7))
    assert list(dict(short.named_parameters())) == [
        f"layers.{i}.{k}.{name}" for i in (0, 1, 2, 3, 8) for k in (0, 1) for name in ("weight", "bias")
    ]
    sites = [f"layers.{i}#0" for i in repeats.places]
    assert repeats.holds(sites, [0, 1, 2, 2, 3])
    assert not repeats.holds(sites, [0, 1, 2, 3, 3])
    assert [place for _, place in repeats.order(sites)] == [-1, -1, -1, -1, 4, 5, 6, 7, -1]


def test_links_in_a_node_and_between_nodes(counted: Counted, recipe: Recipe) -> None:
    rates = {**RATES, "link": 8e9, "network": 1e9}
    inside, across = (estimate(counted, hardware(None, **rates, node=node), recipe) for node in (4, 2))
    assert inside.seconds < across.seconds
    assert inside.reduction == across.reduction  # two ranks of one stage, in one node either way
    apart = estimate(counted, hardware(None, **rates, node=1), recipe)
    assert apart.reduction == pytest.approx(8 * inside.reduction)
    device = hardware(None, **rates, node=4)
    assert [device.among(first, count) for first, count in ((0, 4), (0, 8), (2, 4))] == [8e9, 4e9, 2e9]
    console = Console(width=200, record=True, file=StringIO())
    show(compare(recipe, counted, hardware(None, **rates, node=2)), console)
    assert "streams between nodes at 1 GB/s over 1 of 1 cuts; gradients at 8 GB/s" in console.export_text()


def test_the_longest_rank_limits(counted: Counted, recipe: Recipe) -> None:
    found = estimate(
        counted, hardware(None, **RATES), replace(recipe, parallel=replace(recipe.parallel, balance=(1, 7)))
    )
    assert found.limit == 1
    per_microbatch = sum(o.flops for w in counted.works for o in w.operations)
    assert found.mfu == pytest.approx(4 * per_microbatch / (2 * RATES["flops"]) / found.seconds)
    assert 0 < found.mfu < 1
    console = Console(width=200, record=True, file=StringIO())
    show(compare(found.recipe, counted, hardware(None, **RATES)), console)
    assert "1f1b: limited by stage 1 (from layers.0#1): rank 1 computes for" in console.export_text()


def test_rows_that_are_almost_equal_are_folded() -> None:
    rows = [((str(i), f"{size}"), "same", (float(size),)) for i, size in enumerate((50, 100, 101, 101, 99, 50, 50))]
    folded = [tuple(cells) for cells, _ in _folded(rows, ranging=(0,))]
    assert folded == [("0", "50"), ("1-4", "100"), ("5", "50"), ("6", "50")]


def test_fsdp_shards_what_it_shards(counted: Counted, recipe: Recipe) -> None:
    device = hardware(None, **RATES)
    whole = estimate(counted, device, recipe)
    shards = estimate(counted, device, replace(recipe, parallel=replace(recipe.parallel, mode="fsdp")))
    for a, b in zip(whole.memory, shards.memory, strict=True):
        assert b.moments == pytest.approx(a.moments / 2, abs=8)
        assert b.weights == pytest.approx(a.weights * 1.5 - a.casts, abs=8)  # gathered in bfloat16
        assert b.casts == 0 < a.casts
        assert b.buffers <= b.weights
        assert a.buffers == 0
    copies = [6 * e.parameters + m.tables for e, m in zip(whole.stages, whole.memory, strict=True)]
    assert shards.host == whole.host == pytest.approx(max(copies), abs=12)  # what both replicas hold one of them copies
    saving = replace(recipe.checkpoint, asynchronous=False)
    assert estimate(counted, device, replace(recipe, checkpoint=saving)).host == 0


def test_smaller_microbatches_keep_less(counted: Counted, recipe: Recipe) -> None:
    device = hardware(None, **RATES)
    sizes = (replace(recipe.train, microbatch=size) for size in (2, 1))
    whole, half = (estimate(counted, device, replace(recipe, train=train)) for train in sizes)
    for a, b in zip(whole.stages, half.stages, strict=True):
        assert b.cost.kept == pytest.approx(a.cost.kept / 2, rel=1e-6)
        assert b.cost.sent == a.cost.sent // 2


def test_recompute_keeps_less_and_takes_longer(counted: Counted, recipe: Recipe) -> None:
    device = hardware(None, **RATES)
    tables = (RecomputeTable(blocks=blocks) for blocks in ("off", "auto"))
    off, auto = (estimate(counted, device, replace(recipe, recompute=table)) for table in tables)
    passes = [max(m.activations + m.transient for m in e.memory) for e in (off, auto)]
    assert passes[1] < passes[0]
    assert auto.seconds > off.seconds
    assert [s.blocks for s in off.stages] == [()] * 2


def test_every_schedule_is_planned(counted: Counted, recipe: Recipe) -> None:
    found = compare(recipe, counted, hardware(None, **RATES))
    assert list(found.others) == ["1f1b", "interleaved1f1b", "zbv", "dualpipev"]
    assert found.others["1f1b"] is found.chosen
    assert found.fits
    assert found.nearest is None


@pytest.mark.skipif(
    not torch.__version__.startswith("2.13."), reason="the golden plan counts what torch 2.13's partitioner keeps"
)
def test_golden(counted: Counted, recipe: Recipe) -> None:
    """Delete the file and run again to write it anew."""
    console = Console(width=100, record=True, file=StringIO())
    show(compare(recipe, counted, hardware(None, **RATES)), console)
    text = "\n".join(line.rstrip() for line in console.export_text().splitlines()) + "\n"
    if not GOLDEN.exists():
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text, encoding="utf-8")
        pytest.fail(f"{GOLDEN} was not there: look at what was written")
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_experts_are_counted_by_the_tokens_they_get(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 96, "num_experts": 8,
        "num_experts_per_tok": 2, "architectures": ["Qwen3MoeForCausalLM"],
    }  # fmt: skip
    Qwen3MoeConfig(**config).save_pretrained(tmp_path / "model")
    text = RECIPE[: RECIPE.index("[memory]")] + RECIPE[RECIPE.index("[data]") :]
    (tmp_path / "recipe.toml").write_text(text.replace("engram = 2", ""), encoding="utf-8")
    counted = count(read_recipe(tmp_path / "recipe.toml"))
    branch, tokens = counted.works[1].branch, 2 * LENGTH
    router = 2 * tokens * 64 * 8
    experts = 2 * tokens * 2 * 3 * 64 * 32
    for part in (branch.forward, branch.input, branch.weight):
        assert sum(o.flops for o in part) == experts + router
    assert counted.costs[1] >= experts


RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


@pytest.mark.parametrize(("name", "billions"), [("27b", 27.05), ("671b", 671.03)])
def test_the_examples_are_recipes_of_what_they_say(name: str, billions: float) -> None:
    recipe = read_recipe(RECIPES / f"{name}.toml")
    config = AutoConfig.from_pretrained(recipe.model.folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)
    assert recipe.microbatches >= recipe.parallel.stage_count


@pytest.mark.slow
@pytest.mark.parametrize("name", ["27b", "671b"])
def test_the_examples_fit(name: str, tmp_path: Path) -> None:
    assert main(["plan", str(RECIPES / f"{name}.toml"), "--json", str(tmp_path / "plan.json")]) == 0
    written = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert all("seconds" in s for s in written["schedules"].values())


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def once(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture and count the model once for all commands."""
    monkeypatch.setattr("mhc_compile.runtime.plan.model.count", lambda _: counted)


@pytest.mark.usefixtures("once")
def test_the_command(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(path), "--json", str(tmp_path / "plan.json"), "--hardware", "h100"]) == 0
    out = capsys.readouterr().out
    assert "dualpipev" in out
    assert "peak rates of `h100`" in out
    written = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert written["fits"] is True
    assert set(written["schedules"]) == {"1f1b", "interleaved1f1b", "zbv", "dualpipev"}
    memory = written["chosen"]["memory"][0]
    parts = sum(v for k, v in memory.items() if k != "total")
    assert memory["total"] == parts - min(memory["buffers"], memory["activations"] + memory["transient"])


@pytest.mark.usefixtures("once")
def test_a_recipe_that_does_not_fit_is_told_what_does(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(path), "recompute.blocks=off", "--memory", "9e6"]) == 3
    said = capsys.readouterr()
    assert "MHC641" in said.err
    assert "it fits with" in said.err
    assert main(["plan", str(path), "--memory", "1000"]) == 3
    assert "it fits with" not in capsys.readouterr().err
    assert main(["plan", str(path), "--hardware", "abacus"]) == 3
    assert "MHC640" in capsys.readouterr().err


def test_a_recipe_or_a_budget(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], [str(path), "--budget", "1B"]):
        assert main(["plan", *words]) == 3
        assert "MHC600" in capsys.readouterr().err


def test_a_table_that_several_stages_hold(recipe: Recipe) -> None:
    """Values of one pool lie once on a rank, and in as many of its stages as read them."""
    values = UltraMemSettings.preset("v2", side=6, key_width=8, value_width=8, input_width=4, top=3, layers=(0, 3))
    parallel = replace(recipe.parallel, engram=1, schedule="zbv", stages_per_rank=2)
    recipe = replace(recipe, memory=None, ultramem=values, parallel=parallel)
    counted = count(recipe)
    (table,) = counted.tables
    assert (table.rows, table.width, table.reads, table.sites) == (2 * 36, 12, 3, (1, 7))
    found = estimate(counted, hardware(None, **RATES), recipe)
    assert [len(s.tables) for s in found.stages] == [1, 0, 0, 1]
    assert [m.tables for m in found.memory] == [12 * 72 * 12, 0]
    projections = 2 * 2 * LENGTH * HIDDEN * (2 * 8 + 4 + 8)
    plain, with_values = (sum(o.flops for o in counted.works[i].branch.forward) for i in (3, 1))
    assert projections < with_values - plain < 1.5 * projections


# --- measured --------------------------------------------------------------------------------------------------------


def test_forms_without_streams_are_not_counted(recipe: Recipe) -> None:
    with pytest.raises(MHCError, match=r"(?s)MHC602.*attnres.*--measure"):
        count(
            replace(recipe, mhc=StreamsTable(form="attnres"), memory=None, parallel=replace(recipe.parallel, engram=1))
        )


def test_what_is_not_measured(recipe: Recipe) -> None:
    with pytest.raises(MHCError, match=r"MHC644.*one replica"):
        measure(recipe)
    with pytest.raises(MHCError, match=r"MHC643.*zbv gives 2\.1, 1f1b 2"):
        check_losses({"1f1b": 2.0, "dualpipev": 2.00001, "zbv": 2.1})


@pytest.mark.slow
def test_schedules_run_as_they_are_predicted_to(path: Path) -> None:
    recipe = read_recipe(path, ["parallel.engram=1", "model.dtype=float32"])
    recipe = replace(recipe, memory=None)
    found = measure(recipe, rounds=2)
    assert set(found) == {"1f1b", "interleaved1f1b", "zbv", "dualpipev"}
    assert all(m["measured"] > 0 and m["predicted"] > 0 for m in found.values())
