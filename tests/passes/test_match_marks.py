"""Sites found and parameters held are matched by name, or both lists are shown."""

from collections.abc import Callable

import pytest
import torch
from goldens import Printer
from recipes import Recipe
from stepping import add_parameters, analysed
from torch import Tensor, nn
from toys import toy

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.parameters import StreamParameters
from mhc_compile.passes.base import Context, Mark, call_nodes, module_path, op_name
from mhc_compile.passes.match_marks import pair_with_marks, sites_of
from mhc_compile.passes.results import ResidualStream
from mhc_compile.passes.widen import Widen

Golden = Callable[[str], None]
WIDTH = 8
IDS = torch.arange(6).reshape(2, 3)
SPEC = StreamSpec(streams=2)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return x.sin()


class Two(nn.Module):
    """Two owners side by side, the first called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.ModuleDict({"body": Body()}), Body()

    def forward(self, ids: Tensor) -> Tensor:
        body = self.left["body"]
        return body(ids) + body(ids.flip(1)) * self.right(ids)


def mark(gm: torch.fx.GraphModule, owner: str, *sites: str, exit: str = "mean") -> Mark:
    held = StreamParameters(StreamSpec(streams=2, exit=exit), dict.fromkeys(sites, WIDTH))
    return add_parameters(gm, owner, held)


def pairs_text(pairs: list[tuple[ResidualStream, Mark]], gm: torch.fx.GraphModule) -> str:
    names = Printer(gm).names
    lines = [f"stream of {s.owner} from {names[s.entry]}: mark of {m.owner or '(root)'}" for s, m in pairs]
    return "\n".join(f"{line}, {', '.join(x.name for x in s.sites)}" for line, (s, _) in zip(lines, pairs, strict=True))


def test_each_stream_gets_its_owners_mark(golden: Golden) -> None:
    gm, streams = analysed(Two(), IDS)
    left, right = mark(gm, "left.body", "#0", "#1"), mark(gm, "right", "#0", "#1")
    pairs = pair_with_marks(streams, [left, right])
    assert [m for _, m in pairs] == [left, left, right]
    golden(pairs_text(pairs, gm))


def test_sites_are_named_relative_to_an_owner_further_out(golden: Golden) -> None:
    gm, streams = analysed(Two(), IDS)
    root = mark(gm, "", "left.body#0", "left.body#1", "right#0", "right#1")
    pairs = pair_with_marks(streams, [root])
    assert {m.owner for _, m in pairs} == {""}
    golden(pairs_text(pairs, gm))


def test_the_innermost_owner_around_a_stream_counts() -> None:
    gm, streams = analysed(Two(), IDS)
    outer, inner = mark(gm, "left", "body#0", "body#1"), mark(gm, "left.body", "#0", "#1")
    pairs = pair_with_marks(streams[:2], [inner])
    assert [m for _, m in pairs] == [inner, inner]
    with pytest.raises(MHCError, match="MHC206"):  # nothing is left for the outer one
        pair_with_marks(streams[:2], [outer, inner])


def test_the_learned_exit_is_no_site() -> None:
    gm, streams = analysed(*toy(Recipe(layers=1)))
    held = mark(gm, "", "layers.0#0", "layers.0#1", exit="head")
    assert "head.fn" in held.parameters
    assert sites_of(held) == ["layers.0#0", "layers.0#1"]
    assert pair_with_marks(streams, [held]) == [(streams[0], held)]


def refused(held: list[str], owner: str = "") -> MHCError:
    gm, streams = analysed(*toy(Recipe(layers=1)))
    with pytest.raises(MHCError) as caught:
        pair_with_marks(streams, [mark(gm, owner, *held)])
    assert caught.value.code == "MHC206"
    return caught.value


def test_mhc206_shows_what_is_missing_and_what_is_left_over() -> None:
    error = refused(["layers.0#0", "layers.1#0"])
    assert error.detail == (
        "sites without parameters: ['layers.0#1']; parameters without a site: ['layers.1#0']; "
        "found in the graph: ['layers.0#0', 'layers.0#1']; held by the model: ['layers.0#0', 'layers.1#0']"
    )
    assert error.module == "layers.0"
    assert "operator.add" in error.node
    assert "toys.py:" in error.source


@pytest.mark.parametrize("held", [[], ["layers.0#0"], ["layers.0#0", "layers.0#1", "layers.0#2"]])
def test_mhc206_for_any_other_set_of_names(held: list[str]) -> None:
    assert str(sorted(held)) in refused(held).detail


@pytest.mark.parametrize("owner", ["left.body", "left"])
def test_streams_outside_every_owner_stay_residual(owner: str) -> None:
    gm, streams = analysed(Two(), IDS)
    held = mark(gm, owner, *("#0", "#1") if owner == "left.body" else ("body#0", "body#1"))
    Widen().apply(gm, Context(marks=[held], streams=streams))
    wide = [n for n in call_nodes(gm) if op_name(n) == "distribute"]
    assert len(wide) == 4
    assert {module_path(n) for n in wide} == {"left.body"}


def test_an_owner_whose_name_begins_like_another_is_another() -> None:
    gm, streams = analysed(Two(), IDS)
    with pytest.raises(MHCError, match=r"parameters without a site: \['#0', '#1'\]"):
        pair_with_marks(streams, [mark(gm, "rig", "#0", "#1")])


def test_mhc206_for_parameters_without_any_stream() -> None:
    gm, _ = analysed(*toy(Recipe(layers=1)))
    with pytest.raises(MHCError, match="MHC206") as caught:
        pair_with_marks([], [mark(gm, "", "layers.0#0")])
    assert caught.value.node is None
