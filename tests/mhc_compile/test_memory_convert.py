"""Memories in converted models: their start, training, and living with everything that a model goes through."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from memories import PRESETS, losses_of, shake_memory, small, tokenizer, with_memory
from tiny_models import HIDDEN, VOCAB, close, gpt2, ids, llama, shake, t5, variants
from torch import nn
from transformers import BertConfig, BertModel

from mhc_compile import (
    MHCError,
    MHCWarning,
    TableAdamW,
    convert,
    export,
    inspect,
    parameter_groups,
    stream_parameters,
    to_residual,
)
from mhc_compile.parameters import owners


def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=VOCAB,
        max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    return BertModel(config).eval()


def tables(model: nn.Module) -> list[Any]:
    return [
        held.table(layer)
        for held in owners(model).values()
        if held.memories.engram
        for layer in held.memories.engram.paths
    ]


@pytest.mark.parametrize("preset", variants(*PRESETS))
def test_a_memory_at_its_start_changes_nothing_at_all(preset: str) -> None:
    plain = convert(llama(eos_token_id=5), inner="eager")
    model = convert(llama(eos_token_id=5), engram=small(preset), inner="eager")
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, plain(ids()).logits)
    started = convert(llama(eos_token_id=5), engram=small(preset), engram_start="paper", inner="eager")
    with torch.no_grad():
        assert not torch.equal(started(ids()).logits, plain(ids()).logits)


@pytest.mark.parametrize("make", variants(gpt2, bert))
@pytest.mark.parametrize("streams", variants(1, 2))
def test_other_models_and_numbers_of_streams(make: Any, streams: int) -> None:
    plain = convert(make(), streams=streams, inner="eager")
    model = convert(make(), streams=streams, engram=small("paper"), inner="eager")
    with torch.no_grad():
        before = plain(ids())[0]
        assert torch.equal(model(ids())[0], before)
        shake_memory(model)
        assert float((model(ids())[0] - before).abs().max()) > 1e-3


@pytest.mark.parametrize("preset", variants("paper", "v41"))
def test_training_moves_rows_and_projections(preset: str) -> None:
    model = convert(llama(), engram=small(preset), inner="aot_eager").train()
    before = {name: p.detach().clone() for name, p in stream_parameters(model).items() if ".engram." in name}
    rows = [t.weight.detach().clone() for t in tables(model)]
    optimizer = TableAdamW(parameter_groups(model, lr=1e-2))
    losses = losses_of(model, optimizer)
    assert losses == sorted(losses, reverse=True)
    assert not [name for name, p in stream_parameters(model).items() if name in before and torch.equal(p, before[name])]
    for table, old in zip(tables(model), rows, strict=True):
        moved = (table.weight != old).any(1)
        assert 0 < int(moved.sum()) <= table.rows // 2  # those that the ids hit, and no others
        assert table.gradient is None
    assert not [name for name in stream_parameters(model) if ".table." in name]


def test_ordinary_clipping_and_optimizers_do_not_choke_on_tables() -> None:
    model = with_memory(llama()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(ids(), labels=ids(), use_cache=False).loss.backward()
    assert float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)) > 0
    optimizer.step()
    assert all(t.gradient is not None for t in tables(model))
    with pytest.raises(MHCError, match=r"MHC204.*5 x lr"):
        parameter_groups(model)


def test_gradients_that_nobody_takes_are_said() -> None:
    model = with_memory(llama(num_hidden_layers=1), layers=(0,)).train()

    def train() -> None:
        for _ in range(40):
            model(ids(), labels=ids(), use_cache=False).loss.backward()

    with pytest.warns(MHCWarning, match="MHC227"):
        train()


@pytest.mark.parametrize("cache", variants(True, False))
def test_checkpointed_layers_give_the_same_gradients(cache: bool) -> None:
    plain, saved = with_memory(llama()).train(), with_memory(llama()).train()
    saved.gradient_checkpointing_enable()
    for model in (plain, saved):
        model(ids(), labels=ids(), use_cache=cache).loss.backward()
    for a, b in zip(plain.parameters(), saved.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or close(b.grad, a.grad, 1e-5)
    for a, b in zip(tables(plain), tables(saved), strict=True):
        assert torch.equal(a.gradient.rows, b.gradient.rows)
        assert close(b.gradient.values, a.gradient.values, 1e-5)


def test_copies_and_pickles_have_tables_of_their_own() -> None:
    model = with_memory(llama())
    with torch.no_grad():
        wanted = model(ids()).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(ids()).logits, wanted)
            for table in tables(other):
                table.weight.zero_()
            assert not torch.equal(other(ids()).logits, wanted)
            assert torch.equal(model(ids()).logits, wanted)
    fresh = convert(llama(), engram=small("paper"), inner="eager")
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(ids()).logits, wanted)


def test_half_precision_leaves_the_memory_in_its_own() -> None:
    model = with_memory(llama()).to(torch.bfloat16)
    assert {p.dtype for p in owners(model)["model"].parameters()} == {torch.float32}
    exact = with_memory(llama()).double()
    with torch.no_grad():
        wanted = exact(ids()).logits
        error = float((model(ids()).logits.double() - wanted).abs().max() / wanted.abs().max())
    assert error < 0.05


def test_autocast() -> None:
    model = with_memory(llama()).train()
    with torch.autocast("cpu", torch.bfloat16):
        half = model(ids(), labels=ids(), use_cache=False).loss
    half.backward()
    assert close(half, model(ids(), labels=ids(), use_cache=False).loss, 0.02)
    assert all(t.gradient is not None for t in tables(model))


def test_compressed_ids_are_looked_up_alike() -> None:
    model = convert(llama(), engram=small("v41"), tokenizer=tokenizer(), inner="eager")
    held = owners(model)["model"]
    assert held.memories.engram is not None
    assert held.memories.engram.compression is not None
    assert held.memories.engram.compression["size"] == 28
    table = held.get_buffer("engram.compression")
    assert len(table) == VOCAB
    small_ids = torch.tensor([[2, 3, 4, 5]])
    large = small_ids + 26
    assert torch.equal(table[small_ids], table[large])
    shake_memory(model)
    model.model.embed_tokens.weight.data[28:54] = model.model.embed_tokens.weight.data[2:28]
    with torch.no_grad():
        assert torch.equal(model(small_ids).logits, model(large).logits)
    raw = convert(llama(), engram=small("v41", compress=False), tokenizer=tokenizer(), inner="eager")
    assert raw.model.mhc.memories.engram.compression is None


def test_documents_do_not_see_each_other() -> None:
    """Two documents in a row, told apart by positions: what the first says changes nothing in the second's memory."""
    model = with_memory(llama(num_hidden_layers=1), "paper", layers=(0,))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]).expand(2, -1)
    mask = torch.full((8, 8), float("-inf")).triu(1)
    mask[4:, :4] = float("-inf")
    mask = mask.expand(2, 1, 8, 8)
    other = torch.cat([ids(seed=9)[:, :4], ids()[:, 4:]], 1)
    with torch.no_grad():
        a, b = (model(x, attention_mask=mask, position_ids=positions).logits for x in (ids(), other))
        assert torch.equal(a[:, 4:], b[:, 4:])
        assert not torch.equal(a[:, :4], b[:, :4])
        alone = model(ids()[:, 4:], position_ids=positions[:, 4:]).logits
        assert close(a[:, 4:], alone, 1e-5)


@pytest.mark.parametrize("preset", variants(*PRESETS))
def test_lengths_share_one_graph(preset: str) -> None:
    model = with_memory(llama(eos_token_id=5, num_hidden_layers=1), preset, layers=(0,))
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for length in (8, 9, 10, 12, 20):
            model(ids(2, length), use_cache=False)
    # One for the first length, one for all others.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_exported_programs_read_the_table_as_a_parameter() -> None:
    model = with_memory(llama())
    program = export(model, ids(), example_kwargs={"use_cache": False})
    with torch.no_grad():
        assert close(program.module()(ids(), use_cache=False).logits, model(ids(), use_cache=False).logits, 1e-5)
    assert any(name.endswith("table.weight") for name in program.state_dict)


def test_inspect_shows_memories() -> None:
    model = with_memory(llama(), "v41")
    found = inspect(model)
    assert [m.layer for m in found.memories] == ["model.layers.0", "model.layers.1"]
    assert found.memories[0].rows == tables(model)[0].weight.numel()
    assert "2..4 x 8" in str(found)
    assert inspect(llama()).memories == ()


def test_back_to_residual_while_nothing_is_added() -> None:
    model = convert(llama(), engram=small("paper"), inner="eager")
    with torch.no_grad():
        wanted = llama()(ids()).logits
    assert torch.equal(to_residual(model)(ids()).logits, wanted)
    with pytest.raises(MHCError, match="MHC411"):
        to_residual(with_memory(llama()))


def test_refusals() -> None:
    model = with_memory(llama())
    with pytest.raises(MHCError, match="MHC225"):
        model(inputs_embeds=torch.randn(2, 4, 32), use_cache=False)
    with pytest.raises(MHCError, match="MHC221"):
        model(torch.full((1, 4), VOCAB))
    for arguments, code in (
        ({"engram": "none"}, "MHC220"),
        ({"engram": 3}, "MHC220"),
        ({"tokenizer": tokenizer()}, "MHC220"),
        ({"engram": small("v41"), "engram_start": "warm"}, "MHC220"),
        ({"engram": small("v41", layers=(7,))}, "MHC226"),
        ({"engram": small("v41", rows_per_head=1 << 40)}, "MHC223"),
        ({"engram": small("v41", layers=("model.layers.0",))}, "MHC226"),
    ):
        with pytest.raises(MHCError, match=code):
            convert(llama(), inner="eager", **arguments)


def test_numeric_debugging_accepts_a_trained_memory() -> None:
    model = convert(llama(), engram=small("paper"), inner="eager", debug="numeric")
    shake(model, 0.5)
    shake_memory(model)
    with torch.no_grad():
        assert torch.isfinite(model(ids()).logits).all()


def test_both_memories_of_a_shared_decoder_and_encoder_are_the_decoder_s() -> None:
    model = with_memory(t5(), "v41")
    out = model(input_ids=ids(), decoder_input_ids=ids(seed=2), use_cache=False)
    out.logits.sum().backward()
    assert all(t.gradient is not None for t in tables(model))
