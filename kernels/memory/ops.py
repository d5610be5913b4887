"""The ops by which a memory enters the streams, registered with `torch.library` on import.

`engram::*` is the dialect of the graph passes: composite, plain PyTorch of `mhc_compile.kernels.memory.fusion` inside,
with autocast off. `spec` is always `str(FusionSpec)`.

    engram::gate(X [..., n, C], keys [..., n, C], query_gain [n, C], key_gain [n, C], spec) -> a [..., n]
    engram::inject(X [B, S, n, C], a [B, P' + S, n], value [B, P' + S, C], reach [B, S]?, conv_gain [n, C]?,
                   conv [n, C, taps]?, spec) -> like X

`engram_kernels::gate` and `inject` are the same, opaque to every compiler; `add` is an `inject` without a convolution.
A gate and what it lets in are one op where there is no history:

    engram_kernels::add(X, a, value, spec) -> X'
    engram_kernels::remember(X, keys, value, query_gain, key_gain, spec) -> X'
    engram_kernels::recall(X, keys, value, query_gain, key_gain, reach?, conv_gain, conv, spec) -> X', a

They add the gradient of X' to that of X where they form it, not in a pass of its own. The hashing ops come with these
(`mhc_compile.kernels.memory.hash_ops`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import mhc_compile.kernels.memory.hash_ops  # noqa: F401  (registers the hashing ops)
from mhc_compile.kernels.autocast import without_autocast
from mhc_compile.kernels.kernelspec import Values
from mhc_compile.kernels.memory import fusion
from mhc_compile.kernels.memory.spec import FusionSpec
from mhc_compile.kernels.memory.step import Kind, MemoryStep
from mhc_compile.kernels.registration import KernelOp, register

# Other files of the package register ops of their own under these names.
DIALECT = torch.library.Library("engram", "FRAGMENT")
KERNELS = torch.library.Library("engram_kernels", "FRAGMENT")
_GATE = "Tensor X, Tensor keys, Tensor query_gain, Tensor key_gain, str spec"
_INJECT = "Tensor X, Tensor a, Tensor value, Tensor? reach, Tensor? conv_gain, Tensor? conv, str spec"
Optional = Tensor | None


@lru_cache(maxsize=1024)
def _step(
    kind: Kind, n: int, C: int, spec: str, X: torch.dtype, keys: torch.dtype, value: torch.dtype, joins: bool
) -> MemoryStep:
    return MemoryStep(
        kind=kind, streams=n, width=C, spec=FusionSpec.parse(spec),
        streams_dtype=X, keys_dtype=keys, value_dtype=value, joins=joins,
    )  # fmt: skip


def _steps_of(prototypes: tuple[MemoryStep, ...], values: Values, static: Sequence[Any]) -> tuple[MemoryStep, ...]:
    X = values["X"] if "X" in values else values["d_next_X"]
    steps = []
    for p in prototypes:
        # Those that a step has not are the same for every call: it is compiled once.
        dtypes = [values[k].dtype if k in p.floats() else torch.float32 for k in ("keys", "value")]
        steps.append(_step(p.kind, int(X.shape[-2]), int(X.shape[-1]), static[0], X.dtype, *dtypes, p.joins))
    return tuple(steps)


def _gate_dialect(X: Tensor, keys: Tensor, query_gain: Tensor, key_gain: Tensor, spec: str) -> Tensor:
    with without_autocast(X):
        return fusion.gate(X, keys, query_gain, key_gain, FusionSpec.parse(spec))


def _inject_dialect(
    X: Tensor, a: Tensor, value: Tensor, reach: Optional, conv_gain: Optional, conv: Optional, spec: str
) -> Tensor:
    with without_autocast(X):
        return fusion.inject(X, a, value, reach, conv_gain, conv, FusionSpec.parse(spec))


def _register() -> None:
    tags = (torch.Tag.pt2_compliant_tag,)
    for schema, composite in (
        (f"gate({_GATE}) -> Tensor", _gate_dialect),
        (f"inject({_INJECT}) -> Tensor", _inject_dialect),
    ):
        DIALECT.define(schema, tags=tags)
        DIALECT.impl(schema.split("(", 1)[0], composite, "CompositeImplicitAutograd")

    def step(kind: Kind, *, joins: bool = False) -> MemoryStep:
        return MemoryStep(kind=kind, streams=1, width=1, spec=FusionSpec(), joins=joins)

    in_a_row = (step("gate", joins=True), step("inject"))
    recall = {
        "inputs": ("X", "keys", "value", "query_gain", "key_gain", "reach", "conv_gain", "conv"),
        "outputs": ("next_X", "a"),
    }
    through = {"same_gradient": {"X": "next_X"}}
    ops: dict[str, tuple[tuple[MemoryStep, ...], dict[str, Any]]] = {
        "gate": ((step("gate"),), {}),
        "add": ((step("add"),), through),
        "inject": ((step("inject"),), {**through, "optional": ("reach",)}),
        "remember": ((step("remember"),), {}),
        "recall": (in_a_row, {**recall, "optional": ("reach",)}),
    }
    for name, (steps, more) in ops.items():
        register(KernelOp(library=KERNELS, name=name, prototypes=steps, specs_of=partial(_steps_of, steps), **more))


_register()
