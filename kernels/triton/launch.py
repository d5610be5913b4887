"""Load generated Triton, choose its tiles, launch it, and compile it for GPUs that need not be here."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from mhc_compile.kernels.kernelspec import Direction, KernelSpec, Values
from mhc_compile.kernels.target import Source
from mhc_compile.kernels.triton.build import Compiled, compile_kernel, module_of
from mhc_compile.kernels.triton.tiles import TileConfig, autotunes, fastest, shipped

_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
_MEASURED: dict[str, TileConfig] = {}


@dataclass(frozen=True)
class Call:
    """One launch of a kernel with one tile configuration."""

    values: dict[str, Tensor]
    numbers: dict[str, int]
    grid: tuple[int, ...]


class Launcher(ABC):
    """How the kernels of one class of specifications are generated, cut and launched."""

    SCRATCH: tuple[str, ...]
    """Names of tensors that are no values of the specification, all float32."""

    @abstractmethod
    def source(self, spec: Any, direction: Direction) -> Source:
        """Generate the Python file of one direction."""

    @abstractmethod
    def kernels(self, spec: Any, direction: Direction) -> tuple[str, ...]:
        """Return the kernels of one direction, in the order of their launches."""

    @abstractmethod
    def pointers(self, spec: Any, kernel: str) -> tuple[str, ...]:
        """Return the tensors that a kernel takes, in order."""

    @abstractmethod
    def tiles(self, spec: Any, kernel: str, arch: int | str) -> list[TileConfig]:
        """Return what measuring tries for an architecture, first the choice without measuring."""

    @abstractmethod
    def constants(self, spec: Any, kernel: str, backend: str, tile: TileConfig) -> dict[str, Any]:
        """Return the kernel's constants for a backend (`cuda`, `hip`)."""

    @abstractmethod
    def run(self, spec: Any, direction: Direction, values: Values) -> dict[str, Tensor]:
        """Launch the kernels of one direction; return its outputs by name."""

    @cache  # noqa: B019  (a launcher lives as long as the process)
    def load(self, spec: KernelSpec, direction: Direction) -> ModuleType:
        """Import the generated file, whose kernels Triton compiles at their first call.

        Under `TRITON_INTERPRET=1` they run on CPU tensors. Raises ImportError where there is no Triton.
        """
        return module_of(f"{spec.name}_{direction}", self.source(spec, direction).text)

    def launch(
        self, spec: KernelSpec, direction: Direction, kernel: str, device: torch.device,
        call: Callable[[TileConfig], Call],
    ) -> Call:  # fmt: skip
        """Launch a kernel with its default tile, or the fastest where measuring is asked for."""
        tile = self._tile(spec, direction, kernel, device, call)
        launched = call(tile)
        self.start(spec, direction, kernel, tile, launched)
        return launched

    def start(self, spec: KernelSpec, direction: Direction, kernel: str, tile: TileConfig, call: Call) -> None:
        """Launch a kernel with a tile."""
        fn, device = getattr(self.load(spec, direction), kernel), next(iter(call.values.values())).device
        options: dict[str, Any] = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
        if device.type == "cpu":  # the interpreter
            options = {}
        backend = "cuda" if device.type == "cuda" and not torch.version.hip else "other"
        with torch.cuda.device(device) if device.type == "cuda" else torch.device(device):
            fn[call.grid](
                *(call.values[name] for name in self.pointers(spec, kernel)),
                **call.numbers,
                **self.constants(spec, kernel, backend, tile),
                **options,
            )

    def _tile(
        self, spec: KernelSpec, direction: Direction, kernel: str, device: torch.device,
        call: Callable[[TileConfig], Call],
    ) -> TileConfig:  # fmt: skip
        tiles = self.tiles(spec, kernel, arch_of(device))
        if device.type != "cuda":
            return tiles[0]
        key = self.key(spec, direction, kernel, device)
        if not autotunes():
            return shipped().get(key, tiles[0])
        if key not in _MEASURED:
            from triton.testing import do_bench

            def milliseconds(tile: TileConfig) -> float:
                launch = call(tile)
                return float(do_bench(lambda: self.start(spec, direction, kernel, tile, launch)))

            _MEASURED[key] = fastest(key, tiles, milliseconds)
        return _MEASURED[key]

    @cache  # noqa: B019  (a launcher lives as long as the process)
    def key(self, spec: KernelSpec, direction: Direction, kernel: str, device: torch.device) -> str:
        """Return the name under which the fastest tile of a kernel is kept: of its text and the device."""
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        digest = hashlib.sha256(f"{self.source(spec, direction).text}\n{gpu}".encode()).hexdigest()[:16]
        return f"{spec.name}_{kernel}_{digest}"

    def compile_for(
        self,
        spec: KernelSpec,
        direction: Direction,
        kernel: str,
        backend: Literal["cuda", "hip"],
        arch: int | str,
        tile: TileConfig | None = None,
    ) -> Compiled:
        """Compile one kernel for an architecture (`("cuda", 90)`, `("hip", "gfx942")`) on any machine.

        Raises ImportError without Triton and what its compiler raises.
        """
        tile = tile or self.tiles(spec, kernel, arch)[0]
        fn, names = getattr(self.load(spec, direction), kernel), self.pointers(spec, kernel)
        constants = self.constants(spec, kernel, backend, tile)

        def type_of(name: str) -> str:
            if name not in names:
                return "constexpr" if name in constants else "i64"
            return _POINTERS[torch.float32 if name in self.SCRATCH else spec.dtype(name)]

        # A launch would detect this from the tensors: storage is aligned to 16 bytes, as are tokens of such a width.
        aligned = [i for i, name in enumerate(fn.arg_names) if name in names]
        if spec.n * spec.width % 16 == 0 and "x_stride" in fn.arg_names:
            aligned.append(fn.arg_names.index("x_stride"))
        types = {name: type_of(name) for name in fn.arg_names}
        return compile_kernel(fn, types, constants, aligned, backend, arch, tile)


def interprets() -> bool:
    """Return whether Triton runs on the CPU here: `TRITON_INTERPRET=1` was set before it was imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1" and importlib.util.find_spec("triton") is not None


@cache
def arch_of(device: torch.device) -> int | str:
    """Return the architecture of a GPU (80, 90, ... of NVIDIA's, "gfx942", ... of AMD's)."""
    if device.type != "cuda":  # the interpreter: any will do
        return 90
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
