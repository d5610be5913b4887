"""Memories in architectures that nobody here wrote: added without a change, and read once they say something."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import named
from torch import Tensor

import mhc_compile

sys.path.insert(0, str(Path(__file__).parents[1] / "mhc_compile"))
from memories import shake_memory, small

IN_CI = ("gpt2", "qwen3", "bert")
MORE = (
    "bart", "bloom", "cohere2", "deepseek_v3", "electra", "falcon", "gemma2", "gemma3_text", "gpt_neox", "granite",
    "jamba", "mamba2", "mixtral", "olmo2", "opt", "phi3", "roberta", "rwkv", "seq2seq/t5", "seq2seq/bart",
    "masked/modernbert", "whisper", "xlnet",
)  # fmt: skip


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return (out.logits if hasattr(out, "logits") else out[0]).float()


@pytest.mark.parametrize("name", [*IN_CI, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_a_memory_is_added_and_read(name: str) -> None:
    torch._dynamo.reset()
    model, inputs = named(name)
    model.eval()
    before = logits(model, inputs)
    scale = float(before.abs().max())
    settings = small("paper", layers=(0,))
    mhc_compile.convert(model, streams=2, engram=settings, inner="eager", example_kwargs=inputs)  # type: ignore[misc]
    assert float((logits(model, inputs) - before).abs().max()) < 5e-6 * scale
    shake_memory(model)
    assert float((logits(model, inputs) - before).abs().max()) > 0.05 * scale
