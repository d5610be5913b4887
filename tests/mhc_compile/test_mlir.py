"""Models in MLIR, every fused chain a function: what is called, what it computes, and that others can read it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
import torch
from memories import with_memory
from tiny_models import chain, close, gpt2, ids, llama, logits, shake, t5
from torch import Tensor, nn
from torch.export import Dim

import mhc_compile
from mhc_compile.export.execute import Executable

pytest.importorskip("torch_mlir")
TAKES = "X y post mix phi alpha bias norm_weight"


def call_of(model: nn.Module, batch: int = 2, length: int = 8) -> dict[str, Any]:
    if not hasattr(model, "config"):
        return {"x": ids(batch, length)}
    more = {"decoder_input_ids": ids(batch, 5)} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids(batch, length), "use_cache": False, **more}


def converted(model: nn.Module, **options: Any) -> nn.Module:
    mhc_compile.convert(model, example_kwargs=call_of(model), inner="eager", **({"iterations": 2} | options))
    shake(model)
    return model


def text_of(module: Any) -> str:
    return str(module.operation.get_asm(large_resource_limit=8))


def functions(text: str) -> dict[str, str]:
    """The text of every function by its name."""
    parts = re.split(r"^  func\.func (?:private )?@(\w+)", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def calls(text: str) -> Counter[str]:
    return Counter(re.findall(r"call @(\w+)", text))


def named(signature: str) -> str:
    return " ".join(re.findall(r'mhc\.name = "([^"]*)"', signature))


def assert_equal_to_eager(module: Any, model: nn.Module, call: dict[str, Any]) -> None:
    got = Executable(module)(*(v for v in call.values() if isinstance(v, Tensor)))[0]
    with torch.no_grad():
        assert close(got, logits(model(**call)), 1e-5)


def test_chains_are_functions_that_calls_share() -> None:
    model = converted(llama())
    text = text_of(mhc_compile.to_mlir(mhc_compile.export(model)))
    found = functions(text)
    boundary = "mhc_boundary_rms_n4_c32_float32"
    read, leave, sinkhorn = "mhc_read_rms_n4_c32_float32", "mhc_leave_n4_c32_float32", "mhc_sinkhorn_n4_x2"
    assert set(found) == {sinkhorn, read, boundary, leave, "main"}
    # Two layers of two sites: the first is read, three boundaries follow.
    assert calls(found["main"]) == {read: 1, boundary: 3, leave: 1}
    assert calls(found[read]) == calls(found[boundary]) == {sinkhorn: 1}
    takes, gives = found[boundary].splitlines()[0].split("->")
    assert named(takes) == TAKES
    assert sorted(named(gives).split()) == ["h", "next_X", "next_mix", "next_post"]
    assert named(found["main"].splitlines()[0]) == "input_ids"
    # Two iterations divide four times, and nothing of them is left in the chains.
    assert found[sinkhorn].count("torch.aten.div") == 4
    assert "torch.aten.exp" not in found[boundary]
    # The branch's norm is in the chain and no longer in main: only the last one, behind the exit.
    assert found["main"].count("torch.aten.rsqrt") == 1


def test_linalg_is_read_again_and_computes_the_same() -> None:
    from torch_mlir import ir
    from torch_mlir.dialects import torch as torch_dialect

    model = converted(llama())
    module = mhc_compile.to_mlir(mhc_compile.export(model), "linalg")
    with ir.Context() as context:  # another one: the text is all that it gets
        torch_dialect.register_dialect(context)
        read = ir.Module.parse(str(module))
        assert read.operation.verify()
        assert functions(text_of(read)).keys() == functions(text_of(module)).keys()
        assert_equal_to_eager(read, model, call_of(model))


@pytest.mark.parametrize("dialect", ["torch", "linalg"])
def test_saved_programs_keep_their_functions(dialect: Any) -> None:
    program = mhc_compile.export(converted(chain()), example_kwargs=call_of(chain()))
    file = BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    wanted = functions(text_of(mhc_compile.to_mlir(program, dialect)))
    assert "mhc_boundary_layer_n4_c32_float32" in wanted
    assert functions(text_of(mhc_compile.to_mlir(torch.export.load(file), dialect))) == wanted


def test_notes_change_nothing_of_a_program() -> None:
    model = converted(chain())
    program = mhc_compile.export(model, example_kwargs=call_of(model))
    notes = [n.meta["custom"]["mhc_chain"] for n in program.graph.nodes if "mhc_chain" in (n.meta.get("custom") or {})]
    assert {n["name"].split("_n4")[0] for n in notes} == {"mhc_read_layer", "mhc_boundary_layer", "mhc_leave"}
    assert torch.equal(program.module()(**call_of(model)), model(**call_of(model)))


def test_dynamic_sizes() -> None:
    model = converted(chain())
    call = call_of(model)
    shapes = {"x": {0: Dim("batch"), 1: Dim("length", max=64)}}
    program = mhc_compile.export(model, example_kwargs=call, dynamic_shapes=shapes)
    module = mhc_compile.to_mlir(program, "linalg")
    boundary = functions(text_of(module))["mhc_boundary_layer_n4_c32_float32"]
    assert "tensor<?x?x4x32xf32>" in boundary.splitlines()[0]
    run = Executable(module)
    for batch, length in ((2, 8), (3, 11)):
        (got,) = run(ids(batch, length))
        with torch.no_grad():
            assert close(got, model(ids(batch, length)), 1e-5)
