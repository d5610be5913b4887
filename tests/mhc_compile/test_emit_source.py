"""`emit`: what is written for each way in which a model says its residual stream, and what is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain_sources
import pytest
import torch
from plain_sources import (
    REFUSED,
    SPELLINGS,
    Averaging,
    Collecting,
    Dropping,
    Model,
    Named,
    OtherwiseTrained,
    PostNorm,
    ids,
)
from tiny_models import llama
from torch import nn

import mhc_compile
from mhc_compile import MHCError, StreamSpec
from mhc_compile.emitting.emit import checked_source, source_of
from mhc_compile.emitting.file import load
from mhc_compile.emitting.gate import Expected
from mhc_compile.emitting.graph_rewrite import GraphRewrite
from mhc_compile.emitting.instrument import functions_around

GOLDEN = Path(__file__).parent / "golden"


def emitted(model: nn.Module, folder: Path, name: str, **options: Any) -> Any:
    """The module of the model's source, imported."""
    return load(mhc_compile.emit(model, folder / f"{name}.py", ids(), **options))


def classes(text: str) -> str:
    """What follows the stream modules."""
    return text[text.index("class " if "def join" not in text else "def join", text.index("def reduce")) :]


@pytest.mark.parametrize("model", SPELLINGS, ids=lambda m: m.__name__)
def test_every_spelling_is_rewritten(model: type[nn.Module], request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = mhc_compile.emit(model(), tmp_path / "source.py", ids())
    text = classes(path.read_text())
    golden = GOLDEN / f"emit_{model.__name__}.py.txt"
    if request.config.getoption("--accept"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text(), f"{golden.name} differs: if the new text is right, run pytest --accept"


@pytest.mark.parametrize(("code", "make"), REFUSED, ids=[code for code, _ in REFUSED])
def test_what_cannot_be_rewritten_has_a_code_and_a_line(
    code: str, make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MHCError) as caught:
        mhc_compile.emit(model, tmp_path / "new" / "source.py", ids())
    assert caught.value.code == code
    if code != "MHC707":
        assert re.search(r"plain_sources\.py:\d+, in ", str(caught.value))
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_code_that_did_not_run_reduces_what_it_puts_away(tmp_path: Path) -> None:
    model = Collecting().eval()
    module = emitted(model, tmp_path, "collecting")
    streams = module.add_streams(copy.deepcopy(model))
    for mine, theirs in zip(streams(ids(), every=True), model(ids(), every=True), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"streams": 1}, {"streams": 2, "iterations": 3}, {"manifold": "identity"}, {"manifold": "unconstrained"},
        {"convention": "liger"}, {"convention": "glm5_next", "exit": "sum"}, {"convention": "hy_v4", "exit": "mean"},
        {"convention": "megatron_main"}, {"manifold": "circulant"}, {"manifold": "permutations", "streams": 3},
        {"manifold": "kronecker", "exit": "sum"}, {"manifold": "transportation"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)  # fmt: skip
def test_streams_of_any_kind_compute_the_same_and_start_alike(options: dict[str, Any], tmp_path: Path) -> None:
    model = PostNorm().eval()
    module = emitted(model, tmp_path, "other", **options)
    streams = module.add_streams(copy.deepcopy(model))
    theirs = mhc_compile.convert(model, ids(), inner="eager", **options)
    start = mhc_compile.stream_parameters(theirs)
    ours = {name: p for name, p in streams.named_parameters() if "mhc_" in name}
    assert len(ours) == len(start)
    for mine, other in zip(ours.values(), start.values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [{"convention": "deepseek_v4"}, {"convention": "deepseek_v41"}, {"form": "hc"}],
    ids=lambda options: "-".join(options.values()),
)
def test_streams_without_a_source(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(MHCError, match="MHC708"):
        mhc_compile.emit(Model(), tmp_path / "source.py", ids(), **options)
    assert not list(tmp_path.iterdir())


def test_code_that_runs_in_training_alone_is_checked_too(tmp_path: Path) -> None:
    model = Dropping().eval()
    module = emitted(model, tmp_path, "dropping")
    streams, theirs = module.add_streams(copy.deepcopy(model)), mhc_compile.convert(model, ids(), inner="eager")
    losses = []
    for trained in (streams, theirs):
        torch.manual_seed(3)
        losses.append(trained.train()(ids()).square().mean())
    torch.testing.assert_close(*losses)
    with pytest.raises(MHCError, match=r"MHC706.*in training(.*\n)*.*plain_sources.*OtherwiseTrainedLayer"):
        mhc_compile.emit(OtherwiseTrained().eval(), tmp_path / "other.py", ids())
    assert not (tmp_path / "other.py").exists()


def test_averages_of_batches_stay_as_they_are(tmp_path: Path) -> None:
    module = emitted(model := Averaging().eval(), tmp_path, "averaging")
    assert all(float(b.abs().sum()) == 0 for name, b in model.named_buffers() if name.endswith("running_mean"))
    torch.testing.assert_close(module.add_streams(copy.deepcopy(model))(ids()), model(ids()))


def test_a_memory_has_no_source(tmp_path: Path) -> None:
    model = mhc_compile.convert(
        llama(), engram=mhc_compile.MemorySettings.preset("paper", rows_per_head=64, layers=(0,))
    )
    with pytest.raises(MHCError, match="MHC708"):
        mhc_compile.emit(model, tmp_path / "source.py")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("return (total / STREAMS)", "return total"),
        ("for _ in range(20)", "for _ in range(19)"),
        ("return self.mhc_feed.distribute(x, ", "return self.mhc_mixing.distribute(x, "),
        ("count += len(sites)", "raise ValueError"),
        ('{"mhc_mixing": None, "mhc_feed": None}', '{"mhc_mixing": None}'),
    ],
)
def test_a_wrong_source_is_found(right: str, wrong: str, tmp_path: Path) -> None:
    model = Model().double().eval()
    rewrite = GraphRewrite(model, StreamSpec())
    expected = Expected(rewrite, (ids(),), {})
    functions = functions_around(model, rewrite.inside, rewrite.outside)
    source = source_of(model, (ids(),), {}, rewrite, functions)
    assert right in source.text
    path = tmp_path / "wrong.py"
    path.write_text(source.text.replace(right, wrong))
    with pytest.raises(MHCError, match="MHC709"):
        expected.difference(source, load(path))


def test_the_difference_is_told() -> None:
    assert checked_source(Model().eval(), (ids(),), {}, StreamSpec()).difference == 0.0


def test_nothing_of_the_probes_is_left(tmp_path: Path) -> None:
    codes = [Model.forward.__code__, Model.run.__code__, plain_sources.Layer.forward.__code__]
    mhc_compile.emit(Model(), tmp_path / "source.py", ids())
    assert codes == [Model.forward.__code__, Model.run.__code__, plain_sources.Layer.forward.__code__]
    assert not [name for name in vars(plain_sources) if name.startswith("__mhc")]


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "source.py").write_text("mine")
    with pytest.raises(MHCError, match="MHC412"):
        mhc_compile.emit(Model(), tmp_path / "source.py", ids())
    assert (tmp_path / "source.py").read_text() == "mine"


def test_a_name_that_the_file_has_already_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MHCError, match=r"MHC707.*the name reduce"):
        mhc_compile.emit(Named(), tmp_path / "source.py", ids())
    assert not list(tmp_path.iterdir())
