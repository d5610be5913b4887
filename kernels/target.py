"""Define `Target`, the base class of `Cpp` and `Triton`, and `Reference`, which computes in plain PyTorch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mhc_compile.kernels.kernelspec import Direction, KernelSpec, Values


@dataclass(frozen=True)
class Source:
    """Generated code, and its own count of what it moves."""

    text: str
    passes: Mapping[str, int]
    """How often it goes over each wide value from end to end, whether or not a cache holds the value meanwhile."""


Plan = Callable[[Sequence[Tensor]], list[Tensor]]
"""Computes one direction: from its inputs, in order, its outputs, in order."""


class Target(ABC):
    """Computes what specifications say."""

    name: ClassVar[str]

    @abstractmethod
    def unsupported(self, spec: KernelSpec) -> str:
        """Return why there is no kernel for `spec`, or ""."""

    @abstractmethod
    def source(self, spec: KernelSpec, direction: Direction) -> Source:
        """Generate the code of one direction. Raises ValueError where the target generates none."""

    def prepare(self, spec: KernelSpec, directions: Sequence[Direction], *, wait: bool) -> None:  # noqa: B027
        """Begin to compile `directions`, where that can be done before the first call.

        Unless calls are to `wait`, plain PyTorch may compute them meanwhile.
        """

    def wait(self) -> None:  # noqa: B027
        """Wait until everything that was begun is compiled."""

    @abstractmethod
    def run(self, spec: KernelSpec, direction: Direction, values: Values) -> dict[str, Tensor]:
        """Compute one direction from its inputs, in order; return its outputs by name."""

    def plan(self, spec: KernelSpec, direction: Direction, values: Values) -> Plan | None:  # noqa: ARG002
        """Return what computes contiguous inputs of the same shapes and dtypes from now on; None: `run` does."""
        return None


class Reference(Target):
    """Plain PyTorch, for any device, dtype and specification; kernels are tested against it."""

    name = "reference"

    def unsupported(self, spec: KernelSpec) -> str:  # noqa: ARG002
        """Return "": everything has a reference."""
        return ""

    def source(self, spec: KernelSpec, direction: Direction) -> Source:
        """Raise ValueError: nothing is generated."""
        raise ValueError(f"{spec.name}: plain PyTorch computes the {direction}")

    def run(self, spec: KernelSpec, direction: Direction, values: Values) -> dict[str, Tensor]:
        """Compute one direction, the backward by autograd."""
        if direction == "forward":
            out = spec.reference(values)
            # An output that is its input (a copy of n = 1 streams) would be an alias, which an op must not return.
            taken = {id(t) for t in values.values()}
            fresh = {name: out[name].clone() if id(out[name]) in taken else out[name] for name in spec.outputs()}
            return {name: t.to(spec.dtype(name)).contiguous() for name, t in fresh.items()}
        names = [name.removeprefix("d_") for name in spec.outputs("backward")]
        flows = {name.removeprefix("d_"): t for name, t in values.items() if name.startswith("d_")}
        with autograd_inside_an_op(next(iter(values.values())).device.type):
            leaves = {name: values[name].detach().requires_grad_() for name in names}
            out = spec.reference({**values, **leaves})
            used = [name for name in flows if out[name].requires_grad]
            gradients = torch.autograd.grad(
                [out[name] for name in used],
                list(leaves.values()),
                [flows[name].to(out[name].dtype) for name in used],
                allow_unused=True,
            )
        return {
            f"d_{name}": (torch.zeros_like(t) if g is None else g).to(spec.dtype(name)).contiguous()
            for (name, t), g in zip(leaves.items(), gradients, strict=True)
        }


@contextmanager
def autograd_inside_an_op(device: str) -> Iterator[None]:
    """Record gradients inside an op's kernel, where the dispatcher has switched autograd off."""
    keys = ["AutogradFunctionality", f"Autograd{ {'cpu': 'CPU', 'cuda': 'CUDA', 'meta': 'Meta'}.get(device, 'Other') }"]
    with ExitStack() as stack:
        for key in [*keys, "ADInplaceOrView"]:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(getattr(torch._C.DispatchKey, key), False))
        stack.enter_context(torch.enable_grad())
        yield
