"""Exported programs: what they compute, where they run, what they refuse, and their MLIR."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import HIDDEN, Chain, chain, close, code_of, gpt2, ids, llama, logits, shake, t5, warned
from torch import Tensor, nn
from torch.export import Dim

import mhc_compile
from mhc_compile.exporting.execute import Executable

# One iteration: what is unrolled is the same, only shorter.
CONVERTED = {"iterations": 1, "inner": "eager"}


def call_of(model: nn.Module, batch: int = 2, length: int = 8) -> dict[str, Any]:
    tokens = ids(batch, length)
    if isinstance(model, Chain):
        return {"x": tokens}
    more = {"decoder_input_ids": tokens[:, :5]} if model.config.is_encoder_decoder else {}
    return {"input_ids": tokens, "use_cache": False, **more}


def converted(model: nn.Module, *args: Any, **options: Any) -> nn.Module:
    mhc_compile.convert(model, *args, example_kwargs=None if args else call_of(model), **(CONVERTED | options))
    shake(model)
    return model


def exported(model: nn.Module, **more: Any) -> torch.export.ExportedProgram:
    return mhc_compile.export(model, example_kwargs=call_of(model), **more)


ELSEWHERE = """
import sys, warnings
sys.modules["mhc_compile"] = None  # an import of it would fail
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
for path, output in zip(sys.argv[1::2], sys.argv[2::2]):
    if output != "Tensor":
        import transformers.modeling_outputs
    kwargs, wanted = torch.load(path.replace(".pt2", ".pt"))
    with torch.no_grad():
        got = torch.export.load(path).module()(**kwargs)
    assert type(got).__name__ == output, type(got)
    got = got if output == "Tensor" else got.logits
    error = (got - wanted).abs().max() / wanted.abs().max()
    assert error <= 1e-6, error  # weights lie elsewhere in memory, and products are summed in another order
print("equal", [m for m in sys.modules if m.split(".")[0] == "mhc_compile" and sys.modules[m]])
"""


@pytest.mark.parametrize(
    "makes",
    [pytest.param({"chain": (chain, "Tensor"), "llama": (lambda: llama(num_hidden_layers=1),
                   "CausalLMOutputWithPast")}, marks=pytest.mark.compat),
     pytest.param({"gpt2": (lambda: gpt2(n_layer=1), "CausalLMOutputWithCrossAttentions"),
                   "t5": (lambda: t5(num_layers=1), "Seq2SeqLMOutput")}, marks=pytest.mark.slow)],
    ids=["plain and llama", "gpt2 and t5"],
)  # fmt: skip
def test_runs_where_this_package_is_not(makes: dict[str, tuple[Callable[[], nn.Module], str]], tmp_path: Path) -> None:
    arguments = []
    for name, (make, output) in makes.items():
        model = converted(make())
        path = tmp_path / f"{name}.pt2"
        torch.export.save(exported(model), path)
        kwargs = call_of(model)
        with torch.no_grad():
            torch.save((kwargs, logits(model(**kwargs))), path.with_suffix(".pt"))
        arguments += [str(path), output]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal []"


@pytest.mark.parametrize("make", [chain, llama, gpt2, lambda: t5(num_layers=1)], ids=["chain", "llama", "gpt2", "t5"])
def test_only_aten_and_the_models_names(make: Callable[[], nn.Module]) -> None:
    model = converted(make())
    program = exported(model)
    spaces = {n.target.namespace for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert spaces == {"aten"}
    held = model.state_dict()
    assert set(program.state_dict) == set(held)
    assert all(program.state_dict[name].data_ptr() == held[name].data_ptr() for name in held)


@pytest.mark.parametrize(("make", "one_layer"), [(llama, {"num_hidden_layers": 1}), (gpt2, {"n_layer": 1})])
def test_dynamic_batch_and_length(make: Callable[..., nn.Module], one_layer: dict[str, int]) -> None:
    model = converted(make(**one_layer))
    program = exported(model, dynamic_shapes={"input_ids": {0: Dim("batch"), 1: Dim("length", max=64)}})
    run = program.module()
    for batch, length in ((2, 8), (3, 17), (5, 2)):
        call = call_of(model, batch, length)
        assert torch.equal(run(**call).logits, model(**call).logits)


def test_shapes_that_do_not_hold_are_refused() -> None:
    model = converted(chain())
    tokens = ids()
    for shapes, part in (({"x": {1: Dim("n", max=4)}}, "n"), ({"tokens": {0: Dim("b")}}, "'tokens'")):
        with pytest.raises(mhc_compile.MHCError, match=part) as caught:
            mhc_compile.export(model, tokens, dynamic_shapes=shapes)
        assert code_of(caught.value) == "MHC503"

    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = chain()

        def forward(self, x: Tensor) -> Tensor:
            return self.chain(x) if x.shape[1] < 10 else self.chain(x) * 2

    short = converted(Short(), tokens)
    with pytest.raises(mhc_compile.MHCError, match="Dim\\('n', max=9\\)"):
        mhc_compile.export(short, tokens, dynamic_shapes={"x": {1: Dim("n")}})
    # A hint lets torch find the range; the program checks it.
    run = mhc_compile.export(short, tokens, dynamic_shapes={"x": {1: Dim.AUTO}}).module()
    assert torch.equal(run(ids(2, 9)), short(ids(2, 9)))
    with pytest.raises(AssertionError):
        run(ids(2, 12))


def test_positional_call_and_nested_containers() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = chain()

        def forward(self, pair: dict[str, Tensor], *rest: Tensor, scale: float = 1.0) -> tuple[Tensor, list[Tensor]]:
            y = self.chain(pair["x"]) * scale + rest[0]
            return y, [y.sum(), pair["bias"]]

    pair = {"x": ids(), "bias": torch.randn(3)}
    shift = torch.randn(2, 8, 1)
    model = Nested()
    mhc_compile.convert(model, pair, shift, **CONVERTED)
    program = mhc_compile.export(model, pair, shift, example_kwargs={"scale": 2.0})
    y, (total, bias) = program.module()(pair, shift, scale=2.0)
    wanted = model(pair, shift, scale=2.0)
    assert torch.equal(y, wanted[0])
    assert torch.equal(total, wanted[1][0])
    assert torch.equal(bias, pair["bias"])


@pytest.mark.parametrize(
    "options",
    [{"convention": "deepseek_v4"}, {"manifold": "permutations", "streams": 3}, {"manifold": "kronecker"},
     {"manifold": "identity", "exit": "sum"}, {"streams": 1}],
    ids=str,
)  # fmt: skip
def test_every_form_of_stream(options: dict[str, Any]) -> None:
    model = converted(chain(), **options, start="paper")
    call = call_of(model)
    assert torch.equal(exported(model).module()(**call), model(**call))
    # With the default start the streams weigh more, and the program's order of sums shows in the last bit.
    model = converted(chain().double(), **options)
    torch.testing.assert_close(exported(model).module()(**call), model(**call), rtol=1e-12, atol=1e-12)


def test_the_program_trains_as_the_model_does() -> None:
    model = converted(llama()).train()
    program = exported(model)
    run, call = program.module(), call_of(model)
    run(**call).logits.square().sum().backward()
    got = {name: p.grad.clone() for name, p in run.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(**call).logits.square().sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    # Tied weights go by one of their names in the program, by the other in the model.
    assert len(got) == len(wanted)
    assert all(close(got[name], wanted[name], 1e-5) for name in set(got) & set(wanted))
    assert {n for n in wanted if ".mhc." in n} <= set(got)


def test_training_mode_with_dropout_warns() -> None:
    for model, expected in ((chain(dropout=0.5), "MHC502"), (gpt2(attn_pdrop=0.5, resid_pdrop=0.0), "MHC502")):
        converted(model)
        with warned() as codes:
            exported(model.eval())
        assert codes == []
        with warned() as codes:
            exported(model.train())
        assert codes == [expected]


def test_autocast_of_the_model_is_kept_and_ours_leaves_no_trace() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = chain()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.chain(x)

    tokens = ids()
    model = converted(Cast(), tokens)
    got = mhc_compile.export(model, tokens).module()(tokens)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, model(tokens))
    plain = exported(converted(chain()))
    assert not any("autocast" in str(n.target) for n in plain.graph.nodes)


def test_bfloat16_keeps_float32_stream_parameters() -> None:
    model = converted(llama(num_hidden_layers=1)).to(torch.bfloat16)
    program, call = exported(model), call_of(model)
    assert torch.equal(program.module()(**call).logits, model(**call).logits)
    kinds = {".mhc." in name: t.dtype for name, t in program.state_dict.items()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


def test_checkpointing_is_inlined() -> None:
    model = converted(llama()).train()
    model.gradient_checkpointing_enable()
    program, call = exported(model), call_of(model)
    assert torch.equal(program.module()(**call).logits, model(**call).logits)


def test_compiled_model_is_unwrapped_and_example_made() -> None:
    model = converted(llama())
    program = mhc_compile.export(torch.compile(model, backend="mhc"))
    call = call_of(model)
    assert torch.equal(program.module()(**call).logits, model(**call).logits)


def test_layers_keep_their_modules_and_lines() -> None:
    model = converted(gpt2())
    program = exported(model)
    node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.addcmul.default)
    assert list(node.meta["nn_module_stack"].values())[-1][0] == "transformer.h.0"
    assert "modeling_gpt2.py" in node.meta["stack_trace"]
    call = call_of(model)
    assert torch.equal(torch.export.unflatten(program)(**call).logits, model(**call).logits)


def test_unconverted_models_and_calls_beside_the_streams_are_refused() -> None:
    with pytest.raises(mhc_compile.MHCError, match="holds no stream parameters") as caught:
        mhc_compile.export(chain(), ids())
    assert code_of(caught.value) == "MHC501"

    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = chain()
            self.other = nn.Linear(8, 8)

        def forward(self, x: Tensor, beside: bool = False) -> Tensor:
            return self.other(x.float()) if beside else self.chain(x)

    model = converted(Either(), ids())
    with pytest.raises(mhc_compile.MHCError, match="reaches none") as caught:
        mhc_compile.export(model, ids(), example_kwargs={"beside": True})
    assert code_of(caught.value) == "MHC501"


def test_breaks_and_classes_that_no_program_holds_are_refused() -> None:
    model = converted(chain())
    model.breaks = "after"
    with pytest.raises(mhc_compile.MHCError) as caught:
        exported(model)
    assert code_of(caught.value) == "MHC104"
    with pytest.raises(mhc_compile.MHCError, match="use_cache") as caught:
        mhc_compile.export(converted(llama()), ids())  # returns a cache
    assert code_of(caught.value) == "MHC504"


def test_random_numbers_of_python_are_refused() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = chain()

        def forward(self, x: Tensor) -> Tensor:
            return self.chain(x) * random.uniform(0.5, 1.0)

    with pytest.raises(mhc_compile.MHCError, match="RandomValueSource") as caught:
        mhc_compile.export(converted(Skips(), ids()), ids())
    assert code_of(caught.value) == "MHC504"


def test_a_failed_export_leaves_torch_as_it_was() -> None:
    before = torch.export._trace._export_to_torch_ir
    with pytest.raises(mhc_compile.MHCError):
        mhc_compile.export(converted(llama()), ids())
    assert torch.export._trace._export_to_torch_ir is before


class Attention(nn.Module):
    """One layer, with a buffer that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.register_buffer("slope", torch.linspace(0, 1, HIDDEN), persistent=False)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = x + torch.softmax(self.q(x) @ x.transpose(-1, -2) * scale, -1) @ self.v(x * self.slope)
        return x + torch.tanh(self.v(x))


def attention() -> tuple[nn.Module, Tensor]:
    x = torch.randn(2, 6, HIDDEN)
    model = Attention()
    mhc_compile.convert(model, x, **CONVERTED)
    shake(model)
    return model, x


@pytest.mark.compat
def test_mlir_torch_dialect() -> None:
    pytest.importorskip("torch_mlir")
    model, x = attention()
    module = mhc_compile.to_mlir(mhc_compile.export(model, x, example_kwargs={"scale": 0.5}))
    text = module.operation.get_asm(large_resource_limit=8)
    assert '@main(%arg0: !torch.vtensor<[2,6,32],f32> {mhc.name = "x"}) -> !torch.vtensor<[2,6,32],f32>' in text
    assert "torch.aten.sigmoid" in text
    assert "torch.operator" not in text


def test_mlir_linalg_computes_the_same() -> None:
    pytest.importorskip("torch_mlir")
    model, x = attention()
    program = mhc_compile.export(model, x, dynamic_shapes={"x": {1: Dim("tokens")}})
    module = mhc_compile.to_mlir(program, "linalg")
    assert "linalg.generic" in str(module)
    assert "torch." not in module.operation.get_asm(large_resource_limit=8).replace("torch.float32", "")
    run = Executable(module)
    for tokens in (x, torch.randn(2, 9, HIDDEN)):
        (got,) = run(tokens)
        with torch.no_grad():
            assert close(got, program.module()(tokens), 1e-5)


@pytest.mark.parametrize(
    ("make", "one_layer", "constants"),
    [(llama, {"num_hidden_layers": 1}, {"model.rotary_emb.inv_freq"}), (gpt2, {"n_layer": 1}, set())],
)
def test_mlir_of_a_hugging_face_model_computes_the_same(
    make: Callable[..., nn.Module], one_layer: dict[str, int], constants: set[str]
) -> None:
    pytest.importorskip("torch_mlir")
    model = converted(make(**one_layer), streams=2)
    program = exported(model)
    assert set(program.constants) == constants
    (got,) = Executable(mhc_compile.to_mlir(program, "linalg"))(ids())
    with torch.no_grad():
        assert close(got, model(**call_of(model)).logits, 1e-5)
    assert set(program.constants) == constants  # the program itself is left alone


def test_results_of_every_kind_come_back() -> None:
    pytest.importorskip("torch_mlir")

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
            return x[i], x.long(), x.sum(), x.t(), self.weight, x > 0, torch.cumsum(x, 1)

    model, x, i = Many(), torch.randn(4, 3), torch.tensor([2, 0])
    program = torch.export.export(model, (x, i))
    for got, wanted in zip(Executable(mhc_compile.to_mlir(program, "linalg"))(x, i), model(x, i), strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted.detach())


def test_mlir_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    program = torch.export.export(nn.Linear(4, 4), (torch.randn(2, 4),))
    with pytest.raises(mhc_compile.MHCError, match="known: torch, linalg") as caught:
        mhc_compile.to_mlir(program, "tosa")  # type: ignore[arg-type]
    assert code_of(caught.value) == "MHC204"
    monkeypatch.setitem(sys.modules, "torch_mlir.fx", None)
    with pytest.raises(mhc_compile.MHCError, match=r"pip install 'mhc-compile\[mlir\]'") as caught:
        mhc_compile.to_mlir(program)
    assert code_of(caught.value) == "MHC505"


def test_mlir_names_an_operation_without_a_form() -> None:
    pytest.importorskip("torch_mlir")

    class Rare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(x).real

    program = torch.export.export(Rare(), (torch.randn(3, 3),))
    with pytest.raises(mhc_compile.MHCError, match="eig") as caught:
        mhc_compile.to_mlir(program, "linalg")
    assert code_of(caught.value) == "MHC506"
