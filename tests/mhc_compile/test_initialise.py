"""Models converted without weights: every stream parameter gets its start from the usual recipes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from memories import small, tokenizer
from tiny_models import chain, ids, llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM

import mhc_compile
from mhc_compile import OverEncodingSettings, convert, to_residual
from mhc_compile.parameters import StreamParameters, owners

LOOKUPS = {
    "engram": small("v41"),
    "over_encoding": OverEncodingSettings(order=2, heads=2, rows=30),
}


def hollow(**options: Any) -> Any:
    """A converted Llama whose every value was lost, as `to_empty` may leave it."""
    config = llama().config
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = convert(model, inner="eager", streams=2, **options)
    return lost(model)


def lost(model: nn.Module) -> nn.Module:
    model.to_empty(device="cpu")
    with torch.no_grad():
        for t in model.parameters():
            t.fill_(torch.nan)
    return model


def recipe(model: nn.Module) -> None:
    """FSDP's."""
    for module in model.modules():
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()


def streams_of(model: nn.Module) -> StreamParameters:
    (held,) = owners(model).values()
    return held


def own(model: nn.Module) -> None:
    streams_of(model).reset_parameters()


def by_transformers(model: Any) -> None:
    model.init_weights()


def started(held: StreamParameters, scratch: bool) -> None:
    fresh = StreamParameters(held.spec, held.sites, start=held.start).state_dict()
    state = held.state_dict()
    assert not any(t.isnan().any() for t in state.values())
    for name, values in fresh.items():
        if scratch and name.endswith((".phi", "head.fn")):
            assert 0.015 < state[name].std() < 0.025
        else:
            assert torch.equal(state[name], values), name
    for name in held.memories.tables:
        assert 0.015 < held.table(name).weight.std() < 0.025


@pytest.mark.parametrize("start", [recipe, own, by_transformers])
@pytest.mark.parametrize("scratch", [False, True])
@pytest.mark.parametrize("lookups", [{}, LOOKUPS], ids=["streams", "lookups"])
def test_lost_values_get_their_start(start: Any, scratch: bool, lookups: dict[str, Any]) -> None:
    model = hollow(scratch=scratch, start="paper" if scratch else "default", exit="head", **lookups)
    start(model)
    started(streams_of(model), scratch)


def test_a_model_of_transformers_is_whole_after_init_weights() -> None:
    model = hollow()
    model.model.rotary_emb = llama().model.rotary_emb  # its table is no parameter, and made by its constructor alone
    model.init_weights()
    residual = llama()
    residual.load_state_dict({n: t for n, t in model.state_dict().items() if ".mhc." not in n})
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, residual(ids()).logits, rtol=1e-5, atol=1e-5)


def test_every_module_resets_what_is_its_own() -> None:
    # FSDP1 makes one module at a time, without those below it.
    model = hollow(scratch=True, start="paper", **LOOKUPS)
    for module in streams_of(model).modules():
        names = [n for n, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
        if names:
            module.reset_parameters()
            assert not any(getattr(module, n).isnan().any() for n in names)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_start_themselves(make: Any) -> None:
    model = make(hollow(scratch=True, start="paper"))
    model.init_weights()
    started(streams_of(model), True)


def test_values_that_there_are_are_not_drawn_again(tmp_path: Path) -> None:
    model = convert(llama(), inner="eager", scratch=True, start="paper", **LOOKUPS)
    before = {n: t.clone() for n, t in streams_of(model).state_dict().items()}
    model.init_weights()
    model.save_pretrained(tmp_path / "saved")
    loaded: Any = mhc_compile.from_pretrained(tmp_path / "saved", inner="eager")
    loaded.init_weights()
    for state in (streams_of(model).state_dict(), streams_of(loaded).state_dict()):
        assert all(torch.equal(t, state[n]) for n, t in before.items())


def test_weights_loaded_into_an_empty_model() -> None:
    trained = convert(llama(), inner="eager", streams=2, scratch=True, start="paper")
    model = hollow()
    model.load_state_dict(trained.state_dict())
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in trained.state_dict().items())


def test_the_ids_table_of_a_memory_comes_back() -> None:
    model = hollow(engram=LOOKUPS["engram"], tokenizer=tokenizer())
    table = streams_of(model).get_submodule("engram").get_buffer("compression")
    wanted = streams_of(convert(llama(), engram=LOOKUPS["engram"], tokenizer=tokenizer(), inner="eager"))
    table.fill_(-1)
    recipe(model)
    assert torch.equal(table, wanted.get_submodule("engram").get_buffer("compression"))


def test_sharded_parameters(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with torch.device("meta"):
            model = chain()
        convert(model, ids().to("meta"), inner="eager", scratch=True, start="paper")
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        model.to_empty(device="cpu")
        recipe(model)
        whole = {n: t.full_tensor() for n, t in streams_of(model).named_parameters()}
    finally:
        torch.distributed.destroy_process_group()
    held = StreamParameters(streams_of(model).spec, streams_of(model).sites, start=streams_of(model).start)
    held.load_state_dict(whole)
    started(held, True)


def test_a_residual_model_has_transformers_own_start_again() -> None:
    model = to_residual(convert(llama(), inner="eager"))
    assert not [m for m in model.modules() if "_init_weights" in vars(m)]
