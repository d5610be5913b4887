"""Seed Diffusion: attention of whole models, the corruption's algebra, the loss, the sampler and its cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import mhc_compile
from mhc_compile import MHCError
from mhc_compile.diffusion import attend, corrupt, denoising_loss, edit_tokens, mask_tokens, sample
from mhc_compile.diffusion.corruption import edited
from mhc_compile.diffusion.objective import EDITS_FROM, LEAST_RATE
from mhc_compile.integrations.diffusion import CachedCalls, add_mask_token

VOCABULARY, MASK = 12, 11


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(seed: int, batch: int = 3, length: int = 20) -> Tensor:
    return torch.randint(MASK, (batch, length), generator=generator(seed))


def levenshtein(a: list[int], b: list[int]) -> int:
    before = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        now = [i]
        for j, y in enumerate(b, 1):
            now.append(min(before[j] + 1, now[-1] + 1, before[j - 1] + (x != y)))
        before = now
    return before[-1]


# --- corruption -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.floats(0, 1), st.booleans())
def test_masks_are_where_they_are_said_to_be(seed: int, rate: float, padded: bool) -> None:
    ids = rows(seed)
    valid = torch.rand(ids.shape, generator=generator(seed)) < 0.7 if padded else None
    rates = torch.full((3, 1), rate)
    noised, masked = mask_tokens(ids, rates, MASK, valid=valid, generator=generator(seed))
    assert torch.equal(noised == MASK, masked)
    assert torch.equal(noised[~masked], ids[~masked])
    assert valid is None or not (masked & ~valid).any()
    again, _ = mask_tokens(ids, rates, MASK, valid=valid, generator=generator(seed))
    assert torch.equal(noised, again)


def test_masks_are_as_many_as_the_rate_says() -> None:
    rates = torch.tensor([[0.0], [0.25], [1.0]])
    _, masked = mask_tokens(rows(0, 3, 20_000), rates, MASK, generator=generator(0))
    assert masked.double().mean(1).tolist() == pytest.approx([0.0, 0.25, 1.0], abs=0.015)


@given(st.integers(0, 10**6), st.integers(0, 12), st.lists(st.integers(0, MASK - 1), max_size=12))
def test_edits_are_within_their_distance(seed: int, count: int, tokens: list[int]) -> None:
    out = edited(tokens, count, MASK, VOCABULARY, generator(seed))
    assert levenshtein(tokens, out) <= count
    assert abs(len(out) - len(tokens)) <= count
    assert all(0 <= token < MASK for token in out)
    if count == 1:
        assert levenshtein(tokens, out) == 1


def test_edits_are_of_three_kinds() -> None:
    rng = generator(0)
    lengths = [len(edited([1, 2, 3, 4], 1, MASK, VOCABULARY, rng)) for _ in range(600)]
    assert [lengths.count(n) / 600 for n in (3, 4, 5)] == pytest.approx([1 / 3] * 3, abs=0.06)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.1), st.booleans())
def test_rows_keep_their_length(seed: int, strength: float, padded: bool) -> None:
    ids = rows(seed, 2, 30)
    valid = torch.rand(ids.shape, generator=generator(seed)) < 0.7 if padded else torch.ones_like(ids).bool()
    out = edit_tokens(
        ids,
        torch.full((2,), strength, dtype=torch.float64),
        MASK,
        VOCABULARY,
        valid=None if not padded else valid,
        generator=generator(seed),
    )
    assert out.shape == ids.shape
    assert torch.equal(out[~valid], ids[~valid])
    for before, after, at in zip(ids, out, valid, strict=True):
        count = math.floor(int(at.sum()) * strength)
        a, b = before[at].tolist(), after[at].tolist()
        # What was cut or filled at the end counts as much again.
        assert levenshtein(a, b) <= 2 * count
        assert b.count(MASK) <= count
        assert MASK not in b[: len(b) - b.count(MASK)]
        if not count:
            assert a == b


def test_impossible_corruptions() -> None:
    for strength in (-0.1, 1.1):
        with pytest.raises(MHCError, match="MHC204"):
            edit_tokens(rows(0), torch.full((3,), strength), MASK, VOCABULARY)


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_losses_are_sums_over_tokens() -> None:
    ids, valid = rows(1), rows(2) < 8
    logits = torch.randn(3, 20, VOCABULARY, generator=generator(3), dtype=torch.float64)
    how: dict[str, Any] = {"mask_token": MASK, "vocabulary": VOCABULARY, "valid": valid}
    masked, edited_ = corrupt(ids, 0.9, **how, generator=generator(4))
    offset = float(torch.rand((1, 1), generator=generator(4)))
    expected = 0.0
    for b in range(3):
        rate = LEAST_RATE + (1 - LEAST_RATE) * ((offset + b / 3) % 1)
        for i in range(20):
            total = sum(math.exp(x) for x in logits[b, i].tolist())
            surprise = math.log(total) - float(logits[b, i, ids[b, i]])
            expected += surprise / rate if masked.ids[b, i] == MASK else 0.0
            expected += surprise if valid[b, i] else 0.0
    assert 0 < (masked.ids == MASK).sum() < valid.sum()
    assert torch.equal(edited_.ids[~valid], ids[~valid])
    found = denoising_loss(lambda _: logits, ids, 0.9, **how, generator=generator(4))
    assert float(found) == pytest.approx(expected / int(valid.sum()), rel=1e-6)


def test_a_rows_corruption_is_its_own() -> None:
    ids, other = rows(1), rows(2)
    other[1] = ids[1]
    valid = torch.tensor([False, True, False])[:, None].expand(3, 20)
    how: dict[str, Any] = {"mask_token": MASK, "vocabulary": VOCABULARY}
    one = corrupt(ids, 1.0, **how, generator=generator(3))
    two = corrupt(other, 1.0, **how, valid=valid, generator=generator(3))
    assert all(torch.equal(a.ids[1], b.ids[1]) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(a.weights[1], b.weights[1]) for a, b in zip(one, two, strict=True))


def test_the_bound_is_that_of_a_network_that_knows_nothing() -> None:
    # A uniform guess costs log V a token, whatever is masked: so does the expectation of the loss.
    losses = [
        denoising_loss(
            lambda x: torch.zeros(*x.shape, VOCABULARY), rows(i, 16, 64), 0.0, mask_token=MASK, vocabulary=VOCABULARY,
            generator=generator(i),
        ).item()
        for i in range(40)
    ]  # fmt: skip
    assert sum(losses) / 40 == pytest.approx(math.log(VOCABULARY), rel=0.05)


def test_stages() -> None:
    ids, seen = rows(5), []

    def network(x: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros(*x.shape, VOCABULARY, dtype=torch.float64)

    def loss(progress: float) -> float:
        rng = generator(6)
        return float(denoising_loss(network, ids, progress, mask_token=MASK, vocabulary=VOCABULARY, generator=rng))

    first = loss(EDITS_FROM - 1e-9)
    assert len(seen) == 1
    kept = seen[0] != MASK
    assert torch.equal(seen[0][kept], ids[kept])
    both = loss(EDITS_FROM)
    assert len(seen) == 3
    assert torch.equal(seen[1], seen[0])
    assert both - first == pytest.approx(math.log(VOCABULARY), rel=1e-12)
    assert 0 < (seen[2] != ids).sum() < ids.numel()


def test_every_rate_is_drawn() -> None:
    shares = []

    def network(x: Tensor) -> Tensor:
        shares.extend((x == MASK).double().mean(1).tolist())
        return torch.zeros(*x.shape, VOCABULARY)

    for i in range(20):
        denoising_loss(network, rows(i, 8, 400), 0.0, mask_token=MASK, vocabulary=VOCABULARY, generator=generator(i))
    counts = torch.histc(torch.tensor(shares), 4, LEAST_RATE, 1.0)
    assert (counts / 160 - 0.25).abs().max() < 0.05


@pytest.mark.parametrize(("progress", "mask_token"), [(-0.1, MASK), (1.1, MASK), (0.0, 3), (0.0, VOCABULARY)])
def test_impossible_objectives(progress: float, mask_token: int) -> None:
    with pytest.raises(MHCError, match="MHC204"):
        denoising_loss(lambda x: x, rows(0), progress, mask_token=mask_token, vocabulary=VOCABULARY)


# --- models -----------------------------------------------------------------------------------------------------------


def llama(vocabulary: int = VOCABULARY, **sizes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.6, **sizes,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def generator_of(streams: int, attention: str = "block:4") -> nn.Module:
    """A model that attends: residual without `streams`."""
    if streams:
        return mhc_compile.convert(llama(), streams=streams, inner="eager", attention=attention)
    return attend(llama(), attention, inner="eager")


@pytest.mark.parametrize("streams", [0, 2])
def test_a_model_with_blocks(streams: int) -> None:
    model: Any = generator_of(streams)
    ids, at = rows(7, 2, 10), torch.arange(10)
    mask = (at[None] // 4 <= at[:, None] // 4).expand(2, 1, 10, 10)
    with torch.no_grad():
        expected = llama()(ids, attention_mask=mask, position_ids=at.expand_as(ids)).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-6, atol=1e-6)
        calls = CachedCalls(model)
        calls(ids[:, :4])
        torch.testing.assert_close(calls(ids[:, 4:]), model(input_ids=ids).logits[:, 4:], rtol=1e-12, atol=1e-12)
    loss = denoising_loss(lambda x: model(input_ids=x).logits, ids, 0.9, mask_token=MASK, vocabulary=VOCABULARY)
    loss.backward()
    own = {name: p for name, p in model.named_parameters() if ".mhc." not in name}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own.values())


@pytest.mark.parametrize("streams", [0, 2])
def test_the_cache_changes_nothing(streams: int) -> None:
    model, prompt = generator_of(streams), rows(9, 2, 6)
    # Blocks end after 8, 12, 16 and 17 tokens.
    for threshold, least, expected in ((0.0, 1, {4}), (0.32, 1, set(range(5, 11))), (2.0, 1, {11}), (2.0, 3, {6})):
        how: dict[str, Any] = {"mask_token": MASK, "threshold": threshold, "least": least}
        with_cache = sample(model, prompt, 11, **how)
        without = sample(model, prompt, 11, **how, cached=False)
        assert torch.equal(with_cache.ids, without.ids)
        assert with_cache.forwards == without.forwards
        assert with_cache.forwards in expected
        assert torch.equal(with_cache.ids[:, :6], prompt)
        assert with_cache.ids.shape == (2, 17)
        assert not (with_cache.ids == MASK).any()
        alone = [sample(model, row[None], 11, **how) for row in prompt]
        assert torch.equal(torch.cat([made.ids for made in alone]), with_cache.ids)
        assert with_cache.tokens_per_forward == 22 / sum(made.forwards for made in alone)


@pytest.mark.parametrize("streams", [0, 2])
def test_masks_in_the_prompt_are_filled(streams: int) -> None:
    model, text = generator_of(streams), rows(9, 2, 14)
    prompt = text.clone()
    prompt[0, 5:11] = prompt[1, 6:8] = MASK  # in the blocks 4 to 7 and 8 to 11; in the first of these
    made = sample(model, prompt, mask_token=MASK, threshold=2.0)
    assert torch.equal(made.ids[prompt != MASK], text[prompt != MASK])
    assert not (made.ids == MASK).any()
    assert (made.new, made.forwards) == (4.0, 6)
    assert torch.equal(made.ids, sample(model, prompt, mask_token=MASK, threshold=2.0, cached=False).ids)
    # What comes after the mask in its block decides, and what comes after the block does not.
    by_hand = prompt[:1].clone()
    with torch.no_grad():
        for stop in (8, 12):
            while (masked := by_hand[:, :stop] == MASK).any():
                confidence, best = model(by_hand).logits[:, :stop, :MASK].max(-1)
                confidence -= model(by_hand).logits[:, :stop, :MASK].logsumexp(-1)
                at = confidence.masked_fill(~masked, -torch.inf).argmax()
                by_hand[0, at] = best[0, at]
    assert torch.equal(made.ids[:1], by_hand)
    more = sample(model, prompt, 3, mask_token=MASK, threshold=2.0)
    assert torch.equal(more.ids[:, :12], made.ids[:, :12])
    assert more.new == 7.0


def test_everything_at_once() -> None:
    model = generator_of(0, "bidirectional")
    out = sample(model, rows(11, 1, 3), 5, mask_token=MASK, threshold=0.0)
    assert (out.forwards, out.tokens_per_forward) == (1, 5.0)
    with pytest.raises(MHCError, match=r"MHC204.*bidirectional"):
        sample(model, rows(11, 1, 3), 5, mask_token=MASK, cached=True)


def test_impossible_samples() -> None:
    how: dict[str, Any] = {"mask_token": MASK}
    cases: list[tuple[str, Callable[[], object]]] = [
        ("its own masks", lambda: sample(llama(), rows(0), 4, **how)),
        ("new=0", lambda: sample(generator_of(0), rows(0), 0, **how)),
        ("new=-1", lambda: sample(generator_of(0), rows(0), -1, **how)),
        ("least=0", lambda: sample(generator_of(0), rows(0), 4, least=0, **how)),
        ("prompt", lambda: sample(generator_of(0), rows(0)[0], 4, **how)),
        ("attend without", lambda: attend(llama(), None)),  # type: ignore[arg-type]
        ("no streams", lambda: attend(llama(), "block:4", streams=2)),
        ("known: block:SIZE", lambda: attend(llama(), "blocks")),
    ]
    for said, call in cases:
        with pytest.raises(MHCError, match="MHC204") as caught:
            call()
        assert said in str(caught.value)


def test_recurrent_models_have_no_mask() -> None:
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=8, state_size=2, num_hidden_layers=1)
    model = attend(MambaForCausalLM(config).eval(), "block:4", inner="eager")
    with pytest.raises(MHCError, match="MHC113"):
        sample(model, rows(0, 1, 4), 4, mask_token=MASK)


# --- the mask token, and Trainer --------------------------------------------------------------------------------------


def words(**special: str) -> PreTrainedTokenizerFast:
    model = models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **special)


def test_a_mask_token_is_added_once() -> None:
    model, tokenizer = llama(), words()
    head = model.lm_head.weight.detach().clone()
    assert add_mask_token(model, tokenizer) == add_mask_token(model, tokenizer) == VOCABULARY
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY + 1 == model.config.vocab_size
    assert torch.equal(model.lm_head.weight[:VOCABULARY], head)
    assert add_mask_token(llama(), words(mask_token="3")) == 3
    spare = llama(VOCABULARY + 4)
    assert add_mask_token(spare, words()) == VOCABULARY
    assert spare.get_input_embeddings().weight.shape[0] == VOCABULARY + 4


def test_trainer(tmp_path: object) -> None:
    class Denoiser(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
            progress = self.state.global_step / self.state.max_steps
            return denoising_loss(
                lambda x: model(input_ids=x).logits, inputs["input_ids"], progress, mask_token=MASK,
                vocabulary=VOCABULARY,
            )  # fmt: skip

    model = attend(mhc_compile.convert(llama().float(), streams=2, inner="eager"), "block:4", inner="eager")
    data = [{"input_ids": row} for row in torch.arange(8).expand(8, 8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=20, per_device_train_batch_size=8, learning_rate=3e-2, report_to=[], logging_steps=1,
        use_cpu=True, save_strategy="no",
    )  # fmt: skip
    trainer = Denoiser(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[12:16]) < 0.5 * sum(losses[:4])
