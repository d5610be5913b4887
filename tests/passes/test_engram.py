"""Inserting memories: the graph, and that it computes what the equations say."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from goldens import graph_text
from inserting import SPEC, Inserted, insert
from recipes import ONE_BY_ONE, Recipe
from stepping import run
from torch import Tensor, nn
from toys import Sites, toy

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory import fusion, hashing
from mhc_compile.kernels.memory.engram import LayerMemory
from mhc_compile.kernels.memory.settings import MemorySettings
from mhc_compile.memory.request import Request
from mhc_compile.parameters import StreamParameters
from mhc_compile.passes.base import call_nodes, op_name
from mhc_compile.passes.engram import Engram
from mhc_compile.passes.fuse_memory import fuse_memories

Golden = Callable[[str], None]


def settings(preset: str, *layers: int) -> MemorySettings:
    return MemorySettings.preset(preset, rows_per_head=31, row_width=2, heads=2, layers=layers)


def inserted(model: nn.Module, ids: Tensor, chosen: MemorySettings, *, portable: bool = False) -> Inserted:
    """The passes up to `engram`."""
    return insert(Engram(portable=portable), Request(engram=chosen), model, ids)


class Remembering(Sites):
    """Adds the memories, by the equations, at the entry of their layers."""

    def __init__(self, out: Inserted, ids: Tensor) -> None:
        each = ((out.held.get_parameter(f"{s}.{p}").detach() for p in ("phi", "alpha", "bias")) for s in out.sites)
        super().__init__(SPEC, (tuple(values) for values in each))  # type: ignore[arg-type]
        self.held, self.ids, self.layer = out.held, ids, -1

    def enter(self, X: Tensor) -> Tensor:
        self.layer += 1
        assert self.held.memories.engram is not None
        mine = [m for m in self.held.memories.engram.layers if m.layer.endswith(str(self.layer))]
        return by_hand(self.held, mine[0], X, self.ids) if mine else X


def by_hand(held: StreamParameters, mine: LayerMemory, X: Tensor, ids: Tensor) -> Tensor:
    memory = held.memories.engram
    assert memory is not None
    p = {name: t.detach() for name, t in held.get_submodule(f"engram.{mine.layer}").named_parameters(recurse=False)}
    reach = hashing.reach(ids, None, None, None)
    rows = hashing.rows(ids, reach, None, mine.hash)
    e = held.table(mine.layer).weight.detach()[rows].flatten(-2).double()
    offset = memory.settings.gain_offset
    keys = (e @ p["key"].T).unflatten(-1, (SPEC.streams, -1))
    gate = fusion.gate(X, keys, p["query_gain"] + offset, p["key_gain"] + offset, memory.fusion)
    more = (p["conv_gain"] + offset, p["conv"]) if memory.fusion.dilation else (None, None)
    return fusion.inject(X, gate, e @ p["value"].T, reach, *more, memory.fusion)


def check(recipe: Recipe, chosen: MemorySettings) -> Inserted:
    model, ids = toy(recipe)
    ids = ids.repeat(1, 3)  # long enough for n-grams and for the convolution's second tap
    out = inserted(model, ids, chosen)
    with torch.no_grad():
        wanted = model.streams(ids, Remembering(out, ids))
    for found, right in zip(run(out.graph, out.inputs), wanted, strict=True):
        assert float((found - right).abs().max() / right.abs().max()) < 1e-12
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(out.without, wanted, strict=True))
    return out


@pytest.mark.parametrize("preset", ["paper", "v41", "qwen_ple"])
@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1)], ids=str)
def test_presets_and_layers(preset: str, layers: tuple[int, ...]) -> None:
    check(Recipe(), settings(preset, *layers))


TOKENS_FIRST = [r for r in ONE_BY_ONE if r.layout in ("bsc", "flat_feed") and r.layers > 1 and not r.shared]


@pytest.mark.parametrize("recipe", TOKENS_FIRST, ids=str)
def test_every_topology(recipe: Recipe) -> None:
    check(recipe, settings("paper", 1))


@pytest.mark.parametrize("preset", ["paper", "v41"])
def test_kernels_take_the_places_of_the_ops(preset: str) -> None:
    model, ids = toy(Recipe())
    out = inserted(model, ids, settings(preset, 0))
    before = run(out.graph, out.inputs)
    notes = fuse_memories(out.graph.graph)
    names = {str(n.target) for n in call_nodes(out.graph) if "engram" in str(n.target)}
    assert {n for n in names if n.startswith("engram_kernels")} - {"engram_kernels.gather.default"} == {
        "engram_kernels.rows.default",
        f"engram_kernels.{'recall' if preset == 'paper' else 'remember'}.default",
    }
    assert len(notes) == 2
    for a, b in zip(run(out.graph, out.inputs), before, strict=True):
        assert float((a - b).abs().max()) < 1e-12


def test_portable_programs_read_the_table_as_an_embedding() -> None:
    model, ids = toy(Recipe())
    ours, portable = (inserted(model, ids, settings("paper", 1), portable=p) for p in (False, True))
    for a, b in zip(run(ours.graph, ours.inputs), run(portable.graph, portable.inputs), strict=True):
        assert torch.equal(a, b)
    assert not [n for n in call_nodes(portable.graph) if "engram_kernels" in str(n.target)]


def test_look_ups_come_before_the_first_layer() -> None:
    model, ids = toy(Recipe())
    out = inserted(model, ids, settings("v41", 1))
    names = [op_name(n) for n in call_nodes(out.graph)]
    assert names.index("reach") < names.index("rows") < names.index("embedding") < names.index("coefficients")


@pytest.mark.parametrize("layout", ["sbc", "flat"])
def test_streams_that_are_not_batch_by_sequence_are_refused(layout: Any) -> None:
    model, ids = toy(Recipe(layout=layout))
    with pytest.raises(MHCError, match="MHC225"):
        inserted(model, ids, settings("v41", 0))


def test_models_without_ids_are_refused() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    with pytest.raises(MHCError, match="MHC225"):
        inserted(model, torch.randn(2, 3, 8, dtype=torch.float64), settings("v41", 0))


def test_memory_with_a_convolution(golden: Golden) -> None:
    model, ids = toy(Recipe(layers=1, style="single"))
    text = graph_text(inserted(model, ids, settings("paper", 0)).graph)
    golden(re.sub(r"_\d+_float32_False, \d+,", "_HANDLE_float32_False, HANDLE,", text))
