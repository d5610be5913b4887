from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mhc_compile
from mhc_compile.kernels import reference
from mhc_compile.kernels.measures import separation
from mhc_compile.measure import measure_streams, measuring
from mhc_compile.parameters import owners

SIZE = 12


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(SIZE)
        self.up, self.down = nn.Linear(SIZE, 2 * SIZE), nn.Linear(2 * SIZE, SIZE)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Chain(nn.Module):
    def __init__(self, depth: int = 3, rounds: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, SIZE)
        self.layers = nn.ModuleList(Block(dropout) for _ in range(depth))
        self.rounds = rounds
        self.head = nn.Linear(SIZE, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for _ in range(self.rounds):
            for layer in self.layers:
                x = layer(x)
        return self.head(x)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 16, (2, 5), generator=torch.Generator().manual_seed(0))


def converted(model: nn.Module | None = None, ids: Tensor | None = None, **options: object) -> nn.Module:
    torch.manual_seed(0)
    example = torch.zeros(2, 5, dtype=torch.long) if ids is None else ids
    return mhc_compile.convert(model or Chain(), example, inner="eager", **options)


def train(model: nn.Module, ids: Tensor, steps: int = 20) -> None:
    optimizer = torch.optim.AdamW(mhc_compile.parameter_groups(model), lr=1e-2)
    for _ in range(steps):
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_separation_is_the_relative_deviation_from_the_mean() -> None:
    mean, off = torch.randn(3, SIZE), torch.randn(3, SIZE)
    assert separation(mean[:, None].expand(3, 4, SIZE).double()).max() < 1e-7
    two = torch.stack([mean + off, mean - off], dim=-2)
    torch.testing.assert_close(
        separation(two.double()), (off.double().norm(dim=-1) / mean.double().norm(dim=-1)), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("convention", ["paper", "deepseek_v4", "megatron_main", "liger"])
def test_equal_streams_and_unit_gain_at_the_start(convention: str, ids: Tensor) -> None:
    found = measure_streams(converted(convention=convention), ids)[""]
    assert found.sites == ("layers.0#0", "layers.1#0", "layers.2#0")
    assert max(found.separation) < 1e-6
    for gain in (found.gain.forward_mean, found.gain.forward_max, found.gain.backward_mean, found.gain.backward_max):
        assert gain == pytest.approx(1.0, abs=1e-3)


def test_training_separates_the_streams_and_moves_the_gain(ids: Tensor) -> None:
    model = converted()
    start = measure_streams(model, ids)[""].gain
    train(model, ids)
    found = measure_streams(model, ids)[""]
    assert found.separation[-1] > 1e-4
    assert found.gain != start
    assert found.gain.backward_max == pytest.approx(1.0, abs=0.05)


def test_gain_of_unconstrained_mixes_is_that_of_their_product(ids: Tensor) -> None:
    """With phi = 0 every token has the same H, which the equations give from the bias alone."""
    model = converted(manifold="unconstrained")
    (state,) = owners(model).values()
    product = torch.eye(4, dtype=torch.float64)
    for name in state.sites:
        bias = state.get_submodule(name).bias
        with torch.no_grad():
            bias += 0.3 * torch.randn(bias.shape)
        product = reference.mixing_matrix(bias.detach().double()[8:], state.spec) @ product
    gain = measure_streams(model, ids)[""].gain
    rows, columns = product.abs().sum(1).max().item(), product.abs().sum(0).max().item()
    assert rows != pytest.approx(columns, rel=1e-2)
    assert (gain.forward_mean, gain.forward_max) == pytest.approx((rows, rows), rel=1e-5)
    assert (gain.backward_mean, gain.backward_max) == pytest.approx((columns, columns), rel=1e-5)


def test_separation_after_each_site_follows_the_equations(ids: Tensor) -> None:
    """The first site, computed by hand: one distribute from equal streams."""
    model = converted()
    (state,) = owners(model).values()
    site = state.get_submodule("layers.0#0")
    with torch.no_grad():
        site.bias += 0.5 * torch.randn(site.bias.shape)
        x = model.embed(ids)
        X = reference.expand(x, 4)
        pre, post, H = reference.coefficients(X, site.phi, site.alpha, site.bias, state.spec)
        h = reference.aggregate(X, pre)
        block = model.layers[0]
        branch = block.down(F.gelu(block.up(block.norm(h))))
        X = reference.distribute(X, branch, post, H)
    found = measure_streams(model, ids)[""]
    assert found.separation[0] == pytest.approx(separation(X.double()).mean().item(), rel=1e-4)


def test_an_owner_called_again_is_one_chain_of_all_its_sites(ids: Tensor) -> None:
    found = measure_streams(converted(Chain(depth=2, rounds=2)), ids)[""]
    assert found.sites == ("layers.0#0", "layers.1#0", "layers.0#1", "layers.1#1")


def test_every_owner_is_measured_apart() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )  # fmt: skip
    model = mhc_compile.convert(T5ForConditionalGeneration(config), inner="eager")
    tokens = torch.arange(12).view(2, 6)
    found = measure_streams(model, {"input_ids": tokens, "decoder_input_ids": tokens[:, :4]})
    assert {owner: len(m.sites) for owner, m in found.items()} == {"encoder": 4, "decoder": 6}
    assert all(m.separation[-1] < 1e-6 for m in found.values())


def test_measuring_leaves_the_model_as_it_was(ids: Tensor) -> None:
    model = converted(Chain(dropout=0.5)).train()
    model.layers[0].eval()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    state = torch.get_rng_state()
    first, second = measure_streams(model, ids), measure_streams(torch.compile(model, backend="mhc"), (ids,))
    assert first == second, "dropout is off"
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.layers] == [False, True, True]
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_measuring_again_sees_what_training_changed(ids: Tensor) -> None:
    model = converted(Chain(dropout=0.5)).train()
    measure = measuring(model, ids)
    start = measure()
    assert start == measure_streams(model, ids)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    assert measure() == measure_streams(model, ids) != start
    assert model.training


def test_a_residual_model_has_no_streams(ids: Tensor) -> None:
    with pytest.raises(mhc_compile.MHCError) as error:
        measure_streams(Chain(), ids)
    assert error.value.code == "MHC410"
