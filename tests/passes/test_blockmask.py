"""Block-causal and bidirectional attention: found by structure, equal to an explicit mask, or refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from goldens import graph_text
from stepping import apply, captured, normal, run
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as fused
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import mhc_compile
from mhc_compile import MHCError
from mhc_compile.passes.base import Context
from mhc_compile.passes.blockmask import BlockMask
from mhc_compile.passes.normalize import Normalize

Golden = Callable[[str], None]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
S, C = 10, 8


class Toy(nn.Module):
    """Two residual layers of attention and a head; `attend` takes query, key and value [B, S, C]."""

    def __init__(self, attend: Attend, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, C)
        self.qkv = nn.ModuleList(nn.Linear(C, 3 * C) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(C, C) for _ in range(layers))
        self.attend = attend
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for qkv, out in zip(self.qkv, self.out, strict=True):
            x = x + out(self.attend(*qkv(x).chunk(3, -1)))
        return x


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / math.sqrt(C)


def positions(x: Tensor) -> tuple[Tensor, Tensor]:
    at = torch.arange(x.shape[1])
    return at[:, None], at[None]


def flag(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fused(q, k, v, is_causal=True)


def flag_by_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fused(q, k, v, None, 0.0, True)


def compared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query, key = positions(q)
    return fused(q, k, v, attn_mask=query >= key)


def forbidden(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query, key = positions(q)
    return scores(q, k).masked_fill(key > query, -math.inf).softmax(-1) @ v


def negated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query, key = positions(q)
    return fused(q, k, v, attn_mask=~(query < key))


def where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query, key = positions(q)
    return torch.where(key <= query, scores(q, k), -1e9).softmax(-1) @ v


def subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query, key = positions(q)
    return torch.softmax(scores(q, k) + (1.0 - (key <= query).double()) * -1e9, -1) @ v


def lower(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.tril(torch.ones(q.shape[1], q.shape[1]))
    return scores(q, k).masked_fill(mask == 0, -math.inf).softmax(-1) @ v


def upper(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((q.shape[1], q.shape[1]), -math.inf, dtype=q.dtype).triu(1)
    return (scores(q, k) + mask).softmax(-1) @ v


SPELLINGS = [flag, flag_by_place, compared, forbidden, negated, where, subtracted, lower, upper]


def blocks(size: int, length: int = S, keys: int | None = None) -> Tensor:
    """What the queries, the last of `keys` positions, see: written as loops."""
    keys = keys or length
    rows = [
        [not size or key < (query // size + 1) * size for key in range(keys)] for query in range(keys - length, keys)
    ]
    return torch.tensor(rows)


def explicit(size: int, window: int = 10**6) -> Attend:
    """Attention with its mask given, softmax and sum written out."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key = positions(q)
        weights = scores(q, k).exp() * (blocks(size, q.shape[1]) & (key > query - window))
        return weights / weights.sum(-1, keepdim=True) @ v

    return attend


def rewritten(model: nn.Module, size: int, *args: Tensor, **kwargs: object) -> Tensor:
    """The pass over the captured graph, and what it computes."""
    found = captured(model, *args, **kwargs)
    gm = apply(BlockMask(size), apply(Normalize(), found.graph, Context()), Context())
    return run(gm, found.inputs)[0]


def ids_of(rows: int = 2) -> Tensor:
    return torch.randint(16, (rows, S), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [3, 0])
@pytest.mark.parametrize("attend", SPELLINGS, ids=lambda f: f.__name__)
def test_every_spelling_is_an_explicit_mask(attend: Attend, size: int) -> None:
    ids = ids_of()
    with torch.no_grad():
        expected = Toy(explicit(size))(ids)
        assert (expected - Toy(attend)(ids)).abs().max() > 1e-3
    torch.testing.assert_close(rewritten(Toy(attend), size, ids), expected, rtol=1e-12, atol=1e-12)


def test_biases_by_distance_stay() -> None:
    def distance(q: Tensor) -> Tensor:
        query, key = positions(q)
        far = torch.where(key - query < -3, 0, (key - query).clamp(-3, 3) + 3)
        return nn.functional.embedding(far, torch.linspace(-1, 1, 7, dtype=q.dtype)[:, None])[..., 0]

    def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key = positions(q)
        return (scores(q, k) + distance(q)).masked_fill(key > query, -math.inf).softmax(-1) @ v

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (scores(q, k) + distance(q)).masked_fill(~blocks(4), -math.inf).softmax(-1) @ v

    out = rewritten(Toy(biased, layers=1), 4, ids_of())
    torch.testing.assert_close(out, Toy(expected, layers=1)(ids_of()).detach(), rtol=1e-12, atol=1e-12)
    gm = normal(Toy(lambda q, k, v: (scores(q, k) + distance(q)).softmax(-1) @ v), ids_of())
    with pytest.raises(MHCError, match=r"MHC113.*compares positions"):
        BlockMask(4).apply(gm, Context())


def test_a_window_keeps_its_beginning() -> None:
    def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key = positions(q)
        return fused(q, k, v, attn_mask=(key <= query) & (key > query - 4))

    out = rewritten(Toy(window), 3, ids_of())
    torch.testing.assert_close(out, Toy(explicit(3, window=4))(ids_of()).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attend", [flag, forbidden, lower], ids=lambda f: f.__name__)
def test_graph(attend: Attend, golden: Golden) -> None:
    gm = normal(Toy(attend, layers=1), ids_of())
    before = graph_text(gm)
    context = Context()
    golden("\n\n".join([before, graph_text(apply(BlockMask(3), gm, context)), *context.notes]))


def test_graph_bidirectional(golden: Golden) -> None:
    texts = [graph_text(apply(BlockMask(), normal(Toy(f, layers=1), ids_of()), Context())) for f in (flag, compared)]
    golden("\n\n".join(texts))


def llama(attention: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def gpt2(attention: str = "sdpa") -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=16, n_positions=32, n_embd=16, n_layer=1, n_head=2, attn_implementation=attention, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double().eval()


def given_mask(model: nn.Module, ids: Tensor, allowed: Tensor) -> Tensor:
    """The model's own code with a mask [B, 1, S, S] passed in."""
    eager = model.config._attn_implementation == "eager"
    added = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -1e30)
    mask = added if eager else allowed
    at = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=at, use_cache=False).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_transformers_with_padding(make: Callable[[str], nn.Module], attention: str) -> None:
    model, ids = make(attention), ids_of()
    padding = torch.tensor([[0] * 2 + [1] * (S - 2), [1] * S])
    for size in (4, 0):
        allowed = blocks(size).expand(2, 1, S, S)
        at = torch.arange(S).expand_as(ids)
        out = rewritten(model, size, input_ids=ids, attention_mask=padding, position_ids=at, use_cache=False)
        expected = given_mask(model, ids, allowed & padding[:, None, None].bool())
        seen = padding.bool()
        torch.testing.assert_close(out[seen], expected[seen], rtol=1e-10, atol=1e-12)


def test_cached_keys_count() -> None:
    model, ids = llama(), ids_of()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :6], past_key_values=cache)
    out = rewritten(model, 4, input_ids=ids[:, 6:], past_key_values=cache, use_cache=True)
    keys = cache.layers[0].keys
    assert out.shape[0] == keys.shape[0]
    gm = captured(model, input_ids=ids[:, 6:], past_key_values=cache, use_cache=True)
    graph = apply(BlockMask(4), apply(Normalize(), gm.graph, Context()), Context())
    mask = next(n for n in graph.graph.nodes if "attn_mask" in n.kwargs).kwargs["attn_mask"]
    graph.graph.output_node().args = ((mask,),)
    assert torch.equal(run(graph, gm.inputs)[0][0, 0], blocks(4, S - 6, S))


# --- the option -------------------------------------------------------------------------------------------------------


def test_the_option_on_streams() -> None:
    ids, option = ids_of(), "block:4"
    expected = given_mask(llama(), ids, blocks(4).expand(2, 1, S, S))
    torch._dynamo.reset()
    model = mhc_compile.convert(llama(), streams=2, attention=option, inner="eager", debug="numeric")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-6, atol=1e-7)
    # What the model was converted with holds for whatever compiles it.
    step = torch.compile(model, backend="mhc", options={"inner": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(step(ids).logits, expected, rtol=1e-6, atol=1e-7)


def test_the_option_is_exported() -> None:
    ids = ids_of()
    model = mhc_compile.convert(Toy(flag, layers=1), ids, streams=2, attention="block:4", inner="eager")
    program = mhc_compile.export(model, ids)
    torch.testing.assert_close(program.module()(ids), Toy(explicit(4), layers=1)(ids), rtol=1e-6, atol=1e-7)


def test_the_option_at_a_call() -> None:
    ids = ids_of()
    torch._dynamo.reset()
    model = mhc_compile.convert(Toy(flag, layers=1), ids, streams=2, inner="eager")
    step = torch.compile(model, backend="mhc", options={"inner": "eager", "attention": "block:4"})
    torch.testing.assert_close(step(ids), Toy(explicit(4), layers=1)(ids), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model(ids), Toy(flag, layers=1)(ids), rtol=1e-6, atol=1e-7)


def test_a_function_around_the_model() -> None:
    ids, model = ids_of(), mhc_compile.convert(Toy(flag), ids_of(), streams=2, attention="block:4", inner="eager")
    held = {"deep": [{"in": [[[model]]]}]}

    def step(ids: Tensor) -> Tensor:
        return held["deep"][0]["in"][0][0][0](ids) * 2

    out = torch.compile(step, backend="mhc", options={"inner": "eager"})(ids)
    torch.testing.assert_close(out, 2 * Toy(explicit(4))(ids), rtol=1e-6, atol=1e-7)


def test_two_options_are_one_too_many(tmp_path: object) -> None:
    torch._dynamo.reset()
    model = mhc_compile.convert(Toy(flag, layers=1), ids_of(), streams=2, attention="block:4", inner="eager")
    step = torch.compile(model, backend="mhc", options={"inner": "eager", "attention": "bidirectional"})
    with pytest.raises(Exception, match="MHC304"):
        step(ids_of())
    with pytest.raises(MHCError, match=r"MHC204 .*attention='block:4'"):
        mhc_compile.emit(model, f"{tmp_path}/model.py")


@pytest.mark.parametrize("option", ["block", "block:0", "block:x", "causal", "", 16])
def test_unknown_options(option: str) -> None:
    with pytest.raises(MHCError, match="MHC204"):
        mhc_compile.Options(attention=option)


def test_sizes_are_checked() -> None:
    for size in (-1, True, 2.0):
        with pytest.raises(MHCError, match="MHC204"):
            BlockMask(size)  # type: ignore[arg-type]


# --- refusals ---------------------------------------------------------------------------------------------------------


def free(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fused(q, k, v)


def no_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q * k + v


def strict(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query, key = positions(q)
    return fused(q, k, v, attn_mask=key < query)


def distance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query, key = positions(q)
    return fused(q, k, v, attn_mask=query - key >= 0)


def flexible(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = create_block_mask(lambda _batch, _head, i, j: i >= j, None, None, S, S, device="cpu")
    return flex_attention(q[:, None], k[:, None], v[:, None], block_mask=mask)[:, 0]


@pytest.mark.parametrize(
    ("attend", "said"),
    [
        (free, "no mask of its attentions"), (no_attention, "no attention was found"), (strict, "masked for itself"),
        (distance, "not key <= query"), (flexible, "in a function"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)  # fmt: skip
def test_refused(attend: Attend, said: str) -> None:
    gm = normal(Toy(attend).requires_grad_(attend is not flexible), ids_of())  # on CPUs it has no backward
    with pytest.raises(MHCError, match="MHC113") as caught:
        BlockMask(4).apply(gm, Context())
    assert said in caught.value.detail
    if attend is not no_attention:
        assert caught.value.node
        assert caught.value.module == "(root)"
        assert ("test_blockmask.py" if attend is not flexible else "flex_attention.py") in str(caught.value.source)


def test_masks_from_outside_are_refused() -> None:
    class Given(Toy):
        def __init__(self) -> None:
            super().__init__(lambda q, k, v: fused(q, k, v, attn_mask=self.mask[: q.shape[1], : q.shape[1]]))
            self.register_buffer("mask", torch.ones(32, 32).tril().bool())

    with pytest.raises(MHCError, match=r"MHC113 .*made outside of the graph.*mask.* \[32, 32\]"):
        BlockMask(4).apply(normal(Given(), ids_of()), Context())


def test_one_query_has_nothing_to_widen() -> None:
    gm = normal(Toy(free), ids_of()[:, :1])
    before = graph_text(gm)
    context = Context()
    assert graph_text(apply(BlockMask(4), gm, context)) == before
    assert context.notes == ["blocks of 4: 0 comparisons of positions, 0 flags, 2 have one query"]
