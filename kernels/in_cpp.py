"""Generated C++: compile it and call it on tensors of a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mhc_compile.kernels.attend import Attend
from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.cpp import attend, backward, build, forward
from mhc_compile.kernels.cpp.memory import POOL
from mhc_compile.kernels.kernelspec import Direction, KernelSpec, Sizes, Values, dtypes_against, laid_out
from mhc_compile.kernels.memory.cpp import convolution, tokens
from mhc_compile.kernels.memory.step import MemoryStep
from mhc_compile.kernels.mixtures import MAX_ROWS, MIXTURES
from mhc_compile.kernels.target import Plan, Reference, Source, Target

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# A backward keeps every step's matrix of LANES tokens on a thread's stack.
MAX_STEPS_BYTES = 1 << 20
_REFERENCE = Reference()
_WAITS: dict[tuple[KernelSpec, Direction], bool] = {}
"""Whether calls wait for the compiler; those of kernels that nobody has prepared do."""


class Cpp(Target):
    """C++ for this machine's vectors."""

    name = "cpp"

    def unsupported(self, spec: KernelSpec) -> str:
        """Return why there is no generated C++ for `spec`, or ""."""
        if reason := dtypes_against(spec, FLOATS):
            return f"C++: {reason}"
        if isinstance(spec, Chain) and spec.weights == "site":
            stream = spec.stream
            if stream.manifold in MIXTURES and not 0 < stream.mix_rows <= MAX_ROWS:
                return f"no C++ kernel for {stream.manifold} with {stream.mix_rows} logits"
            if spec.uses_sinkhorn and not 1 <= stream.iterations <= MAX_STEPS_BYTES // (128 * spec.n**2):
                return f"no C++ kernel for {stream.iterations} Sinkhorn iterations"
        return "no C++ compiler" if build.no_compiler() else ""

    def source(self, spec: KernelSpec, direction: Direction) -> Source:
        """Generate the C++ of one direction."""
        return _emitter(spec, direction)(spec, build.lanes())

    def prepare(self, spec: KernelSpec, directions: Sequence[Direction], *, wait: bool) -> None:
        """Begin to compile `directions`, beside whatever else is compiled meanwhile."""
        for direction in directions:
            _WAITS[spec, direction] = wait or _WAITS.get((spec, direction), False)
            library(spec, direction)

    def wait(self) -> None:
        """Wait until everything that was begun is compiled."""
        for spec, direction in list(_WAITS):
            library(spec, direction).result()

    def run(self, spec: KernelSpec, direction: Direction, values: Values) -> dict[str, Tensor]:
        """Call the compiled function: from the cache, or as soon as it is compiled.

        Meanwhile plain PyTorch computes what need not `wait`, unless PyTorch is to be deterministic.
        """
        if not self._ready(spec, direction):
            return _REFERENCE.run(spec, direction, values)
        names, sizes = spec.outputs(direction), spec.sizes(values)
        if not spec.numbers(sizes)["tokens"]:
            return {name: torch.zeros(spec.shape(name, sizes), dtype=spec.dtype(name)) for name in names}
        arguments, stride = laid_out(spec, values)
        return dict(zip(names, _call(spec, direction, sizes, stride)([*arguments.values()]), strict=True))

    def plan(self, spec: KernelSpec, direction: Direction, values: Values) -> Plan | None:
        """Return the compiled function with everything that depends on shapes and dtypes, once it is loaded."""
        sizes = spec.sizes(values)
        converted = any(t.dtype != spec.dtype(name) for name, t in values.items())
        if converted or not spec.numbers(sizes)["tokens"] or not library(spec, direction).done():
            return None
        return _call(spec, direction, sizes, spec.n * spec.width)

    @staticmethod
    def _ready(spec: KernelSpec, direction: Direction) -> bool:
        waits = _WAITS.get((spec, direction), True) or torch.are_deterministic_algorithms_enabled()
        return waits or library(spec, direction).done()


def _call(spec: KernelSpec, direction: Direction, sizes: Sizes, stride: int) -> Plan:
    """Return the compiled function for inputs that are laid out."""
    outputs = [(spec.shape(name, sizes), spec.dtype(name)) for name in spec.outputs(direction)]
    counts = [*spec.numbers(sizes).values(), stride]
    numbers = (ctypes.c_int64 * len(counts))(*counts)
    function = getattr(library(spec, direction).result(), direction)
    pointers = ctypes.c_void_p * (len(spec.inputs(direction)) + len(outputs))

    def call(inputs: Sequence[Tensor]) -> list[Tensor]:
        out = [POOL.empty(shape, dtype) for shape, dtype in outputs]
        addresses = pointers(*[t.data_ptr() for t in inputs], *[t.data_ptr() for t in out])
        function(addresses, numbers, ctypes.c_int(torch.get_num_threads()))
        return out

    return call


def _emitter(spec: KernelSpec, direction: Direction) -> Callable[[Any, int], Source]:
    if isinstance(spec, Chain):
        return forward.forward_source if direction == "forward" else backward.backward_source
    if isinstance(spec, Attend):
        return attend.forward_source if direction == "forward" else attend.backward_source
    assert isinstance(spec, MemoryStep)
    emits = convolution if spec.convolves else tokens
    return emits.forward_source if direction == "forward" else emits.backward_source


@cache
def library(spec: KernelSpec, direction: Direction) -> Future[Any]:
    """Return the library with one direction, which is being compiled; the future raises what goes wrong."""
    return build.begin(f"{spec.name}_{direction}", lambda: TARGET.source(spec, direction).text)


TARGET = Cpp()
