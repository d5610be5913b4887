"""Functions that the reproducers of `bisect` call; these files contain code, inputs and what to expect.

Every function returns an exit code, 1 while the error is there and 0 once it is gone, and prints what it compared.
"""

from __future__ import annotations

import base64
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from mhc_compile.attach import append_at_start
from mhc_compile.bisect import inner, kernels
from mhc_compile.bisect.values import difference, run_as_it_is, run_in_float64
from mhc_compile.capture import Captured, capture
from mhc_compile.config import Options
from mhc_compile.kernels.registration import registered
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.passes.base import Context, Pass
from mhc_compile.passes.pipeline import ANALYSIS
from mhc_compile.passes.verify import verify

Function = Callable[..., Any]
Inputs = Mapping[str, Any]


def raw(dtype: str, shape: Sequence[int], text: str, *, parameter: bool = False) -> Tensor:
    """Return a tensor from its bytes in base64; `parameter`: one that the model owns."""
    kind = getattr(torch, dtype)
    data = bytearray(base64.b64decode(text))
    tensor = torch.frombuffer(data, dtype=kind).reshape(tuple(shape)) if data else torch.empty(tuple(shape), dtype=kind)
    return nn.Parameter(tensor, requires_grad=False) if parameter else tensor


def seeded(
    dtype: str, shape: Sequence[int], seed: int, mean: float, deviation: float, *, parameter: bool = False
) -> Tensor:
    """Return normal random numbers in place of values that are too many to write."""
    generator = torch.Generator().manual_seed(seed)
    tensor = (torch.randn(tuple(shape), generator=generator) * deviation + mean).to(getattr(torch, dtype))
    return nn.Parameter(tensor, requires_grad=False) if parameter else tensor


def rewritten(
    before: Function,
    after: Function,
    inputs: Inputs,
    *,
    tolerance: float | None,
    step: tuple[str, str, Mapping[str, Any]] | None = None,
    sites: Sequence[tuple[str, str]] = (),
    spec: str | None = None,
) -> int:
    """Compare what a pass makes of `before` with it: by `tolerance` in float64, or by rounding for None.

    `step` names the pass: module, class and fields. Where there is none, or it cannot be imported, what it made is
    `after`, as recorded. `sites` are the paths and names of the sites of the stream ops in `before`; `spec` is given
    for a pass that adds streams to a residual graph.
    """
    old, new, how = _graph(before, inputs, sites), None, "as recorded"
    if step is not None:
        try:
            new, how = _applied(_imported(step), _graph(before, inputs, sites), spec), f"by {step[0]}.{step[1]}"
        except ImportError as error:
            print(f"{error}: the graph that it made is compared as recorded")
    if new is None:
        new = _graph(after, inputs, sites)
    if tolerance is None:
        return _rounding(old, new, how)
    exact, result = (run_in_float64(c.graph, c.inputs)["output"] for c in (old, new))
    d = difference(exact, result)
    return _verdict(exact, result, d.error, d.scale, tolerance * d.scale, f"rewritten {how}, in float64")


def kernel(computes: Function, inputs: Inputs) -> int:
    """Judge the generated kernel of the one fused op that `computes` calls, forward and backward."""
    captured = _graph(computes, inputs, ())
    nodes = captured.graph.graph.nodes
    (node,) = [n for n in nodes if registered(n.target) is not None]
    values = dict(zip((n for n in nodes if n.op == "placeholder"), captured.inputs, strict=True))
    judged = kernels.judge(node.target, [values[a] if isinstance(a, Node) else a for a in node.args])
    if not judged:
        print("no kernel: plain PyTorch computes this here")
        return 0
    for j in judged:
        print(f"  {j.name:<10} error {j.kernel.error:.3g}, plain PyTorch {j.plain.error:.3g}, allowed {j.allowed:.3g}")
    j = kernels.worst(judged)
    return _said(j.kernel.error, j.kernel.scale, j.allowed, f"{j.name} of {j.spec.name}")


def compiled(computes: Function, inputs: Inputs, options: Mapping[str, Any]) -> int:
    """Judge what the inner compiler makes of `computes`."""
    captured = _graph(computes, inputs, ())
    exact = run_in_float64(captured.graph, captured.inputs)
    d, allowed, _ = inner.judge_outputs(captured.graph, captured.inputs, Options(**options), exact)
    return _said(d.error, d.scale, allowed, f"compiled by {options['inner']}")


class _Called(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def _graph(function: Function, inputs: Inputs, sites: Sequence[tuple[str, str]]) -> Captured:
    """Return the function's graph, its stream ops with the sites that they belong to, in order."""
    args = [inputs[name] for name in inspect.signature(function).parameters]
    with torch.no_grad():
        captured = capture(_Called(function), args, {})
    ops = [n for n in captured.graph.graph.nodes if getattr(n.target, "namespace", "") in ("mhc", "mhc_kernels")]
    for node, (module, name) in zip(ops, sites, strict=False):
        if name:
            node.meta["mhc_site"] = name
            node.meta["nn_module_stack"] = {"site": (module, nn.Module)}
    return captured


def _imported(step: tuple[str, str, Mapping[str, Any]]) -> Pass:
    module, name, fields = step
    try:
        step_of_module: Pass = getattr(importlib.import_module(module), name)(**fields)
    except AttributeError as error:
        raise ImportError(f"{module} has no {name}") from error
    return step_of_module


def _applied(step: Pass, captured: Captured, spec: str | None) -> Captured:
    context, inputs = Context(), captured.inputs
    if spec is not None:
        ANALYSIS.run(captured.graph, context)
        context.marks, values = append_at_start(
            captured.graph, captured.graph, StreamSpec.parse(spec), Options(), context.streams
        )
        inputs = [*inputs, *values]
        context.streams = []
        ANALYSIS.run(captured.graph, context)
    graph = step.apply(captured.graph, context)
    verify(graph, whole=False, after=step.name)
    return Captured(graph, inputs)


def _rounding(old: Captured, new: Captured, how: str) -> int:
    exact = run_in_float64(old.graph, old.inputs)["output"]
    plain, result = (run_as_it_is(c.graph, c.inputs, {})["output"] for c in (old, new))
    d, allowed, dtype = inner.worst(inner.tensors(exact), inner.tensors(plain), inner.tensors(result))
    return _verdict(exact, result, d.error, d.scale, allowed, f"rewritten {how}, in {dtype}")


def _verdict(exact: Any, result: Any, error: float, scale: float, allowed: float, what: str) -> int:
    for title, out in (("before", exact), ("after", result)):
        for t in inner.tensors(out)[:3]:
            print(f"{title}: {_short(t)}")
    return _said(error, scale, allowed, what)


def _said(error: float, scale: float, allowed: float, what: str) -> int:
    wrong = not error <= allowed
    print(
        f"{what}: error {error:.3g} at a scale of {scale:.3g}, allowed {allowed:.3g}: {'wrong' if wrong else 'right'}"
    )
    return int(wrong)


def _short(t: Tensor) -> str:
    head = ", ".join(f"{float(x):.6g}" for x in t.detach().flatten()[:6])
    return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)} [{head}{', ...' if t.numel() > 6 else ''}]"
