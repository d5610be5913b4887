"""`gate_values`: what a memory's gates are on a batch, against the equations in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from memories import PRESETS, shake_memory, small, with_memory
from tiny_models import ids, llama, shake
from torch import Tensor, nn

import mhc_compile
from mhc_compile import MHCError
from mhc_compile.gates import gate_values
from mhc_compile.kernels.memory import fusion, hashing
from mhc_compile.parameters import owners


def by_hand(model: Any) -> Tensor:
    """The gates of layer 0, in front of which all streams are the embedding, in float64."""
    (held,) = owners(model).values()
    memory, first = held.memories.engram, held.get_submodule("engram.layers.0").double()
    assert memory is not None
    spec = memory.layers[0].hash
    eos = spec.fill if memory.settings.resets_after_eos else -1
    rows = hashing.rows(ids(), hashing.reach(ids(), None, None, None, eos), None, spec)
    found = held.table("layers.0").weight.double()[rows].flatten(-2)
    keys = (found @ first.key.T).unflatten(-1, (4, -1))
    X = model.model.embed_tokens.weight.double()[ids()].unsqueeze(-2).expand_as(keys)
    offset = memory.settings.gain_offset
    return fusion.gate(X, keys, first.query_gain + offset, first.key_gain + offset, memory.fusion)


@pytest.mark.parametrize("preset", PRESETS)
def test_values_are_those_of_the_equations(preset: str) -> None:
    model = with_memory(llama(), preset)
    shake(model, 0.5)
    found = gate_values(model, ids())
    assert {name: tuple(a.shape) for name, a in found.items()} == {
        f"model.layers.{i}": (*ids().shape, 4) for i in range(2)
    }
    wanted = by_hand(model)
    assert wanted.std() > 0.01
    torch.testing.assert_close(found["model.layers.0"].double(), wanted, rtol=0, atol=2e-6)


def test_every_layer_has_its_own() -> None:
    model = with_memory(llama())
    before = gate_values(model, {"input_ids": ids(), "use_cache": False})
    with torch.no_grad():
        model.model.mhc.get_parameter("engram.layers.1.key_gain").neg_()
    after = gate_values(torch.compile(model, backend="mhc"), [ids()])
    torch.testing.assert_close(after["model.layers.0"], before["model.layers.0"])
    # The gate of the negative argument.
    torch.testing.assert_close(after["model.layers.1"], 1 - before["model.layers.1"], rtol=0, atol=1e-6)


def test_tables_on_disk_give_the_same_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = with_memory(llama())
    model.save_pretrained(tmp_path / "model")
    mapped = mhc_compile.from_pretrained(tmp_path / "model", inner="eager", tables="mapped").train()
    for (name, a), b in zip(
        gate_values(model, ids()).items(), gate_values(mapped, ids()).values(), strict=True
    ):  # fmt: skip
        assert torch.equal(a, b), name
        assert not a.requires_grad
    assert mapped.training


class Twice(nn.Module):
    """A decoder that reads its tokens forwards and backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = llama().model

    def forward(self, ids: Tensor) -> Tensor:
        both = [self.decoder(x, use_cache=False).last_hidden_state for x in (ids, ids.flip(1))]
        return both[0] + both[1]


def test_calls_of_one_owner_follow_each_other() -> None:
    model = mhc_compile.convert(Twice(), ids(), engram=small("v41"), inner="eager")
    shake_memory(model)
    there, back = gate_values(model, ids())["decoder.layers.0"].chunk(2)
    torch.testing.assert_close(back, gate_values(model, ids().flip(1))["decoder.layers.0"].chunk(2)[0])
    assert not torch.allclose(there, back)


def test_a_model_without_memories_is_refused() -> None:
    for model in (llama(), mhc_compile.convert(llama(), inner="eager")):
        with pytest.raises(MHCError, match="MHC410"):
            gate_values(model, ids())
