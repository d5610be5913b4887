"""Specify what a kernel computes, independent of the target: the base class of `Chain` and `MemoryStep`."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
Values = Mapping[str, Tensor]
Sizes = tuple[int, ...]
"""The sizes of one call beside those that the specification fixes: of a chain the leading dimensions of its streams."""


class KernelSpec(ABC):
    """One fused computation, forward and backward. Hashable: generated code is cached under it.

    Values go by name. The gradient of a value `x` is named `d_x` and has its shape and dtype. The backward reads some
    of the forward's inputs and outputs and the gradients of outputs, and writes the gradients of inputs.
    """

    kind: str
    width: int
    """C, the hidden size."""
    WIDE: ClassVar[tuple[str, ...]]
    """The values that have the size of the streams or of the hidden size."""

    @property
    def one_token(self) -> Sizes:
        """The sizes of a call with one token."""
        return (1,)

    @property
    @abstractmethod
    def name(self) -> str:
        """A name for generated functions and tables."""

    @property
    @abstractmethod
    def n(self) -> int:
        """The number of streams."""

    @abstractmethod
    def floats(self) -> dict[str, torch.dtype]:
        """Return the dtypes that calls differ in, by the name of a value."""

    @abstractmethod
    def inputs(self, direction: Direction = "forward") -> tuple[str, ...]:
        """Return the names of what one direction reads: the order of pointers in code and of arguments of ops."""

    @abstractmethod
    def outputs(self, direction: Direction = "forward") -> tuple[str, ...]:
        """Return the names of what one direction writes, in order."""

    @abstractmethod
    def shape(self, name: str, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape of a value."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a value."""

    @abstractmethod
    def sizes(self, values: Values) -> Sizes:
        """Return the sizes of the call whose inputs, of either direction, are `values`."""

    @abstractmethod
    def numbers(self, sizes: Sizes) -> dict[str, int]:
        """Return what generated code is told of the sizes, `tokens` among it, by name."""

    @abstractmethod
    def of_dtypes(self, values: Values) -> Self:
        """Return the specification of the same computation on values of other dtypes."""

    @abstractmethod
    def reference(self, values: Values) -> dict[str, Tensor]:
        """Compute the outputs of the forward in plain PyTorch."""

    @abstractmethod
    def bytes_moved(self, tokens: int, *, backward: bool = False) -> int:
        """Return the bytes that must travel between memory and processor: every value once."""

    @abstractmethod
    def operations(self, tokens: int, *, backward: bool = False) -> int:
        """Return the multiplications and additions over the width."""

    def call(self, values: Values, direction: Direction) -> dict[str, Tensor]:
        """Return the inputs of one direction from `values`, in order."""
        return {name: values[name] for name in self.inputs(direction)}

    def bytes_token(self, direction: Direction, passes: Mapping[str, int] | None = None) -> int:
        """Return the bytes that one token more moves: at least, or by code that goes `passes` times over each value.

        This is the one figure of reports, tables and comparisons. Parameters are read once, whatever the number of
        tokens, and do not count.
        """
        back = direction == "backward"
        least = self.bytes_moved(2, backward=back) - self.bytes_moved(1, backward=back)
        once = self.wide(direction)
        again = {name: count - (name in once) for name, count in (passes or {}).items()}
        sizes = {name: math.prod(self.shape(name, self.one_token)) * self.dtype(name).itemsize for name in again}
        return least + sum(count * sizes[name] for name, count in again.items())

    def wide(self, direction: Direction) -> tuple[str, ...]:
        """Return the names among inputs and outputs of what has the size of the streams or of the hidden size."""
        every = (*self.inputs(direction), *self.outputs(direction))
        return tuple(name for name in every if name.removeprefix("d_") in self.WIDE)


def dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    """Return the dtypes' names for a specification's name, each once: `bfloat16_float32`."""
    return "_".join(str(t).removeprefix("torch.") for t in dict.fromkeys(dtypes))


def dtypes_against(spec: KernelSpec, known: Sequence[torch.dtype]) -> str:
    """Return why a target with kernels for the `known` dtypes has none for `spec`, or ""."""
    dtypes = spec.floats()
    if others := [f"{name} in {t}" for name, t in dtypes.items() if t not in known]:
        return f"kernels are for {', '.join(str(t).removeprefix('torch.') for t in known)}, not {', '.join(others)}"
    if "y" in dtypes and torch.promote_types(dtypes["X"], dtypes["y"]) != dtypes["X"]:
        return f"a branch in {dtypes['y']} makes the streams change from {dtypes['X']}"
    return ""


def token_stride(X: Tensor) -> int | None:
    """Return the elements from one token's streams to the next in X `[..., n, C]`, or None where that step varies."""
    *lead, n, C = X.shape
    if (C > 1 and X.stride(-1) != 1) or (n > 1 and X.stride(-2) != C):
        return None
    steps = [(size, X.stride(i)) for i, size in enumerate(lead) if size > 1]
    for (_, outer), (size, inner) in itertools.pairwise(steps):
        if outer != size * inner:
            return None
    return steps[-1][1] if steps else n * C


def laid_out(spec: KernelSpec, values: Values) -> tuple[dict[str, Tensor], int]:
    """Return the values as generated code reads them, contiguous in their dtypes, and the stride of X from token to
    token, which may have one of its own."""
    stride = token_stride(values["X"]) if "X" in values else None
    ready = {
        name: t if name == "X" and stride is not None else t.to(spec.dtype(name)).contiguous()
        for name, t in values.items()
    }
    return ready, spec.n * spec.width if stride is None else stride
