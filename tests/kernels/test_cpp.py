"""The generated C++ against the float64 reference, values and gradients, and the ways in which tensors come."""

from __future__ import annotations

import tempfile
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
from chains import CHAINS, LATER, backward_values, error, exactly, name_of, random_gradients, random_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor import cpu_vec_isa
from torch.fx import Graph, GraphModule
from torch.testing._internal.logging_tensor import LoggingTensorMode, capture_logs

import mhc_compile.kernels.fused  # noqa: F401  (registers the ops)
from mhc_compile.kernels import in_cpp as cpp
from mhc_compile.kernels import targets
from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.cpp import build, memory
from mhc_compile.kernels.registration import call_directly
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.target import Reference

pytestmark = pytest.mark.skipif(bool(build.compiler_problem()), reason="no C++ compiler: plain PyTorch computes")
HALF = next(c for c in CHAINS if c.kind == "distribute" and c.streams_dtype == torch.float16)
SOME = settings(max_examples=40, deadline=None, derandomize=True)


CPP = targets.TARGETS["cpp"]


def forward(chain: Chain, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return CPP.run(chain, "forward", inputs)


def both(chain: Chain, inputs: dict[str, Tensor], gradients: dict[str, Tensor]) -> list[Tensor]:
    out = forward(chain, inputs)
    grads = CPP.run(chain, "backward", backward_values(chain, inputs, out, gradients))
    return [*out.values(), *grads.values()]


def tolerances(chain: Chain, inputs: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, float]:
    """Twice the error of plain PyTorch in the chain's own dtypes, and a floor of a few roundings."""
    exact_out, exact_grads = exactly(chain, inputs, gradients)
    out = Reference().run(chain, "forward", inputs)
    grads = Reference().run(chain, "backward", backward_values(chain, inputs, out, gradients))
    floors = {torch.float32: 4e-6, torch.float16: 2.5e-3, torch.bfloat16: 2e-2}
    floor = max(floors[chain.streams_dtype], floors[chain.branch_dtype])
    return {
        name: max(floor, 2 * error(found, exact))
        for pairs, exacts in ((out, exact_out), (grads, exact_grads))
        for name, exact in exacts.items()
        for found in [pairs[name]]
    }


def check(chain: Chain, lead: tuple[int, ...], seed: int, scale: float = 1.0) -> None:
    inputs, gradients = random_inputs(chain, lead, seed, scale), random_gradients(chain, lead, seed + 1)
    exact_out, exact_grads = exactly(chain, inputs, gradients)
    allowed = tolerances(chain, inputs, gradients)
    out = forward(chain, inputs)
    grads = CPP.run(chain, "backward", backward_values(chain, inputs, out, gradients))
    for found, exact in ((out, exact_out), (grads, exact_grads)):
        for name, want in exact.items():
            assert found[name].dtype == chain.dtype(name)
            assert error(found[name], want) <= allowed[name], name


@pytest.mark.parametrize("chain", CHAINS + LATER, ids=name_of)
def test_every_specification_equals_the_reference(chain: Chain) -> None:
    assert targets.choose(chain, "cpu") == ("cpp", "")
    check(chain, (37,), seed=0)


@SOME
@given(st.sampled_from(CHAINS), st.sampled_from([(1,), (7,), (8,), (2, 9), (3, 1, 5)]), st.integers(0, 99))
def test_any_number_of_tokens(chain: Chain, lead: tuple[int, ...], seed: int) -> None:
    check(chain, lead, seed)


@SOME
@given(st.sampled_from(LATER), st.sampled_from([(1,), (7,), (2, 9)]), st.integers(0, 99))
def test_any_number_of_tokens_of_later_chains(chain: Chain, lead: tuple[int, ...], seed: int) -> None:
    check(chain, lead, seed)


@SOME
@given(st.sampled_from([c for c in CHAINS if c.weights == "site"]), st.integers(0, 99), st.sampled_from([30.0, 1e4]))
def test_extreme_logits_stay_finite_and_the_last_axis_sums_to_one(chain: Chain, seed: int, scale: float) -> None:
    inputs = random_inputs(chain, (13,), seed, scale)
    out = forward(chain, inputs)
    found = [*out.values()]
    assert all(t.isfinite().all() for t in found)
    grads = both(chain, inputs, random_gradients(chain, (13,), seed))
    assert all(t.isfinite().all() for t in grads)
    fields = chain.stream.convention.fields
    if chain.stream.form == "mhc" and chain.stream.manifold == "sinkhorn":
        last = {"columns_rows": -1, "rows_columns": -2, "columns_then_rows_columns": -2}[fields.order]
        axis = -3 - last if fields.transposed else last
        sums = out["next_mix"].sum(axis)
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-4)


@pytest.mark.parametrize("chain", CHAINS + LATER, ids=name_of)
def test_every_output_is_written_and_two_runs_are_bit_equal(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = memory.Pool.empty

    def poisoned(self: memory.Pool, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return empty(self, shape, dtype).fill_(float("nan"))

    inputs, gradients = random_inputs(chain, (29,), 0), random_gradients(chain, (29,), 1)
    first = both(chain, inputs, gradients)
    monkeypatch.setattr(memory.Pool, "empty", poisoned)
    second = both(chain, inputs, gradients)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("chain", CHAINS[:6:5] + CHAINS[8:12], ids=name_of)
def test_zero_tokens(chain: Chain) -> None:
    inputs, gradients = random_inputs(chain, (2, 0), 0), random_gradients(chain, (2, 0), 1)
    found = both(chain, inputs, gradients)
    wanted = [chain.shape(n, (2, 0)) for n in (*chain.outputs(), *chain.inputs())]
    assert [tuple(t.shape) for t in found] == wanted
    assert all((t == 0).all() for t in found)  # parameters get a gradient of zero


@pytest.mark.parametrize("chain", CHAINS[:6:5] + CHAINS[8:12], ids=name_of)
def test_layouts_other_than_contiguous(chain: Chain) -> None:
    inputs, gradients = random_inputs(chain, (6, 5), 0), random_gradients(chain, (6, 5), 1)
    X = inputs["X"]
    layouts = {
        "sequence first": X.transpose(0, 1).contiguous().transpose(0, 1),
        "every second token": torch.stack([X, X * 0], 2).flatten(1, 2)[:, ::2],
        "channels apart": torch.stack([X, X * 0], -1)[..., 0],
        "streams apart": X.transpose(-1, -2).contiguous().transpose(-1, -2),
    }
    expected = both(chain, inputs, gradients)
    for name, layout in layouts.items():
        assert torch.equal(layout, X)
        found = both(chain, {**inputs, "X": layout}, gradients)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), name
    spread = {
        k: v[:1, :1].expand(v.shape) if v.dim() > 2 or k in ("y", "post", "pre") else v for k, v in inputs.items()
    }
    dense = {k: v.contiguous() for k, v in spread.items()}
    for a, b in zip(both(chain, spread, gradients), both(chain, dense, gradients), strict=True):
        assert torch.equal(a, b)


def test_offsets_beyond_32_bits() -> None:
    """Tokens 2^30 elements apart, on a sparse file: the third begins behind 2^31."""
    chain = CHAINS[0]
    n, C, step = chain.stream.streams, chain.width, 1 << 30
    inputs, gradients = random_inputs(chain, (3,), 0), random_gradients(chain, (3,), 1)
    with tempfile.TemporaryDirectory() as folder:
        storage = torch.UntypedStorage.from_file(str(Path(folder) / "sparse"), True, 4 * (2 * step + n * C))
        far = torch.empty(0).set_(storage, 0, (3, n, C), (step, C, 1))
        far.copy_(inputs["X"])
        found = both(chain, {**inputs, "X": far}, gradients)
        del far, storage
    expected = both(chain, inputs, gradients)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("lanes", [4, 8])
def test_machines_with_shorter_vectors(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "lanes", lambda: lanes)
    cpp.library.cache_clear()
    try:
        for chain in (CHAINS[1], CHAINS[4], CHAINS[8], HALF):
            assert f"constexpr int LANES = {lanes};" in CPP.source(chain, "forward").text
            check(chain, (13,), seed=0)
    finally:
        cpp.library.cache_clear()


@pytest.mark.parametrize("deterministic", [False, True])
def test_plain_pytorch_serves_until_the_kernel_is_loaded(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = replace(CHAINS[0], norm_eps=0.25)  # which no other test asks for
    inputs = random_inputs(chain, (5,), 0)
    compiling, compiled = Future[Any](), cpp.library(chain, "forward").result()
    monkeypatch.setattr(cpp, "library", lambda *_: compiling)
    monkeypatch.setattr(cpp, "_WAITS", {})
    CPP.prepare(chain, ("forward",), wait=False)
    plain = Reference().run(chain, "forward", inputs)
    torch.use_deterministic_algorithms(deterministic)
    try:
        if deterministic:  # it waits: the result is the kernel's
            Timer(0.2, compiling.set_result, [compiled]).start()
        first = forward(chain, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    if not deterministic:
        assert all(torch.equal(first[name], plain[name]) for name in plain)
        compiling.set_result(compiled)
    kernel = forward(chain, inputs)
    assert any(not torch.equal(kernel[name], plain[name]) for name in plain)
    assert all(torch.equal(first[name], kernel[name]) for name in plain) == deterministic


def test_a_training_step_waits_for_kernels_that_inference_did_not_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = replace(CHAINS[0], norm_eps=0.25)
    inputs = random_inputs(chain, (5,), 0)
    compiled = cpp.library(chain, "forward").result()
    for waits in ((False, True), (True, False)):
        compiling = Future[Any]()
        monkeypatch.setattr(cpp, "library", lambda *_, compiling=compiling: compiling)
        monkeypatch.setattr(cpp, "_WAITS", {})
        for wait in waits:
            CPP.prepare(chain, ("forward",), wait=wait)
        Timer(0.2, compiling.set_result, [compiled]).start()
        first = forward(chain, inputs)
        assert all(torch.equal(t, first[name]) for name, t in forward(chain, inputs).items())


def test_the_vector_instructions_are_looked_up_once_for_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "cache_dir", lambda: tmp_path)
    expected = build.vector_isa.__wrapped__()
    if not list(tmp_path.iterdir()):
        pytest.skip("this machine has no vector instructions that torch.compile would have to try out")
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", lambda: "asked again")
    assert build.vector_isa.__wrapped__() is expected
    (found,) = tmp_path.iterdir()
    found.write_text("import os")  # no name of instructions: not believed
    assert build.vector_isa.__wrapped__() == "asked again"
    found.write_text(str(expected))
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert build.vector_isa.__wrapped__() == "asked again"


def test_a_plan_is_for_calls_of_its_shapes_layout_and_target_alone() -> None:
    chain = Chain(kind="boundary", stream=StreamSpec(streams=2, iterations=3), width=24)
    op = torch.ops.mhc_kernels.boundary.default
    halved = replace(chain, streams_dtype=torch.bfloat16, branch_dtype=torch.bfloat16)

    def agree(chain: Chain, lead: tuple[int, ...], *, strided: bool = False) -> None:
        inputs = random_inputs(chain, lead, 0)
        if strided:
            inputs["post"] = torch.stack([inputs["post"], inputs["post"]], -1)[..., 0]
        want = Reference().run(chain, "forward", inputs)
        found = op(*inputs.values(), str(chain.stream))
        tolerance = 1e-5 if chain.streams_dtype == torch.float32 else 3e-2
        assert all(
            f.shape == w.shape and error(f, w.double()) < tolerance for f, w in zip(found, want.values(), strict=True)
        )

    with torch.no_grad():
        for _ in range(2):
            for lead in ((1, 1), (2, 3), (6,), (0, 3)):
                agree(chain, lead)
            agree(chain, (2, 3), strided=True)
            agree(halved, (2, 3))
        inputs = random_inputs(chain, (2, 3), 0)
        with targets.only("reference"):
            found = op(*inputs.values(), str(chain.stream))
        want = Reference().run(chain, "forward", inputs)
    assert all(torch.equal(*pair) for pair in zip(found, want.values(), strict=True))


def test_direct_calls_are_seen_by_modes_profilers_and_gradients() -> None:
    chain = Chain(kind="distribute", stream=StreamSpec(streams=2), width=24)
    inputs = random_inputs(chain, (3,), 0)
    graph = Graph()
    values = [graph.placeholder(name) for name in inputs]
    graph.output(graph.call_function(torch.ops.mhc_kernels.distribute.default, (*values, str(chain.stream))))
    want = Reference().run(chain, "forward", inputs)["next_X"]
    call_directly(graph)
    run = GraphModule({}, graph)
    with torch.no_grad():
        assert error(run(*inputs.values()), want.double()) < 1e-5
        with torch.profiler.profile() as profile:
            run(*inputs.values())
        assert any(event.key == "mhc_kernels::distribute" for event in profile.key_averages())
        with LoggingTensorMode(), capture_logs() as logs:
            run(*inputs.values())
        assert any("distribute" in line for line in logs)
    inputs["y"].requires_grad_()
    run(*inputs.values()).sum().backward()
    assert inputs["y"].grad is not None


def equal_bits(found: Tensor, exact: Tensor) -> bool:
    """Whether every value is the same, signs of zeros too; one NaN is as good as another."""
    same = found.view(torch.int16) == exact.view(torch.int16)
    return bool((same | (found.isnan() & exact.isnan())).all())


def every_float16() -> Tensor:
    return torch.arange(1 << 16).to(torch.uint16).view(torch.float16)


def check_conversions() -> None:
    """Every float16 is read, and what lies between two of them or beyond is rounded, as PyTorch's casts do it."""
    zero, n, C = torch.zeros, HALF.stream.streams, HALF.width
    halves = every_float16()
    fill = C - len(halves) % C
    y = torch.cat([halves, halves[:fill]]).view(-1, C)
    lead = (len(y),)
    inputs = {"X": zero(*lead, n, C).half(), "y": y, "post": torch.ones(*lead, n), "mix": zero(*lead, n, n)}
    assert equal_bits(forward(HALF, inputs)["next_X"], (y[:, None] + 0.0).expand(*lead, n, C).contiguous())

    numbers = halves[halves.isfinite()].float().unique()
    middle = (numbers[1:] + numbers[:-1]) / 2
    beyond = torch.tensor([0.0, -0.0, 65519.996, 65520.0, 1e5, 3e38, -65519.996, -65520.0, torch.inf, -torch.inf])
    tiny = torch.tensor([2.0**-25, 2.0**-26, 1e-40, -(2.0**-25), torch.nan])
    steps = [torch.nextafter(middle, torch.full((), to)) for to in (torch.inf, -torch.inf)]
    values = torch.cat([numbers, middle, *steps, beyond, tiny])
    post = torch.cat([values, values[: -len(values) % n]]).view(-1, n)
    lead = (len(post),)
    one = torch.ones(*lead, C).half()
    inputs = {"X": zero(*lead, n, C).half(), "y": one, "post": post, "mix": zero(*lead, n, n)}
    want = (post + 0.0).half()[..., None].expand(*lead, n, C).contiguous()
    assert want.isinf().any()
    assert equal_bits(forward(HALF, inputs)["next_X"], want)


@pytest.mark.parametrize("flags", [(), ("-U__F16C__",)], ids=["the machine's own", "by arithmetic"])
@pytest.mark.parametrize("lanes", sorted({4, 8, build.lanes()}))
def test_float16_is_converted_as_pytorch_casts(
    lanes: int, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "lanes", lambda: lanes)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, *flags))
    cpp.library.cache_clear()
    try:
        check_conversions()
    finally:
        cpp.library.cache_clear()


def test_gradients_too_large_for_float16_are_infinite_as_a_cast_makes_them() -> None:
    inputs, gradients = random_inputs(HALF, (9,), 0), random_gradients(HALF, (9,), 1)
    gradients["d_next_X"] = torch.full_like(gradients["d_next_X"], 6e4)
    inputs["post"] = torch.full_like(inputs["post"], 0.3)  # the sum of four: 72000
    *_, dy, _, _ = both(HALF, inputs, gradients)
    assert (dy == torch.inf).all()


def test_the_number_of_threads_changes_sums_by_rounding_alone() -> None:
    chain, threads = CHAINS[0], torch.get_num_threads()
    inputs, gradients = random_inputs(chain, (100,), 0), random_gradients(chain, (100,), 1)
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(both(chain, inputs, gradients))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        (Chain(kind="read", stream=StreamSpec(), width=8, streams_dtype=torch.float64), "float64"),
        (Chain(kind="distribute", stream=StreamSpec(), width=8, streams_dtype=torch.bfloat16), "a branch in"),
        (Chain(kind="read", stream=StreamSpec(streams=5, manifold="permutations"), width=8), "120 logits"),
        (Chain(kind="read", stream=StreamSpec(iterations=0), width=8), "0 Sinkhorn iterations"),
        (Chain(kind="read", stream=StreamSpec(iterations=1000), width=8), "1000 Sinkhorn iterations"),
    ],
)
def test_what_has_no_kernel_is_left_to_plain_pytorch(chain: Chain, reason: str) -> None:
    target, why = targets.choose(chain, "cpu")
    assert target == "reference"
    assert reason in why


def test_source_is_readable_and_says_what_it_is() -> None:
    text = CPP.source(CHAINS[0], "forward").text
    assert "boundary_n4_c48_float32" in text
    assert "convention=paper" in text
    assert "constexpr int N = 4, C = 48, ROWS = 24;" in text
