"""The kernels of a report: code that compiles, the bytes that it moves as written, and the floor of these."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memories import with_memory
from test_report import check, needs_compiler
from tiny_models import HIDDEN, ids, llama

import mhc_compile
from mhc_compile.bench import boundary as boundary_bench
from mhc_compile.bench.recompute import plan_for
from mhc_compile.diff.form import Form
from mhc_compile.kernels.chain import Chain, Kind
from mhc_compile.kernels.cpp import build as cpp
from mhc_compile.kernels.in_cpp import Cpp
from mhc_compile.kernels.in_triton import Triton
from mhc_compile.kernels.kernelspec import DIRECTIONS
from mhc_compile.kernels.memory.spec import FusionSpec
from mhc_compile.kernels.memory.step import MemoryStep
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.passes.cost import bytes_text
from mhc_compile.report.page.page import page

TARGETS = {"cpp": Cpp(), "triton": Triton()}
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


@st.composite
def steps(draw: Any) -> MemoryStep:
    kind = draw(st.sampled_from(["gate", "add", "inject", "remember"]))
    spec = FusionSpec(dilation=draw(st.integers(1, 3)), taps=draw(st.integers(1, 4)))
    joins = kind == "gate" and draw(st.booleans())
    return MemoryStep(kind=kind, streams=draw(st.integers(1, 8)), width=draw(st.sampled_from([32, 40])), spec=spec,
                      joins=joins)  # fmt: skip


def passes_in(code: str, name: str) -> int:
    """Read off the code how often it goes over the tensor `name` from end to end."""
    if "@triton.jit" in code:
        # Every loop over columns (or tokens, of a gradient that sums over them) is a pass over what it loads or stores.
        loops = re.split(r"\n    for ", code)[1:]
        return sum(f"tl.{verb}({name} " in loop for loop in loops for verb in ("load", "store"))
    body = code[code.index('extern "C"') :]
    return len(re.findall(rf"(?<![\w.]){name} \+ ", body))


@given(chains(), st.sampled_from(sorted(TARGETS)), st.sampled_from(["forward", "backward"]))
@settings(deadline=None, max_examples=60)
def test_the_code_of_chains_says_how_often_it_goes_over_each_tensor(
    chain: Chain, language: str, direction: Any
) -> None:
    source = TARGETS[language].source(chain, direction)
    assert dict(source.passes) == {name: passes_in(source.text, name) for name in source.passes}
    assert [n for n in chain.wide(direction) if n not in source.passes and passes_in(source.text, n)] == []
    assert chain.bytes_token(direction, source.passes) >= chain.bytes_token(direction) > 0
    if language == "triton":
        ast.parse(source.text)


@given(steps(), st.sampled_from(["forward", "backward"]))
@settings(deadline=None, max_examples=60)
def test_the_code_of_memories_says_how_often_it_goes_over_each_tensor(step: MemoryStep, direction: Any) -> None:
    for target in TARGETS.values():
        source = target.source(step, direction)
        assert set(step.wide(direction)) <= set(source.passes)
        assert step.bytes_token(direction, source.passes) >= step.bytes_token(direction) > 0
        # What is written is written once, and every value is there once at least.
        assert {source.passes[name] for name in step.outputs(direction) if name in source.passes} <= {1}
        pointers = set(re.findall(r"\b\w+\b", source.text))
        assert set(source.passes) <= pointers


@pytest.mark.parametrize("norm", ["none", "rms"])
def test_what_a_boundary_moves(norm: Any) -> None:
    C = 1024
    chain = Chain(kind="boundary", stream=StreamSpec(), width=C, norm=norm)
    written = {
        (name, direction): chain.bytes_token(direction, target.source(chain, direction).passes) // (4 * C)
        for name, target in TARGETS.items()
        for direction in DIRECTIONS
    }
    # Values of C a token. On a CPU a block of tokens stays in a cache of its own; X and y are read again for the
    # gradients of H and post, and d_h, where no norm makes another of it, for those of pre and X'. On a GPU X' is read
    # again to be weighed, h read and written again for its norm; the gradient of phi is a kernel of its own.
    assert written["cpp", "forward"] == 10
    assert written["cpp", "backward"] == 15 + 5 + (norm == "none")
    assert written["triton", "forward"] == 10 + 4 + (2 if norm == "rms" else 0)
    assert written["triton", "backward"] > written["cpp", "backward"]


def test_what_a_memory_moves() -> None:
    C, spec = 1024, FusionSpec(dilation=3)
    inject = MemoryStep(kind="inject", streams=4, width=C, spec=spec)
    gate = MemoryStep(kind="gate", streams=4, width=C, spec=spec, joins=True)
    written = {
        (name, step.kind, direction): step.bytes_token(direction, target.source(step, direction).passes) / (4 * C)
        for name, target in TARGETS.items()
        for step in (inject, gate)
        for direction in DIRECTIONS
    }
    # Values of C a token: streams in and out, and v for its norm and for each of four taps.
    assert written["cpp", "inject", "forward"] == written["triton", "inject", "forward"] == 8 + 1 + 4
    # On a CPU v for its norm, each tap and twice for its gradient, d_next_X twice; on a GPU a row's values stay in
    # registers from tap to tap, and dv is written, read and written.
    assert written["cpp", "inject", "backward"] == 7 + 2 * 4 + 1
    assert written["triton", "inject", "backward"] == 3 + 4 + 2 + 1
    # X and keys for the sums and for what follows, d_next_X, d_X and d_keys once.
    assert written["cpp", "gate", "backward"] == written["triton", "gate", "backward"] == 2 * 8 + 12


@needs_compiler
def test_one_kernel_has_one_number_everywhere() -> None:
    report = mhc_compile.inspect(mhc_compile.convert(llama()), ids(), kernels="all")
    (boundary,) = [k for k in report.kernels if k.kind == "boundary"]
    chain = Chain(kind="boundary", stream=StreamSpec(), width=HIDDEN, norm="rms")
    size = chain.bytes_token("forward", TARGETS["cpp"].source(chain, "forward").passes)
    assert (boundary.name, boundary.bytes_token) == (chain.name, size)
    (embedded,) = re.findall(r'<script id="report" type="application/json">(.*?)</script>', page(report), re.DOTALL)
    for data in (json.loads(report.json()), json.loads(embedded)):
        (kernel,) = [k for k in data["kernels"] if k["kind"] == "boundary"]
        assert kernel["bytes_token"] == size
    line = next(line for line in str(report).splitlines() if line.startswith(boundary.name))
    columns = line.split()
    assert columns[columns.index("cpu") + 1 :][:3] == [f"{size:,}", f"{size / boundary.limit_token:.2f}", "x"]
    form = Form("A", report)
    assert form.kernels[boundary.name] == (boundary.calls, size)
    # What the bench measures against is what any kernel must move.
    bare = replace(chain, norm="none")
    inputs = boundary_bench.random_inputs(bare, 2, torch.device("cpu"))
    ours, *_ = boundary_bench.contenders_of(bare, inputs, 2, (), backward=False)
    assert ours.bytes is not None
    assert ours.bytes - bare.bytes_moved(1) == bare.bytes_token("forward")


@needs_compiler
def test_blocks_and_stages_have_one_number_everywhere() -> None:
    report = mhc_compile.inspect(mhc_compile.convert(llama()), ids(), recompute=2, stages=2)
    assert [e.block for e in report.sites] == [e.stage for e in report.sites] == [0, 0, 1, 1]
    plan = plan_for(mhc_compile.convert(llama()), ids(), 2)
    assert sum(b.kept for b in report.blocks) == plan.kept
    assert max(b.recomputed for b in report.blocks) == plan.transient
    notes = next(p.notes for p in report.passes if p.name == "recompute")
    assert any(bytes_text(plan.kept) in note for note in notes)


@needs_compiler
def test_kernels_of_a_model() -> None:
    model = mhc_compile.convert(llama())
    data = check(mhc_compile.inspect(model, ids(), kernels="all"))
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
def test_kernels_of_memories_have_code_and_counted_bytes() -> None:
    data = check(mhc_compile.inspect(with_memory(llama(), layers=(0,)), kernels="all"))
    memory = [k for k in data["kernels"] if k["kind"] in ("gate", "inject")]
    assert len(memory) == 2
    for kernel in memory:
        assert 'extern "C"' in kernel["forward"]
        assert 'extern "C"' in kernel["backward"]
        for suffix in ("", "_backward"):
            assert kernel[f"bytes_token{suffix}"] >= kernel[f"limit_token{suffix}"] > 0
        assert [data["elements"][i]["name"] for i in kernel["elements"]] == ["memory at model.layers.0"]
