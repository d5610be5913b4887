"""Pipelines as values: their text, what changes them, and what they refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from torch.fx import GraphModule

from mhc_compile import MHCError, Options
from mhc_compile.config import compile_pipeline, native_pipeline
from mhc_compile.passes import pipeline as pipelines
from mhc_compile.passes.base import Context
from mhc_compile.passes.fuse import Fuse
from mhc_compile.passes.lower import Lower
from mhc_compile.passes.pipeline import ANALYSIS, EXPORT, NATIVE, WIDENING, Pipeline
from mhc_compile.passes.recompute import Recompute
from mhc_compile.passes.residual import Residual

TEXT = "normalize,residual,widen,fuse{kinds=boundary},lower"


@dataclass(frozen=True)
class Odd:
    """A pass with every type of option."""

    count: int
    share: float = 0.5
    deep: bool = False
    label: str = ""
    blocks: str | int | None = None
    kind: Literal["a", "b", False] = "a"
    paths: tuple[str, ...] = ("x",)

    name: ClassVar[str] = "odd"
    requires: ClassVar[tuple[str, ...]] = ("oddities",)
    provides: ClassVar[tuple[str, ...]] = ()

    def apply(self, gm: GraphModule, context: Context) -> GraphModule:
        return gm


@pytest.mark.parametrize(
    "pipeline",
    [
        ANALYSIS, EXPORT, NATIVE, WIDENING, compile_pipeline(Options()), compile_pipeline(Options(inner="eager")),
        native_pipeline(Options(recompute="2GiB", kernels="-leave")), compile_pipeline(Options(recompute=3)),
    ],
    ids=str,
)  # fmt: skip
def test_every_pipeline_of_ours_is_what_its_text_says(pipeline: Pipeline) -> None:
    assert Pipeline.parse(str(pipeline)) == pipeline


def test_text() -> None:
    pipeline = Pipeline.parse(TEXT)
    assert pipeline.names == ("normalize", "residual", "widen", "fuse", "lower")
    assert pipeline.passes[3] == Fuse(("boundary",))
    assert str(pipeline) == TEXT
    assert str(Pipeline.parse(" normalize , fuse{ without_kernels=true  kinds=read,boundary } ")) == (
        "normalize,fuse{kinds=read,boundary without_kernels=true}"
    )
    assert Pipeline.parse("fuse{kinds=}").passes == (Fuse(()),)
    assert Pipeline.parse("recompute{blocks=4}").passes == (Recompute(4),)


@pytest.mark.parametrize(
    "step",
    [
        Odd(1),
        Odd(-3, 1e-9, True, "two words", "6", "b", ()),
        Odd(0, float("inf"), False, 'a "quoted} {, word', 6, False, ("a/b.c", "", "x,y", "true")),
        Odd(2, label="none", blocks="none", paths=("1.5", "2GiB")),
    ],
)
def test_options_of_every_type_are_read_as_they_were(step: Odd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pipelines.BUILT_IN, "odd", Odd)
    written = Pipeline((step, Lower(), step))
    read = Pipeline.parse(str(written))
    assert read == written
    assert [type(getattr(read.passes[0], f)) for f in Odd.__match_args__] == [
        type(getattr(step, f)) for f in Odd.__match_args__
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("normalize,fues", "no pass 'fues'; known: normalize, residual, .* fuse"),
        ("fuse{kind=read}", "fuse has no option 'kind'; known: kinds, without_kernels"),
        ("lower{x=1}", "lower has no option 'x'; known: none"),
        ("fuse{kinds=reed}", "fuse: kinds=reed is none of .*'read'"),
        ("fuse{without_kernels=1}", "fuse: without_kernels=1 is none of bool"),
        ("odd", "odd needs the option 'count'"),
        ("odd{count=1.5}", "count=1.5 is none of int"),
        ("odd{count}", "odd: 'count' is no OPTION=VALUE"),
        ("normalize,,lower", "',lower' is no pass"),
        ("fuse{kinds=read", "'fuse{kinds=read' is no pass"),
        ("", "'' is no pass"),
    ],
)
def test_text_that_is_none(text: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pipelines.BUILT_IN, "odd", Odd)
    with pytest.raises(MHCError, match=rf"MHC240 .*{told}"):
        Pipeline.parse(text)


def test_options_are_checked_by_the_pass_itself_too() -> None:
    with pytest.raises(MHCError, match=r"MHC204 .*recompute='many'"):
        Pipeline.parse("recompute{blocks=many}")


def test_changes_make_new_pipelines() -> None:
    usual = Pipeline.parse(TEXT)
    once, again = Recompute(2), Recompute(3)
    assert usual.before("fuse", once, again).names == (*usual.names[:3], "recompute", "recompute", "fuse", "lower")
    assert usual.after("lower", once).passes == (*usual.passes, once)
    assert usual.without("fuse", "residual").names == ("normalize", "widen", "lower")
    assert str(usual.replace("fuse", Fuse(("read",)))) == TEXT.replace("boundary", "read")
    assert [part.names for part in usual.split("residual")] == [usual.names[:2], usual.names[2:]]
    assert usual.shared_with(NATIVE) == (
        Pipeline(usual.passes[:1]),
        Pipeline(usual.passes[1:]),
        Pipeline(NATIVE.passes[1:]),
    )
    assert [len(part.passes) for part in ANALYSIS.shared_with(usual)] == [2, 0, 3]
    assert str(usual) == TEXT


def test_changes_at_a_pass_that_is_not_there() -> None:
    usual = Pipeline.parse(TEXT)
    for change in (
        lambda: usual.before("engram", Lower()),
        lambda: usual.after("engram", Lower()),
        lambda: usual.without("lower", "engram"),
        lambda: usual.replace("engram", Lower()),
        lambda: usual.split("engram"),
    ):
        with pytest.raises(MHCError, match=r"MHC240 .*no pass 'engram' in normalize,residual"):
            change()


def test_an_order_that_cannot_be() -> None:
    Pipeline.parse(TEXT).check()
    Pipeline((Residual(),)).check(provided=("normal-form",))
    with pytest.raises(MHCError, match=r"MHC241 .*fuse requires dialect in (?s:.)*put native or widen before fuse"):
        Pipeline.parse("normalize,residual,fuse,widen,lower").check()
    with pytest.raises(MHCError, match=r"MHC241 .*odd requires odd(?s:.)*put a pass that provides oddities before odd"):
        Pipeline((Odd(1),)).check()
