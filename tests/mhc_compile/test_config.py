"""Which kernels the option `kernels` allows."""

from __future__ import annotations

import pytest

from mhc_compile.config import Options
from mhc_compile.diagnostics import MHCError
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
