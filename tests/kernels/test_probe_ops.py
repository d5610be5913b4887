"""The recording ops: equal to the equations, whole and piece by piece, without gradients of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mhc_compile.kernels import hc, probe_ops, reference
from mhc_compile.kernels.attend import attend
from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.forms import DepthForm, form_of, start_values
from mhc_compile.kernels.memory import fusion
from mhc_compile.kernels.memory.spec import FusionSpec
from mhc_compile.kernels.spec import Convention, StreamSpec
from mhc_compile.kernels.start import DEFAULT

OPS = torch.ops.mhc_probes


def operands(n: int = 3, C: int = 5, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Of a site, for 2 x 7 tokens."""
    X, y = torch.randn(2, 7, n, C, dtype=dtype), torch.randn(2, 7, C, dtype=dtype)
    pre, post = (torch.rand(2, 7, n) + 0.1 for _ in range(2))
    return {"X": X, "y": y, "pre": pre, "post": post, "mix": torch.randn(2, 7, n, n)}


def figures(found: Tensor, n: int = 3) -> dict[str, Tensor]:
    sizes = {name: torch.Size(shape) for name, shape in probe_ops.layout(n).items()}
    parts = found.split([shape.numel() for shape in sizes.values()])
    return {name: part.reshape(shape) for (name, shape), part in zip(sizes.items(), parts, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_site_that_has_not_mixed_mixes_itself(dtype: torch.dtype) -> None:
    X, y, pre, post, mix = operands(dtype=dtype).values()
    if dtype == torch.float64:
        pre, post, mix = pre.double(), post.double(), mix.double()
    after = reference.distribute(X, y, post, mix)
    mixed, composite = OPS.site(after, y, pre, post, mix, None, True)
    own, _ = OPS.site(X, y, pre, post, mix, None, False)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, own)
    assert torch.equal(composite, mix)
    assert composite.data_ptr() != mix.data_ptr()
    found = figures(mixed)
    torch.testing.assert_close(found["streams"], after.float().square().mean((0, 1, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["branch"], y.float().square().mean(), rtol=1e-5, atol=1e-6)
    assert found["tokens"] == 14


@pytest.mark.parametrize("mixed", [True, False])
def test_pieces_make_the_whole(mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y, pre, post, mix = operands().values()
    whole, _ = OPS.site(X, y, pre, post, mix, mix, mixed)
    monkeypatch.setattr(probe_ops, "CHUNK", 4 * 15)
    pieces, _ = OPS.site(X, y, pre, post, mix, mix, mixed)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("convention", list(Convention))
def test_pre_from_what_a_kernel_keeps(convention: Convention) -> None:
    spec = StreamSpec(streams=3, convention=convention, manifold=convention.fields.manifold)
    chain = Chain(kind="read", stream=spec, width=5)
    phi, alpha, bias = start_values(spec, 0, 5).values()
    phi, alpha = torch.randn(phi.shape), torch.tensor([0.3, 0.2, 0.1])
    X = torch.randn(2, 7, 3, 5)
    kept = chain.reference({"X": X, "phi": phi, "alpha": alpha, "bias": bias})["z"]
    expected, _, _ = reference.coefficients(X, phi, alpha, bias, spec)
    torch.testing.assert_close(OPS.pre(kept, alpha, bias, 5, str(spec)), expected)


def test_pre_of_hyper_connections_from_what_a_kernel_keeps() -> None:
    spec = StreamSpec(streams=3, form="hc")
    values = {"X": torch.randn(2, 7, 3, 5), "phi": torch.randn(5, 5), "alpha": torch.rand(2), "bias": torch.randn(15)}
    kept = Chain(kind="read", stream=spec, width=5).reference(values)["z"]
    expected, _, _ = hc.dynamic(**values)
    torch.testing.assert_close(OPS.pre(kept, values["alpha"], values["bias"], 5, str(spec)), expected)


def test_gates_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = str(FusionSpec())
    X, keys = torch.randn(2, 2, 7, 3, 5)
    gains = torch.randn(2, 3, 5)
    gate = fusion.gate(X, keys, *gains, FusionSpec.parse(spec))
    wanted = torch.stack([torch.histc(gate[..., i].flatten(), probe_ops.BINS, 0, 1) for i in range(3)])
    assert torch.equal(OPS.gates(X, keys, *gains, spec).float(), wanted)
    monkeypatch.setattr(probe_ops, "CHUNK", 4 * 15)
    assert torch.equal(OPS.gates(X, keys, *gains, spec).float(), wanted)


def test_watch_is_the_identity_and_gives_squared_norms() -> None:
    X, y = torch.randn(2, 7, 3, 5, requires_grad=True), torch.randn(2, 7, 5, requires_grad=True)
    slot = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    a, b = probe_ops.watch(X, y, slot)
    assert torch.equal(a, X)
    assert (a.data_ptr(), b.data_ptr()) == (X.data_ptr(), y.data_ptr())
    (a.sin().sum() + (b * 2).sum()).backward()
    assert torch.equal(X.grad, X.detach().cos())
    each = X.grad.double().square().sum((0, 1, 3))
    wanted = torch.cat([each, torch.tensor([4.0 * 70], dtype=torch.float64)])
    torch.testing.assert_close(slot.grad, wanted, rtol=1e-6, atol=0)
    with torch.no_grad():
        assert probe_ops.watch(X, y, slot) == (X, y)
    assert probe_ops.watch(X.detach(), y.detach(), slot)[0].requires_grad is False


def test_what_is_recorded_has_no_gradient() -> None:
    X, y, pre, post, mix = (t.requires_grad_() for t in operands().values())
    found, composite = OPS.site(X, y, pre, post, mix, None, True)
    assert not found.requires_grad
    assert not composite.requires_grad


def test_fakes_and_schemas() -> None:
    X, y, pre, post, mix = operands().values()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.site.default, (X, y, pre, post, mix, None, True), test_utils=checks)
    torch.library.opcheck(OPS.site.default, (X, y, pre, post, mix, mix, False), test_utils=checks)
    spec = StreamSpec(streams=3)
    z, alpha, bias = torch.rand(2, 7, spec.rows + 1), torch.ones(3), torch.zeros(spec.rows)
    torch.library.opcheck(OPS.pre.default, (z, alpha, bias, 5, str(spec)), test_utils=checks)
    gains = torch.randn(2, 3, 5)
    torch.library.opcheck(OPS.gates.default, (X, X + 1, *gains, str(FusionSpec())), test_utils=checks)
    torch.library.opcheck(OPS.norms.default, (X, y), test_utils=checks)


def of_depth(found: Tensor, columns: int) -> dict[str, Tensor]:
    shapes = {name: torch.Size(s) for name, s in probe_ops.depth_layout(columns, weights=True).items()}
    parts = found.split([shape.numel() for shape in shapes.values()])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


@pytest.mark.parametrize("form", ["attnres", "denseformer", "mudd"])
def test_a_site_of_a_depth_form(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = StreamSpec(form=form)
    of_site = form_of(spec)
    assert isinstance(of_site, DepthForm)
    outputs, places = list(torch.randn(3, 2, 7, 5)), [0, 2, 3]
    named = {name: torch.randn(p.shape) for name, p in of_site.parameters(spec, 3, 5, DEFAULT).items()}
    read = of_site.read(outputs, places, spec, **named)
    operands = (outputs, places, list(named.values()), read, outputs[0], 6, str(spec))
    whole = OPS.depth(*operands)
    found = of_depth(whole, 6)
    assert found["tokens"] == 14
    for name, value in (("read", read), ("newest", outputs[-1]), ("output", outputs[0])):
        torch.testing.assert_close(found[name], value.square().mean())
    if form == "attnres":
        shares = attend(outputs, *named.values())[1][..., :3].softmax(-1)
        torch.testing.assert_close(found["weights"][places], shares.mean((0, 1)))
        entropy = torch.distributions.Categorical(shares).entropy().mean()
        torch.testing.assert_close(found["weights_entropy"], entropy)
    if form == "denseformer":
        torch.testing.assert_close(found["weights"][places], named["weights"][places] + torch.tensor([0.0, 0.0, 1.0]))
    if form == "mudd":
        rows = of_site.weights(outputs, places, spec, **named)
        assert rows.shape == (2, 7, 3)
        torch.testing.assert_close(found["weights"][places], rows.mean((0, 1)))
    assert not found["weights"][[1, 4, 5]].any()
    monkeypatch.setattr(probe_ops, "CHUNK", 4 * 15)
    torch.testing.assert_close(OPS.depth(*operands), whole, rtol=1e-5, atol=1e-6)


def test_watch_one_is_the_identity_and_gives_the_squared_norm() -> None:
    x, slot = torch.randn(2, 7, 5, requires_grad=True), torch.zeros((), dtype=torch.float64, requires_grad=True)
    watched = probe_ops.watch_one(x, slot)
    assert watched.data_ptr() == x.data_ptr()
    watched.sin().sum().backward()
    assert torch.equal(x.grad, x.detach().cos())
    torch.testing.assert_close(slot.grad, x.grad.double().square().sum(), rtol=1e-6, atol=0)
    with torch.no_grad():
        assert probe_ops.watch_one(x, slot) is x
    assert probe_ops.watch_one(x.detach(), slot).requires_grad is False
