"""Which layers get a memory, and a memory as JSON."""

from __future__ import annotations

import json

import pytest

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory.engram import Memory, layers_of, memory_of
from mhc_compile.kernels.memory.settings import MemorySettings

LLAMA = [f"layers.{i}#{j}" for i in range(3) for j in range(2)]
BERT = [f"encoder.layer.{i}.{part}#0" for i in range(2) for part in ("attention.output", "output")]


def settings(**fields: object) -> MemorySettings:
    return MemorySettings.preset("v41", **{"rows_per_head": 100, "row_width": 4, "layers": (0, 2), **fields})


@pytest.mark.parametrize(
    ("sites", "layers"),
    [
        (LLAMA, {"layers.0": "layers.0#0", "layers.1": "layers.1#0", "layers.2": "layers.2#0"}),
        (BERT, {f"encoder.layer.{i}": f"encoder.layer.{i}.attention.output#0" for i in range(2)}),
        (["block.0.layer.0#0", "block.0.layer.1#0"], {"block.0": "block.0.layer.0#0"}),
        (["first#0", "first#1", "second#0", "#0"], {"first": "first#0", "second": "second#0", "#0": "#0"}),
    ],
)
def test_a_layer_is_the_path_up_to_its_number(sites: list[str], layers: dict[str, str]) -> None:
    assert layers_of(sites) == layers


def test_layers_by_index_and_by_path_are_the_same_memory() -> None:
    by_index = memory_of(settings(), LLAMA, vocab=50, compression=None, fill=0)
    by_path = memory_of(settings(layers=("layers.2", "layers.0")), LLAMA, vocab=50, compression=None, fill=0)
    assert by_index.layers == by_path.layers
    assert [m.layer for m in by_index.layers] == ["layers.0", "layers.2"]
    assert [m.site for m in by_index.layers] == ["layers.0#0", "layers.2#0"]
    first, second = (m.hash for m in by_index.layers)
    assert set(first.moduli).isdisjoint(second.moduli)
    assert first.multipliers != second.multipliers


def test_compression_changes_the_multipliers_alone() -> None:
    raw = memory_of(settings(), LLAMA, vocab=50, compression=None, fill=0)
    small = memory_of(settings(), LLAMA, vocab=50, compression={"size": 7}, fill=0)
    assert not raw.compressed
    assert small.compressed
    assert raw.layers[0].hash.moduli == small.layers[0].hash.moduli
    assert raw.layers[0].hash.multipliers != small.layers[0].hash.multipliers


@pytest.mark.parametrize("layer", [3, "layers.7", "layers.0#0"])
def test_layers_that_are_not_there(layer: object) -> None:
    with pytest.raises(MHCError, match=r"MHC226.*2 \(layers.2\)"):
        memory_of(settings(layers=(layer,)), LLAMA, vocab=50, compression=None, fill=0)


def test_json_and_back() -> None:
    memory = memory_of(settings(), [*BERT[:2], "encoder.layer.1#0", "encoder.layer.2#0"], vocab=50,
                       compression={"size": 9, "pad": None}, fill=3)  # fmt: skip
    assert Memory.parse(json.loads(str(memory))) == memory
    with pytest.raises(TypeError):
        Memory.parse({**memory.plain(), "layers": []})
    with pytest.raises(MHCError, match="MHC220"):
        Memory.parse({**memory.plain(), "layers": [{"layer": "a", "site": "a#0", "hash": "no", "rows": 1}]})
