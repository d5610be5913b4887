"""Check proposals numerically: run their nodes on small random values in float64, and compare with the reference.

Values and all gradients must agree, on tokens of several magnitudes, so that every eps shows, and on logits at which
the Sinkhorn iterations are far from converged, so that their number does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_map

from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels import reference
from mhc_compile.kernels.spec import Convention, Manifold, StreamSpec
from mhc_compile.passes.base import is_tensor, op_name, shape, value
from mhc_compile.passes.dataflow import Dataflow
from mhc_compile.passes.hyperconnections import SIZED, NotApart, Proposal, Region, cast_behind, region
from mhc_compile.passes.numeric import widen, widen_dtype

TOLERANCE = 1e-9
"""Of the largest element; a wrong eps moves the values by 1e-6 and more."""
_TOKENS = 6
_MAGNITUDES = (1.0, 1e-1, 1e-2, 1e-3, 3.0, 1e-3)
_DIVIDES = ("truediv", "div", "true_divide", "divide", "logsumexp", "normalize")

Values = dict[Node, Any]


class Trial:
    """A region run on random values: `tokens` are the leading sizes of its streams in the graph."""

    def __init__(self, flow: Dataflow, region: Region, tokens: tuple[Any, ...]) -> None:
        self.flow = flow
        self.region = region
        self.tokens = tokens
        self.small = (1,) * (len(tokens) - 2) + ((2, _TOKENS // 2) if len(tokens) > 1 else (_TOKENS,))
        self.rng = torch.Generator().manual_seed(0)
        self.values: Values = {n: value(n).node.hint for n in region.numbers}
        self.inputs: list[Node] = []

    def draw(self, node: Node, tail: tuple[int, ...], *, scale: float = 1.0, magnitudes: bool = False) -> None:
        """Give `node` a random value of its own tail (a parameter's shape, or the dimensions after the tokens)."""
        lead = () if node in self.flow.parametric else self.small
        drawn = scale * torch.randn((*lead, *tail), generator=self.rng, dtype=torch.float64, device="cpu")
        if magnitudes:
            drawn *= torch.tensor(_MAGNITUDES, dtype=torch.float64, device="cpu").reshape(
                *self.small, *(1 for _ in tail)
            )
        self.values[node] = drawn.requires_grad_()
        self.inputs.append(node)

    @property
    def small_numel(self) -> int:
        """The number of tokens here."""
        return _TOKENS

    def run(self) -> None:
        """Compute every node of the region. Raises `NotApart` where that is not possible with other sizes."""
        for node in self.region.nodes:
            try:
                self.values[node] = self._compute(node)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                raise NotApart(f"{node.name} cannot be computed apart: {str(error).splitlines()[0]}") from error

    def _compute(self, node: Node) -> Any:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: self.values.get(n))
        args, kwargs = tree_map(widen_dtype, (args, kwargs))
        name = op_name(node)
        if name in SIZED and (node in self.flow.hot or self._spreads(node)):
            return getattr(args[0], name)(self._resized(shape(node)))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": "cpu"}
        if node.op == "call_method":
            method = "double" if name in ("float", "half", "bfloat16") else name
            return widen(getattr(args[0], method)(*args[1:], **kwargs))
        assert callable(node.target)
        return widen(node.target(*args, **kwargs))

    def _spreads(self, node: Node) -> bool:
        """Return whether `node` repeats a parameter for every token."""
        source, k = node.args[0], len(self.tokens)
        if op_name(node) not in ("expand", "broadcast_to") or not isinstance(source, Node):
            return False
        return shape(node)[:k] == self.tokens and len(shape(node)) > len(shape(source))

    def _resized(self, sizes: tuple[Any, ...]) -> tuple[int, ...]:
        """Return the size that a value of the graph has in this trial."""
        k = len(self.tokens)
        if sizes[:k] == self.tokens:
            return (*self.small, *sizes[k:])
        if sizes[0] == math.prod(self.tokens):
            return (_TOKENS, *sizes[1:])
        raise ValueError(f"a size of {list(sizes)} does not begin with the tokens")

    def gradients(self, out: Tensor) -> list[Tensor]:
        """Return the gradients of a random projection of `out` by every input."""
        rng = torch.Generator().manual_seed(1)
        weights = torch.randn(out.shape, generator=rng, dtype=torch.float64, device="cpu")
        inputs = [self.values[n] for n in self.inputs]
        gradients = torch.autograd.grad((out * weights).sum(), inputs, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, inputs, strict=True)]

    def error(self, node: Node, want: Tensor) -> float:
        """Return the largest difference of `node` or its gradients from `want`, as a share of the largest element."""
        got = self.values[node]
        if got.shape != want.shape:
            return math.inf
        worst = distance(got, want)
        if worst > TOLERANCE:
            return worst
        return max(worst, *map(distance, self.gradients(got), self.gradients(want)))


def distance(got: Tensor, want: Tensor) -> float:
    """Return the largest difference, as a share of the largest element of `want`; infinite where one is not finite."""
    error = (got - want).detach().abs().max().item()
    scale = want.detach().abs().max().item()
    return math.inf if math.isnan(error) else error / max(scale, 1e-30)


@dataclass
class Confirmed:
    """A site (or, with `following=None`, a learned exit) that computes what `spec` says."""

    proposal: Proposal
    spec: StreamSpec
    parameters: tuple[Node, Node, Node]
    """phi, alpha and bias of a site; fn, base and scale of an exit."""
    following: Node | None
    """The next streams."""
    nodes: list[Node]
    """What becomes unused when the site is rewritten."""
    numbers: list[Node]
    """Numbers of which the specification holds the present values."""
    rounded: dict[str, torch.dtype] = field(default_factory=dict)
    """The dtypes to which the model rounds `post` and `mix` before it mixes."""


@dataclass
class Verdict:
    """What a trial found: the specification, or None and how far off the nearest one is."""

    spec: StreamSpec | None
    why: str = ""
    rounded: dict[str, torch.dtype] = field(default_factory=dict)


def confirm_site(flow: Dataflow, p: Proposal, hints: Sequence[StreamSpec], memory: dict[Any, Verdict]) -> Confirmed:
    """Return the site as a convention computes it. Raises `NotApart` with the reason if none does.

    `hints` are tried first.

    `memory` holds the verdicts on regions of this graph: layers are alike, and one trial serves them all.
    """
    if p.branch is None or not p.following:
        raise NotApart("no value combines its streams with what its branch computes")
    parameters = _roles(p, region(flow, [p.read], [p.streams]), (2, 3))
    why = ""
    for following in p.following:
        try:
            both = region(flow, [p.read, following], [p.streams, p.branch])
            if both.parameters != sorted(parameters, key=flow.index.__getitem__):
                raise NotApart(f"it reads {len(both.parameters)} parameters, not phi, alpha and bias")
            key = _signature(p, both, parameters, following)
            if key not in memory:
                memory[key] = _judge(flow, p, following, both, parameters, hints)
        except NotApart as reason:
            why = str(reason)
            continue
        verdict = memory[key]
        if verdict.spec is not None:
            following = cast_behind(following, value(p.streams).dtype)
            whole = region(flow, [p.read, following], [p.streams, p.branch])
            return Confirmed(p, verdict.spec, parameters, following, whole.nodes, whole.numbers, verdict.rounded)
        why = verdict.why
    raise NotApart(why)


def _judge(
    flow: Dataflow,
    p: Proposal,
    following: Node,
    both: Region,
    parameters: tuple[Node, Node, Node],
    hints: Sequence[StreamSpec],
) -> Verdict:
    trial = _site_trial(flow, p, both, parameters)
    nearest, why = math.inf, f"no convention has {p.rows} rows for {p.n} streams"
    for spec in specifications(p.n, p.rows, both, hints):
        h, X = _reference(trial, p, parameters, spec)
        error = max(trial.error(p.read, h), trial.error(following, X))
        if error <= TOLERANCE:
            assert p.branch is not None
            return Verdict(spec, "", _rounded(flow, p, region(flow, [following], [p.streams, p.branch]), trial))
        if error < nearest:
            nearest, why = error, f"no convention computes its numbers; nearest is '{spec}', {error:.1e} off"
    return Verdict(None, why)


def _signature(p: Proposal, both: Region, parameters: tuple[Node, Node, Node], following: Node) -> Any:
    """Return a key that is equal for regions that compute the same from their leaves, operation by operation."""
    leaves = (p.streams, p.branch, *parameters)
    names: dict[Node, str] = {n: f"leaf{i}" for i, n in enumerate(leaves) if n is not None}
    names |= {n: repr(value(n).node.hint) for n in both.numbers}
    names |= {n: f"%{i}" for i, n in enumerate(both.nodes)}

    def form(node: Node) -> str:
        return f"{shape(node)} {value(node).dtype}" if is_tensor(node) else ""

    def called(node: Node) -> str:
        # What has no name is a size, which is read from the result.
        return repr(torch.fx.map_arg((node.args, node.kwargs), lambda n: names.get(n, "size")))

    lines = tuple((n.op, n.target, called(n), form(n)) for n in both.nodes)
    return lines, tuple(form(n) for n in leaves if n is not None), names[p.read], names[following]


def confirm_exit(flow: Dataflow, p: Proposal, hints: Sequence[StreamSpec]) -> Confirmed:
    """Return the learned exit as a convention computes it. Raises `NotApart` with the reason if none does."""
    apart = region(flow, [p.read], [p.streams])
    fn, scale, base = _roles(p, apart, (1,))
    trial = _site_trial(flow, p, apart, (fn, scale, base))
    nearest, why = math.inf, ""
    for spec in [*hints, *(StreamSpec(streams=p.n, convention=c) for c in Convention)]:
        spec = replace(spec, exit="head")
        if spec.streams != p.n:
            continue
        head = _matrix(trial, fn, p), trial.values[base], trial.values[scale].reshape(1)
        error = trial.error(p.read, reference.reduce(trial.values[p.streams], spec, head))
        if error <= TOLERANCE:
            return Confirmed(p, spec, (fn, base, scale), None, apart.nodes, apart.numbers)
        if error < nearest:
            nearest, why = error, f"no convention's exit computes its numbers; nearest is '{spec}', {error:.1e} off"
    raise NotApart(why)


def is_function(
    flow: Dataflow, out: Node, source: Node, function: Callable[[Tensor], Tensor], tail: tuple[int, ...]
) -> Region | None:
    """Return what computes `out` from `source` `[..., *tail]` as `function` does, without parameters, or None."""
    tokens = shape(source)[: len(shape(source)) - len(tail)]
    try:
        apart = region(flow, [out], [source])
        if apart.parameters:
            return None
        trial = Trial(flow, apart, tokens)
        trial.draw(source, tail)
        trial.run()
    except NotApart:
        return None
    return apart if trial.error(out, function(trial.values[source])) <= TOLERANCE else None


def _roles(p: Proposal, apart: Region, sizes: tuple[int, ...]) -> tuple[Node, Node, Node]:
    """Return phi, alpha (or scale) and bias (or base), told apart by their shapes."""
    others = [n for n in apart.parameters if n is not p.phi]
    bias = [n for n in others if shape(n) == (p.rows,)]
    alpha = [n for n in others if n not in bias and len(shape(n)) < 2 and math.prod(shape(n)) in sizes]
    if len(bias) != 1 or len(alpha) != 1 or len(others) != 2:
        forms = ", ".join(str(list(shape(n))) for n in others) or "nothing"
        raise NotApart(f"beside phi it reads {forms}, not an alpha and a bias of {p.rows}")
    return p.phi, alpha[0], bias[0]


def _site_trial(flow: Dataflow, p: Proposal, apart: Region, parameters: tuple[Node, Node, Node]) -> Trial:
    trial = Trial(flow, apart, shape(p.streams)[:-2])
    phi, alpha, bias = parameters
    trial.draw(p.streams, (p.n, p.hidden), magnitudes=True)
    if p.branch is not None:
        trial.draw(p.branch, (p.hidden,))
    trial.draw(phi, shape(phi), scale=1 / math.sqrt(p.n * p.hidden))
    trial.draw(alpha, shape(alpha), scale=2.0)
    trial.draw(bias, shape(bias))
    trial.run()
    return trial


def _reference(
    trial: Trial, p: Proposal, parameters: tuple[Node, Node, Node], spec: StreamSpec
) -> tuple[Tensor, Tensor]:
    phi, alpha, bias = parameters
    assert p.branch is not None
    X, factors = trial.values[p.streams], trial.values[alpha]
    three = torch.nn.functional.pad(factors, (0, 3 - len(factors)))
    pre, post, H = reference.coefficients(X, _matrix(trial, phi, p), three, trial.values[bias], spec)
    return reference.aggregate(X, pre), reference.distribute(X, trial.values[p.branch], post, H)


def _matrix(trial: Trial, phi: Node, p: Proposal) -> Tensor:
    return trial.values[phi] if shape(phi) == (p.rows, p.n * p.hidden) else trial.values[phi].T


def _rounded(flow: Dataflow, p: Proposal, mix: Region, trial: Trial) -> dict[str, torch.dtype]:
    """Return the dtype in which coefficients meet values of C channels, where it is narrower than float32."""
    sizes = {p.n: "post", p.n * p.n: "mix"}
    dtypes = {}
    for node in filter(is_tensor, mix.nodes):
        for source in node.all_input_nodes:
            if not (is_tensor(source) and source in trial.values and flow.depends(source, p.projection)):
                continue
            small, large = (trial.values[n].numel() / trial.small_numel for n in (source, node))
            dtype = value(source).dtype
            if small in sizes and large >= p.hidden and dtype.itemsize < torch.float32.itemsize:
                dtypes[sizes[int(small)]] = dtype
    return dtypes


def specifications(n: int, rows: int, apart: Region, hints: Sequence[StreamSpec]) -> Iterator[StreamSpec]:
    """Yield what a site of `n` streams and `rows` rows may be: `hints` first, then a system's own manifold."""
    yield from (s for s in hints if s.streams == n and s.rows == rows)
    count = sum(op_name(m) in _DIVIDES and shape(m)[-2:] == (n, n) for m in apart.nodes if is_tensor(m))
    possible = []
    for manifold in get_args(Manifold):
        for convention in (c for c in Convention if not c.fields.deferred):
            for iterations in dict.fromkeys(((count + 1) // 2, count // 2)) if manifold == "sinkhorn" else (0,):
                try:
                    spec = StreamSpec(
                        streams=n, convention=convention, manifold=manifold, iterations=iterations,
                        exit=convention.fields.exit,
                    )  # fmt: skip
                except MHCError:  # not for this number of streams
                    continue
                if spec.rows == rows and spec not in hints:
                    possible.append(spec)
    yield from sorted(possible, key=lambda s: s.manifold != s.convention.fields.manifold)
