"""`torch.compile(model, backend="mhc")` on a converted model: options, inner compilers, misuse."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Chain, Outer, chain, close, code_of, ids, llama, logits, shake, state, warned

import mhc_compile
from mhc_compile import MHCError, convert
from mhc_compile.parameters import owners


@pytest.mark.parametrize(
    "inner",
    ["eager", pytest.param("aot_eager", marks=pytest.mark.compat), pytest.param("inductor", marks=pytest.mark.compat)],
)
def test_each_inner_compiler_computes_the_streams(inner: str) -> None:
    model = convert(llama(), inner="eager")
    shake(model)
    expected = model(ids()).logits
    assert close(torch.compile(model, backend="mhc", options={"inner": inner})(ids()).logits, expected)


def test_the_backend_is_found_without_importing_the_package() -> None:
    program = """
import sys, warnings, torch
warnings.simplefilter("ignore")
layer = torch.nn.TransformerEncoderLayer(16, 2, 32, norm_first=True, batch_first=True)
model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
assert "mhc" in torch.compiler.list_backends()
assert not any(name.startswith("mhc_compile") for name in sys.modules)
compiled = torch.compile(model, backend="mhc", options={"inner": "eager", "streams": 2})
compiled(torch.randn(1, 3, 16))
print(model.mhc.spec.streams)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "2\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"options": {"stream": 4}}, "MHC204"),
        ({"options": {"inner": "triton"}}, "MHC204"),
        ({"options": {"debug": "always"}}, "MHC204"),
        ({"options": {"mode": "fastest"}}, "MHC204"),
        ({"options": {"inner": "eager", "mode": "max-autotune"}}, "MHC204"),
        ({"options": {"streams": 0}}, "MHC201"),
        ({"options": {"streams": 9}}, "MHC201"),
        ({"options": {"convention": "hyper"}}, "MHC202"),
        ({"options": {"manifold": "sphere"}}, "MHC203"),
        ({"options": {"exit": "max"}}, "MHC204"),
        ({"mode": "fastest"}, "MHC204"),
    ],
)
@pytest.mark.parametrize("converted", [False, True])
def test_an_option_that_is_not_one_is_refused(arguments: dict[str, Any], code: str, converted: bool) -> None:
    model = chain()
    if converted:
        convert(model, ids(), inner="eager")
    before = state(model)
    with pytest.raises(Exception, match=code) as caught:
        torch.compile(model, backend="mhc", **arguments)(ids())
    assert code_of(caught.value) == code
    assert state(model) == before
    if converted or "mode" in arguments:
        return
    with pytest.raises(MHCError) as refused:
        convert(model, ids(), **arguments["options"])
    assert refused.value.code == code
    assert state(model) == before


@pytest.mark.parametrize(("name", "other"), [("streams", 2), ("convention", "liger"), ("manifold", "identity")])
def test_stream_options_that_differ_from_the_converted_model_are_refused(name: str, other: Any) -> None:
    model = convert(chain(), ids(), inner="eager", streams=4)
    with pytest.raises(Exception, match="MHC304") as caught:
        torch.compile(model, backend="mhc", options={"inner": "eager", name: other})(ids())
    assert code_of(caught.value) == "MHC304"
    same = {"inner": "eager", "streams": 4, "convention": "paper", "manifold": "sinkhorn"}
    torch.compile(model, backend="mhc", options=same)(ids())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_mode_of_inductor(mode: str) -> None:
    model = convert(chain(), ids(), inner="eager")
    shake(model)
    expected = model(ids())
    assert close(torch.compile(model, backend="mhc", mode=mode)(ids()), expected)


@pytest.mark.parametrize("arguments", [{"fullgraph": True}, {"dynamic": True}])
def test_arguments_of_torch_compile(arguments: dict[str, Any]) -> None:
    model = convert(chain(), ids(), inner="eager")
    shake(model)
    expected = model(ids())
    assert torch.equal(torch.compile(model, backend="mhc", options={"inner": "eager"}, **arguments)(ids()), expected)


def test_a_model_that_is_compiled_already_can_be_converted() -> None:
    model = chain()
    compiled = torch.compile(model, backend="mhc", options={"inner": "eager"})
    assert convert(compiled, ids(), inner="eager") is compiled
    shake(model)
    assert torch.equal(compiled(ids()), model(ids()))
    assert not close(model(ids()), chain()(ids()))


def test_threads_may_share_a_converted_model() -> None:
    model = convert(chain(), ids(), inner="eager")
    shake(model)
    expected = model(ids())
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(out, expected) for out in pool.map(model, [ids()] * 8))


def test_a_mode_among_the_options() -> None:
    model = convert(chain(), ids(), mode="default")
    shake(model)
    assert close(torch.compile(model, backend="mhc", options={"mode": "default"})(ids()), model(ids()))


@pytest.mark.parametrize("debug", [True, "numeric"])
def test_debug_accepts_a_right_rewrite_also_of_trained_parameters(debug: Any) -> None:
    model = convert(llama(), inner="eager", debug=debug)
    shake(model)
    expected = model(ids()).logits
    step = torch.compile(model, backend="mhc", options={"inner": "eager", "debug": debug})
    assert torch.equal(step(ids()).logits, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_another_backend_is_refused(backend: str) -> None:
    model = convert(chain(), ids(), inner="eager")
    with pytest.raises(Exception, match="MHC301"):
        torch.compile(model, backend=backend)(ids())
    assert close(model(ids()), chain()(ids()))


def test_dynamo_switched_off_never_runs_the_residual_form() -> None:
    model = convert(chain(), ids(), inner="eager")
    shake(model)
    expected = model(ids())
    assert torch.equal(torch._dynamo.disable(model)(ids()), expected)
    with pytest.raises(MHCError, match="MHC301"), torch.compiler.set_stance("force_eager"):
        model(ids())


def test_a_function_that_calls_a_converted_model() -> None:
    model = convert(llama(), inner="eager")
    shake(model)
    expected = model(ids()).logits

    @torch.compile(backend="mhc", options={"inner": "eager"})
    def step(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        out = model(x).logits
        torch._dynamo.graph_break()
        return 2 * out

    with warned() as codes:
        assert torch.equal(step(ids()), 2 * expected)
    assert not codes


@pytest.mark.parametrize("argument", [True, False])
def test_a_step_of_training_compiled_whole(argument: bool) -> None:
    model = convert(chain(), ids(), inner="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten())
        loss.backward()
        optimizer.step()
        return loss.detach() * 1

    step: Any = train_step if argument else lambda x: train_step(model, optimizer, x)
    compiled = torch.compile(step, backend="mhc", options={"inner": "eager"})
    inputs = (model, optimizer, ids()) if argument else (ids(),)
    with warned() as codes:
        losses = [float(compiled(*inputs)) for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]
    assert not codes


def test_torch_export_names_the_export_that_works() -> None:
    model = convert(chain(), ids(), inner="eager")
    with pytest.raises(MHCError, match="MHC301") as caught:
        torch.export.export(model, (ids(),))
    assert "mhc_compile.export" in str(caught.value)
    assert "{" not in caught.value.detail


def test_breaks_outside_the_owner_of_a_converted_model() -> None:
    model = Outer(convert(chain(), ids(), inner="eager"))
    shake(model)
    expected = model(ids())
    with warned() as codes:
        assert torch.equal(torch.compile(model, backend="mhc", options={"inner": "eager"})(ids()), expected)
    assert not codes


@pytest.mark.parametrize("where", ["before", "inside", "after"])
def test_a_break_in_the_owner_of_a_converted_model_names_its_place(where: str) -> None:
    model = convert(chain(), ids(), inner="eager")
    model.breaks = where
    for call in (model, torch.compile(model, backend="mhc", options={"inner": "eager"})):
        with pytest.raises(Exception, match="MHC104") as caught:
            call(ids())
        assert code_of(caught.value) == "MHC104"
        assert "tiny_models.py" in str(caught.value)


def test_a_submodule_converted_alone() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = chain(), chain()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.left(x) + self.right(x)

    model = Two()
    convert(model.left, ids(), inner="eager")
    shake(model)
    expected = model(ids())
    assert list(owners(model)) == ["left"]
    assert torch.equal(torch.compile(model, backend="mhc", options={"inner": "eager"})(ids()), expected)


def test_compile_in_place() -> None:
    model = convert(chain(), ids(), inner="eager")
    shake(model)
    expected = model(ids())
    model.compile(backend="mhc", options={"inner": "eager"})
    assert torch.equal(model(ids()), expected)
    model.compile(backend="eager")
    with pytest.raises(MHCError, match="MHC301"):
        model(ids())


def test_the_owner_keeps_its_name_signature_and_class() -> None:
    model = convert(chain(), ids(), inner="eager")
    assert isinstance(model, Chain)
    assert type(model).__name__ == "Chain"
    assert list(mhc_compile.stream_parameters(model))[:3] == [f"mhc.layers.0#0.{n}" for n in ("phi", "alpha", "bias")]


def test_logits_of_a_call_with_keywords_only() -> None:
    model = llama()
    expected = logits(model(input_ids=ids()))
    assert close(logits(convert(model, inner="eager")(input_ids=ids())), expected)


def test_a_converted_model_runs_from_a_checkout_that_is_not_installed() -> None:
    program = (
        "import importlib.metadata as metadata; metadata.entry_points = lambda **_: metadata.EntryPoints(())\n"
        "import torch, mhc_compile; from tiny_models import chain, ids\n"
        "assert 'mhc' not in torch._dynamo.list_backends()\n"
        "assert mhc_compile.convert(chain(), ids(), inner='eager')(ids()).isfinite().all()\n"
    )
    path = f"{Path(mhc_compile.__file__).parents[1]}{os.pathsep}{Path(__file__).parent}"
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, check=False)
    assert done.returncode == 0
