"""`sites=` and `filter_fn=`: which residual adds become sites."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import llama
from torch import Tensor, nn

import mhc_compile
from mhc_compile import MHCError, MHCWarning
from mhc_compile.bisect import bisect
from mhc_compile.kernels import reference
from mhc_compile.kernels.spec import StreamSpec

OWN = {"inner": "eager", "streams": 3}


class Block(nn.Module):
    """A branch that its own forward adds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh()


class Net(nn.Module):
    """Six blocks after an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(6))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def by_hand(net: Any, x: Tensor, chosen: set[int]) -> Tensor:
    """Compute the converted model block by block: n streams at the chosen blocks, one in front of every other."""
    spec = net.mhc.spec
    x = net.embed(x)
    X = None
    for i, block in enumerate(net.blocks):
        if i not in chosen:
            x = x if X is None else reference.reduce(X, spec)
            x, X = block(x), None
            continue
        X = reference.expand(x, spec.streams) if X is None else X
        site = net.mhc.get_submodule(f"blocks.{i}#0")
        pre, post, mix = reference.coefficients(X, site.phi.double(), site.alpha.double(), site.bias.double(), spec)
        X = reference.distribute(X, block.linear(reference.aggregate(X, pre)).tanh(), post, mix)
    return net.head(x if X is None else reference.reduce(X, spec))


@pytest.mark.parametrize(("sites", "chosen"), [("blocks.[2-4]", {2, 3, 4}), ("blocks.0,blocks.1,*.5#0", {0, 1, 5})])
def test_only_chosen_adds_have_streams(sites: str, chosen: set[int]) -> None:
    torch.manual_seed(0)
    net, x = Net().double(), torch.randn(2, 3, 5, dtype=torch.float64)
    expected = net(x)
    converted = mhc_compile.convert(copy.deepcopy(net), x, sites=sites, **OWN)
    assert list(converted.mhc.sites) == [f"blocks.{i}#0" for i in sorted(chosen)]
    torch.testing.assert_close(converted(x), expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        for p in mhc_compile.stream_parameters(converted).values():
            p += torch.randn_like(p)
    torch.testing.assert_close(converted(x), by_hand(converted, x, chosen), rtol=1e-5, atol=1e-5)
    compiled = torch.compile(converted, backend="mhc", fullgraph=True, options={"inner": "eager"})
    torch.testing.assert_close(compiled(x), converted(x), rtol=1e-6, atol=1e-6)


def test_a_function_chooses_by_module_and_name() -> None:
    asked: list[tuple[str, str]] = []

    def choose(module: nn.Module, name: str) -> bool:
        asked.append((type(module).__name__, name))
        return module.linear.weight.shape == (8, 8) and name > "blocks.1"

    net = mhc_compile.convert(Net(), torch.randn(2, 5), filter_fn=choose, sites="blocks.[0-4]", **OWN)
    assert asked == [("Block", f"blocks.{i}#0") for i in range(5)]
    assert list(net.mhc.sites) == [f"blocks.{i}#0" for i in range(1, 5)]
    assert "4 sites of 6 adds" in repr(net.mhc)
    assert mhc_compile.to_residual(net).state_dict().keys() == Net().state_dict().keys()


def test_at_the_first_call_of_a_compiled_model() -> None:
    net, x = Net(), torch.randn(2, 5)
    expected = net(x)
    compiled = torch.compile(net, backend="mhc", options={**OWN, "sites": "blocks.[1-3]"})
    with pytest.warns(MHCWarning, match="MHC302"):
        torch.testing.assert_close(compiled(x), expected)
    assert list(net.mhc.sites) == ["blocks.1#0", "blocks.2#0", "blocks.3#0"]
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": "block.3"}, "the sites have names like 'blocks.3'"),
        ({"sites": "blocks.1", "filter_fn": lambda *_: False}, "none of 6 sites is chosen"),
        ({"sites": "blocks.1,blocks.3", "form": "denseformer"}, "choose sites without a gap"),
        ({"sites": ["blocks.1"]}, "separate patterns by commas"),
        ({"filter_fn": "blocks.1"}, "is no function of a module and a name"),
    ],
)
def test_what_chooses_nothing_is_rejected(options: dict[str, Any], message: str) -> None:
    net = Net()
    with pytest.raises(MHCError, match="MHC204") as error:
        mhc_compile.convert(net, torch.randn(2, 5), **OWN, **options)
    assert message in str(error.value)
    assert not hasattr(net, "mhc")


def test_inspecting_and_bisecting_reject_what_converting_does() -> None:
    chosen = {"sites": "blocks.1,blocks.3", "form": "denseformer"}
    for look in (mhc_compile.inspect, bisect):
        with pytest.raises(MHCError, match="choose sites without a gap"):
            look(Net(), torch.randn(2, 5), **chosen)


def test_sites_of_which_no_mixing_learns_warn() -> None:
    with pytest.warns(MHCWarning, match="MHC109.*3 of 6 adds, 3 not chosen.*no H gets a gradient"):
        mhc_compile.convert(Net(), torch.randn(2, 5), filter_fn=lambda _, name: int(name[7]) % 2 == 0, **OWN)


def test_what_an_owner_skips_in_a_stream_of_a_module_inside_is_counted() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.outer = nn.ModuleList(Block() for _ in range(4)), nn.Linear(8, 8)

        def forward(self, x: Tensor, apart: bool) -> Tensor:
            x = self.outer(x) if apart else x
            for layer in self.layers:
                x = layer(x)
            return self.outer(x) if apart else x

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Part(), Part()

        def forward(self, x: Tensor, apart: bool = False) -> Tensor:
            return self.b(self.a(x, False), apart)

    x = torch.randn(2, 8)
    both = mhc_compile.convert(Both(), x, sites="a.layers.[1-3],b.layers.[0-2]", **OWN)
    for apart, owners in ((False, [""]), (True, ["", "b"])):
        report = mhc_compile.inspect(both, x, example_kwargs={"apart": apart})
        assert [stream.module for stream in report.streams] == owners
        assert str(report.coverage) == "6 of 8 adds, 2 not chosen"
        skipped = [site.full_name for site in report.sites if site.spec is None]
        assert skipped == ["a.layers.0#0", "b.layers.3#0"]
        assert str(report).count(" skipped ") == 2


def test_a_folder_keeps_what_was_chosen(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=3)
    model.save_pretrained(tmp_path / "residual")
    done = mhc_compile.convert_folder(tmp_path / "residual", tmp_path / "mhc", sites="model.layers.[1-2]")
    assert (done.sites, done.adds) == (4, "4 of 6 adds, 2 not chosen")
    loaded = mhc_compile.from_pretrained(tmp_path / "mhc", inner="eager")
    ids = torch.arange(6)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    again = mhc_compile.from_pretrained(tmp_path / "again", inner="eager")
    assert again.model.mhc.skipped == loaded.model.mhc.skipped == ("layers.0#0", "layers.0#1")
    for code, convert in [
        ("MHC418", lambda out: mhc_compile.convert_folder(tmp_path / "mhc", out, layout="megatron")),
        ("MHC708", lambda out: mhc_compile.emit_folder(tmp_path / "mhc", out)),
    ]:
        with pytest.raises(MHCError, match=code):
            convert(tmp_path / "out")
    with pytest.raises(MHCError, match=r"MHC204.*a memory is added to streams that begin at the embedding"):
        mhc_compile.convert(model, sites="model.layers.1", over_encoding="default", **OWN)
    report = str(mhc_compile.inspect(loaded))
    assert "4 of 6 adds, 2 not chosen" in report


def test_source_has_no_options_of_compiling(tmp_path: Path) -> None:
    with pytest.raises(MHCError, match=r"MHC204.*sites has no meaning"):
        mhc_compile.emit(Net(), tmp_path / "net.py", torch.randn(2, 5), sites="blocks.1")  # type: ignore[call-arg]


def test_skipped_names_in_a_damaged_folder(tmp_path: Path) -> None:
    from mhc_compile.checkpoint.manifest import Manifest, Owner, read_manifest

    owner = Owner(StreamSpec(), {"a#0": 8}, skipped=("a#0",))
    Manifest(architecture="Net", owners={"": owner}, streams_file="streams").write(tmp_path)
    with pytest.raises(MHCError, match=r"MHC414.*a skipped add that is a site"):
        read_manifest(tmp_path)


def test_progress_is_told_or_shown(capsys: pytest.CaptureFixture[str]) -> None:
    steps: list[tuple[int, int, str]] = []
    mhc_compile.convert(Net(), torch.randn(2, 5), progress=lambda *step: steps.append(step), **OWN)
    assert [(done, total) for done, total, _ in steps] == [(0, 3), (1, 3), (2, 3)]
    mhc_compile.convert(Net(), torch.randn(2, 5), progress=True, **OWN)
    assert capsys.readouterr() == ("", "")  # no terminal
