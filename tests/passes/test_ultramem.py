"""Inserting UltraMem: the graph, and that it computes what the equations say."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from goldens import graph_text
from inserting import SPEC, Inserted, insert
from recipes import ONE_BY_ONE, Recipe
from stepping import run
from torch import Tensor, nn
from toys import Sites, Toy, toy

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory import ultramem
from mhc_compile.kernels.memory.ultramem_settings import UltraMemSettings
from mhc_compile.memory.request import Request
from mhc_compile.passes.base import call_nodes, op_name
from mhc_compile.passes.fuse_memory import fuse_memories
from mhc_compile.passes.ultramem import LookUpByContent

Golden = Callable[[str], None]
V1 = UltraMemSettings(side=3, key_width=4, value_width=6, top=2, layers=(0,), skip=1)
V2 = UltraMemSettings(
    side=3, key_width=4, value_width=6, top=3, input_width=2, shared=True, layers="all", skip=0, expansion=1
)


def inserted(model: nn.Module, ids: Tensor, settings: UltraMemSettings, *, portable: bool = False) -> Inserted:
    """The passes up to `ultramem`."""
    return insert(LookUpByContent(portable=portable), Request(ultramem=settings), model, ids)


class Remembering(Sites):
    """Reads at the last site of each layer, and adds to what the last site of one adds, by the equations."""

    def __init__(self, out: Inserted, model: Toy) -> None:
        each = ((out.held.get_parameter(f"{s}.{p}").detach() for p in ("phi", "alpha", "bias")) for s in out.sites)
        super().__init__(SPEC, (tuple(values) for values in each))  # type: ignore[arg-type]
        self.held, self.model, self.sites = out.held, model, out.sites
        self.found: dict[str, Tensor] = {}
        self.seen = 0
        recipe = model.recipe
        self.normed = recipe.style in ("pre", "sandwich", "single") and recipe.norm != "layer_by_hand"

    def layer(self) -> tuple[str, bool]:
        """The layer of the site that was read last, and whether it is its last."""
        site = self.sites[self.taken - 1]
        path = re.match(r".*?\d+", site)
        assert path is not None
        return path[0], self.taken == len(self.sites) or not self.sites[self.taken].startswith(path[0])

    def read(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, post, H = super().read(X)
        path, last = self.layer()
        if last:
            layer = self.model.get_submodule(path)
            norm = layer.norm if self.model.recipe.style == "single" else layer.feed_norm
            self.remember(path, norm(h) if self.normed else h)
        return h, post, H

    def remember(self, path: str, x: Tensor) -> None:
        memory = self.held.memories.ultramem
        assert memory is not None
        for index, (read, add) in enumerate(memory.layers):
            if read == path:
                own = self.held.get_submodule(f"ultramem.{path}").named_parameters(recurse=False)
                p = {name: t.detach() for name, t in own}
                spec = memory.spec(index)
                operands = (p[name] for name in ("query_gain", "keys", "key_gain", "cores"))
                rows, groups, scores = ultramem.retrieve(x @ p["query"].T, *operands, spec)  # type: ignore[arg-type]
                values = self.held.table("ultra-mem").weight.detach()[rows].flatten(-2)
                product = x @ p["input"].T if "input" in p else None
                self.found[add] = ultramem.expand(values, groups, scores, product, spec) @ p["projection"].T

    def write(self, X: Tensor, y: Tensor, post: Tensor, H: Tensor) -> Tensor:
        path, last = self.layer()
        return super().write(X, y + self.found[path] if last and path in self.found else y, post, H)


def check(recipe: Recipe, settings: UltraMemSettings) -> Inserted:
    model, ids = toy(recipe)
    out = inserted(model, ids, settings)
    with torch.no_grad():
        wanted = model.streams(ids, Remembering(out, model))
    for found, right in zip(run(out.graph, out.inputs), wanted, strict=True):
        assert float((found - right).abs().max() / right.abs().max()) < 1e-12
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(out.without, wanted, strict=True))
    return out


@pytest.mark.parametrize("layers", [(0,), (0, 1), "all"], ids=str)
@pytest.mark.parametrize("settings", [V1, V2], ids=["v1", "v2"])
def test_versions_and_layers(settings: UltraMemSettings, layers: tuple[int, ...]) -> None:
    check(Recipe(layers=3), replace(settings, layers=layers))


# How layers and branches look, and what else reads the stream. How the add is spelt is the business of `widen`.
KINDS = [r for r in ONE_BY_ONE if r.layers > 1 and not r.shared and r.add in ("plus", "alpha") and r.carry != "affine"]


@pytest.mark.parametrize(
    "recipe", [r for r in KINDS if r.extra not in ("clone", "cast") and r.layout == "bsc"], ids=str
)
def test_every_topology(recipe: Recipe) -> None:
    check(recipe, V2)


def test_tokens_may_be_laid_out_as_they_like() -> None:
    for layout in ("sbc", "flat", "flat_feed"):
        check(Recipe(layout=layout), V1)


def test_portable_programs_read_the_table_as_an_embedding() -> None:
    model, ids = toy(Recipe())
    ours, portable = (inserted(model, ids, V2, portable=p) for p in (False, True))
    for a, b in zip(run(ours.graph, ours.inputs), run(portable.graph, portable.inputs), strict=True):
        assert torch.equal(a, b)
    assert not [n for n in call_nodes(portable.graph) if "engram_kernels" in str(n.target)]


def test_the_kernel_takes_the_place_of_the_look_up_and_its_sums() -> None:
    model, ids = toy(Recipe())
    out = inserted(model, ids, V2)
    before = run(out.graph, out.inputs)
    notes = ["choice of the largest scores in a kernel", "look-up by content and its sums, in one kernel"]
    assert fuse_memories(out.graph.graph) == [f"2 x {note}" for note in notes]
    assert not [n for n in call_nodes(out.graph) if op_name(n) in ("gather", "expand") and "engram" in str(n.target)]
    for a, b in zip(run(out.graph, out.inputs), before, strict=True):
        assert float((a - b).abs().max()) < 1e-12


def test_models_without_ids_have_one() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    out = inserted(model, torch.randn(2, 3, 8, dtype=torch.float64), V2)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(run(out.graph, out.inputs), out.without, strict=True))


def test_layers_that_are_not_there_are_refused() -> None:
    model, ids = toy(Recipe())
    for settings in (replace(V1, skip=2), replace(V1, layers=(1,)), replace(V2, layers=("blocks.0",))):
        with pytest.raises(MHCError, match="MHC226"):
            inserted(model, ids, settings)


class Flattening(nn.Module):
    """Its second layer works on tokens in one row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.layers[0](x)
        x = x.flatten(0, 1)
        return x + self.layers[1](x)


def test_tokens_laid_out_otherwise_where_they_are_added_are_refused() -> None:
    with pytest.raises(MHCError, match=r"MHC226.*laid out"):
        inserted(Flattening().double(), torch.randint(0, 11, (2, 3)), V1)


def test_the_graph(golden: Golden) -> None:
    model, ids = toy(Recipe(layers=1, style="single"))
    out = inserted(model, ids, V2)
    assert [op_name(n) for n in call_nodes(out.graph) if "engram" in str(n.target)] == ["retrieve", "gather", "expand"]
    golden(re.sub(r"_\d+_float32_False, \d+,", "_HANDLE_float32_False, HANDLE,", graph_text(out.graph)))
