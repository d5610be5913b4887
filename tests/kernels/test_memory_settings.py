"""Settings of memories and the hashes that follow, against published values, published rules and Qwen4-Exp itself."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from sympy import isprime
from torch import Tensor

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.memory import hashing
from mhc_compile.kernels.memory.constants import mixed, primes_from, splitmix64_multipliers
from mhc_compile.kernels.memory.settings import PRESETS, MemorySettings, fusion_spec, hash_specs, table_rows
from mhc_compile.kernels.memory.spec import HashSpec


def test_golden_values_of_deepseek_v41() -> None:
    settings = MemorySettings.preset("v41")
    assert (settings.order, settings.heads, settings.layers) == (4, 8, (1, 14))
    first, second = hash_specs(settings, (1, 14), vocab=99092, fill=2)
    assert (first.rows, second.rows) == (384006168, 384016682)
    assert first.multipliers == (76632096046245, 4839876093313, 35959672319349, 73987337458391)
    assert first.moduli[:3] == (16000057, 16000079, 16000081)
    assert table_rows(settings, first) == first.rows


def test_golden_values_of_the_released_demonstration() -> None:
    settings = MemorySettings.preset("paper", rows_per_head=646_400, row_width=64)
    first, second = hash_specs(settings, (1, 15), vocab=99092, fill=2)
    assert first.moduli[:2] == (646403, 646411)
    assert (first.rows, second.rows) == (10344164, 10348242)
    assert first.multipliers == (76632096046245, 4839876093313, 35959672319349)


def test_splitmix64_is_the_published_generator() -> None:
    # The first outputs of the generator seeded with 1234567, as its authors' C code prints them.
    gamma = 0x9E3779B97F4A7C15
    found = [mixed(1234567 + (i + 1) * gamma) for i in range(3)]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_moduli_are_the_next_unused_primes_over_orders_and_layers() -> None:
    settings = MemorySettings.preset("paper", rows_per_head=1000, order=4, heads=3)
    used: set[int] = set()
    for spec in hash_specs(settings, (0, 5, 7), vocab=50, fill=0):
        want = []
        for _ in range(settings.order - 1):
            at = settings.rows_per_head - 1
            for _ in range(settings.heads):
                at += 1
                while not isprime(at) or at in used:
                    at += 1
                used.add(at)
                want.append(at)
        assert list(spec.moduli) == want


def test_multipliers_follow_the_layer_or_its_ordinal() -> None:
    small: dict[str, Any] = {"rows_per_head": 10, "heads": 1}
    by_layer = MemorySettings.preset("paper", **small)
    by_ordinal = MemorySettings.preset("qwen_ple", **small)
    same = hash_specs(by_layer, (3,), 50, 0)[0].multipliers, hash_specs(by_layer, (1, 3), 50, 0)[1].multipliers
    assert same[0] == same[1]
    first, second = hash_specs(by_ordinal, (1, 3), 50, 0)
    assert first.multipliers == hash_specs(by_ordinal, (3,), 50, 0)[0].multipliers
    assert second.multipliers == splitmix64_multipliers(1234, 1, 3, 50)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("vocab", [1, 2, 99092, 2**31])
def test_products_of_ids_stay_below_64_bits(name: str, vocab: int) -> None:
    settings = MemorySettings.preset(name, rows_per_head=100)
    for spec in hash_specs(settings, (0, 1), vocab, 0):
        assert all(m % 2 == 1 and m > 0 and m * (vocab - 1) < 2**63 for m in spec.multipliers)
        assert HashSpec.parse(str(spec)) == spec


def test_tables_are_padded() -> None:
    settings = MemorySettings.preset("qwen_ple", rows_per_head=100)
    (spec,) = hash_specs(settings, (1,), 50, 0)
    rows = table_rows(settings, spec)
    assert rows % 128 == 0
    assert spec.rows <= rows < spec.rows + 128
    assert table_rows(MemorySettings.preset("qwen_ple", rows_per_head=100, pad_rows_to=1), spec) == spec.rows


def test_fusion_follows_the_settings() -> None:
    paper, v41 = (fusion_spec(MemorySettings.preset(name)) for name in ("paper", "v41"))
    assert (paper.dilation, paper.taps, paper.history, paper.signed_root) == (3, 4, 9, True)
    assert (v41.dilation, v41.history) == (0, 0)
    assert not fusion_spec(MemorySettings(signed_root=False)).signed_root
    assert fusion_spec(MemorySettings(eps=1e-5, taps=2)).eps == 1e-5


def test_presets_are_what_they_are_called() -> None:
    assert MemorySettings.preset("paper") == MemorySettings()
    assert MemorySettings().memory_width == 1280
    qwen = MemorySettings.preset("qwen_ple")
    assert (qwen.fill, qwen.resets_after_eos, qwen.gain_offset, qwen.compress) == ("eos", True, 1, False)
    assert qwen.memory_width == 2560
    changed = MemorySettings.preset("v41", seed=3, layers=[0, "model.layers.5"])
    assert (changed.name, changed.seed, changed.layers) == ("v41", 3, (0, "model.layers.5"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"order": 1}, {"order": 2.0}, {"order": True}, {"heads": 0}, {"rows_per_head": 1}, {"rows_per_head": 2**49},
        {"row_width": 0}, {"taps": 0}, {"seed": -1}, {"gain_offset": 2}, {"gain_offset": True}, {"convolution": 1},
        {"signed_root": None}, {"compress": "yes"}, {"resets_after_eos": 0}, {"multipliers": "mt19937"},
        {"pad_rows_to": 64}, {"pad_rows_to": True}, {"fill": "bos"}, {"eps": 0.0}, {"eps": 1}, {"layers": ()},
        {"layers": (1, 1)}, {"layers": (-1,)}, {"layers": ("",)}, {"layers": (True,)}, {"layers": "12"}, {"name": 3},
    ],
    ids=str,
)  # fmt: skip
def test_values_that_are_not_possible_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MHCError, match=f"MHC220.*{next(iter(wrong))}"):
        MemorySettings(**wrong)


def test_names_that_are_not_known_are_refused() -> None:
    with pytest.raises(MHCError, match=r"MHC220.*'v42'; known: paper, v41, qwen_ple"):
        MemorySettings.preset("v42")
    with pytest.raises(MHCError, match=r"MHC220.*unknown field 'head'"):
        MemorySettings.preset("v41", head=3)


@pytest.mark.parametrize(
    ("layers", "vocab", "fill"),
    [((), 9, 0), ((2, 1), 9, 0), ((1, 1), 9, 0), ((-1,), 9, 0), ((1,), 0, 0), ((1,), 9, 9), ((1,), 9, -1)],
)
def test_hashes_of_impossible_layers_and_vocabularies_are_refused(
    layers: tuple[int, ...], vocab: int, fill: int
) -> None:
    with pytest.raises(MHCError, match="MHC220"):
        hash_specs(MemorySettings(rows_per_head=10), layers, vocab, fill)


@pytest.mark.parametrize(
    "wrong",
    [
        {"moduli": (0,)}, {"moduli": ()}, {"moduli": (2, 3, 5)}, {"multipliers": (1,)}, {"moduli": (2**62, 2**62)},
        {"multipliers": (2**63, 1, 1)}, {"fill": -(2**63) - 1},
    ],
    ids=str,
)  # fmt: skip
def test_hashes_that_no_table_has_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MHCError, match="MHC220"):
        HashSpec(**{"multipliers": (1, 1, 1), "moduli": (2, 3), "fill": 0} | wrong)


def test_primes_begin_at_the_base() -> None:
    assert primes_from(2, 5) == (2, 3, 5, 7, 11)
    assert primes_from(7, 2) == (7, 11)
    assert all(a < b for a, b in pairwise(primes_from(10**9, 20)))


EOS, VOCAB, BASE = 2, 30, 101


class Cache:
    """What Qwen4-Exp's embedding asks of a cache: its last ids."""

    held: Tensor | None = None

    def get_conv_state(self, layer_idx: int, state_idx: int) -> Tensor | None:
        return self.held

    def update_conv_state(self, new: Tensor, layer_idx: int, state_idx: int, conv_kernel_size: int) -> Tensor:
        both = new if self.held is None else torch.cat([self.held, new], -1)
        self.held = both[..., -conv_kernel_size:]
        return both


def qwen(ordinal: int, order: int, heads: int) -> Any:
    from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
    from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextNGramEmbedding

    config = Qwen4ExpTextConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, ple_layer_ids=[1, 2], ngram_size=order,
        heads_per_ngram=heads, ple_embed_dim=4 * heads * (order - 1), ngram_vocab_size_base=BASE, eos_token_id=EOS,
    )  # fmt: skip
    return Qwen4ExpTextNGramEmbedding(config, config.ple_embed_dim, layer_idx=ordinal, ple_layer_index=ordinal)


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("ordinal", [0, 1])
def test_qwen_ple_is_the_embedding_of_qwen4_exp(ordinal: int, order: int) -> None:
    theirs = qwen(ordinal, order, heads=3)
    table = theirs.ngram_embedding.weight.detach()
    settings = MemorySettings.preset("qwen_ple", order=order, heads=3, rows_per_head=BASE, row_width=4)
    spec = hash_specs(settings, (0, 1), VOCAB, EOS)[ordinal]
    assert spec.multipliers == tuple(theirs.layer_multipliers.tolist())
    assert spec.moduli == tuple(theirs.head_vocab_sizes)
    assert spec.offsets == tuple(theirs.head_offsets)
    assert table_rows(settings, spec) == len(table)

    ids = torch.randint(0, VOCAB, (4, 11))
    ids[0, 4], ids[1, 0], ids[2, 5:7], ids[3, 10] = EOS, EOS, EOS, EOS
    whole = hashing.rows(ids, hashing.reach(ids, None, None, None, EOS), None, spec)
    index: list[Tensor] = []
    theirs.ngram_embedding.register_forward_pre_hook(lambda _, args: index.append(args[0]))
    want = theirs(ids, None)
    assert torch.equal(whole, index[-1])
    assert torch.equal(table[whole].flatten(-2), want)

    # In steps of any size over a cache.
    for cuts in ([1] * 11, [5, 1, 2, 3], [2, 9]):
        cache, carried, before, at = Cache(), None, None, 0
        for length in cuts:
            now = ids[:, at : at + length]
            step = theirs(now, cache)
            far = hashing.reach(now, None, None, carried, EOS)
            found = hashing.rows(now, far, before, spec)
            assert torch.equal(found, index[-1])
            assert torch.equal(found, whole[:, at : at + length])
            assert torch.equal(table[found].flatten(-2), step)
            carried, before = hashing.carry(far, now, None, EOS), hashing.window(now, before, spec)
            at += length


def test_padding_is_to_qwen4_exp_what_it_is_to_a_mask() -> None:
    theirs = qwen(0, 3, heads=2)
    spec = hash_specs(MemorySettings.preset("qwen_ple", heads=2, rows_per_head=BASE), (0,), VOCAB, EOS)[0]
    ids = torch.randint(EOS + 1, VOCAB, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    index: list[Tensor] = []
    theirs.ngram_embedding.register_forward_pre_hook(lambda _, args: index.append(args[0]))
    theirs(torch.where(mask.bool(), ids, EOS), None)  # as its model calls it
    found = hashing.rows(ids, hashing.reach(ids, mask, None, None, EOS), None, spec)
    assert torch.equal(found[mask.bool()], index[-1][mask.bool()])
