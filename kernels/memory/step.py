"""The fused steps by which a memory enters the streams: what each reads and writes, for any target.

    gate       a = gate(X, keys)                                        (arXiv 2601.07372, section 3)
    add        X' = X + a v
    inject     X' = X + a v + silu(conv(rmsnorm(a v)))
    remember   X' = X + gate(X, keys) v

u_m = a_m v is of rank one in the streams: its norm needs mean(v^2) and a_m alone, `rms(u_m)^2 = a_m^2 mean(v^2)`. Of
n*C values per token, only X (and the keys) are read and only X' is written. The gradient of X through `add` and
`inject` is that of X', without a copy; their backward does not read X.

Shapes: `B` batch, `S` tokens of this call, `n` streams, `C` hidden size, `L = P' + S` rows, P' of them history.

    X, next_X, keys [B, S, n, C]   a [B, L, n]   value [B, L, C]   reach [B, S] int64
    query_gain, key_gain, conv_gain [n, C]   conv [n, C, taps]

`gate` and `remember` take any leading dimensions and have no history. X, keys and value are in dtypes of their own, all
else is float32 (float64 where one of them is).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from mhc_compile.kernels.kernelspec import Direction, KernelSpec, Sizes, Values, dtype_names
from mhc_compile.kernels.memory import fusion
from mhc_compile.kernels.memory.spec import FusionSpec
from mhc_compile.kernels.reference import compute_dtype

Kind = Literal["gate", "add", "inject", "remember"]
_INPUTS: dict[Kind, tuple[str, ...]] = {
    "gate": ("X", "keys", "query_gain", "key_gain"),
    "add": ("X", "a", "value"),
    "inject": ("X", "a", "value", "reach", "conv_gain", "conv"),
    "remember": ("X", "keys", "value", "query_gain", "key_gain"),
}
# Stands for the reach of every token where the caller gives none: no limit.
_FAR = torch.iinfo(torch.int64).max


@dataclass(frozen=True, kw_only=True)
class MemoryStep(KernelSpec):
    """One fused step.

    The sizes of a call are the leading dimensions of the streams, and then P' where it can have history.
    """

    WIDE: ClassVar[tuple[str, ...]] = ("X", "next_X", "keys", "value")

    kind: Kind
    streams: int
    """n."""
    width: int
    """C, the hidden size."""
    spec: FusionSpec
    streams_dtype: torch.dtype = torch.float32
    """The dtype of the streams before and after the step, X and X'."""
    keys_dtype: torch.dtype = torch.float32
    value_dtype: torch.dtype = torch.float32
    joins: bool = False
    """Whether a `gate` hands its streams on to an `inject`; its backward then adds the gradient of X' to that of X."""

    @property
    def n(self) -> int:
        """The number of streams."""
        return self.streams

    @property
    def gates(self) -> bool:
        """Whether it computes the gates from X and keys."""
        return self.kind in ("gate", "remember")

    @property
    def adds(self) -> bool:
        """Whether it writes X'."""
        return self.kind != "gate"

    @property
    def convolves(self) -> bool:
        """Whether tokens read values of earlier ones."""
        return self.kind == "inject"

    @property
    def name(self) -> str:
        """A name for generated functions: `remember_n4_c1024_float32`."""
        joined = "_joined" if self.joins else ""
        return f"{self.kind}{joined}_n{self.streams}_c{self.width}_{dtype_names([*self.floats().values()])}"

    def floats(self) -> dict[str, torch.dtype]:
        """Return the dtypes of X, keys and value, as far as it has them."""
        keys = {"keys": self.keys_dtype} if self.gates else {}
        return {"X": self.streams_dtype, **keys, **({"value": self.value_dtype} if self.adds else {})}

    def inputs(self, direction: Direction = "forward") -> tuple[str, ...]:
        """Return the names of what one direction reads, in order."""
        names = _INPUTS[self.kind]
        if direction == "forward":
            return names
        joined = ("d_next_X",) if self.joins else ()
        return (*(names if self.gates else names[1:]), *joined, *(f"d_{name}" for name in self.outputs()))

    def outputs(self, direction: Direction = "forward") -> tuple[str, ...]:
        """Return the names of what one direction writes, in order."""
        if direction == "forward":
            return ("next_X",) if self.adds else ("a",)
        names = self.inputs("backward")
        return tuple(f"d_{name}" for name in names if name != "reach" and not name.startswith("d_"))

    def shape(self, name: str, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape of a value."""
        n, C = self.streams, self.width
        lead = sizes if self.gates else sizes[:2]
        rows = sizes if self.gates else (sizes[0], sizes[1] + sizes[2])
        by_name: dict[str, tuple[int, ...]] = {
            "X": (*lead, n, C),
            "keys": (*lead, n, C),
            "a": (*rows, n),
            "value": (*rows, C),
            "dv": (*rows, C),
            "reach": lead,
            "query_gain": (n, C),
            "key_gain": (n, C),
            "conv_gain": (n, C),
            "conv": (n, C, self.spec.taps),
        }
        return by_name[name.removeprefix("d_").removeprefix("next_")]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a value."""
        name = name.removeprefix("d_").removeprefix("next_")
        own = {"X": self.streams_dtype, "keys": self.keys_dtype, "value": self.value_dtype, "reach": torch.int64}
        return own.get(name, compute_dtype(*self.floats().values()))

    def sizes(self, values: Values) -> Sizes:
        """Return the leading dimensions of the streams, and P' where it can have history."""
        lead = tuple((values["X"] if "X" in values else values["d_next_X"]).shape[:-2])
        return lead if self.gates else (*lead, values["value"].shape[1] - lead[1])

    @property
    def one_token(self) -> Sizes:
        """The sizes of a call with one token."""
        return (1,) if self.gates else (1, 1, 0)

    def numbers(self, sizes: Sizes) -> dict[str, int]:
        """Return the number of tokens, that of one sequence, and P'."""
        if self.gates:
            return {"tokens": math.prod(sizes), "length": math.prod(sizes), "before": 0}
        return {"tokens": sizes[0] * sizes[1], "length": sizes[1], "before": sizes[2]}

    def of_dtypes(self, values: Values) -> Self:
        """Return the step for streams, keys and values of the dtypes at hand."""
        known = {name: values[name].dtype for name in self.floats()}
        keys, value = (known.get(name, torch.float32) for name in ("keys", "value"))
        return replace(self, streams_dtype=known["X"], keys_dtype=keys, value_dtype=value)

    def call(self, values: Values, direction: Direction) -> dict[str, Tensor]:
        """Return the inputs of one direction, in order. Raises `MHCError` MHC220 for shapes that do not fit."""
        if not self.gates:
            like = values["X"] if "X" in values else values["d_next_X"]
            fusion.check_shapes(like, values["a"], values["value"], values.get("conv"), self.spec)
            if self.convolves and values.get("reach") is None:
                values = {**values, "reach": like.new_full(like.shape[:2], _FAR, dtype=torch.int64)}
        return super().call(values, direction)

    def reference(self, values: Values) -> dict[str, Tensor]:
        """Compute the output of the forward in plain PyTorch; of a gate that joins, X' = X with it.

        The streams may be missing where the gradients do not depend on them.
        """
        X = values["X"] if "X" in values else values["d_next_X"].new_zeros(values["d_next_X"].shape)
        if self.gates:
            a = fusion.gate(X, values["keys"], values["query_gain"], values["key_gain"], self.spec)
        else:
            a = values["a"]
        if not self.adds:
            return {"a": a, **({"next_X": X} if self.joins else {})}
        value, lead = values["value"], X.shape
        if self.gates:  # of any leading dimensions
            X, a, value = (t.reshape(1, -1, *t.shape[len(lead) - 2 :]) for t in (X, a, value))
        reach, gain, conv = (values.get(name) for name in ("reach", "conv_gain", "conv"))
        return {"next_X": fusion.inject(X, a, value, reach, gain, conv, self.spec).view(lead)}

    def bytes_moved(self, tokens: int, *, backward: bool = False) -> int:
        """Return what must travel between memory and processor: every value once, without parameters and gates.

        With n = 4 and equal dtypes, in units of C values per token: `inject` 9 forward and 6 backward, `remember` 13
        and 22.
        """
        X, keys = self.streams * self.streams_dtype.itemsize, self.streams * self.keys_dtype.itemsize
        value, gated = self.adds * self.value_dtype.itemsize, self.gates * (X + keys)
        if backward:
            return tokens * self.width * (2 * value + 2 * gated + (self.adds or self.joins) * X)
        read = self.adds and not self.gates
        return tokens * self.width * (value + gated + (read + self.adds) * X)

    def operations(self, tokens: int, *, backward: bool = False) -> int:
        """Return the multiplications and additions over the width: of gates three sums a stream, of taps two."""
        each = 6 * self.gates + 2 * self.adds + (2 * self.spec.taps + 2) * self.convolves
        return tokens * self.width * self.streams * each * (2 if backward else 1)
