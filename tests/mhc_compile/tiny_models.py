"""Models small enough to convert and compile in a second or two, and what tests ask of them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Cache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mhc_compile import MHCError, MHCWarning, from_pretrained, parameter_groups, stream_parameters

HIDDEN, VOCAB = 32, 64


def ids(batch: int = 2, length: int = 8, *, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def llama(**config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    fields = {
        "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0,
        "initializer_range": 0.1,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(fields | config))).eval()


def gpt2(**config: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    fields = {
        "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64, "bos_token_id": 1,
        "eos_token_id": 1, "initializer_range": 0.1, "loss_type": "ForCausalLM",
    }  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(**(fields | config))).eval()


def t5(**config: Any) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    fields = {
        "d_model": HIDDEN, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": VOCAB,
        "decoder_start_token_id": 0,
    }  # fmt: skip
    return T5ForConditionalGeneration(T5Config(**(fields | config))).eval()


def cache_argument(model: nn.Module) -> str:
    """What the installed transformers calls the argument, and the output, that hold the cache of `model`."""
    forward = type(getattr(model, "_orig_mod", model)).forward
    (name,) = (
        name
        for name, hint in get_type_hints(inspect.unwrap(forward)).items()
        if name != "return" and any(inspect.isclass(kind) and issubclass(kind, Cache) for kind in get_args(hint))
    )
    return name


def cached(model: nn.Module, ids: Tensor, cache: Any, **more: Any) -> Any:
    """The output of `model` for `ids` that go on from `cache`."""
    return model(ids, **{cache_argument(model): cache}, **more)


def cache_in(out: Any) -> Any:
    """The cache that transformers' output holds."""
    (cache,) = (value for value in out.values() if isinstance(value, Cache))
    return cache


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Chain(nn.Module):
    """A model whose own forward holds the stream; `breaks` says where Dynamo cannot follow it."""

    def __init__(self, breaks: str = "", dropout: float = 0.0, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Block(dropout) for _ in range(depth))
        self.head = nn.Linear(HIDDEN, VOCAB)
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        if self.breaks == "before":
            torch._dynamo.graph_break()
        h = self.embed(x)
        for i, layer in enumerate(self.layers):
            if self.breaks == "inside" and i == 1:
                torch._dynamo.graph_break()
            h = layer(h)
        if self.breaks == "after":
            torch._dynamo.graph_break()
        return self.head(h)


def chain(**options: Any) -> Chain:
    torch.manual_seed(0)
    return Chain(**options).eval()


class Late(nn.Module):
    """Layers without residual connections in front of the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(12))
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.first:
            x = torch.tanh(linear(x))
        for layer in self.layers:
            x = layer(x)
        return x


class Outer(nn.Module):
    """A model that holds the stream owner as a part, with breaks in its own forward around it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        y = self.inner(x)
        torch._dynamo.graph_break()
        return self.scale * y


def shake(model: nn.Module, scale: float = 0.1) -> None:
    """Move every stream parameter off its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in stream_parameters(model).values():
            p.add_(scale * torch.randn(p.shape, generator=generator))


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    """A loss on a batch of tokens, whatever the model returns."""
    out = logits(model(ids(seed=seed)))
    return F.cross_entropy(out.flatten(0, 1).float(), ids(seed=seed + 1).flatten())


def gradients(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """The gradients of that loss by parameter name."""
    model.zero_grad()
    loss_of(model, seed).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def learned(model: nn.Module) -> list[Tensor]:
    """The loss of one batch, then its gradients of all parameters, after a shake."""
    shake(model)
    loss = loss_of(model)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def predicted(model: nn.Module) -> Tensor:
    """The logits of one batch, of an encoder and a decoder those of another."""
    both = "T5" in type(model).__name__
    return logits(model(input_ids=ids(), decoder_input_ids=ids(seed=1)) if both else model(ids()))


def disagree(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> list[str]:
    """Names in `theirs` of tensors that differ by more than `tolerance` of their largest entry."""
    return [name for name, g in theirs.items() if not close(ours[name], g, tolerance)]


def logits(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits


def close(a: Tensor, b: Tensor, tolerance: float = 2e-6) -> bool:
    """Whether two tensors agree to `tolerance` of the largest value."""
    return bool((a.detach() - b.detach()).abs().max() <= tolerance * b.detach().abs().max())


def code_of(error: BaseException) -> str:
    """The code of an error, whether Dynamo wrapped it or not: the text must show it either way."""
    inner = getattr(error, "inner_exception", error)
    assert isinstance(inner, MHCError), repr(error)
    assert inner.code in str(error)
    return inner.code


@contextmanager
def warned() -> Iterator[list[str]]:
    """The codes of this package's warnings."""
    codes: list[str] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield codes
    codes += [str(w.message).split()[0] for w in seen if issubclass(w.category, MHCWarning)]


def state(model: nn.Module) -> tuple[Any, ...]:
    """What a refusal must leave as it was: modules, their classes, parameters and their values."""
    modules = [(name, type(m), m.training) for name, m in model.named_modules()]
    return modules, [(name, id(p), p._version, p.requires_grad) for name, p in model.named_parameters()]


def variants(first: Any, *others: Any) -> list[Any]:
    """Return parameters for `parametrize`, a tuple for several arguments; all but the first are `slow`."""
    rows = [other if isinstance(other, tuple) else (other,) for other in others]
    return [first, *(pytest.param(*row, marks=pytest.mark.slow) for row in rows)]


def static_cache_agrees(model: Any) -> bool:
    """Whether a converted language model generates the same with buffers, of which attention reads a part."""
    settings = {"max_new_tokens": 4, "do_sample": False}
    plain = model.generate(ids()[:1, :4], use_cache=False, **settings)
    return torch.equal(plain, model.generate(ids()[:1, :4], cache_implementation="static", **settings))


def used(model: Any, folder: Path) -> None:
    """Train a converted language model, generate with and without a cache, save it and load it again."""
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = loss_of(model)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    generated = [
        model.generate(ids()[:1, :4], max_new_tokens=4, do_sample=False, use_cache=cache) for cache in (False, True)
    ]
    assert torch.equal(*generated)
    model.save_pretrained(folder)
    again = from_pretrained(folder, inner="eager")
    with torch.no_grad():
        torch.testing.assert_close(logits(again(ids())), logits(model(ids())), rtol=1e-4, atol=1e-5)
