"""Programs: the terms that a model adds to the loss of its tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import ids
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import mhc_compile
from mhc_compile.diagnostics import MHCError
from mhc_compile.runtime.program import Program, capture_program


class Spreading(nn.Module):
    """A Llama that returns, beside logits, what its loss has besides that of the tokens."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
        )
        self.inner, self.way = LlamaForCausalLM(config), way

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = self.inner(input_ids=input_ids, use_cache=False).logits
        wide, flat = logits.square().mean(), logits.mean()
        out = {"logits": logits, "wide": wide}
        if labels is not None:
            of_tokens = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            match self.way:
                case "sum":
                    out["loss"] = of_tokens + 3 * wide + flat
                case "in place":
                    of_tokens += 3 * wide
                    out["loss"] = of_tokens + flat
                case "without":
                    out["loss"] = of_tokens
                case "product":
                    out["loss"] = (of_tokens + 3 * wide) * 0.5
        return out


class Unlabelled(Spreading):
    def forward(self, input_ids: Tensor) -> dict[str, Any]:  # type: ignore[override]
        return super().forward(input_ids)


def program(model: nn.Module) -> Program:
    mhc_compile.convert(model, streams=2, inner="eager", example_kwargs={"input_ids": ids()})
    return capture_program(model, {"input_ids": ids()})


@pytest.mark.parametrize("way", ["sum", "in place"])
def test_what_labels_do_not_change_is_added(way: str) -> None:
    found = program(Spreading(way))
    assert found.auxiliary
    outputs = found.graph.graph.output_node().all_input_nodes
    assert [tuple(n.meta["example_value"].shape) for n in outputs] == [(2, 8, 64), ()]
    assert "labels" not in found.inputs.values()


def test_a_loss_of_tokens_alone_adds_nothing() -> None:
    assert not program(Spreading("without")).auxiliary


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Spreading("product"), "no sum with a multiple of wide"),
        (Spreading("nowhere"), "0 losses of its labels"),
        (Unlabelled("sum"), "takes no labels"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(model: nn.Module, said: str) -> None:
    with pytest.raises(MHCError, match=f"MHC609.*{said}"):
        program(model)
