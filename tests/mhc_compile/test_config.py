"""Which kernels the option `kernels` allows."""

from __future__ import annotations

import pytest

from mhc_compile.config import OPTION_FIELDS, STREAM_FIELDS, Options, overridden
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.spec import Convention, StreamSpec
from mhc_compile.overrides import Overrides, StreamOverrides
from mhc_compile.passes.fuse import KERNELS


@pytest.mark.parametrize(
    ("kernels", "inner", "kinds"),
    [
        ("auto", "inductor", KERNELS),
        ("auto", "eager", ()),
        ("auto", "aot_eager", ()),
        ("all", "eager", KERNELS),
        ("none", "inductor", ()),
        ("boundary, read", "inductor", ("read", "boundary")),
        ("-leave,-reduce", "inductor", tuple(k for k in KERNELS if k not in ("leave", "reduce"))),
        ("boundary,engram", "eager", ("boundary", "engram")),
    ],
)
def test_kernels(kernels: str, inner: str, kinds: tuple[str, ...]) -> None:
    assert Options(kernels=kernels, inner=inner).kinds == kinds  # type: ignore[arg-type]


@pytest.mark.parametrize("kernels", ["", "boundry", "boundary,-read", "auto,read", "--leave"])
def test_what_kernels_may_not_say(kernels: str) -> None:
    with pytest.raises(MHCError, match=r"MHC204.*known: auto, all, none, distribute"):
        Options(kernels=kernels)


def test_keywords_are_the_fields_of_both_classes() -> None:
    assert Overrides.__annotations__.keys() == STREAM_FIELDS | OPTION_FIELDS
    assert StreamOverrides.__annotations__.keys() == STREAM_FIELDS


def test_keywords_replace_fields_of_the_objects_given() -> None:
    spec, options = StreamSpec(streams=2, exit="sum"), Options(inner="eager")
    assert overridden(spec, options, {"streams": 3, "kernels": "all"}) == (
        StreamSpec(streams=3, exit="sum"),
        Options(inner="eager", kernels="all"),
    )
    assert overridden(None, None, {"convention": "deepseek_v4"}) == (
        StreamSpec(convention=Convention.DEEPSEEK_V4, exit="head"),
        Options(),
    )
