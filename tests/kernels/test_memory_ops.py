"""The ops by which memories enter streams: registered for every compiler, differentiable once, one result each way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chains import error
from torch import Tensor

import mhc_compile.kernels.memory.ops  # noqa: F401  (registers the ops)
from mhc_compile.kernels.memory.spec import FusionSpec
from mhc_compile.kernels.registration import registered

KERNELS = torch.ops.engram_kernels
SPEC = FusionSpec(dilation=2, taps=3)
TEXT = str(SPEC)


def tensors(dtype: torch.dtype = torch.float32, tokens: int = 6, n: int = 2, C: int = 20) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    history = SPEC.history
    shapes = {
        "X": (2, tokens, n, C), "keys": (2, tokens, n, C), "a": (2, history + tokens, n),
        "value": (2, history + tokens, C), "query_gain": (n, C), "key_gain": (n, C), "conv_gain": (n, C),
        "conv": (n, C, SPEC.taps),
    }  # fmt: skip
    made = {k: torch.randn(shape, generator=rng) for k, shape in shapes.items()}
    made["keys"] += 2 * made["X"]
    narrow = ("X", "keys", "value")
    return {k: v.to(dtype if k in narrow or dtype == torch.float64 else torch.float32) for k, v in made.items()}


def calls(dtype: torch.dtype = torch.float32, tokens: int = 6) -> dict[str, tuple[Any, ...]]:
    """Arguments of every opaque op, by a name that begins with the op's."""
    t = tensors(dtype, tokens)
    reach = torch.arange(tokens).expand(2, -1) % 4
    inject = (t["X"], t["a"], t["value"])
    remember = (t["X"], t["keys"], t["value"][:, SPEC.history :], t["query_gain"], t["key_gain"], TEXT)
    return {
        "gate": (t["X"], t["keys"], t["query_gain"], t["key_gain"], TEXT),
        "remember": remember,
        "recall": (*remember[:-1], reach, t["conv_gain"], t["conv"], TEXT),
        "inject": (*inject, reach, t["conv_gain"], t["conv"], TEXT),
        "inject everywhere": (*inject, None, t["conv_gain"], t["conv"], TEXT),
        "add": (*inject, TEXT),
    }


NAMES = list(calls())


def opaque(name: str) -> Any:
    return getattr(KERNELS, name.split()[0])


def dialect(name: str) -> Any:
    def remember(X: Tensor, keys: Tensor, value: Tensor, query: Tensor, key: Tensor, *rest: Any) -> Any:
        *convolution, spec = rest
        a = torch.ops.engram.gate(X, keys, query, key, spec)
        out = torch.ops.engram.inject(X, a, value, *(convolution or (None, None, None)), spec)
        return (out, a) if convolution else out

    def add(*arguments: Any) -> Any:
        return torch.ops.engram.inject(*arguments[:-1], None, None, None, arguments[-1])

    if name == "add":
        return add
    return remember if name in ("remember", "recall") else getattr(torch.ops.engram, name.split()[0])


def leaves_of(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Tensor]]:
    made = tuple(
        t.clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments
    )
    return made, [t for t in made if isinstance(t, Tensor) and t.requires_grad]


def results(op: Any, arguments: tuple[Any, ...]) -> list[Tensor]:
    """Outputs, and gradients of all that has one."""
    made, leaves = leaves_of(arguments)
    out = op(*made)
    out = out if isinstance(out, tuple) else (out,)
    rng = torch.Generator().manual_seed(1)
    flow = [torch.randn(o.shape, generator=rng).to(o.dtype) for o in out]
    return [*(o.detach() for o in out), *torch.autograd.grad(out, leaves, flow)]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(opaque(name).default, leaves_of(calls()[name])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_opaque_op_is_the_dialect_s(name: str, dtype: torch.dtype) -> None:
    arguments = calls(dtype)[name]
    found, expected = results(opaque(name), arguments), results(dialect(name), arguments)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert error(a, b) < tolerance


def test_the_gradient_of_the_streams_is_handed_on_as_it_is() -> None:
    for name in ("inject", "add"):
        made, leaves = leaves_of(calls()[name])
        flow = torch.randn_like(leaves[0])
        (found,) = torch.autograd.grad(opaque(name)(*made), [leaves[0]], flow)
        assert found.data_ptr() == flow.data_ptr()


def test_parameters_in_half_precision_get_gradients_of_their_own_dtype() -> None:
    for name in NAMES:
        wide = calls()[name]
        narrow = [t.bfloat16() if isinstance(t, Tensor) and t.is_floating_point() else t for t in wide]
        streams = 3 if name in ("remember", "recall") else 2 if name == "gate" else 1
        arguments = (*wide[:streams], *narrow[streams:])
        if name.startswith(("inject", "add")):
            arguments = (*arguments[:2], wide[2], *arguments[3:])
        for a, b in zip(results(opaque(name), arguments), results(dialect(name), arguments), strict=True):
            assert a.dtype == b.dtype
            assert error(a, b) < (1e-2 if a.dtype == torch.bfloat16 else 2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_gradients_are_refused(name: str) -> None:
    made, leaves = leaves_of(calls()[name])
    out = opaque(name)(*made)
    out = out[0] if isinstance(out, tuple) else out
    first = torch.autograd.grad(out.square().sum(), leaves[1], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(first.sum(), leaves[1])


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name: str) -> None:
    arguments = calls()[name]
    for op in (opaque(name), dialect(name)):
        expected = results(op, arguments)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = results(op, arguments)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_with_dynamic_tokens(backend: str) -> None:
    def step(X: Tensor, keys: Tensor, value: Tensor, history: Tensor, *gains: Tensor) -> Tensor:
        X, _ = KERNELS.recall(X, keys, value, *gains[:2], None, *gains[2:], TEXT)
        a = KERNELS.gate(X, keys, *gains[:2], TEXT)
        rows, gates = torch.cat([history, value], 1), torch.cat([history[..., :2], a], 1)
        return 2 * KERNELS.inject(X, gates, rows, None, *gains[2:], TEXT)

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (3, 9):
        t = tensors(tokens=tokens)
        history, value = t["value"].split([SPEC.history, tokens], 1)
        arguments = (t["X"], t["keys"], value, history, *(t[k] for k in list(t)[-4:]))
        for a, b in zip(results(compiled, arguments), results(step, arguments), strict=True):
            torch.testing.assert_close(a, b)


def test_the_dialect_decomposes() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    for name in ("gate", "inject"):
        op = dialect(name)
        graph = make_fx(lambda *t, op=op: op(*t, TEXT))(*calls()[name][:-1])
        targets = {str(node.target).split(".")[0] for node in graph.graph.nodes if node.op == "call_function"}
        assert targets == {"aten"}


def test_an_op_s_steps_are_known_from_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        X, value = torch.empty(2, 3, 4, 8, dtype=torch.bfloat16), torch.empty(2, 3, 8)
        gains = torch.empty(4, 8), torch.empty(4, 8)
        op = registered(KERNELS.recall.default)
        assert op is not None
        _, steps = op.parse([X, X, value, *gains, None, gains[0], torch.empty(4, 8, SPEC.taps), TEXT])
    assert [(step.kind, step.n, step.width) for step in steps] == [("gate", 4, 8), ("inject", 4, 8)]
    assert [step.floats() for step in steps] == [
        {"X": torch.bfloat16, "keys": torch.bfloat16}, {"X": torch.bfloat16, "value": torch.float32},
    ]  # fmt: skip
    assert registered(torch.ops.aten.add.Tensor) is None
