"""Tiny models with memories."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import ids
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from mhc_compile import convert
from mhc_compile.kernels.memory.settings import MemorySettings
from mhc_compile.parameters import owners

PRESETS = ("paper", "v41", "qwen_ple")


def small(preset: str, **fields: Any) -> MemorySettings:
    """A preset with tables of a few hundred rows, at the first two layers."""
    return MemorySettings.preset(preset, **{"rows_per_head": 97, "row_width": 4, "layers": (0, 1), **fields})


def tokenizer() -> Tokenizer:
    """Letters in both cases: half of the ids stand for the same texts."""
    vocab = {t: i for i, t in enumerate(["<pad>", "</s>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return made


def with_memory(model: Any, preset: str = "paper", *, inner: str = "eager", **fields: Any) -> Any:
    """The model converted, its memory far from its start."""
    model = convert(model, engram=small(preset, **fields), inner=inner)
    shake_memory(model)
    return model


def losses_of(model: Any, optimizer: torch.optim.Optimizer, steps: int = 4) -> list[float]:
    """The losses of training steps on one batch."""
    losses = []
    for _ in range(steps):
        loss = model(ids(), labels=ids(), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def shake_memory(model: nn.Module, seed: int = 1) -> None:
    """Random values for all that a memory adds."""
    rng = torch.Generator().manual_seed(seed)
    for held in owners(model).values():
        with torch.no_grad():
            for name, p in held.in_graph().items():
                if name.startswith("engram."):
                    p.copy_(torch.randn(p.shape, generator=rng) * 0.5)
            for layer in held.memories.tables:
                held.table(layer).start(seed, 1.0)
