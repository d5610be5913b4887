"""What servers do to a model of transformers, done to an emitted folder in plain PyTorch.

The steps are those of the Transformers backends of vLLM and SGLang. `AutoModel` makes the base model without memory for
parameters, linear layers and embeddings are replaced, what is left gets memory, weights are loaded by name, and the
tokens of all sequences come as one row with an attention of the server's own.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import VOCAB, ids, llama, shake
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mhc_compile
from mhc_compile.emitting.file import load

SEQUENCES = [ids(1, length, seed=length)[0] for length in (5, 3, 8)]


def tied_llama() -> Any:
    return llama(tie_word_embeddings=True)


def gpt_neox() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=64)).eval()


@pytest.fixture(scope="module", params=[tied_llama, pytest.param(gpt_neox, marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An emitted folder whose streams are no longer equal."""
    path = tmp_path_factory.mktemp("served")
    converted = mhc_compile.convert(request.param(), inner="eager")
    shake(converted)
    mhc_compile.save_pretrained(converted, path / "converted")
    return mhc_compile.emit_folder(path / "converted", path / "emitted")


# --- the server -------------------------------------------------------------------------------------------------------


class ServedLinear(nn.Module):
    """A linear layer whose weights wait for `load`."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full(linear.weight.shape, torch.nan, dtype=dtype))
        self.bias = None if linear.bias is None else nn.Parameter(torch.full(linear.bias.shape, torch.nan, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Attention:
    """What the server keeps for a layer. Tokens attend to those before them in their own sequence."""

    def __init__(self, sequences: list[Tensor]) -> None:
        self.lengths = [len(sequence) for sequence in sequences]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Return `[tokens, heads * width]` for `[heads, tokens, width]`."""
        parts = [t.split(self.lengths, 1) if len(self.lengths) > 1 else [t] for t in (query, key, value)]
        done = [
            F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=True)[0]
            for q, k, v in zip(*parts, strict=True)
        ]
        return torch.cat(done, 1).transpose(0, 1).flatten(1)


def served_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    attention_instances: dict[int, Attention] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    assert attention_mask is None
    assert attention_instances is not None, "the keyword arguments of the call do not reach attention"
    return attention_instances[module.layer_idx](query[0], key[0], value[0], scaling), None  # type: ignore[index]


ALL_ATTENTION_FUNCTIONS.register("served", served_attention)


@contextmanager
def parameters_without_memory(dtype: torch.dtype) -> Iterator[None]:
    """Put parameters on the meta device as they are registered, but not buffers."""
    register, default = nn.Module.register_parameter, torch.get_default_dtype()

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else nn.Parameter(parameter.to("meta")))

    torch.set_default_dtype(dtype)
    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        torch.set_default_dtype(default)


class Server:
    """A base model as a server makes it, and the head, which the server adds itself.

    What is left gets memory in the dtype of the model, as vLLM gives it, or in its own, as SGLang does.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, *, own_dtypes: bool = False) -> None:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        config._attn_implementation, config.dtype = "served", dtype
        with parameters_without_memory(dtype):
            self.model: Any = AutoModel.from_config(config, dtype=dtype, trust_remote_code=True)
        for parent in list(self.model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    setattr(parent, name, ServedLinear(child, dtype))
        self.model.set_input_embeddings(nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype))
        for module in self.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    values = torch.full(parameter.shape, torch.nan, dtype=parameter.dtype if own_dtypes else dtype)
                    setattr(module, name, nn.Parameter(values))
        self.head = self._load(load_file(folder / "model.safetensors"))

    @torch.no_grad()
    def _load(self, weights: dict[str, Tensor]) -> Tensor:
        missing = dict(self.model.named_parameters())
        prefix = f"{self.model.base_model_prefix}."
        inside = {name for name in weights if name.startswith(prefix)}
        for name in inside:
            missing.pop(name.removeprefix(prefix)).copy_(weights[name])
        assert not missing
        heads = [weights[name] for name in weights.keys() - inside]
        return (heads or [self.model.get_input_embeddings().weight])[0].to(self.model.dtype)  # tied weights are one

    @torch.no_grad()
    def logits(self, sequences: list[Tensor] = SEQUENCES) -> Tensor:
        """Return the logits of all tokens `[tokens, vocabulary]`."""
        tokens = torch.cat(sequences)[None]
        positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])[None]
        instances = {i: Attention(sequences) for i in range(self.model.config.num_hidden_layers)}
        out = self.model(
            input_ids=tokens, position_ids=positions, use_cache=False, return_dict=False, attention_instances=instances
        )
        return out[0][0] @ self.head.T


def unserved(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """The logits of the sequences, one by one, of the model that transformers loads."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
    with torch.no_grad():
        return torch.cat([model(sequence[None]).logits[0] for sequence in SEQUENCES])


def error(logits: Tensor, right: Tensor) -> float:
    return float((logits.float() - right).norm() / right.norm())


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.mark.compat
def test_a_served_model_computes_what_the_unserved_one_does(folder: Path) -> None:
    torch.testing.assert_close(Server(folder, torch.float32).logits(), unserved(folder))


@pytest.mark.parametrize("own_dtypes", [False, True], ids=["all in bfloat16", "streams in float32"])
def test_in_half_precision_it_is_as_exact(folder: Path, own_dtypes: bool) -> None:
    right, server = unserved(folder), Server(folder, torch.bfloat16, own_dtypes=own_dtypes)
    kept = torch.float32 if own_dtypes else torch.bfloat16
    assert {p.dtype for p in server.model.parameters()} == {torch.bfloat16, kept}
    assert {p.dtype for name, p in server.model.named_parameters() if name.endswith("phi")} == {kept}
    assert error(server.logits(), right) < 1.5 * error(unserved(folder, torch.bfloat16), right)


def test_what_servers_ask_the_classes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    # The name of a class that a server has itself would be served without the streams.
    assert not any(hasattr(transformers, name) for name in config["architectures"])
    assert next(iter(config["auto_map"])) == "AutoConfig"
    with torch.device("meta"):
        known = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model = AutoModel.from_config(known, trust_remote_code=True)
        residual = AutoModel.from_config(AutoConfig.for_model(known.model_type.removesuffix("_mhc")))
    assert type(model).is_backend_compatible()
    assert type(model.get_decoder()) is type(model)
    assert model.tp_plan
    assert model.tp_plan == residual.tp_plan
    assert not model.supports_pp_plan
    sites = [module for module in model.modules() if hasattr(module, "phi")]
    assert sites
    assert not any(isinstance(part, nn.Linear) for site in sites for part in site.modules())
    whole, base = (auto.from_pretrained(folder, trust_remote_code=True) for auto in (AutoModelForCausalLM, AutoModel))
    assert torch.equal(base(ids())[0], whole.base_model(ids())[0])


def test_what_is_saved_again_has_the_names_of_the_folder(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    again.save_pretrained(folder.parent / "again")
    saved = json.loads((folder.parent / "again" / "config.json").read_text())
    for name in ("architectures", "auto_map"):
        assert saved[name] == config[name]


def test_a_served_model_is_one_graph_for_any_number_of_tokens(folder: Path) -> None:
    server = Server(folder, torch.float32)
    rows = SEQUENCES[:1], SEQUENCES[2:]
    right = [server.logits(row) for row in rows]
    counter = CompileCounter()
    server.model.compile(backend=counter, fullgraph=True, dynamic=True)
    for row, logits in zip(rows, right, strict=True):
        torch.testing.assert_close(server.logits(row), logits)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("layers", "steps"), [(2, 40), pytest.param(12, 150, marks=pytest.mark.slow)])
def test_rounded_stream_parameters_move_a_trained_model_little(layers: int, steps: int, tmp_path: Path) -> None:
    module = load(mhc_compile.emit(llama(), tmp_path / "source.py"))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256, "initializer_range": 0.02}
    model = module.add_streams(llama(num_hidden_layers=layers, **sizes))
    batch = batches()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        inputs = batch()
        model(input_ids=inputs, labels=inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    rounded, half = copy.deepcopy(model), copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".mhc_" in name:
                rounded.get_parameter(name).copy_(p.bfloat16())
                half.get_parameter(name).data = p.data
        inputs = batch()
        right = model(inputs).logits
        moved, usual = error(rounded(inputs).logits, right), error(half(inputs).logits, right)
    print(f"{layers} layers: only the stream parameters rounded {moved:.1e}, all else in bfloat16 {usual:.1e}")
    assert 0 < moved < usual / 4


def batches() -> Callable[[], Tensor]:
    """Return a function that gives batches of bytes of the standard library."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-f]*.py"))
    data = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.stack([data[i : i + 64] for i in torch.randint(len(data) - 64, (8,), generator=generator)])


_RANK = """
import sys
rank, folder, store = int(sys.argv[1]), *sys.argv[2:]
import torch, torch.distributed as dist
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
ids = torch.arange(16).view(2, 8)
whole, split = (
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **more) for more in ({}, {"tp_plan": "auto"})
)
parts = [name for name, p in split.named_parameters() if hasattr(p, "full_tensor")]
assert len(parts) >= 8, parts
assert not any(".mhc_" in name for name in parts), parts
outputs = [model(input_ids=ids, labels=ids) for model in (whole, split)]
torch.testing.assert_close(outputs[1].logits, outputs[0].logits)
for out in outputs:
    out.loss.backward()
for name, p in whole.named_parameters():
    if ".mhc_" in name:
        torch.testing.assert_close(split.get_parameter(name).grad, p.grad, msg=lambda m: f"{name}: {m}")
print("same")
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo")
def test_two_processes_share_the_linear_layers(folder: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(rank), str(folder), str(tmp_path / "store")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for rank in ranks:
            out, errors = rank.communicate(timeout=300)
            assert out.endswith("same\n"), errors[-3000:]
    finally:
        for rank in ranks:
            rank.kill()
