"""Training in stages, replicas and shards is training: losses, norms and weights of a plain loop in one process.

The plain loop runs the converted model eagerly on whole batches. What differs is the order in which gradients are added
up, so figures agree to the rounding of float32 sums.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training import Result, model_folder, plain, recipe, spread

import mhc_compile
from mhc_compile.runtime.recipe import Recipe

V = {"stages_per_rank": 2}
WAYS: dict[str, dict[str, Any]] = {
    "1f1b": {"schedule": "1f1b"},
    "interleaved1f1b": {"schedule": "interleaved1f1b", **V},
    "zbv": {"schedule": "zbv", **V},
    "dualpipev": {"schedule": "dualpipev", **V},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("parity") / "llama")


@pytest.fixture(scope="module", params=["engram", "ultramem"])
def tables(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with tables. That of UltraMem is one for layers that lie in several stages.

    With so many rows of Engram no gradient cancels to rounding in these batches, of which AdamW would make a whole
    step; with 50 a head one does.
    """
    memories: dict[str, Any] = {
        "engram": mhc_compile.MemorySettings.preset(
            "v41", layers=(0, 2), rows_per_head=100, row_width=4, compress=False
        ),
        "ultramem": mhc_compile.UltraMemSettings.preset(
            "v2", side=6, key_width=8, value_width=8, input_width=4, top=3, heads=2
        ),
    }
    memory = {request.param: memories[request.param]}
    return model_folder(tmp_path_factory.mktemp("parity") / request.param, **memory)


def check(recipes: dict[str, Recipe], answers: Path, wanted: Result | None = None, still: tuple[str, ...] = ()) -> None:
    first = next(iter(recipes.values()))
    losses, norms, weights = wanted or plain(first)
    model = mhc_compile.from_pretrained(first.model.folder, inner="eager")
    start = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, found in spread(recipes, answers).items():
        torch.testing.assert_close(found[0], losses, rtol=2e-6, atol=0, msg=lambda m, n=name: f"{n}, losses: {m}")
        torch.testing.assert_close(found[1], norms, rtol=2e-5, atol=0, msg=lambda m, n=name: f"{n}, norms: {m}")
        assert {n.split("[")[0] for n in found[2]} == weights.keys(), name
        for n, p in found[2].items():
            full, _, begin = n.partition("[")
            rows = slice(int(begin.rstrip(":]") or 0), None)
            rows = slice(rows.start, rows.start + len(p)) if full.endswith("table.weight") else slice(None)
            # AdamW divides by the gradient's own size: a sum that all but cancels is rounding alone.
            moved = (weights[full][rows] - start[full][rows]).norm()
            assert (moved == 0) == full.startswith(still), full
            assert (p - weights[full][rows]).norm() <= 1e-2 * moved, f"{name}, {full}"


def test_a_few_ways(llama: Path, tmp_path: Path) -> None:
    eager = {"model": {"inner": "eager"}}
    check(
        {
            "one": recipe(llama, **eager),
            "stages-and-replicas": recipe(llama, parallel={"stages": 2, "data": 2}, **eager),
            "interleaved-fsdp": recipe(
                llama, parallel={"stages": 2, "data": 2, "mode": "fsdp", **WAYS["interleaved1f1b"]}, **eager
            ),
            "dualpipev": recipe(llama, parallel={"stages": 2, **WAYS["dualpipev"]}),
        },
        tmp_path,
    )


def test_spread_tables(tables: Path, tmp_path: Path) -> None:
    eager = {"model": {"inner": "eager"}}
    check(
        {
            "one": recipe(tables, **eager),
            "replicas": recipe(tables, parallel={"data": 2}, **eager),
            "shards-and-replicas": recipe(tables, parallel={"data": 2, "engram": 2}, **eager),
            "stages-and-shards": recipe(tables, parallel={"stages": 2, "engram": 2, **WAYS["zbv"]}, **eager),
        },
        tmp_path,
    )


@pytest.mark.slow
@pytest.mark.parametrize("tables", ["ultramem"], indirect=True)
def test_spread_tables_in_kernels(tables: Path, tmp_path: Path) -> None:
    kernels = {"model": {"kernels": "all"}}
    zbv = {"stages": 2, "timeout": 600, **WAYS["zbv"]}
    check(
        {
            "one": recipe(tables, **kernels),
            "stages": recipe(tables, parallel=zbv, **kernels),
            "stages-fsdp": recipe(tables, parallel={"stages": 2, "data": 2, "mode": "fsdp", "timeout": 600}, **kernels),
            "inductor": recipe(tables, parallel=zbv, model={"inner": "inductor"}),
        },
        tmp_path,
    )


def test_the_auxiliary_loss_of_experts(tmp_path: Path) -> None:
    folder = model_folder(
        tmp_path / "mixtral", num_local_experts=4, output_router_logits=True, router_aux_loss_coef=5.0
    )
    eager = {"model": {"inner": "eager"}}
    one = recipe(folder, train={"microbatch": 4}, **eager)
    stages = {"two": {"stages": 2, "mode": "fsdp", "data": 2}, "zbv": {"stages": 2, **WAYS["zbv"]}}
    spread_over = {name: recipe(folder, train={"microbatch": 2}, parallel=p, **eager) for name, p in stages.items()}
    wanted = plain(one)
    check({"one": one}, tmp_path, wanted)
    check(spread_over, tmp_path)
    free = model_folder(tmp_path / "free", num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.0)
    assert (
        wanted[0][0] > plain(recipe(free, train={"warmup": 0}, steps=1, **eager))[0][0] + 1
    )  # which is much of the loss


@pytest.mark.slow
def test_biases_that_balance_experts(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "deepseek", n_routed_experts=8)
    train = {"balance_rate": 0.02, "microbatch": 2}
    ways: dict[str, dict[str, Any]] = {
        "1f1b": {"stages": 2, "data": 2},
        "interleaved-fsdp": {"stages": 2, "data": 2, "mode": "fsdp", **WAYS["interleaved1f1b"]},
        "zbv": {"stages": 2, **WAYS["zbv"]},
        "dualpipev": {"stages": 2, **WAYS["dualpipev"]},
    }
    one = recipe(folder, train=train, recompute={"blocks": "auto"})
    spread_over = {name: recipe(folder, train=train, parallel=way) for name, way in ways.items()}
    check({"one": one, **spread_over}, tmp_path)


def test_bfloat16_weights_are_those_of_the_step(llama: Path, tmp_path: Path) -> None:
    """Masters move in float32, and every step computes with what they are by then, gathered by FSDP or not."""
    model = {"inner": "eager", "dtype": "bfloat16"}
    ways = {"replicas": {"data": 2}, "fsdp": {"data": 2, "mode": "fsdp"}, "stages": {"stages": 2}}
    recipes = {"one": recipe(llama, model=model, steps=5)}
    recipes |= {name: recipe(llama, model=model, steps=5, parallel=way) for name, way in ways.items()}
    found = spread(recipes, tmp_path)
    wanted = plain(recipe(llama, steps=5))[0]
    for name, (losses, _, _) in found.items():
        torch.testing.assert_close(losses, found["one"][0], rtol=2e-3, atol=0, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(losses, wanted, rtol=2e-2, atol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["replicate", "fsdp"])
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_every_way_for_twenty_steps(llama: Path, tmp_path: Path, inner: str, mode: str) -> None:
    recipes = {"one": recipe(llama, steps=20, model={"inner": inner})}
    for name, way in WAYS.items():
        for data in (1, 2):
            parallel = {"stages": 2, "data": data, "mode": mode, "timeout": 600, **way}
            recipes[f"{name}-{data}"] = recipe(llama, steps=20, model={"inner": inner}, parallel=parallel)
    check(recipes, tmp_path, plain(recipe(llama, steps=20)))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["attnres", "attnres_block", "denseformer", "mudd", "value_residual"])
def test_depth_forms(form: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", form=form)
    recipes = {"one": recipe(folder, model={"inner": "eager"})}
    if form != "value_residual":  # whose two sites, the later attentions, are two stages at most
        parallel = {"stages": 2, "data": 2, "mode": "fsdp", **WAYS["interleaved1f1b"]}
        recipes["interleaved-fsdp"] = recipe(folder, parallel=parallel, model={"inner": "eager"})
        recipes["dualpipev"] = recipe(folder, parallel={"stages": 2, **WAYS["dualpipev"]})
    recipes["1f1b"] = recipe(folder, parallel={"stages": 2})
    # Attention over one source has no gradient.
    check(recipes, tmp_path, still=("model.mhc.layers.0#0.",) if form.startswith("attnres") else ())


@pytest.mark.slow
def test_recomputed_blocks(llama: Path, tmp_path: Path) -> None:
    recipes = {}
    for blocks in ("auto", "stage", 2):
        for name, way in WAYS.items():
            parallel = {"stages": 2, "timeout": 600, **way}
            recipes[f"{name}-{blocks}"] = recipe(llama, parallel=parallel, recompute={"blocks": blocks})
    check(recipes, tmp_path)
