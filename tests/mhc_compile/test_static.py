"""`mhc-compile bench static`: what the model counts is what the kernels' specifications say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from mhc_compile.bench import static
from mhc_compile.cli import main
from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.in_triton import Triton, launcher_of
from mhc_compile.kernels.spec import StreamSpec

HALF = {"streams_dtype": torch.bfloat16, "branch_dtype": torch.bfloat16}
needs_triton = pytest.mark.skipif(
    bool(Triton().unsupported(Chain(kind="boundary", stream=StreamSpec(), width=8))), reason="Triton is not installed"
)

CODE = """\
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/              @!P1 LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   FFMA R4, R5, R6, R7 ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
        /*0040*/              @!PT LDS RZ, [RZ] ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2) ;
"""
TEXT = """\
  tt.func public @forward() {
    %0 = scf.for %c0 = %c0_i32 to %c4096_i32 step %c32_i32 iter_args(%u = %cst) {
      %1 = scf.for %i = %c0_i32 to %2 step %c1_i32 {
      }
    }
    scf.for %t = %first to %last step %c16_i64 : i64 {
    }
"""


def test_loops_and_their_turns() -> None:
    instructions, loops = static.parse(CODE)
    assert [name for name, _ in instructions] == ["MOV", "LDG.E.128", "FFMA", "BRA", "LDS", "BRA", "EXIT"]
    assert loops == [(1, 5), (2, 3)]
    turns = static.turns_of(TEXT, 7)
    assert turns == [(0, 128), (1, 63.5), (0, 7)]
    assert static.matched(loops, turns[:2]) == (loops, turns[:2])
    assert static.matched([(1, 5)], [(0, 128), (1, 2)]) == ([(1, 5)], [(0, 128)])  # the inner one is written out
    with pytest.raises(AssertionError, match="not those"):
        static.matched([(1, 5), (6, 9)], turns[:2])


def test_kinds_of_instructions() -> None:
    names = ("HGMMA.64x16x16.F32.BF16", "FFMA2", "F2FP.BF16.F32.PACK_AB", "F2F.BF16.F32", "SHFL.BFLY", "LDGSTS.E.128",
             "LDS.64", "LDGDEPBAR", "UIADD3", "IMAD.MOV.U32", "IMAD.WIDE.U32", "IADD3.X", "UTCHMMA")  # fmt: skip
    kinds = ["tensor", "float32", "integer", "special", "shuffle", "global", "shared", "sync", "uniform", "move",
             "multiply", "integer", "tensor"]  # fmt: skip
    assert [static.kind_of(name) for name in names] == kinds


def test_what_a_multiprocessor_holds() -> None:
    assert static.resident(128, 46 * 1024, 8) == 2  # registers
    assert static.resident(32, 100 * 1024, 4) == 2  # shared memory
    assert static.resident(16, 0, 8) == 8  # threads


@needs_triton
def test_bytes_accessed_are_those_of_the_specification(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    chain = Chain(kind="boundary", stream=StreamSpec(), width=1024, **HALF)
    (call,) = static.launches(chain, "forward", 4096, 90).values()
    tile = launcher_of(chain).tiles(chain, "forward", 90)[0]
    assert call.grid == (4096 // tile.tokens, 1)
    compiled = launcher_of(chain).compile_for(chain, "forward", "forward", "cuda", 90)
    model = static.model_of(chain, "forward", "forward", compiled, tile, call, static.GPUS[90], 4096)
    accessed = sum(sum(stage.loads.values()) for stage in model.stages)
    passes = Triton().source(chain, "forward").passes
    wide = sum(count * math.prod(chain.shape(name, (1,))) * 2 for name, count in passes.items())
    phi = 32 * chain.span * 4 / tile.tokens  # read by every program, rows that are not there included
    assert accessed == pytest.approx(wide + phi, rel=0.06)  # coefficients and z on top
    assert model.bytes_least == chain.bytes_token("forward")
    assert model.times["tensor"] > 0
    assert model.times[model.bound] == max(model.times.values())
    # The loops over the columns, which do as much for every tile, have as many turns as there are tiles.
    assert [stage.name for stage in model.stages] == ["outside", "loop 1", "loop 2", "loop 3"]


@needs_triton
def test_command_says_what_bounds_each_kernel(tmp_path: Path) -> None:
    assert main(["bench", "static", "--quick", "--json", str(tmp_path / "figures.json")]) == 0
    kernels = json.loads((tmp_path / "figures.json").read_text())["kernels"]
    assert [(k["kernel"].partition(", ")[2], k["gpu"]) for k in kernels] == [
        ("forward", "H200"), ("backward", "H200"), ("forward", "B200"), ("backward", "B200"),
    ]  # fmt: skip
    assert all(k["bound"] in k["times"] and k["registers"] > 0 for k in kernels)
    assert main(["bench", "static", "--png", str(tmp_path / "bars.png")]) == 2
