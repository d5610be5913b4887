"""Models in MLIR, every fused chain a function: what is called, what it computes, and that others can read it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from memories import with_memory
from tiny_models import chain, close, gpt2, ids, llama, logits, shake, t5
from torch import Tensor, nn
from torch.export import Dim

import mhc_compile
from mhc_compile.cli import main
from mhc_compile.conversion.example_inputs import example_inputs
from mhc_compile.exporting.execute import Executable

pytest.importorskip("torch_mlir")
TAKES = "X y post mix phi alpha bias norm_weight"


def call_of(model: nn.Module, batch: int = 2, length: int = 8) -> dict[str, Any]:
    if not hasattr(model, "config"):
        return {"x": ids(batch, length)}
    more = {"decoder_input_ids": ids(batch, 5)} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids(batch, length), "use_cache": False, **more}


def converted(model: nn.Module, **options: Any) -> nn.Module:
    mhc_compile.convert(
        model,
        example_kwargs=call_of(model),
        inner="eager",
        **{k: v for k, v in ({"iterations": 2} | options).items() if v is not None},
    )
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


def test_saved_programs_keep_their_functions() -> None:
    program = mhc_compile.export(converted(chain()), example_kwargs=call_of(chain()))
    file = BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    wanted = functions(text_of(mhc_compile.to_mlir(program)))
    assert "mhc_boundary_layer_n4_c32_float32" in wanted
    assert functions(text_of(mhc_compile.to_mlir(torch.export.load(file)))) == wanted


def test_notes_change_nothing_of_a_program() -> None:
    model = converted(chain())
    program = mhc_compile.export(model, example_kwargs=call_of(model))
    notes = [n.meta["custom"]["mhc_chain"] for n in program.graph.nodes if "mhc_chain" in (n.meta.get("custom") or {})]
    assert {n["name"].split("_n4")[0] for n in notes} == {"mhc_read_layer", "mhc_boundary_layer", "mhc_leave"}
    assert torch.equal(program.module()(**call_of(model)), model(**call_of(model)))


def test_holes_in_notes_are_filled() -> None:
    model = converted(chain())
    program = mhc_compile.export(model, example_kwargs=call_of(model))
    wanted = functions(text_of(mhc_compile.to_mlir(program)))
    inner = [n for n in program.graph.nodes if n.target in (torch.ops.aten.rsqrt.default, torch.ops.aten.exp.default)]
    assert len({str(n.target) for n in inner}) == 2
    for node in inner:
        del node.meta["custom"]
    assert functions(text_of(mhc_compile.to_mlir(program))) == wanted


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


def test_weights_without_values_are_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from torch_mlir import ir

    model = llama(num_hidden_layers=1, architectures=["LlamaForCausalLM"])
    model.config.save_pretrained(tmp_path)
    file = tmp_path / "llama.mlir"
    assert main(["inspect", str(tmp_path), "--streams", "2", "--mlir", "linalg", "--out", str(file)]) == 0
    assert capsys.readouterr().out == f"written to {file}\n"
    assert [p.name for p in tmp_path.iterdir() if "unfinished" in p.name] == []
    text = file.read_text()
    assert "mhc_boundary_rms_n2_c32_float32" in functions(text)
    names = named(functions(text)["main"].splitlines()[0]).split()
    # Another program gives it the weights of a model of its own.
    mhc_compile.convert(model, streams=2, inner="eager")
    shake(model)
    held = model.state_dict()
    assert set(names) == {*held, "input_ids"}
    with ir.Context():
        execute = Executable(ir.Module.parse(text))
    (got,) = execute(*(held.get(name, ids()) for name in names[:-1]), example_inputs(model)["input_ids"])
    with torch.no_grad():
        assert close(got, model(**example_inputs(model)).logits, 1e-5)


def test_a_model_without_values_is_exported_and_lowered() -> None:
    with torch.device("meta"):
        model = chain()
    mhc_compile.convert(model, torch.zeros(2, 8, dtype=torch.int64, device="meta"), iterations=1)
    program = mhc_compile.export(model, torch.zeros(2, 8, dtype=torch.int64, device="meta"))
    found = functions(text_of(mhc_compile.to_mlir(program, "linalg")))
    assert set(named(found["main"].splitlines()[0]).split()) == {*model.state_dict(), "x"}


def test_options_of_the_report_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    wrong = {"--out file": "--out is for", "--mlir torch --source": "--source", "--mlir torch --html f": "--html"}
    for arguments, said in wrong.items():
        assert main(["inspect", str(config), *arguments.split()]) == 2
        err = capsys.readouterr().err
        assert err.startswith("MHC520")
        assert said in err


WIDE: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "gpt2": (lambda: converted(gpt2()), {"mhc_read_layer", "mhc_boundary_layer", "mhc_leave", "mhc_sinkhorn"}),
    "t5": (lambda: converted(t5(num_layers=1)), {"mhc_read", "mhc_boundary", "mhc_leave", "mhc_sinkhorn"}),
    "a memory of the paper": (lambda: with_memory(llama(), "paper"), {"engram_recall", "mhc_distribute"}),
    "a memory of v4.1": (lambda: with_memory(llama(), "v41"), {"engram_remember", "mhc_distribute"}),
    "hyper-connections": (
        lambda: converted(chain(), form="hc", iterations=None), {"mhc_aggregate", "mhc_distribute", "mhc_leave"}
    ),
    "no Sinkhorn": (lambda: converted(chain(), manifold="kronecker"), {"mhc_read_layer", "mhc_leave"}),
    "a learned head": (lambda: converted(chain(), convention="deepseek_v4"), {"mhc_leave", "mhc_sinkhorn"}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDE)
def test_wider(name: str) -> None:
    make, wanted = WIDE[name]
    model = make()
    call = call_of(model)
    module = mhc_compile.to_mlir(mhc_compile.export(model, example_kwargs=call), "linalg")
    text = text_of(module)
    assert wanted <= {re.sub(r"_n\d.*", "", f) for f in functions(text)}
    assert ("sinkhorn" in text) == ("mhc_sinkhorn" in wanted or "memory" in name)
    # Nothing that only torch-mlir can read.
    assert not re.search(r"\b(torch|torch_c|tm_tensor)\.[a-z]", text)
    assert_equal_to_eager(module, model, call)


@pytest.mark.slow
def test_deeper_models_have_no_more_functions() -> None:
    few, many = (
        functions(text_of(mhc_compile.to_mlir(mhc_compile.export(converted(llama(num_hidden_layers=depth))))))
        for depth in (2, 6)
    )
    assert few.keys() == many.keys()
    assert all(few[name] == many[name] for name in few if name != "main")
