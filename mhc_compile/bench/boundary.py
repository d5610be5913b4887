"""One site boundary: distribute of one site, coefficients and aggregate of the next, forward and backward."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from mhc_compile.bench.contest import Contender, contest, distance, say, show
from mhc_compile.bench.gpu_contenders import Package, Work, select
from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.spec import StreamSpec

OURS = "mhc-compile"
Boundary = Callable[..., Sequence[Tensor]]


def run(console: Console, *, quick: bool) -> dict[str, Any]:
    """Measure forward, and forward with backward; print the tables and return all rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, width = (256, 128) if quick else (8192, 4096) if device.type == "cuda" else (4096, 1024)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chain = Chain(kind="boundary", stream=StreamSpec(), width=width, streams_dtype=dtype, branch_dtype=dtype)
    inputs = random_inputs(chain, tokens, device)
    shape = f"{tokens} tokens, n=4, C={width}, {str(dtype).removeprefix('torch.')}"
    rounds = 3 if quick else 15
    packages, left_out = select(device)
    for line in left_out:
        say(console, line)
    groups = {}
    for title, backward in ((f"boundary forward, {shape}", False), (f"boundary forward and backward, {shape}", True)):
        contenders = contenders_of(chain, inputs, tokens, packages, backward=backward)
        rows = contest(console, contenders, ours=OURS, device=device, shape=shape, rounds=rounds)
        groups[title] = show(console, title, rows)
    return {"groups": groups}


def random_inputs(chain: Chain, tokens: int, device: torch.device) -> list[Tensor]:
    """Draw the boundary's inputs at sizes that training sees: a doubly stochastic mix, small phi."""
    rng = torch.Generator(device).manual_seed(0)
    values = []
    for name in chain.inputs():
        value = torch.randn(chain.shape(name, (tokens,)), generator=rng, device=device)
        value = {"mix": lambda v: torch.softmax(v, -1), "phi": lambda v: 0.02 * v}.get(name, lambda v: v)(value)
        values.append(value.to(chain.dtype(name)))
    return values


def ours(chain: Chain) -> Boundary:
    """Return the fused op."""

    def boundary(*inputs: Tensor) -> Sequence[Tensor]:
        return torch.ops.mhc_kernels.boundary(*inputs, str(chain.stream))[:4]

    return boundary


def plain(chain: Chain) -> Boundary:
    """Return the dialect ops, which decompose into plain PyTorch."""

    def boundary(
        X: Tensor, y: Tensor, post: Tensor, mix: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor
    ) -> Sequence[Tensor]:
        X = torch.ops.mhc.distribute(X, y, post, mix)
        pre, next_post, next_mix = torch.ops.mhc.coefficients(X, phi, alpha, bias, str(chain.stream))
        return X, torch.ops.mhc.aggregate(X, pre), next_post, next_mix

    return boundary


def _exactly(chain: Chain, inputs: Sequence[Tensor], gradients: Sequence[Tensor], *, backward: bool) -> list[Tensor]:
    """Return the outputs, or the gradients of the inputs, in float64."""
    leaves = [v.double().requires_grad_(backward) for v in inputs]
    outputs = plain(chain)(*leaves)
    if not backward:
        return list(outputs)
    return list(torch.autograd.grad(outputs, leaves, [g.double() for g in gradients]))


def contenders_of(
    chain: Chain,
    inputs: list[Tensor],
    tokens: int,
    packages: Sequence[tuple[Package, SimpleNamespace]],
    *,
    backward: bool,
    checked: bool = True,
) -> list[Contender]:
    """Return ways to compute the boundary, forward or forward and backward; copying its bytes is among them.

    Unchecked, nothing is computed in float64, for sizes that would not fit.
    """
    device = inputs[0].device
    rng = torch.Generator(device).manual_seed(1)
    names, output_names = chain.inputs(), chain.outputs()[:4]
    gradients = [
        torch.randn(chain.shape(name, (tokens,)), generator=rng, device=device).to(chain.dtype(name))
        for name in output_names
    ]
    exact = _exactly(chain, inputs, gradients, backward=backward) if checked else []
    leaves = [v.clone().requires_grad_(backward) for v in inputs]
    moved = chain.bytes_moved(tokens) + (chain.bytes_moved(tokens, backward=True) if backward else 0)
    tolerance = 1e-4 if chain.streams_dtype == torch.float32 else 3e-2

    def contender(name: str, boundary: Boundary) -> Contender:
        def work() -> Sequence[Tensor]:
            if not backward:
                with torch.no_grad():
                    return boundary(*leaves)
            return torch.autograd.grad(boundary(*leaves), leaves, gradients)

        return Contender(name, work, moved, (lambda results: distance(results, exact)) if checked else None, tolerance)

    def other(package: Package, api: SimpleNamespace) -> Contender:
        values, wanted_gradients = (
            dict(zip(*pair, strict=True)) for pair in ((names, inputs), (output_names, gradients))
        )
        work = Work(package, api, values, wanted_gradients, backward=backward)
        its_own = replace(chain, stream=replace(chain.stream, convention=package.convention))
        found = Contender(package.name, work.run, moved, None, tolerance, optional=True, prepare=work.prepare)
        if checked:
            seen = work.inputs()
            exact = _exactly(its_own, [seen[name] for name in names], gradients, backward=backward)
            read = names if backward else output_names
            found.check = lambda results: distance(work.read(results, read), exact)
        return found

    results = [
        contender(OURS, ours(chain)),
        contender("Inductor", torch.compile(plain(chain))),
        contender("eager", plain(chain)),
    ]
    results.append(Contender("copy", _copy(inputs[0], moved), moved))
    if importlib.util.find_spec("hyper_connections"):
        results.append(_hyper_connections(chain, inputs[0], backward=backward))
    return results + [other(package, api) for package, api in packages]


def _copy(like: Tensor, moved: int) -> Callable[[], Tensor]:
    """Return a copy of as many bytes as the work must move: the floor."""
    source, target = (torch.ones(moved // 8, dtype=torch.float32, device=like.device) for _ in range(2))
    return lambda: target.copy_(source)


def _hyper_connections(chain: Chain, X: Tensor, *, backward: bool) -> Contender:
    """Return a site of the package `hyper-connections` around an empty branch: its own equations, same sizes."""
    from hyper_connections.manifold_constrained_hyper_connections import ManifoldConstrainedHyperConnections

    n = chain.stream.streams
    site = ManifoldConstrainedHyperConnections(n, dim=chain.width).to(X.device)
    streams = X.detach().transpose(0, 1).reshape(n, -1, chain.width).float().contiguous().requires_grad_(backward)

    @torch.compile
    def step(streams: Tensor) -> Tensor:
        branch, add_residual = site(streams)
        return add_residual(branch)

    def work() -> Any:
        if not backward:
            with torch.no_grad():
                return step(streams)
        return torch.autograd.grad(step(streams).sum(), [streams, *site.parameters()], allow_unused=True)

    return Contender("hyper-connections, Inductor", work)
