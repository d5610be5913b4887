"""Stages as modules: names, values and gradients of the model they were cut from."""

from typing import Any

import pytest
import torch
from small import by_name, ids, llama, program_of, stages_of, through
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

import mhc_compile
from mhc_compile.config import Options
from mhc_compile.diagnostics import MHCError
from mhc_compile.parameters import owners
from mhc_compile.passes.stages import site_nodes, split_graph
from mhc_compile.runtime.balance import cuts, site_costs
from mhc_compile.runtime.program import capture_program
from mhc_compile.runtime.stage import build_stages, tied


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), tokens.roll(-1, 1).flatten())


def gradients(model: nn.Module, logits: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(logits, tokens).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def summed(stages: list[Any]) -> dict[str, Tensor]:
    """The gradients of the stages by name, those of several holders added."""
    found: dict[str, list[nn.Parameter]] = {}
    for stage in stages:
        for name, p in stage.named_parameters():
            if p.grad is not None and all(p is not q for q in found.get(name, [])):
                found.setdefault(name, []).append(p)
    return {name: sum(p.grad for p in held) for name, held in found.items()}


@pytest.mark.parametrize(
    ("form", "starts", "units"),
    [
        ("hc_static", [2, 4], "stage"),
        pytest.param("hc", [2, 4], "stage", marks=pytest.mark.slow),
        ("attnres", [3], "blocks"),
        pytest.param("attnres_block", [2, 4], "stage", marks=pytest.mark.slow),
        pytest.param("denseformer", [2, 4], "stage", marks=pytest.mark.slow),
        ("mudd", [2, 4], "stage"),
        pytest.param("value_residual", [1], "blocks", marks=pytest.mark.slow),
    ],
)
def test_stages_of_other_forms(form: str, starts: list[int], units: str) -> None:
    model, tokens = llama(form=form), ids()
    with torch.no_grad():
        for p in owners(model)["model"].parameters():
            p.add_(0.1 * torch.randn_like(p))
    stages = stages_of(program_of(model, tokens), starts, units=units)
    torch.testing.assert_close(through(stages, tokens), model(input_ids=tokens).logits, rtol=1e-5, atol=1e-5)
    loss_of(through(stages, tokens), tokens).backward()
    wanted, found = gradients(model, model(input_ids=tokens).logits, tokens), summed(stages)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-9)


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("starts", "units"),
    [
        pytest.param([2, 4], "stage", marks=pytest.mark.compat),
        ([3], "blocks"),
        pytest.param([], "stage", marks=pytest.mark.slow),
        pytest.param([1, 2, 5], "stage", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_stages_are_the_model(inner: str, starts: list[int], units: str) -> None:
    model, tokens = llama(memory=True, inner="eager"), ids()
    program = program_of(model, tokens)
    stages = stages_of(program, starts, Options(inner=inner), units=units)
    for name, table in ((n, t) for s in stages for n, t in s.tables.items()):
        table.fill(0, model.get_submodule(name).weight.detach())
    assert by_name(stages).keys() == dict(model.named_parameters()).keys()
    logits = through(stages, tokens)
    torch.testing.assert_close(logits, model(input_ids=tokens).logits, rtol=1e-5, atol=1e-5)
    loss_of(logits, tokens).backward()
    wanted = gradients(model, model(input_ids=tokens).logits, tokens)
    found = summed(stages)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-9)
    ours = next(t for s in stages for t in s.tables.values()).take_gradient()
    theirs = model.model.mhc.table("layers.1").take_gradient()
    assert ours is not None
    assert theirs is not None
    assert torch.equal(ours.rows, theirs.rows)
    torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-8)


def test_layers_in_several_stages_share_a_table() -> None:
    """Here one rank holds all stages, and so one table."""
    model, tokens = llama(ultramem=True), ids()
    program = program_of(model, tokens)
    stages = stages_of(program, [2, 4])
    name = "model.mhc.ultramem.table"
    assert all(s.tables == {name: stages[0].tables[name]} for s in stages)
    assert stages[0].tables[name].ratio == 4.0
    stages[0].tables[name].fill(0, model.get_submodule(name).weight.detach())
    assert tied(program, split_graph(program.graph, [2, 4]))[name] == (0, 1, 2)
    logits = through(stages, tokens)
    torch.testing.assert_close(logits, model(input_ids=tokens).logits, rtol=1e-5, atol=1e-5)
    loss_of(logits, tokens).backward()
    gradients(model, model(input_ids=tokens).logits, tokens)
    ours, theirs = stages[0].tables[name].take_gradient(), model.model.mhc.table("ultra-mem").take_gradient()
    assert torch.equal(ours.rows, theirs.rows)
    torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-8)


def test_what_crosses_and_what_is_tied() -> None:
    model, tokens = llama(memory=True), ids()
    program = program_of(model, tokens)
    stages = stages_of(program, [2, 4])
    assert [s.tied for s in stages] == [{"model.embed_tokens.weight"}, set(), {"model.embed_tokens.weight"}]
    assert stages[0].get_parameter("model.embed_tokens.weight") is stages[2].get_parameter("model.embed_tokens.weight")
    # The ids are read where the memory is; they do not travel.
    assert [tuple(t.shape) for s in stages for t in s.example_inputs] == [(2, 8), (2, 8, 4, 32), (2, 8, 4, 32)]
    assert [tuple(t.shape) for s in stages for t in s.example_outputs] == [(2, 8, 4, 32), (2, 8, 4, 32), (2, 8, 64)]
    coefficients = site_nodes(stages[1].piece.graph.graph)
    assert [n.meta["mhc_site"] for n in coefficients] == ["layers.1#0", "layers.1#1"]
    assert list(stages[1].tables) == ["model.mhc.engram.layers.1.table"]
    assert tied(program, [s.piece for s in stages]) == {"model.embed_tokens.weight": (0, 2)}


def test_stages_are_on_no_device_until_they_are_wanted() -> None:
    program = program_of(llama(), ids())
    (stage,) = build_stages(program, [2, 4], indices=[1], options=Options(inner="eager"))
    assert all(p.is_meta for p in stage.parameters())
    stage.materialise()
    assert not any(t.is_meta for t in (*stage.parameters(), *stage.buffers()))
    torch.testing.assert_close(
        stage.get_buffer("model.rotary_emb.inv_freq"), program.buffers["model.rotary_emb.inv_freq"]
    )


def test_masters_are_float32_where_the_graph_computes_in_bfloat16() -> None:
    model, tokens = llama(dtype="bfloat16").to(torch.bfloat16), ids()
    stages = stages_of(program_of(model, tokens), [2])
    assert {p.dtype for s in stages for p in s.parameters()} == {torch.float32}
    assert stages[0].example_outputs[0].dtype == torch.bfloat16
    logits = through(stages, tokens)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, model(input_ids=tokens).logits, rtol=1e-2, atol=1e-2)
    loss_of(logits, tokens).backward()
    assert {p.grad.dtype for s in stages for p in s.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("eager", marks=pytest.mark.slow)])
def test_microbatches_share_the_weights_that_were_cast(inner: str) -> None:
    """Two microbatches in flight keep one copy, gradients are those of casts of their own, changed weights count."""
    model, tokens = llama(dtype="bfloat16").to(torch.bfloat16), [ids(seed=1), ids(seed=2)]
    stages = stages_of(program_of(model, tokens[0]), [2], Options(inner=inner))
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if t.dtype == torch.bfloat16 and t.shape == (64, 32):  # gate and up projections, and the embedding
            kept[t.untyped_storage().data_ptr()] = kept.get(t.untyped_storage().data_ptr(), 0) + 1
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        losses = [loss_of(through(stages, t), t) for t in tokens]
    assert 2 <= len(kept) <= 8  # of 3 layers; twice as many were each microbatch to cast its own
    sum(losses).backward()
    together = summed(stages)
    apart: dict[str, Tensor] = {}
    for t in tokens:
        for s in stages:
            s.zero_grad()
            s.forget_casts()
        loss_of(through(stages, t), t).backward()
        apart = {name: apart[name] + g if name in apart else g.clone() for name, g in summed(stages).items()}
    for name, gradient in apart.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-5, atol=1e-7)
    before = through(stages, tokens[0])
    with torch.no_grad():
        stages[0].get_parameter("model.layers.0.mlp.up_proj.weight").mul_(2.0)
    assert not torch.equal(through(stages, tokens[0]), before)


def test_evaluation_drops_nothing() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, resid_pdrop=0.5, embd_pdrop=0.5)
    model, tokens = mhc_compile.convert(GPT2LMHeadModel(config), inner="eager"), ids()
    stages = stages_of(program_of(model, tokens), [1, 2])
    assert not torch.equal(through(stages, tokens), through(stages, tokens))
    for stage in stages:
        stage.eval()
    torch.testing.assert_close(through(stages, tokens), model.eval()(input_ids=tokens).logits)


def test_training_after_an_evaluation_has_gradients() -> None:
    tokens = ids()
    stages = stages_of(program_of(llama(), tokens), [3], Options(inner="aot_eager"))
    with torch.no_grad():
        through([s.eval() for s in stages], tokens)
    loss_of(through([s.train() for s in stages], tokens), tokens).backward()
    assert all(p.grad is not None for s in stages for p in s.parameters())


def test_an_encoder_and_a_decoder() -> None:
    torch.manual_seed(0)
    config = T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8, vocab_size=64, decoder_start_token_id=0,
                      dropout_rate=0.0)  # fmt: skip
    model, tokens = mhc_compile.convert(T5ForConditionalGeneration(config), inner="eager"), ids()
    batch = {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)}
    program = capture_program(model, batch)
    stages = stages_of(program, [2, 4, 7])
    crossing: Any = (tokens,)
    for stage in stages:
        found = stage(*crossing, **batch)
        crossing = found if isinstance(found, tuple) else (found,)
    torch.testing.assert_close(crossing[0], model(**batch).logits, rtol=1e-5, atol=1e-5)
    # The decoder's stages are given the encoder's output, and the bias that all its layers share is made again.
    assert max(len(s.example_inputs) for s in stages) == 2
    assert any("relative_attention_bias" in name for name in stages[-1].tied)


def test_cuts() -> None:
    program = program_of(llama(), ids())
    costs = site_costs(program)
    assert len(costs) == 6
    assert costs[0] >= costs[2]
    assert costs[5] > costs[3]  # the head
    assert cuts(program, 3) == sorted(set(cuts(program, 3)))
    assert cuts(program, 3, [1, 2, 3]) == [1, 3]
    assert len(cuts(program, 4, "measure")) == 3
    for wrong in ([6], [3, 2], [0, 6]):
        with pytest.raises(MHCError, match="MHC620"):
            cuts(program, 2, wrong)
    with pytest.raises(MHCError, match="MHC620"):
        cuts(program, 7)


def test_equal_layers_are_compiled_once() -> None:
    (stage,) = stages_of(program_of(llama(num_hidden_layers=4), ids()), [], Options(inner="aot_eager"), units="blocks")
    tokens = ids()
    through([stage], tokens)
    compiled = [next(iter(unit._compiled.values())) for unit in stage.units]
    assert compiled[1] is compiled[2]
    assert len({id(c) for c in compiled}) == 3  # the first holds the embedding, the last the head


@pytest.mark.parametrize(("recompute", "units"), [(2, 3), pytest.param("off", 3, marks=pytest.mark.slow)])
def test_units_are_recompute_blocks(recompute: str | int, units: int) -> None:
    tokens = ids()
    program = program_of(llama(), tokens)
    options = Options(inner="aot_eager", recompute=recompute)
    results = []
    for how in ("stage", "blocks"):
        (stage,) = stages_of(program, [], options, units=how)
        loss_of(through([stage], tokens), tokens).backward()
        results.append({name: p.grad for name, p in stage.named_parameters()})
        assert len(stage.units) == (1 if how == "stage" else units)
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_a_model_that_is_not_converted() -> None:
    with pytest.raises(MHCError, match="MHC501"):
        capture_program(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16)), {"input_ids": ids()})


def test_a_restart_finds_what_was_compiled() -> None:
    """The same stage again comes from Inductor's caches, with and without blocks that are computed again."""
    model, tokens = llama(num_hidden_layers=1, tie_word_embeddings=False), ids()
    program = program_of(model, tokens)
    found, first = [], {}
    for blocks in ("off", "off", 1, 1):
        torch._dynamo.reset()
        counters["inductor"].clear()
        (stage,) = stages_of(program, [], Options(inner="inductor", kernels="none", recompute=blocks))
        through([stage], tokens).sum().backward()
        found.append([counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "bypass")])
        first = first or summed([stage])
        for name, gradient in summed([stage]).items():
            torch.testing.assert_close(gradient, first[name], rtol=1e-5, atol=1e-6)
    assert found[1] == found[3] == [2, 0]
    assert all(bypassed == 0 for _, bypassed in found)
