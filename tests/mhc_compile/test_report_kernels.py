"""The kernels of a report: code that compiles, the bytes that it moves as written, and the floor of these."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memories import with_memory
from test_report import check, needs_compiler
from tiny_models import HIDDEN, ids, llama

import mhc_compile
from mhc_compile.inspect.kernels import bytes_as_written, limit_of, passes, wide
from mhc_compile.kernels.chain import Chain, Kind
from mhc_compile.kernels.cpp import build as cpp
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.triton import build as triton

SOURCES = {"cpp": cpp.source, "triton": triton.source}
KINDS: tuple[Kind, ...] = ("distribute", "aggregate", "coefficients", "read", "boundary", "reduce", "leave")


@st.composite
def chains(draw: Any) -> Chain:
    kind = draw(st.sampled_from(KINDS))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return Chain(
        kind=kind,
        stream=StreamSpec(streams=draw(st.integers(1, 8)), exit=draw(st.sampled_from(["mean", "sum", "head"]))),
        width=draw(st.sampled_from([32, 40, 1024, 4097])),
        streams_dtype=dtype,
        branch_dtype=dtype,
        norm=draw(st.sampled_from(["none", "rms", "layer"])) if kind in ("read", "boundary") else "none",
    )


@given(chains(), st.sampled_from(sorted(SOURCES)), st.sampled_from(["forward", "backward"]))
@settings(deadline=None, max_examples=60)
def test_every_wide_tensor_is_found_in_the_code(chain: Chain, language: str, direction: Any) -> None:
    code = SOURCES[language](chain, direction)
    for name in wide(chain, direction):
        assert passes(code, name) >= 1, (chain.name, name)
    assert bytes_as_written(chain, direction, code) >= limit_of(chain, direction) > 0
    if language == "triton":
        ast.parse(code)


@pytest.mark.parametrize("norm", ["none", "rms"])
def test_what_a_boundary_moves(norm: Any) -> None:
    C = 1024
    chain = Chain(kind="boundary", stream=StreamSpec(), width=C, norm=norm)
    written = {
        (language, direction): bytes_as_written(chain, direction, source(chain, direction)) // (4 * C)
        for language, source in SOURCES.items()
        for direction in ("forward", "backward")
    }
    # Values of C a token. On a CPU a block of tokens stays in a cache of its own; X and y are read again for the
    # gradients of H and post, and d_h, where no norm makes another of it, for those of pre and X'. On a GPU X' is read
    # again to be weighed, h read and written again for its norm; the gradient of phi is a kernel of its own.
    assert written["cpp", "forward"] == 10
    assert written["cpp", "backward"] == 15 + 5 + (norm == "none")
    assert written["triton", "forward"] == 10 + 4 + (2 if norm == "rms" else 0)
    assert written["triton", "backward"] > written["cpp", "backward"]


@needs_compiler
def test_kernels_of_a_model() -> None:
    model = mhc_compile.convert(llama())
    data = check(mhc_compile.inspect(model, ids(), kernels="all").data())
    kinds = {k["kind"]: k for k in data["kernels"]}
    assert {kind: k["calls"] for kind, k in kinds.items()} == {"read": 1, "boundary": 3, "leave": 1}
    assert {k["device"] for k in data["kernels"]} == {"cpu"}
    names = [data["elements"][i]["name"] for i in kinds["boundary"]["elements"]]
    assert names == ["layers.0#0", "layers.0#1", "layers.1#0", "layers.1#1"]
    assert [data["elements"][i]["kind"] for i in kinds["leave"]["elements"]] == ["site", "exit"]
    for kernel in data["kernels"]:
        for direction, suffix in (("forward", ""), ("backward", "_backward")):
            assert kernel["name"] in kernel[direction].splitlines()[0]
            assert kernel[f"limit_token{suffix}"] <= kernel[f"bytes_token{suffix}"]
    small = 4 * (4 + 16) * 2 + 4 * 24
    assert kinds["boundary"]["limit_token"] == 10 * HIDDEN * 4 + small
    assert cpp.compiled("kernel_of_a_report", kinds["read"]["forward"]).is_file()


@needs_compiler
def test_kernels_of_memories_have_code_and_a_floor() -> None:
    data = check(mhc_compile.inspect(with_memory(llama(), layers=(0,)), kernels="all").data())
    memory = [k for k in data["kernels"] if k["kind"] in ("gate", "inject")]
    assert len(memory) == 2
    for kernel in memory:
        assert 'extern "C"' in kernel["forward"]
        assert 'extern "C"' in kernel["backward"]
        assert kernel["bytes_token"] is None
        assert kernel["limit_token"] > 0
        assert [data["elements"][i]["name"] for i in kernel["elements"]] == ["memory at model.layers.0"]
