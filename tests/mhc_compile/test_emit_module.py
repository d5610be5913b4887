"""An emitted module is an ordinary one: whatever is done to modules of PyTorch and transformers works with it."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import ids, llama, shake, static_cache_agrees
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad

import mhc_compile

NAME = "emitted_llama"
PAGE = Path(__file__).parents[2] / "docs" / "emit.md"


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The emitted source of Llama, imported as a user would."""
    folder = tmp_path_factory.mktemp("emitted")
    mhc_compile.emit(llama(), folder / f"{NAME}.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield importlib.import_module(NAME)
    del sys.modules[NAME]


@pytest.mark.skipif(not transformers.__version__.startswith("5.24."), reason="the page shows the Llama of 5.24")
def test_the_page_shows_this_source(module: Any, request: pytest.FixtureRequest) -> None:
    text = PAGE.read_text()
    begin, end = "<!-- source: begin -->\n", "<!-- source: end -->"
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    if request.config.getoption("--accept"):
        PAGE.write_text(f"{before}```python\n{Path(module.__file__).read_text()}```\n{after}")
    assert f"```python\n{Path(module.__file__).read_text()}```\n" in PAGE.read_text(), "run pytest --accept"


def test_the_source_of_llama_is_short(module: Any) -> None:
    assert len(Path(module.__file__).read_text().splitlines()) < 250


def moved(module: Any, **config: Any) -> nn.Module:
    """A model with streams that are no longer equal."""
    model: nn.Module = module.add_streams(llama(**config)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".mhc_" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture
def model(module: Any) -> nn.Module:
    return moved(module)


def loss(model: nn.Module) -> Tensor:
    result: Tensor = model(input_ids=ids(), labels=ids()).loss
    return result


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.compat
def test_the_start_is_the_residual_model_and_a_second_call_changes_nothing(module: Any, model: nn.Module) -> None:
    residual = llama()
    torch.testing.assert_close(module.add_streams(copy.deepcopy(residual))(ids()).logits, residual(ids()).logits)
    before = model(ids()).logits
    assert torch.equal(module.add_streams(model)(ids()).logits, before)


@pytest.mark.compat
def test_weights_of_a_converted_model_load(module: Any) -> None:
    converted = mhc_compile.convert(llama(), inner="eager")
    shake(converted)
    model = module.add_streams(llama())
    model.load_state_dict(converted.state_dict())
    assert torch.equal(model(ids()).logits, converted(ids()).logits)


def test_the_base_model_is_made_with_its_streams(module: Any, model: Any) -> None:
    base = module.LlamaModel(model.config).eval()
    base.load_state_dict(model.model.state_dict())
    assert torch.equal(base(ids())[0], model.model(ids())[0])
    converted = mhc_compile.convert(llama(), inner="eager")
    shake(converted)
    base.load_state_dict(converted.model.state_dict())
    assert torch.equal(base(ids())[0], converted.model(ids())[0])


def test_a_converted_model_has_the_same_source(module: Any, tmp_path: Path) -> None:
    converted = mhc_compile.convert(llama())
    shake(converted)
    again = mhc_compile.emit(converted, tmp_path / "again.py")
    assert again.read_text() == Path(module.__file__).read_text()
    assert mhc_compile.stream_parameters(converted)


def test_hidden_states_that_a_caller_asks_for_are_reduced(module: Any) -> None:
    residual = llama()
    states = module.add_streams(copy.deepcopy(residual))(ids(), output_hidden_states=True).hidden_states
    for mine, theirs in zip(states, residual(ids(), output_hidden_states=True).hidden_states, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.compat
def test_generation_with_caches(model: nn.Module) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache, without = (model.generate(ids(), use_cache=use, **options) for use in (True, False))  # type: ignore[operator]
    assert torch.equal(with_cache, without)
    assert static_cache_agrees(model)


def test_layers_run_by_hand(module: Any, model: Any) -> None:
    inner = model.model
    x = inner.embed_tokens(ids())
    positions = torch.arange(x.shape[1])[None]
    rotary = inner.rotary_emb(x, position_ids=positions)
    streams = module.expand(x, module.STREAMS)
    for layer in inner.layers:
        streams = layer(streams, position_embeddings=rotary, position_ids=positions)
    torch.testing.assert_close(model.lm_head(inner.norm(module.reduce(streams))), model(ids()).logits)


def test_checkpointing(model: Any) -> None:
    model.train()
    usual = gradients(model)
    model.gradient_checkpointing_enable()
    assert_same(gradients(model), usual)


def test_functional_transforms(model: nn.Module) -> None:
    def of(values: dict[str, Tensor]) -> Tensor:
        result: Tensor = functional_call(model, values, (), {"input_ids": ids(), "labels": ids()}).loss
        return result

    values = {name: p.detach() for name, p in model.named_parameters()}
    assert_same(grad(of)(values), gradients(model))


def test_gradients_of_gradients(module: Any) -> None:
    model = moved(module, attn_implementation="eager")
    first = torch.autograd.grad(loss(model), list(model.parameters()), create_graph=True)
    sum(g.square().sum() for g in first).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if ".mhc_" in n)


def test_a_model_without_memory_gets_its_start(module: Any) -> None:
    config = llama().config
    with torch.device("meta"):
        model = module.LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    for part in model.modules():
        if isinstance(part, module.HyperConnection):
            part.reset_parameters()
    start = module.add_streams(llama()).state_dict()
    for name, p in model.state_dict().items():
        assert ".mhc_" not in name or torch.equal(p, start[name])


def test_transformers_starts_the_sites_that_a_checkpoint_lacks(module: Any, tmp_path: Path) -> None:
    residual = llama()
    residual.save_pretrained(tmp_path)
    model = module.LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(model(ids()).logits, residual(ids()).logits)


def test_hooks_of_layers_run(model: Any) -> None:
    seen: list[torch.Size] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *call: seen.append(call[-1].shape))
    model(ids())
    assert seen == [torch.Size([2, 8, 4, model.config.hidden_size])] * len(model.model.layers)


def test_every_layer_is_compiled_alone(model: Any) -> None:
    before = model(ids()).logits
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    torch.testing.assert_close(model(ids()).logits, before)


def test_graphs_break_between_layers(model: Any) -> None:
    before = model(ids()).logits
    model.model.layers[0].register_forward_hook(lambda *_: torch._dynamo.graph_break())
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(ids()).logits, before)


def test_every_layer_is_sharded_alone(model: Any) -> None:
    usual = {name: g.clone() for name, g in gradients(model).items()}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        sharded = gradients(model)
        assert_same({name: g.full_tensor() for name, g in sharded.items()}, usual)  # type: ignore[attr-defined]
    finally:
        torch.distributed.destroy_process_group()


def test_a_narrower_dtype_computes_coefficients_in_float32(model: Any) -> None:
    before = model(ids()).logits
    after = model.to(torch.bfloat16)(ids()).logits
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert float((after.float() - before).norm() / before.norm()) < 0.05


def test_our_backend_fuses_its_streams(model: nn.Module) -> None:
    report = mhc_compile.inspect(model, example_kwargs={"input_ids": ids(), "use_cache": False})
    assert any("4 hand-written sites raised" in note for step in report.passes for note in step.notes)
    kinds = [kernel.name.split("_")[0] for kernel in report.kernels]
    assert kinds == ["read", "boundary", "leave"]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="mhc")
    torch.testing.assert_close(compiled(ids()).logits, model(ids()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_inductor_compiles_it(model: nn.Module) -> None:
    compiled = torch.compile(model, backend="inductor")
    torch.testing.assert_close(compiled(ids()).logits, model(ids()).logits, rtol=1e-4, atol=1e-5)


_ELSEWHERE = """
import sys
sys.modules["mhc_compile"] = None
sys.path.insert(0, sys.argv[1])
import torch, emitted_llama
torch.manual_seed(0)
from transformers import LlamaConfig
model = emitted_llama.LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4))
ids = torch.arange(16).view(2, 8)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(5):
    loss = model(input_ids=ids, labels=ids).loss
    losses.append(float(loss))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
assert losses[-1] < losses[0], losses
print(model.eval().generate(ids, max_new_tokens=3, pad_token_id=0, eos_token_id=None).shape)
"""


def test_another_process_needs_torch_and_transformers_alone(module: Any) -> None:
    words = [sys.executable, "-c", _ELSEWHERE, str(Path(module.__file__).parent)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[2, 11]" in done.stdout
