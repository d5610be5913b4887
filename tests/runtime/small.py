"""Converted models small enough to train in a second, and their stages."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import mhc_compile
from mhc_compile.config import Options
from mhc_compile.runtime.program import Program, capture_program
from mhc_compile.runtime.stage import Stage, build_stages, materialise_all
from mhc_compile.runtime.weights import assign

VOCAB = 64


def ids(batch: int = 2, length: int = 8, *, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def llama(
    *,
    memory: bool = False,
    ultramem: bool = False,
    streams: int = 4,
    inner: str = "eager",
    form: str = "mhc",
    **config: Any,
) -> nn.Module:
    """A converted Llama of three layers with a tied head; its memories read random rows and give something."""
    torch.manual_seed(0)
    fields = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0,
        "initializer_range": 0.1, "tie_word_embeddings": True,
    }  # fmt: skip
    extra: dict[str, Any] = {}
    if memory:
        settings = mhc_compile.MemorySettings.preset("v41", layers=(1,), rows_per_head=50, row_width=4, compress=False)
        extra = {"engram": settings, "engram_start": "paper"}
    if ultramem:
        extra["ultramem"] = mhc_compile.UltraMemSettings.preset(
            "v2", side=6, key_width=8, value_width=8, input_width=4, top=3
        )
    model = LlamaForCausalLM(LlamaConfig(**(fields | config)))
    mhc_compile.convert(model, streams=streams, scratch=True, start="paper", inner=inner, form=form, **extra)
    for name, p in mhc_compile.stream_parameters(model).items():
        if name.endswith(".projection"):
            nn.init.normal_(p, std=0.3)
    return model


def stages_of(program: Program, starts: Sequence[int], options: Options | None = None, **how: Any) -> list[Stage]:
    """All stages of a program, with the values of its own model."""
    options = options or Options(inner="eager")
    stages = build_stages(program, starts, indices=range(len(starts) + 1), options=options, **how)
    materialise_all(stages)
    own = dict(program.model.named_parameters()) | dict(program.model.named_buffers())
    for name, p in by_name(stages).items():
        assign(p, own[name].detach())
    return stages


def by_name(stages: Sequence[Stage]) -> dict[str, nn.Parameter]:
    """The parameters of several stages by name, tied ones once."""
    return {name: p for stage in stages for name, p in stage.named_parameters()}


def through(stages: Sequence[Stage], tokens: Tensor) -> Tensor:
    """The logits, one stage after the other."""
    crossing: Any = (tokens,)
    for stage in stages:
        found = stage(*crossing, input_ids=tokens)
        crossing = found if isinstance(found, tuple) else (found,)
    return crossing[0]


def program_of(model: nn.Module, tokens: Tensor) -> Program:
    return capture_program(model, {"input_ids": tokens})
