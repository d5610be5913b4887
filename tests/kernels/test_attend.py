"""The fused read of Attention Residuals: generated C++ and Triton against the float64 reference, and as an op."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from chains import backward_values, error, exactly, random_gradients, random_inputs

from mhc_compile.kernels import targets
from mhc_compile.kernels.attend import Attend, attend
from mhc_compile.kernels.cpp.build import compiler_problem
from mhc_compile.kernels.fused import attend_op
from mhc_compile.kernels.in_triton import Triton, launcher_of
from mhc_compile.kernels.kernelspec import DIRECTIONS
from mhc_compile.kernels.target import Reference, Target

READS = [
    Attend(sources=1, width=8),
    Attend(sources=2, width=33),
    Attend(sources=5, width=48, sources_dtype=torch.bfloat16),
    Attend(sources=9, width=17, sources_dtype=torch.float16),
    Attend(sources=33, width=64),
    Attend(sources=2, width=33, normalised=True),
    Attend(sources=5, width=48, normalised=True, queries=3),
    Attend(sources=4, width=40, normalised=True, queries=3, sources_dtype=torch.bfloat16),
    Attend(sources=3, width=17, normalised=True, queries=2, sources_dtype=torch.float16),
]
needs_cpp = pytest.mark.skipif(bool(compiler_problem()), reason="no C++ compiler: plain PyTorch computes")
needs_triton = pytest.mark.skipif(bool(Triton().unsupported(READS[0])), reason="Triton is not installed")
FLOORS = {torch.float32: 1e-5, torch.float16: 2.5e-3, torch.bfloat16: 2e-2}


def errors(target: Target, spec: Attend, lead: tuple[int, ...], seed: int = 0) -> dict[str, tuple[float, float]]:
    """Errors against float64 by name, of the target and of plain PyTorch."""
    inputs, gradients = random_inputs(spec, lead, seed), random_gradients(spec, lead, seed + 1)
    exact = exactly(spec, {name: t.clone() for name, t in inputs.items()}, gradients)  # it marks what it is given
    found = []
    for each in (target, Reference()):
        out = each.run(spec, "forward", inputs)
        found.append(out | each.run(spec, "backward", backward_values(spec, inputs, out, gradients)))
    return {
        name: (error(found[0][name], want), error(found[1][name], want))
        for part in exact
        for name, want in part.items()
    }


@needs_cpp
@pytest.mark.parametrize("spec", READS, ids=lambda s: s.name)
@pytest.mark.parametrize("lead", [(1,), (37,), (2, 9)])
def test_cpp_equals_the_reference(spec: Attend, lead: tuple[int, ...]) -> None:
    assert targets.choose(spec, "cpu") == ("cpp", "")
    for name, (ours, plain) in errors(targets.TARGETS["cpp"], spec, lead).items():
        assert ours <= max(FLOORS[spec.sources_dtype], 2 * plain), name


@needs_cpp
def test_large_logits_and_no_tokens() -> None:
    spec = READS[1]
    inputs = random_inputs(spec, (6,), 0)
    inputs["query"] *= 1e4
    out = targets.TARGETS["cpp"].run(spec, "forward", inputs)
    torch.testing.assert_close(out["h"], attend([inputs[s] for s in spec.names], inputs["query"], inputs["gain"])[0])
    assert targets.TARGETS["cpp"].run(spec, "forward", random_inputs(spec, (0,), 0))["h"].shape == (0, 33)


@needs_cpp
@pytest.mark.parametrize("sources", [1, 3])
def test_the_op_and_its_gradients(sources: int) -> None:
    spec = Attend(sources=sources, width=24)
    inputs = {name: t.requires_grad_() for name, t in random_inputs(spec, (2, 5), 0).items()}
    h, _ = attend_op(sources, normalised=False)(*inputs.values())
    plain, _ = attend([inputs[s] for s in spec.names], inputs["query"], inputs["gain"])
    torch.testing.assert_close(h, plain, rtol=1e-5, atol=1e-5)
    weight = torch.randn(h.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.autograd.grad((x * weight).sum(), list(inputs.values())) for x in (h, plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.library.opcheck(
        attend_op(sources, normalised=False), tuple(inputs.values()), test_utils=("test_schema", "test_faketensor")
    )


def test_a_float64_read_is_plain() -> None:
    spec = Attend(sources=3, width=8, sources_dtype=torch.float64)
    assert targets.choose(spec, "cpu")[0] == "reference"
    for ours, plain in errors(targets.TARGETS["reference"], spec, (4,)).values():
        assert ours == plain < 1e-12


WORKER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from test_attend import READS, errors
from mhc_compile.kernels import targets
assert targets.choose(READS[0], "cpu") == ("triton", "")
for spec in READS:
    print(json.dumps([str(spec.sources_dtype), errors(targets.TARGETS["triton"], spec, (3, 7))]))
"""


@needs_triton
def test_interpreted_triton_equals_the_reference(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "MHC_COMPILE_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(Path(__file__).parent)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(READS)
    for dtype, found in rows:
        # The interpreter cuts bfloat16 off instead of rounding it: twice the error of a rounding.
        floor = 1e-5 if dtype == "torch.float32" else 2e-2
        for name, (ours, plain) in found.items():
            assert ours <= max(floor, 2 * plain), name


@needs_triton
@pytest.mark.parametrize(
    "target",
    [("cuda", 90), *(pytest.param(t, marks=pytest.mark.slow) for t in (("cuda", 80), ("hip", "gfx942")))],
    ids=str,
)
@pytest.mark.parametrize(
    "options", [{"width": 4096}, {"width": 1024, "normalised": True, "queries": 3}], ids=["one", "normalised"]
)
def test_it_compiles_for_gpus_that_are_not_here(
    options: dict[str, Any], target: tuple[Literal["cuda", "hip"], int | str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    spec = Attend(sources=9, sources_dtype=torch.bfloat16, **options)
    for direction in DIRECTIONS:
        compiled = launcher_of(spec).compile_for(spec, direction, direction, *target)
        if target[0] == "cuda":
            assert compiled.registers()[1] == 0
        assert "atomic" not in Triton().source(spec, direction).text


@needs_triton
def test_what_is_too_large_says_so() -> None:
    for spec in (Attend(sources=2, width=20000), Attend(sources=200, width=64)):
        assert "128 sources, or rows of more than 16384" in Triton().unsupported(spec)
