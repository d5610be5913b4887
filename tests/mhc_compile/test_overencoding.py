"""Over-encoding of converted models: their start, training, generation, checkpoints, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from memories import losses_of, shake_memory, small
from test_generate import DYNAMIC, NO_CACHE, STATIC, generated, padded
from tiny_models import cache_in, cached, chain, close, gpt2, ids, llama, shake, t5
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

from mhc_compile import (
    MHCError,
    OverEncodingSettings,
    TableAdamW,
    convert,
    convert_folder,
    export,
    from_pretrained,
    parameter_groups,
    to_residual,
)
from mhc_compile.cli import main
from mhc_compile.memory.tables import Storage
from mhc_compile.parameters import owners

SMALL = OverEncodingSettings(order=3, heads=2, rows=97)
TABLE = "over-encoding.model-00001-of-00001.safetensors"


def shake_n_grams(model: nn.Module) -> Any:
    """Let the n-grams say something."""
    generator = torch.Generator().manual_seed(1)
    for held in owners(model).values():
        if held.memories.over_encoding is not None:
            with torch.no_grad():
                W = held.get_parameter("over_encoding.projection")
                W.copy_(torch.randn(W.shape, generator=generator) * 0.3)
            held.table("over-encoding").start(1, 1.0)
    return model


@pytest.fixture(scope="module")
def trained() -> Any:
    """A converted model whose streams differ and whose n-grams say something."""
    model = convert(llama(eos_token_id=5, num_hidden_layers=1), streams=2, over_encoding=SMALL, inner="eager")
    shake(model, 0.5)
    return shake_n_grams(model)


@pytest.mark.parametrize(("make", "streams"), [(llama, 1), (gpt2, 8)])
def test_the_start_changes_nothing_at_all(make: Any, streams: int) -> None:
    layers: dict[str, Any] = {"n_layer": 1} if make is gpt2 else {"num_hidden_layers": 1}
    plain = convert(make(**layers), streams=streams, inner="eager")
    model = convert(make(**layers), streams=streams, over_encoding=SMALL, inner="eager")
    with torch.no_grad():
        before = plain(ids()).logits
        assert torch.equal(model(ids()).logits, before)
        shake_n_grams(model)
        assert float((model(ids()).logits - before).abs().max()) > 1e-2


def test_half_precision_stays_half() -> None:
    model = convert(llama(num_hidden_layers=1).bfloat16(), streams=1, over_encoding=SMALL, inner="eager")
    with torch.no_grad():
        assert model(ids()).logits.dtype == torch.bfloat16
    assert model.model.mhc.get_parameter("over_encoding.projection").dtype == torch.float32


def test_the_embedding_of_a_whole_model_is_the_sum(trained: Any) -> None:
    model, held = trained, trained.model.mhc
    with torch.no_grad():
        first = model(ids(), output_hidden_states=True).hidden_states[0]
        rows = torch.ops.engram.over_rows(
            ids(), torch.arange(8).expand(2, 8), None, str(held.memories.over_encoding.hash)
        )
        more = held.table("over-encoding")(rows) @ held.get_parameter("over_encoding.projection").T
    assert close(first, model.model.embed_tokens(ids()) + more)


def test_training_moves_rows_and_the_projection() -> None:
    model = convert(llama(num_hidden_layers=1), streams=2, over_encoding=SMALL, inner="aot_eager").train()
    held = model.model.mhc
    W, rows = held.get_parameter("over_encoding.projection"), held.table("over-encoding").weight
    before = rows.clone()
    groups = parameter_groups(model, lr=1e-2)
    assert any(p is W for p in groups[0]["params"])  # which is decayed
    optimizer = TableAdamW(groups)
    losses = losses_of(model, optimizer)
    assert losses == sorted(losses, reverse=True)
    assert bool(W.any())
    moved = (rows != before).any(1)
    assert 0 < int(moved.sum()) <= 4 * ids().numel()  # the rows of n-grams that were seen, and no others
    with pytest.raises(MHCError, match="MHC411"):
        to_residual(model)


BEAMS: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2}


@pytest.mark.parametrize(
    ("cache", "search"), [(DYNAMIC, BEAMS), (STATIC, {"attention_mask": padded()})], ids=["beams", "left-padded"]
)
def test_caches_change_nothing(trained: Any, cache: dict[str, Any], search: dict[str, Any]) -> None:
    options = {"max_new_tokens": 3, "eos_token_id": 63, **search}
    assert torch.equal(generated(trained, **cache, **options), generated(trained, **NO_CACHE, **options))


def test_calls_that_go_on_equal_the_whole(trained: Any) -> None:
    with torch.no_grad():
        whole = trained(ids(), use_cache=False).logits
        cache, steps = DynamicCache(config=trained.config), []
        for part in ids().split([1, 1, 3, 3], 1):
            steps.append(cached(trained, part, cache).logits)
    assert close(torch.cat(steps, 1), whole, 1e-5)
    assert torch.equal(cache.mhc_memory["ids", "over-encoding"], ids()[:, -2:])


def test_left_padding_changes_nothing_for_the_tokens_behind_it(trained: Any) -> None:
    padding = torch.full((2, 3), 7)
    mask = torch.cat([torch.zeros_like(padding), torch.ones_like(ids())], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = trained(torch.cat([padding, ids()], 1), attention_mask=mask, position_ids=positions).logits
        assert close(found[:, 3:], trained(ids()).logits)


def test_packed_documents_do_not_see_each_other(trained: Any) -> None:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]).expand(2, 8)
    with torch.no_grad():
        first, second = (
            trained(x, position_ids=positions, output_hidden_states=True, use_cache=False).hidden_states[0]
            for x in (ids(), torch.cat([ids(seed=3)[:, :4], ids()[:, 4:]], 1))
        )
    assert torch.equal(first[:, 4:], second[:, 4:])


def test_a_memory_and_n_grams_side_by_side() -> None:
    memory = small("v41", layers=(0,))
    model = convert(llama(num_hidden_layers=1), streams=2, engram=memory, over_encoding=SMALL, inner="eager")
    shake_memory(model)
    shake_n_grams(model)
    with torch.no_grad():
        whole = model(ids(), use_cache=False).logits
        cache, steps = DynamicCache(config=model.config), []
        for part in ids().split([3, 5], 1):
            steps.append(cached(model, part, cache).logits)
    assert close(torch.cat(steps, 1), whole, 1e-5)
    assert set(cache.mhc_memory) == {(part, of) for part in ("ids", "reach") for of in ("", "over-encoding")}


def test_the_decoder_of_a_pair_gets_the_n_grams() -> None:
    model = shake_n_grams(convert(t5(num_layers=1), streams=2, over_encoding=SMALL, inner="eager"))
    assert model.encoder.mhc.memories.over_encoding is None
    assert model.decoder.mhc.memories.over_encoding is not None
    with torch.no_grad():
        whole = model(ids(), decoder_input_ids=ids(), use_cache=False).logits
        # Made here: torch 2.11 cannot trace T5 making it.
        cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
        steps = [cached(model, ids(), cache, decoder_input_ids=part).logits for part in ids().split([3, 5], 1)]
    assert close(torch.cat(steps, 1), whole, 1e-5)


def test_a_copy_has_its_own_rows(trained: Any) -> None:
    other = copy.deepcopy(trained)
    other.model.mhc.table("over-encoding").start(9)
    with torch.no_grad():
        wanted = trained(ids()).logits
        assert not torch.equal(other(ids()).logits, wanted)
        assert torch.equal(trained(ids()).logits, wanted)


def test_exported_programs_have_the_n_grams(trained: Any) -> None:
    program = export(trained, ids(), example_kwargs={"use_cache": False})
    with torch.no_grad():
        out = program.module()(ids(), use_cache=False)
        assert close(out.logits, trained(ids()).logits)


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    trained.save_pretrained(folder)
    return folder


def test_a_converted_folder(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    assert main(["convert", str(source), str(there), "--over-encoding", "order=3,heads=2,rows=97"]) == 0
    said = json.loads((there / "mhc.json").read_text())
    assert said["format"] == 2
    assert said["owners"]["model"]["over_encoding"]["hidden"] == 32
    model: Any = from_pretrained(there, inner="eager")
    with torch.no_grad():
        assert close(model(ids()).logits, llama()(ids()).logits)
    rows = model.model.mhc.table("over-encoding").weight
    assert float(rows.std()) == pytest.approx(0.02, rel=0.1)
    assert main(["inspect", str(there)]) == 0
    convert_folder(there, back, to="residual")
    assert (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert not list(back.glob("over-encoding*"))
    capsys.readouterr()
    for wrong in ("rows", "rows=x", "width=3", "order=1", "rows=97,"):
        assert main(["convert", str(source), str(tmp_path / "no"), "--over-encoding", wrong]) == 2
        assert "MHC220" in capsys.readouterr().err


@pytest.mark.parametrize("storage", ["device", "host", "mapped"])
def test_every_storage_says_the_same(trained: Any, saved: Path, storage: Storage) -> None:
    model: Any = from_pretrained(saved, inner="eager", tables=storage)
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, trained(ids()).logits)
    assert model.model.mhc.table("over-encoding").storage == storage


def test_folders_in_use_and_damaged_ones(trained: Any, saved: Path) -> None:
    trained.save_pretrained(saved)
    assert [p.name for p in saved.glob("over-encoding*")] == [TABLE]
    with pytest.raises(MHCError, match="MHC411"):
        convert_folder(saved, saved.parent / "never", to="residual")
    said = json.loads((saved / "mhc.json").read_text())
    for change, code in (
        ({"hash": "vocab=64 order=3 moduli=97,99,101,105"}, "MHC223"),
        ({"hash": "vocab=64 order=3 moduli=97,98,99,101"}, "MHC414"),
        ({"hidden": 31}, "MHC414"),
        ({"hidden": None}, "MHC414"),
    ):
        changed = copy.deepcopy(said)
        changed["owners"]["model"]["over_encoding"] |= change
        (saved / "mhc.json").write_text(json.dumps(changed))
        with pytest.raises(MHCError, match=code):
            from_pretrained(saved, inner="eager")
    (saved / "mhc.json").write_text(json.dumps(said))
    (saved / TABLE).unlink()
    with pytest.raises(MHCError, match="MHC224"):
        from_pretrained(saved, inner="eager")


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_models_without_ids_are_refused(trained: Any) -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with pytest.raises(MHCError, match="MHC225"):
        convert(model, torch.randn(2, 3, 32), over_encoding=SMALL, inner="eager")
    assert not owners(model)
    with pytest.raises(MHCError, match="MHC225"), torch.no_grad():
        trained(inputs_embeds=torch.randn(2, 3, 32))


def test_ids_beyond_the_vocabulary_are_refused(trained: Any) -> None:
    with pytest.raises(MHCError, match="MHC221"), torch.no_grad():
        trained(ids() + 60)


def test_caches_without_the_state_are_refused(trained: Any) -> None:
    cache = cache_in(trained(ids(), use_cache=True))  # with gradients: not for generation
    with pytest.raises(MHCError, match="MHC229"), torch.no_grad():
        cached(trained, ids()[:, :1], cache)


def test_arguments_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MHCError, match=r"MHC220.*over_encoding='large'"):
        convert(chain(), ids(), over_encoding="large")
    with pytest.raises(MHCError, match=r"MHC220.*channels"):
        convert(chain(), ids(), over_encoding=OverEncodingSettings(heads=11, rows=5))
    with pytest.raises(MHCError, match=r"MHC204.*over_encoding"):
        convert_folder(tmp_path, tmp_path / "out", to="residual", over_encoding="default")
