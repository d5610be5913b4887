"""The fused steps by which a memory enters the streams: what each takes and gives, whatever target it is generated for.

    gate       a = gate(X, keys)                                        (arXiv 2601.07372, section 3)
    add        X' = X + a v
    inject     X' = X + a v + silu(conv(rmsnorm(a v)))
    remember   X' = X + gate(X, keys) v

u_m = a_m v is of rank one in the streams: its norm needs mean(v^2) and a_m alone, `rms(u_m)^2 = a_m^2 mean(v^2)`, so
that nothing of n*C values a token is read but X (and the keys), or written but X'. The gradient of X through `add` and
`inject` is the one of X', which nobody copies; their backward does not look at X.

Shapes: `B` batch, `S` tokens of this call, `n` streams, `C` hidden size, `L = P' + S` rows, P' of them history.

    X, next_X, keys [B, S, n, C]   a [B, L, n]   value [B, L, C]   reach [B, S] int64
    query_gain, key_gain, conv_gain [n, C]   conv [n, C, taps]

`gate` and `remember` are given B = 1 and P' = 0, tokens flattened. X, keys and value are in dtypes of their own, all
else is float32 (float64 where one of them is). The gradient of a tensor `x` is named `d_x` and has its shape and dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from mhc_compile.kernels.engram.spec import FusionSpec
from mhc_compile.kernels.reference import compute_dtype

Kind = Literal["gate", "add", "inject", "remember"]
Direction = Literal["forward", "backward"]
_INPUTS: dict[Kind, tuple[str, ...]] = {
    "gate": ("X", "keys", "query_gain", "key_gain"),
    "add": ("X", "a", "value"),
    "inject": ("X", "a", "value", "reach", "conv_gain", "conv"),
    "remember": ("X", "keys", "value", "query_gain", "key_gain"),
}


class Sizes(NamedTuple):
    """The sizes of one call."""

    batch: int
    tokens: int
    """S, of one sequence."""
    before: int = 0
    """P', rows of `a` and `value` in front of those of the tokens."""

    @property
    def rows(self) -> int:
        """L, of one sequence."""
        return self.before + self.tokens


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One fused step, forward and backward. Hashable: generated code is cached under it."""

    kind: Kind
    streams: int
    """n."""
    width: int
    """C, the hidden size."""
    spec: FusionSpec
    streams_dtype: torch.dtype = torch.float32
    """Of X and X'."""
    keys_dtype: torch.dtype = torch.float32
    value_dtype: torch.dtype = torch.float32
    joins: bool = False
    """Of a gate whose streams go on to an `inject`: its backward adds the gradient of X' to that of X."""

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
        dtypes = dict.fromkeys(str(t).removeprefix("torch.") for t in self.dtypes())
        return f"{self.kind}{'_joined' if self.joins else ''}_n{self.streams}_c{self.width}_{'_'.join(dtypes)}"

    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of X, keys and value, as far as it has them."""
        keys = (self.keys_dtype,) if self.gates else ()
        return (self.streams_dtype, *keys, *((self.value_dtype,) if self.adds else ()))

    def arguments(self, direction: Direction) -> tuple[str, ...]:
        """What one direction reads, in order."""
        names = _INPUTS[self.kind]
        if direction == "forward":
            return names
        joined = ("d_next_X",) if self.joins else ()
        return (*(names if self.gates else names[1:]), *joined, f"d_{self.outputs('forward')[0]}")

    def outputs(self, direction: Direction) -> tuple[str, ...]:
        """What one direction writes, in order."""
        if direction == "forward":
            return ("next_X",) if self.adds else ("a",)
        given = self.arguments("backward")
        return tuple(f"d_{name}" for name in given if name != "reach" and not name.startswith("d_"))

    def shape(self, name: str, sizes: Sizes) -> tuple[int, ...]:
        """The shape of a value."""
        n, C, (batch, tokens, _) = self.streams, self.width, sizes
        by_name: dict[str, tuple[int, ...]] = {
            "X": (batch, tokens, n, C),
            "next_X": (batch, tokens, n, C),
            "keys": (batch, tokens, n, C),
            "a": (batch, sizes.rows, n),
            "value": (batch, sizes.rows, C),
            "reach": (batch, tokens),
            "query_gain": (n, C),
            "key_gain": (n, C),
            "conv_gain": (n, C),
            "conv": (n, C, self.spec.taps),
        }
        return by_name[name.removeprefix("d_")]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a value."""
        name = name.removeprefix("d_")
        own = {"X": self.streams_dtype, "keys": self.keys_dtype, "value": self.value_dtype, "reach": torch.int64}
        return own.get(name.removeprefix("next_"), compute_dtype(*self.dtypes()))

    def bytes_moved(self, tokens: int, *, backward: bool = False) -> int:
        """What must travel between memory and processor: every value once, parameters and gates left out.

        With n = 4 and equal dtypes, in units of C values a token: `inject` 9 forward and 6 backward, `remember` 13 and
        22.
        """
        X, keys = self.streams * self.streams_dtype.itemsize, self.streams * self.keys_dtype.itemsize
        value = self.value_dtype.itemsize if self.adds else 0
        moved = value
        if self.gates:
            moved += X + keys
        if not backward:
            moved += (X if self.adds and not self.gates else 0) + (X if self.adds else 0)
        else:
            moved += (X if self.adds or self.joins else 0) + value + (X + keys if self.gates else 0)
        return tokens * self.width * moved
