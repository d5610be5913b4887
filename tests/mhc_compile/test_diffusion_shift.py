"""Blocks beside clean ones in training, logits of next tokens, and which positions the sampler takes first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import mhc_compile
from mhc_compile import MHCError
from mhc_compile.diffusion import attend, denoising_loss, sample
from mhc_compile.integrations.diffusion import beside_clean, shifted

VOCABULARY, MASK, BLOCK = 12, 11, 4


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.6,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def model_of(streams: int) -> Any:
    return mhc_compile.convert(llama(), streams=streams, inner="eager") if streams else llama()


def rows(seed: int, batch: int, length: int) -> Tensor:
    return torch.randint(MASK, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("streams", [0, 2])
def test_blocks_beside_clean_ones_see_what_they_see_in_sampling(streams: int) -> None:
    clean, noised = rows(0, 2, 10), rows(1, 2, 10)
    with torch.no_grad():
        found = beside_clean(model_of(streams), clean, BLOCK)(noised)
        moved = beside_clean(model_of(streams), clean, BLOCK, shift=True)(noised)
        model = attend(model_of(streams), f"block:{BLOCK}", inner="eager")
        for begin in range(0, 10, BLOCK):
            stop = min(begin + BLOCK, 10)
            logits = model(torch.cat([clean[:, :begin], noised[:, begin:stop]], 1)).logits
            torch.testing.assert_close(found[:, begin:stop], logits[:, begin:], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(moved[:, begin:stop], shifted(logits)[:, begin:], rtol=1e-6, atol=1e-6)


def test_the_checkpoint_predicts_the_first_token_of_a_block() -> None:
    # Before any training the loss of first tokens is that of next tokens.
    ids, model = rows(2, 2, 9), llama()
    first = (torch.arange(9) % BLOCK == 0) & (torch.arange(9) > 0)
    with torch.no_grad():
        moved = beside_clean(model, ids, 1, shift=True)(torch.full_like(ids, MASK))
        torch.testing.assert_close(moved[:, 1:], model(ids).logits[:, :-1], rtol=1e-6, atol=1e-6)
        network = beside_clean(model, ids, BLOCK, shift=True)
        loss = denoising_loss(network, ids, 0.0, mask_token=MASK, vocabulary=VOCABULARY, valid=first.expand(2, 9))
    assert torch.isfinite(loss)


@pytest.mark.parametrize("order", ["surest", "leftmost"])
def test_sampling_with_logits_of_next_tokens(order: Any) -> None:
    model, prompt = attend(llama(), f"block:{BLOCK}", inner="eager"), rows(3, 2, 6)
    how: dict[str, Any] = {"mask_token": MASK, "threshold": 2.0, "order": order, "shift": True}
    made = sample(model, prompt, 9, **how)
    assert torch.equal(made.ids, sample(model, prompt, 9, **how, cached=False).ids)
    ids = torch.cat([prompt, torch.full((2, 9), MASK)], 1)
    with torch.no_grad():
        for stop in (8, 12, 15):
            while (masked := ids[:, :stop] == MASK).any():
                confidence, best = shifted(model(ids[:, :stop]).logits)[..., :MASK].log_softmax(-1).max(-1)
                for row in range(2):
                    places = masked[row].nonzero().flatten()
                    at = places[0] if order == "leftmost" else places[confidence[row, places].argmax()]
                    ids[row, at] = best[row, at]
    assert torch.equal(made.ids, ids)
    assert made.forwards == 9
    assert sample(model, prompt, 9, **how | {"least": 2}).forwards == 1 + 2 + 2


def test_unknown_order() -> None:
    model = attend(llama(), f"block:{BLOCK}", inner="eager")
    with pytest.raises(MHCError, match=r"MHC204.*surest, leftmost"):
        sample(model, rows(4, 1, 4), 4, mask_token=MASK, order="rightmost")  # type: ignore[arg-type]
