"""Generated Triton: for a GPU, or under `TRITON_INTERPRET=1` for a CPU."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from mhc_compile.kernels.attend import Attend
from mhc_compile.kernels.chain import NORMED, Chain
from mhc_compile.kernels.kernelspec import Direction, KernelSpec, Values, dtypes_against
from mhc_compile.kernels.memory.step import MemoryStep
from mhc_compile.kernels.memory.triton.steps import StepLauncher
from mhc_compile.kernels.mixtures import MAX_ROWS, MIXTURES
from mhc_compile.kernels.target import Source, Target
from mhc_compile.kernels.triton.attend import AttendLauncher, too_large
from mhc_compile.kernels.triton.chains import ChainLauncher
from mhc_compile.kernels.triton.launch import Launcher

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LAUNCHERS: dict[type[KernelSpec], Launcher] = {
    Chain: ChainLauncher(),
    MemoryStep: StepLauncher(),
    Attend: AttendLauncher(),
}


def launcher_of(spec: KernelSpec) -> Launcher:
    """Return what launches the kernels of `spec`, and compiles them for GPUs that need not be here."""
    return _LAUNCHERS[type(spec)]


class Triton(Target):
    """Triton, compiled at the first call."""

    name = "triton"

    def unsupported(self, spec: KernelSpec) -> str:
        """Return why there is no generated Triton for `spec`, or ""."""
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if reason := dtypes_against(spec, FLOATS):
            return f"Triton: {reason}"
        if isinstance(spec, Chain):
            if spec.weights == "site" and spec.stream.manifold in MIXTURES and not 0 < spec.stream.mix_rows <= MAX_ROWS:
                return f"no Triton kernel for {spec.stream.manifold} with {spec.stream.mix_rows} logits"
            if spec.fills and spec.stream.mix_rows > MAX_ROWS:
                return f"no Triton kernel for transportation with {spec.stream.mix_rows} logits"
            if spec.uses_sinkhorn and spec.stream.iterations < 1:
                return "no Triton kernel without a Sinkhorn iteration"
            if spec.norm != "none" and spec.kind not in NORMED:
                return f"no Triton kernel for {spec.kind} with a norm"
        if isinstance(spec, Attend) and (reason := too_large(spec)):
            return reason
        if torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability() < (8, 0):
            return "Triton kernels are for GPUs of compute capability 8.0 and later"
        return ""

    def source(self, spec: KernelSpec, direction: Direction) -> Source:
        """Generate the Python file of one direction."""
        return launcher_of(spec).source(spec, direction)

    def run(self, spec: KernelSpec, direction: Direction, values: Values) -> dict[str, Tensor]:
        """Launch the kernels of one direction, on values of any strides.

        Raises what Triton raises where it cannot compile or launch.
        """
        sizes, like = spec.sizes(values), next(iter(values.values()))
        if not spec.numbers(sizes)["tokens"]:
            return {n: like.new_zeros(spec.shape(n, sizes), dtype=spec.dtype(n)) for n in spec.outputs(direction)}
        return launcher_of(spec).run(spec, direction, values)
