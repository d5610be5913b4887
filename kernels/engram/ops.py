"""The ops by which a memory enters the streams, registered with `torch.library` on import.

`engram::*` is the dialect of the graph passes: composite, plain PyTorch of `mhc_compile.kernels.engram.fusion` inside,
with autocast off. `spec` is always `str(FusionSpec)`.

    engram::gate(X [..., n, C], keys [..., n, C], query_gain [n, C], key_gain [n, C], spec) -> a [..., n]
    engram::inject(X [B, S, n, C], a [B, P' + S, n], value [B, P' + S, C], reach [B, S]?, conv_gain [n, C]?,
                   conv [n, C, taps]?, spec) -> like X

`engram_kernels::gate` and `inject` are the same, opaque to every compiler, with fakes and gradients that are ops again;
so are a gate and an inject in one, without history, `remember` without a convolution, too:

    engram_kernels::remember(X, keys, value, query_gain, key_gain, spec) -> X'
    engram_kernels::recall(X, keys, value, query_gain, key_gain, reach?, conv_gain, conv, spec) -> X', a

They add the gradient of X' to that of X where they form it, not in a pass of its own. What computes a call is chosen by
its device (`mhc_compile.kernels.engram.providers`). Gradients of gradients raise NotImplementedError. The hashing ops
come with these (`mhc_compile.kernels.engram.hash_ops`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor

import mhc_compile.kernels.engram.hash_ops  # noqa: F401  (registers the hashing ops)
from mhc_compile.kernels.autocast import without_autocast
from mhc_compile.kernels.engram import fusion, providers
from mhc_compile.kernels.engram.entry import Direction, Entry, Kind, Sizes
from mhc_compile.kernels.engram.spec import FusionSpec
from mhc_compile.kernels.reference import compute_dtype

# Other files of the package register ops of their own under these names.
DIALECT = torch.library.Library("engram", "FRAGMENT")
KERNELS = torch.library.Library("engram_kernels", "FRAGMENT")
_GATE = "Tensor X, Tensor keys, Tensor query_gain, Tensor key_gain, str spec"
_INJECT = "Tensor X, Tensor a, Tensor value, Tensor? reach, Tensor? conv_gain, Tensor? conv, str spec"
_FLOW = "Tensor a, Tensor value, Tensor? reach, Tensor? conv_gain, Tensor? conv, Tensor flow, str spec"
_RECALL = "Tensor X, Tensor keys, Tensor value, Tensor query_gain, Tensor key_gain, "
_RECALL += "Tensor? reach, Tensor conv_gain, Tensor conv, str spec"
_REMEMBER = "Tensor X, Tensor keys, Tensor value, Tensor query_gain, Tensor key_gain, str spec"
Optional = Tensor | None
Op = Callable[..., Any]
# What every token reaches where no reach is given.
_FAR = torch.iinfo(torch.int64).max


def entry_of(
    kind: Kind, streams: Tensor, spec: str, *, keys: Optional = None, value: Optional = None, joins: bool = False
) -> Entry:
    """The fused step that computes a call: `remember` one of its kind, `inject` without a convolution an `add`.

    `recall` is a gate that joins and an `inject`. The tensors may be fake: shapes and dtypes are looked at alone.
    """
    dtypes = [t.dtype if t is not None else torch.float32 for t in (streams, keys, value)]
    return _entry(kind, int(streams.shape[-2]), int(streams.shape[-1]), spec, *dtypes, joins)


@lru_cache(maxsize=1024)
def _entry(
    kind: Kind, n: int, C: int, spec: str, X: torch.dtype, keys: torch.dtype, value: torch.dtype, joins: bool
) -> Entry:
    return Entry(
        kind=kind, streams=n, width=C, spec=FusionSpec.parse(spec),
        streams_dtype=X, keys_dtype=keys, value_dtype=value, joins=joins,
    )  # fmt: skip


def _gate_dialect(X: Tensor, keys: Tensor, query_gain: Tensor, key_gain: Tensor, spec: str) -> Tensor:
    with without_autocast(X):
        return fusion.gate(X, keys, query_gain, key_gain, FusionSpec.parse(spec))


def _inject_dialect(
    X: Tensor, a: Tensor, value: Tensor, reach: Optional, conv_gain: Optional, conv: Optional, spec: str
) -> Tensor:
    with without_autocast(X):
        return fusion.inject(X, a, value, reach, conv_gain, conv, FusionSpec.parse(spec))


def _run(entry: Entry, direction: Direction, tensors: list[Tensor], sizes: Sizes) -> list[Tensor]:
    found = providers.run(entry, direction, dict(zip(entry.arguments(direction), tensors, strict=True)), sizes)
    return [found[name] for name in entry.outputs(direction)]


# Gates and gates with values: tokens do not see each other and are flattened.


def _flat(entry: Entry, direction: Direction, *tensors: Tensor) -> list[Tensor]:
    lead = tensors[0].shape[:-2]
    sizes = Sizes(1, lead.numel())
    of_tokens = ("X", "keys", "value", "d_a", "d_next_X")
    names = entry.arguments(direction)
    flat = [
        t.reshape(1, sizes.tokens, *t.shape[len(lead) :]) if name in of_tokens else t
        for name, t in zip(names, tensors, strict=True)
    ]
    found = _run(entry, direction, flat, sizes)
    plain = [name.removeprefix("d_") for name in entry.outputs(direction)]
    return [
        t.view(*lead, *t.shape[2:]) if name in ("X", "keys", "value", "a", "next_X") else t
        for name, t in zip(plain, found, strict=True)
    ]


def _gate(X: Tensor, keys: Tensor, query_gain: Tensor, key_gain: Tensor, spec: str) -> Tensor:
    return _flat(entry_of("gate", X, spec, keys=keys), "forward", X, keys, query_gain, key_gain)[0]


def _gate_backward(
    X: Tensor, keys: Tensor, query_gain: Tensor, key_gain: Tensor, flow: Tensor, spec: str
) -> tuple[Tensor, ...]:
    entry = entry_of("gate", X, spec, keys=keys)
    return tuple(_flat(entry, "backward", X, keys, query_gain, key_gain, flow))


def _remember(X: Tensor, keys: Tensor, value: Tensor, query_gain: Tensor, key_gain: Tensor, spec: str) -> Tensor:
    entry = entry_of("remember", X, spec, keys=keys, value=value)
    return _flat(entry, "forward", X, keys, value, query_gain, key_gain)[0]


def _remember_backward(
    X: Tensor, keys: Tensor, value: Tensor, query_gain: Tensor, key_gain: Tensor, flow: Tensor, spec: str
) -> tuple[Tensor, ...]:
    entry = entry_of("remember", X, spec, keys=keys, value=value)
    return tuple(_flat(entry, "backward", X, keys, value, query_gain, key_gain, flow))


# Values with gates that are given: tokens may read earlier ones.


def _seen(like: Tensor, reach: Optional) -> Tensor:
    return like.new_full(like.shape[:2], _FAR, dtype=torch.int64) if reach is None else reach


def _inject(
    X: Tensor, a: Tensor, value: Tensor, reach: Optional, conv_gain: Optional, conv: Optional, spec: str
) -> Tensor:
    sizes = Sizes(X.shape[0], X.shape[1], fusion.check_shapes(X, a, value, conv, FusionSpec.parse(spec)))
    if conv is None or conv_gain is None:
        return _run(entry_of("add", X, spec, value=value), "forward", [X, a, value], sizes)[0]
    tensors = [X, a, value, _seen(X, reach), conv_gain, conv]
    return _run(entry_of("inject", X, spec, value=value), "forward", tensors, sizes)[0]


def _inject_backward(
    a: Tensor, value: Tensor, reach: Optional, conv_gain: Optional, conv: Optional, flow: Tensor, spec: str
) -> tuple[Tensor, ...]:
    sizes = Sizes(flow.shape[0], flow.shape[1], a.shape[1] - flow.shape[1])
    if conv is None or conv_gain is None:
        entry = entry_of("add", flow, spec, value=value)
        none = [a.new_empty(0, dtype=entry.dtype("a")) for _ in range(2)]
        return (*_run(entry, "backward", [a, value, flow], sizes), *none)
    tensors = [a, value, _seen(flow, reach), conv_gain, conv, flow]
    return tuple(_run(entry_of("inject", flow, spec, value=value), "backward", tensors, sizes))


def _recall(
    X: Tensor, keys: Tensor, value: Tensor, query_gain: Tensor, key_gain: Tensor,
    reach: Optional, conv_gain: Tensor, conv: Tensor, spec: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    a = _gate(X, keys, query_gain, key_gain, spec)
    return _inject(X, a, value, reach, conv_gain, conv, spec), a


def _recall_backward(
    X: Tensor, keys: Tensor, value: Tensor, query_gain: Tensor, key_gain: Tensor,
    reach: Optional, conv_gain: Tensor, conv: Tensor, a: Tensor, flow: Tensor, flow_a: Tensor, spec: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    d_a, d_value, *d_conv = _inject_backward(a, value, reach, conv_gain, conv, flow, spec)
    entry = entry_of("gate", X, spec, keys=keys, joins=True)
    d_X, d_keys, *d_gains = _flat(entry, "backward", X, keys, query_gain, key_gain, flow, d_a.add_(flow_a))
    return (d_X, d_keys, d_value, *d_gains, *d_conv)


# Fakes: contiguous, values and streams in their own dtypes, all else in the one of the arithmetic.


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


def _wide(dtypes: tuple[torch.dtype, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape, dtype=compute_dtype(*dtypes)) for t in tensors)


def _gate_fake(X: Tensor, keys: Tensor, query_gain: Tensor, key_gain: Tensor, spec: str) -> Tensor:  # noqa: ARG001
    return X.new_empty(X.shape[:-1], dtype=compute_dtype(X.dtype, keys.dtype))


def _gate_backward_fake(
    X: Tensor, keys: Tensor, query_gain: Tensor, key_gain: Tensor, flow: Tensor, spec: str  # noqa: ARG001
) -> tuple[Tensor, ...]:  # fmt: skip
    return (*_like(X, keys), *_wide((X.dtype, keys.dtype), query_gain, key_gain))


def _streams_fake(X: Tensor, *rest: Any) -> Tensor:  # noqa: ARG001
    return _like(X)[0]


def _remember_backward_fake(
    X: Tensor, keys: Tensor, value: Tensor, query_gain: Tensor, key_gain: Tensor, flow: Tensor, spec: str  # noqa: ARG001
) -> tuple[Tensor, ...]:  # fmt: skip
    dtypes = (X.dtype, keys.dtype, value.dtype)
    return (*_like(X, keys, value), *_wide(dtypes, query_gain, key_gain))


def _inject_backward_fake(
    a: Tensor, value: Tensor, reach: Optional, conv_gain: Optional, conv: Optional, flow: Tensor, spec: str  # noqa: ARG001
) -> tuple[Tensor, ...]:  # fmt: skip
    dtypes = (flow.dtype, value.dtype)
    gains = [a.new_empty(0) if t is None else t for t in (conv_gain, conv)]
    return (*_wide(dtypes, a), *_like(value), *_wide(dtypes, *gains))


def _recall_fake(X: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return _like(X)[0], X.new_empty(X.shape[:-1], dtype=compute_dtype(X.dtype, keys.dtype))


def _recall_backward_fake(X: Tensor, keys: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    query_gain, key_gain, _, conv_gain, conv, *_ = rest
    gates, convolved = (X.dtype, keys.dtype), (X.dtype, value.dtype)
    return (*_like(X, keys, value), *_wide(gates, query_gain, key_gain), *_wide(convolved, conv_gain, conv))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.spec = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(op: Op) -> Op:
    def differentiate(ctx: Any, flow: Tensor) -> tuple[Tensor | None, ...]:
        found = op(*ctx.saved_tensors, flow, ctx.spec)
        return (*(g.to(t.dtype) for g, t in zip(found, ctx.saved_tensors, strict=True)), None)

    return differentiate


def _save_inject(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, *tensors, ctx.spec = inputs  # the streams are not looked at again
    ctx.save_for_backward(*tensors)


def _differentiate_inject(ctx: Any, flow: Tensor) -> tuple[Tensor | None, ...]:
    a, value, reach, conv_gain, conv = ctx.saved_tensors
    d_a, d_value, d_gain, d_conv = torch.ops.engram_kernels.inject_backward(
        a, value, reach, conv_gain, conv, flow, ctx.spec
    )
    gains = [None if t is None else g.to(t.dtype) for g, t in ((d_gain, conv_gain), (d_conv, conv))]
    return flow, d_a.to(a.dtype), d_value, None, *gains, None


def _save_recall(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.spec = inputs
    ctx.save_for_backward(*tensors, output[1])


def _differentiate_recall(ctx: Any, flow: Tensor, flow_a: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, a = ctx.saved_tensors
    found = torch.ops.engram_kernels.recall_backward(*tensors, a, flow, flow_a, ctx.spec)
    floats = [t for i, t in enumerate(tensors) if i != 5]
    given = [g.to(t.dtype) for g, t in zip(found, floats, strict=True)]
    return (*given[:5], None, *given[5:], None)


def _no_second_order(ctx: Any, *gradients: Tensor) -> NoReturn:
    raise NotImplementedError("fused kernels have no second derivative; the ops engram::* have PyTorch's")


def _nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _register() -> None:
    tags = (torch.Tag.pt2_compliant_tag,)
    for schema, composite in (
        (f"gate({_GATE}) -> Tensor", _gate_dialect),
        (f"inject({_INJECT}) -> Tensor", _inject_dialect),
    ):
        DIALECT.define(schema, tags=tags)
        DIALECT.impl(schema.split("(", 1)[0], composite, "CompositeImplicitAutograd")
    opaque: dict[str, tuple[Op, Op]] = {
        f"gate({_GATE}) -> Tensor": (_gate, _gate_fake),
        f"gate_backward({_GATE.replace('str', 'Tensor flow, str')}) -> (Tensor, Tensor, Tensor, Tensor)": (
            _gate_backward, _gate_backward_fake,
        ),
        f"remember({_REMEMBER}) -> Tensor": (_remember, _streams_fake),
        f"remember_backward({_REMEMBER.replace('str', 'Tensor flow, str')}) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor)": (_remember_backward, _remember_backward_fake),
        f"recall({_RECALL}) -> (Tensor, Tensor)": (_recall, _recall_fake),
        f"recall_backward({_RECALL.replace('str', 'Tensor a, Tensor flow, Tensor flow_a, str')}) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)": (_recall_backward, _recall_backward_fake),
        f"inject({_INJECT}) -> Tensor": (_inject, _streams_fake),
        f"inject_backward({_FLOW}) -> (Tensor, Tensor, Tensor, Tensor)": (_inject_backward, _inject_backward_fake),
    }  # fmt: skip
    for schema, (kernel, fake) in opaque.items():
        name = schema.split("(", 1)[0]
        KERNELS.define(schema, tags=tags)
        KERNELS.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"engram_kernels::{name}", fake, lib=KERNELS)
    ops = torch.ops.engram_kernels
    gradients: dict[str, tuple[Op, Op]] = {
        "gate": (_differentiate(ops.gate_backward), _save),
        "remember": (_differentiate(ops.remember_backward), _save),
        "recall": (_differentiate_recall, _save_recall),
        "inject": (_differentiate_inject, _save_inject),
    }
    for name, (differentiate, save) in gradients.items():
        register = torch.library.register_autograd
        register(f"engram_kernels::{name}", differentiate, setup_context=save, lib=KERNELS)
        register(f"engram_kernels::{name}_backward", _no_second_order, setup_context=_nothing, lib=KERNELS)


_register()
