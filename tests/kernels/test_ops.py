"""The registered ops: against the reference, through every layer of the compiler, and with their limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels import ops, reference, sinkhorn
from mhc_compile.kernels.forms import start_values
from mhc_compile.kernels.spec import Convention, Manifold, StreamSpec
from mhc_compile.kernels.start import Start, start_head

C = 8
CASES = [
    StreamSpec(iterations=3),
    StreamSpec(convention=Convention.DEEPSEEK_V4, iterations=3),
    StreamSpec(convention=Convention.MEGATRON_MAIN, streams=2, iterations=2),
    StreamSpec(manifold="identity", streams=3),
    StreamSpec(manifold="permutations", streams=3),
    StreamSpec(manifold="kronecker"),
    StreamSpec(manifold="unconstrained", convention=Convention.DEEPSEEK_V4),
    StreamSpec(streams=1, iterations=1),
]


def name(spec: StreamSpec) -> str:
    return f"{spec.convention.value}-{spec.manifold}-{spec.streams}"


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaves(spec: StreamSpec, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(1)
    return [t.to(dtype).requires_grad_() for t in start_values(spec, 1, C, Start(scratch=True, paper=True)).values()]


def site(spec: StreamSpec, opaque: bool = True) -> Callable[..., Tensor]:
    """A whole stream with one site, from entry to exit."""
    dialect, text = torch.ops.mhc, str(spec)
    maps = torch.ops.mhc_kernels.reference_coefficients if opaque else dialect.coefficients

    def run(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
        X = dialect.expand(x, spec.streams)
        pre, post, H = maps(X, phi, alpha, bias, text)
        X = dialect.distribute(X, torch.sin(dialect.aggregate(X, pre)), post, H)
        return dialect.reduce(X, text)

    return run


def plain(spec: StreamSpec) -> Callable[..., Tensor]:
    def run(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
        X = reference.expand(x, spec.streams)
        pre, post, H = reference.coefficients(X, phi, alpha, bias, spec)
        X = reference.distribute(X, torch.sin(reference.aggregate(X, pre)), post, H)
        return reference.reduce(X, spec)

    return run


def value_and_gradients(fn: Callable[..., Tensor], *args: Tensor) -> list[Tensor]:
    out = fn(*args)
    return [out, *torch.autograd.grad(out.square().sum(), args)]


def assert_same(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance * max(1.0, b.abs().max().item()), rtol=tolerance)


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("spec", CASES, ids=name)
def test_ops_are_the_reference(spec: StreamSpec, opaque: bool) -> None:
    x = normal(2, 5, C, dtype=torch.float64).requires_grad_()
    args = (x, *leaves(spec, torch.float64))
    assert_same(value_and_gradients(site(spec, opaque), *args), value_and_gradients(plain(spec), *args), 1e-11)


def test_the_head_op() -> None:
    spec = StreamSpec(exit="head", convention=Convention.DEEPSEEK_V4)
    X, head = normal(3, 4, C), start_head(spec, C, Start(scratch=True, paper=True))
    assert torch.equal(torch.ops.mhc.reduce(X, str(spec), *head), reference.reduce(X, spec, head))


@pytest.mark.parametrize("iterations", [0, 1, 2, 20])
@pytest.mark.parametrize("convention", Convention)
def test_opaque_sinkhorn_is_the_reference(convention: Convention, iterations: int) -> None:
    for n in (1, 3, 8):
        spec = StreamSpec(streams=n, convention=convention, iterations=iterations)
        for scale in (1.0, 10.0):
            logits = (scale * normal(3, 4, n, n, seed=n, dtype=torch.float64)).requires_grad_()
            seen = normal(3, 4, n, n, seed=9, dtype=torch.float64)
            results = []
            for fn in (reference.sinkhorn, lambda x, s: torch.ops.mhc_kernels.sinkhorn(x, str(s))):
                H = fn(logits, spec)
                results.append((H.detach(), *torch.autograd.grad(H, logits, seen)))
            (want, want_grad), (got, grad) = results
            torch.testing.assert_close(got, want, atol=1e-13, rtol=1e-13)
            torch.testing.assert_close(grad, want_grad, atol=1e-11 * want_grad.abs().max().clamp(min=1).item(), rtol=0)
            assert got.is_contiguous()
            assert grad.is_contiguous()


@pytest.mark.parametrize("iterations", [0, 1, 4])
@pytest.mark.parametrize("convention", Convention)
def test_gradcheck_of_the_written_backward(convention: Convention, iterations: int) -> None:
    spec = StreamSpec(streams=3, convention=convention, iterations=iterations)
    logits = normal(2, 3, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: torch.ops.mhc_kernels.sinkhorn(x, str(spec)), [logits])


def test_the_clamped_divisor_and_the_floor_stop_gradients() -> None:
    """Logits so far apart that a column sum is below Megatron's clamp, and the paper's start is at its floor."""
    logits = torch.tensor([[0.0, -40.0], [0.0, -90.0]], dtype=torch.float64, requires_grad=True)
    for convention in (Convention.PAPER, Convention.MEGATRON_MAIN):
        spec = StreamSpec(streams=2, convention=convention, iterations=3)
        (want,) = torch.autograd.grad(reference.sinkhorn(logits, spec)[0, 1] * 1e6, logits)
        (got,) = torch.autograd.grad(torch.ops.mhc_kernels.sinkhorn(logits, str(spec))[0, 1] * 1e6, logits)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e2, 1e4])
@pytest.mark.parametrize("convention", Convention)
def test_opaque_sinkhorn_in_float32(convention: Convention, scale: float) -> None:
    spec = StreamSpec(convention=convention)
    logits = (scale * normal(400, 4, 4)).requires_grad_()
    H = torch.ops.mhc_kernels.sinkhorn(logits, str(spec))
    (grad,) = torch.autograd.grad(H.square().sum(), logits)
    assert H.isfinite().all()
    assert grad.isfinite().all()
    if scale == 1.0:
        wide = logits.detach().double().requires_grad_()
        exact = reference.sinkhorn(wide, spec)
        (exact_grad,) = torch.autograd.grad(exact.square().sum(), wide)
        assert (H - exact).abs().max() < 3e-6
        assert (grad - exact_grad).abs().max() < 2e-5


def test_sinkhorn_takes_any_layout_dtype_and_count() -> None:
    text = str(StreamSpec(iterations=4))
    op = torch.ops.mhc_kernels.sinkhorn
    logits = normal(6, 4, 4)
    want = op(logits, text)
    turned = logits.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert not turned.is_contiguous()
    assert torch.equal(op(turned, text), want)
    assert torch.equal(op(logits[1:4], text), want[1:4])
    assert torch.equal(op(logits[0], text), want[0])
    half = op(logits.bfloat16(), text)
    assert half.dtype == torch.float32
    narrow = logits.bfloat16().requires_grad_()
    assert torch.autograd.grad(op(narrow, text).sum(), narrow)[0].dtype == torch.bfloat16
    empty = torch.zeros(0, 3, 4, 4, requires_grad=True)
    assert op(empty, text).shape == (0, 3, 4, 4)
    assert torch.autograd.grad(op(empty, text).sum(), empty)[0].shape == (0, 3, 4, 4)


def test_chunks_of_tokens_are_seamless(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = StreamSpec(convention=Convention.DEEPSEEK_V4, iterations=3)
    logits, grad = normal(10, 4, 4), normal(10, 4, 4, seed=1)
    whole = sinkhorn.forward(logits, spec), sinkhorn.backward(grad, logits, spec)
    monkeypatch.setattr(sinkhorn, "CHUNK", 3)
    assert_same([sinkhorn.forward(logits, spec), sinkhorn.backward(grad, logits, spec)], list(whole), 1e-7)


@pytest.mark.parametrize("convention", list(Convention))
def test_derivatives_of_any_order_of_the_opaque_op(convention: Convention) -> None:
    spec = StreamSpec(convention=convention, iterations=3)
    logits, weights = normal(2, 4, 4).double(), normal(2, 4, 4, seed=1).double()
    found = []
    for project in (lambda x: torch.ops.mhc_kernels.sinkhorn(x, str(spec)), lambda x: reference.sinkhorn(x, spec)):
        x = logits.clone().requires_grad_()
        value, orders = (project(x) * weights).square().sum(), []
        for _ in range(3):
            (orders_of_x,) = torch.autograd.grad(value, x, create_graph=True)
            orders.append(orders_of_x)
            value = (orders_of_x * weights).square().sum()
        found.append(orders)
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("spec", CASES, ids=name)
def test_opcheck(spec: StreamSpec) -> None:
    text, n = str(spec), spec.streams
    X, y = normal(2, 3, n, C).requires_grad_(), normal(2, 3, C).requires_grad_()
    parameters = leaves(spec)
    post, H = normal(2, 3, n).requires_grad_(), normal(2, 3, n, n).requires_grad_()
    calls: list[tuple[Any, tuple[Any, ...]]] = [(torch.ops.mhc_kernels.reference_coefficients, (X, *parameters, text))]
    if spec.manifold == "sinkhorn":
        calls.append((torch.ops.mhc_kernels.sinkhorn, (H, text)))
        calls.append((torch.ops.mhc_kernels.sinkhorn_backward, (H.detach(), H.detach(), text)))
    if spec is CASES[0]:
        calls += [
            (torch.ops.mhc.coefficients, (X, *parameters, text)),
            (torch.ops.mhc.expand, (y, n)),
            (torch.ops.mhc.aggregate, (X, post)),
            (torch.ops.mhc.distribute, (X, y, post, H)),
            (torch.ops.mhc.reduce, (X, text)),
        ]
    for op, args in calls:
        torch.library.opcheck(op, args)


@pytest.mark.parametrize(("spec", "opaque"), [(s, True) for s in CASES] + [(CASES[1], False)])
def test_aot_eager(spec: StreamSpec, opaque: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(site(spec, opaque), backend="aot_eager", fullgraph=True, dynamic=True)
    parameters = leaves(spec)
    for length in (5, 3):
        x = normal(2, length, C).requires_grad_()
        assert_same(value_and_gradients(compiled, x, *parameters), value_and_gradients(plain(spec), x, *parameters))


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor(dynamic: bool) -> None:
    torch._dynamo.reset()
    spec = StreamSpec()
    compiled = torch.compile(site(spec), fullgraph=True, dynamic=dynamic)
    parameters = leaves(spec)
    for length in (5, 3) if dynamic else (5,):
        x = normal(2, length, C).requires_grad_()
        assert_same(value_and_gradients(compiled, x, *parameters), value_and_gradients(plain(spec), x, *parameters))


def test_inductor_of_the_dialect_in_bfloat16() -> None:
    torch._dynamo.reset()
    spec = StreamSpec(convention=Convention.DEEPSEEK_V4, iterations=2)
    x, parameters = normal(2, 5, C, dtype=torch.bfloat16).requires_grad_(), leaves(spec)
    got = torch.compile(site(spec, opaque=False), fullgraph=True)(x, *parameters)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, plain(spec)(x, *parameters))


def test_the_sinkhorn_loop_is_one_node_each_way() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    spec = StreamSpec()
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    torch.compile(site(spec), backend=backend, fullgraph=True)(normal(2, C), *leaves(spec)).sum().backward()
    targets = [str(n.target) for g in graphs for n in g.graph.nodes]
    assert targets.count("mhc_kernels.sinkhorn.default") == 1
    assert targets.count("mhc_kernels.sinkhorn_backward.default") == 1
    assert not any(t.startswith("mhc.") for t in targets)


@pytest.mark.parametrize("manifold", ["sinkhorn", "permutations", "kronecker"])
def test_export_holds_plain_pytorch(manifold: Manifold) -> None:
    spec = StreamSpec(manifold=manifold, iterations=2)

    class Site(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parameters_ = torch.nn.ParameterList([t.detach() for t in leaves(spec)])

        def forward(self, x: Tensor) -> Tensor:
            return site(spec, opaque=False)(x, *self.parameters_)

    module = Site()
    dynamic = {"x": {1: torch.export.Dim("tokens")}}
    program = torch.export.export(module, (normal(2, 5, C),), dynamic_shapes=dynamic).run_decompositions()
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert not any("mhc" in t for t in targets)
    x = normal(2, 7, C)
    torch.testing.assert_close(program.module()(x), module(x))


def test_autocast_changes_nothing() -> None:
    for spec in CASES[:2]:
        for opaque in (False, True):
            fn, x, parameters = site(spec, opaque), normal(2, 5, C), leaves(spec)
            want = fn(x, *parameters)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(fn(x, *parameters), want)
                assert torch.is_autocast_enabled("cpu")
    torch._dynamo.reset()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = torch.compile(fn, backend="aot_eager", fullgraph=True)(x, *parameters)
    torch.testing.assert_close(compiled, want)


@pytest.mark.parametrize("spec", CASES, ids=name)
def test_meta_and_fake_agree_with_the_real_shapes(spec: StreamSpec) -> None:
    args = (normal(2, 3, C, dtype=torch.bfloat16), *(t.detach() for t in leaves(spec)))
    want = site(spec)(*args)
    meta = site(spec)(*(a.to("meta") for a in args))
    with FakeTensorMode() as mode:
        fake = site(spec)(*(mode.from_tensor(a) for a in args))
    for other in (meta, fake):
        assert (other.shape, other.dtype, other.stride()) == (want.shape, want.dtype, want.stride())
    assert meta.device.type == "meta"


def test_inference_mode_and_deterministic_algorithms() -> None:
    spec, x = StreamSpec(iterations=3), normal(2, 5, C)
    parameters = leaves(spec)
    want = value_and_gradients(site(spec), x.requires_grad_(), *parameters)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(value_and_gradients(site(spec), x, *parameters), want, 0.0)
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.inference_mode():
        assert torch.equal(site(spec)(x, *parameters), want[0])


@pytest.mark.parametrize("spec", CASES, ids=name)
def test_zero_tokens(spec: StreamSpec) -> None:
    x = torch.zeros(2, 0, C, requires_grad=True)
    out, *grads = value_and_gradients(site(spec), x, *leaves(spec))
    assert out.shape == (2, 0, C)
    assert all(g.eq(0).all() for g in grads)


def test_a_bad_specification_has_its_code_through_an_op() -> None:
    with pytest.raises(MHCError) as caught:
        torch.ops.mhc.reduce(normal(4, C), "streams=4 colour=red")
    assert caught.value.code == "MHC204"


SIGNATURE = json.dumps({"spec": str(StreamSpec()), "names": ["a", "b"]})


def marked(x: Tensor, w: Tensor) -> Tensor:
    return torch.ops.mhc.mark(x, [w, w.sin()], SIGNATURE, [], "") * 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor", None])
@pytest.mark.parametrize("grad", [False, True])
def test_mark_never_runs(backend: str | None, grad: bool) -> None:
    torch._dynamo.reset()
    fn = torch.compile(marked, backend=backend, fullgraph=True) if backend else marked
    with pytest.raises(MHCError) as caught:
        fn(normal(3).requires_grad_(grad), normal(2).requires_grad_(grad))
    assert caught.value.code == "MHC301"
    assert 'backend="mhc"' in str(caught.value)
    assert caught.value.detail == str(StreamSpec())


def test_mark_is_traced_and_can_be_removed() -> None:
    seen: list[list[str]] = []

    def remove(gm: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        seen.append([str(n.target) for n in gm.graph.nodes])
        for node in list(gm.graph.find_nodes(op="call_function", target=torch.ops.mhc.mark)):  # Dynamo keeps the packet
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
        gm.recompile()
        return gm.forward

    torch._dynamo.reset()
    x, w = normal(3), normal(2).requires_grad_()
    torch.testing.assert_close(torch.compile(marked, backend=remove, fullgraph=True)(x, w), 2 * x)
    assert any("mark" in target for target in seen[0])


def test_mark_has_a_fake_and_a_gradient_for_tracing() -> None:
    x, w = normal(3).requires_grad_(), normal(2).requires_grad_()
    with FakeTensorMode() as mode:
        fake = marked(mode.from_tensor(x), mode.from_tensor(w))
        assert (fake.shape, fake.dtype) == (x.shape, x.dtype)
    meta = torch.ops.mhc.mark(x.detach().to("meta"), [], SIGNATURE, [], "")
    assert meta.device.type == "meta"

    def joint(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(marked(x, w).sum(), (x, w))

    graph = make_fx(joint, tracing_mode="fake")(x, w)
    assert "mhc.mark.default" in [str(n.target) for n in graph.graph.nodes]


def test_importing_again_registers_nothing_new() -> None:
    assert ops.DIALECT.ns == "mhc"
    assert sinkhorn.LIBRARY.ns == "mhc_kernels"
    names = {str(s.name) for s in torch._C._jit_get_all_schemas() if str(s.name).startswith("mhc")}
    assert {"mhc::expand", "mhc::coefficients", "mhc::aggregate", "mhc::distribute", "mhc::reduce"} <= names
    assert {"mhc::mark", "mhc_kernels::reference_coefficients", "mhc_kernels::sinkhorn"} <= names
