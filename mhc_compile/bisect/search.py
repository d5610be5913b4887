"""Find the first pass and the first site at which a model's results leave the tolerance.

Passes run one at a time. The graph after each is compared with the graph before it:

    in float64            value by value, wherever both hold the same one (`mhc_compile.bisect.places`)
    in the own dtypes     each value computed from what float64 says of the values before it, so that errors do not add
                          up: its rounding may be ten times that of the graph before

Then every generated kernel by itself, forward and backward (`mhc_compile.bisect.kernels`), and what the inner compiler
makes of the last graph (`mhc_compile.bisect.inner`).

A pass that begins to read stream parameters (`widen`, `engram`, `ultramem`, ...) changes the function by design: it is
compared with the streams at their function-preserving start. All others are compared with the model's own parameters,
or with moved ones where these are at the start, because equal streams hide what is mixed up among them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from mhc_compile.bisect import kernels
from mhc_compile.bisect.bisection import Checked, Finding
from mhc_compile.bisect.places import Pair, Source, pairs, places_of, site_of
from mhc_compile.bisect.slices import names_of, nodes_of
from mhc_compile.bisect.subject import Subject, parameters_read
from mhc_compile.bisect.values import Difference, Values, difference, run_as_it_is, run_in_float64
from mhc_compile.capture import private_copy
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.passes.base import Context, Pass, module_path, source_line, value
from mhc_compile.passes.verify import VerificationError, verify

TOLERANCE = 1e-9
"""In float64, of a value's scale: passes that keep the function agree to rounding."""
START_TOLERANCE = 1e-5
"""The same at the start of the streams, whose parameters are float32."""
START_DRIFT = 3e-6
"""What the eps of some conventions add to that with every site."""
SINGLE_DRIFT = 1e-3
"""What a single stream adds, whose weight is sigmoid(8) = 0.9997 at the start."""


@dataclass(frozen=True)
class Wrong:
    """A finding with what its reproducer needs."""

    finding: Finding
    step: Pass | None
    """The pass; None for kernels and the inner compiler."""
    before: GraphModule
    after: GraphModule
    source: Source | None
    """What is wrong, in `before`, None for the outputs."""
    found: Source | None
    """The same in `after`."""
    agreed: list[Pair] = field(default_factory=list)
    """Values on which both graphs agree."""
    inputs: list[Any] = field(default_factory=list)
    values: Values = field(default_factory=dict)
    """Of `before`: in float64, of kernels in their own dtypes."""
    new: Values = field(default_factory=dict)
    """Of `after`, in float64."""
    tolerance: float = TOLERANCE
    """Relative, in float64."""
    spec: str | None = None
    """Of the streams that a pass adds."""
    own_dtype: bool = False
    """Whether it shows only in the model's own dtypes."""

    def stops(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return the nodes of both graphs whose values agree, with one name for each value."""
        before: dict[str, str] = {}
        after: dict[str, str] = {}
        for pair in self.agreed:
            old, new = names_of(self.before, [pair.before]), names_of(self.after, [pair.after])
            before |= {name: name for name in old}
            same = bool(old and new) and _shape(self.values, old[0]) == _shape(self.new or self.values, new[0])
            after |= {name: old[0] if same else name for name in new}
        return before, after


def _shape(values: Values, name: str) -> object:
    return getattr(values.get(name), "shape", None)


class Search:
    """The search through the passes of one model."""

    def __init__(self, subject: Subject, tolerance: float | None) -> None:
        self.subject = subject
        self.tolerance = tolerance
        self.graph = subject.graph
        self.context = Context(marks=subject.marks)
        self.checked: list[Checked] = []
        self._known: dict[bool, Values] = {}
        """Of the graph as it is, in float64, by whether the streams are at their start."""

    def run(self, steps: Iterable[Pass]) -> Wrong | None:
        """Run the passes; return what the first wrong one does, or None."""
        return next((wrong for step in steps if (wrong := self._step(step)) is not None), None)

    def values(self) -> Values:
        """Return the values of the graph after all passes, in float64."""
        return self._values(self.graph, at_start=False)

    def _step(self, step: Pass) -> Wrong | None:
        before = private_copy(self.graph)
        text, read = str(self.graph.graph), parameters_read(self.graph, self.subject.marks)
        try:
            self.graph = step.apply(self.graph, self.context)
            self.graph.graph.lint()
            verify(self.graph, whole=True, after=step.name)
        except (VerificationError, RuntimeError, AssertionError) as error:  # as FX and verify report a broken graph
            return self._broken(step, before, error)
        if str(self.graph.graph) == text:
            self.checked.append(Checked(step.name, changed=False))
            return None
        added = bool(parameters_read(self.graph, self.subject.marks) - read)
        reference = self._values(before, at_start=added)
        self._known = {}
        try:
            values = self._values(self.graph, at_start=added)
        except Exception as error:  # whatever the operations of a wrong graph raise
            return self._broken(step, before, error)
        return self._compared(step, before, reference, values, added)

    def _values(self, gm: GraphModule, *, at_start: bool) -> Values:
        if at_start not in self._known:
            self._known[at_start] = run_in_float64(gm, self._inputs(at_start))
        return self._known[at_start]

    def _inputs(self, at_start: bool) -> list[Any]:
        return self.subject.start if at_start else self.subject.own

    def _compared(self, step: Pass, before: GraphModule, old: Values, new: Values, added: bool) -> Wrong | None:
        usual = self._start_tolerance() if added else TOLERANCE
        tolerance = self.tolerance if self.tolerance is not None else usual
        agreed: list[Pair] = []
        largest = 0.0
        for pair in (*pairs(before, self.graph, self.subject.residual), None):
            exact, result = (
                (old["output"], new["output"]) if pair is None else (pair.before.of(old), pair.after.of(new))
            )
            d = difference(exact, result)
            largest = max(largest, d.relative)
            if not d.error <= tolerance * max(d.scale, 1e-30):
                self.checked.append(Checked(step.name, True, d.relative))
                wrong = self._wrong(step, before, pair, d, tolerance * d.scale, "float64", added)
                return replace(wrong, agreed=agreed, values=old, new=new, tolerance=tolerance)
            if pair is not None:
                agreed.append(pair)
        return self._rounded(step, before, agreed, old, new, largest, added)

    def _start_tolerance(self) -> float:
        single = any(StreamSpec.parse(mark.spec).streams == 1 for mark in self.subject.marks)
        return START_TOLERANCE + (SINGLE_DRIFT if single else START_DRIFT) * (1 + len(self.subject.residual))

    def _rounded(
        self, step: Pass, before: GraphModule, agreed: list[Pair], old: Values, new: Values, error: float, added: bool
    ) -> Wrong | None:
        """Compare the roundings of both graphs in their own dtypes."""
        inputs = self._inputs(added)
        own_old = run_as_it_is(before, inputs, anchors([p.before for p in agreed], old))
        own_new = run_as_it_is(self.graph, inputs, anchors([p.after for p in agreed], new))
        largest = 0.0
        for i, pair in enumerate(agreed):
            dtype = dtype_of(pair.before.of(own_old))
            if dtype is None:
                continue
            rounding = difference(pair.before.of(old), pair.before.of(own_old))
            if added:  # other equations have other errors: those of single values of the stream are no measure
                rounding = Difference(max(rounding.error, 16 * torch.finfo(dtype).eps * rounding.scale), rounding.scale)
            d = difference(pair.after.of(new), pair.after.of(own_new))
            allowed = kernels.allowed(rounding, dtype)
            if d.error > 0:
                largest = max(largest, d.error / max(allowed, 1e-300))
            if not d.error <= allowed:
                self.checked.append(Checked(step.name, True, error, largest))
                name = str(dtype).removeprefix("torch.")
                wrong = self._wrong(step, before, pair, d, allowed, name, added)
                return replace(wrong, agreed=agreed[:i], values=old, new=new, own_dtype=True)
        self.checked.append(Checked(step.name, True, error, largest))
        return None

    def _wrong(
        self, step: Pass, before: GraphModule, pair: Pair | None, d: Difference, allowed: float, dtype: str, added: bool
    ) -> Wrong:
        if pair is None:
            site, what, node = None, "the outputs of the graph", self.graph.graph.output_node()
        else:
            site, what = site_of(pair, self.graph, self.subject.residual)
            node = nodes_of(self.graph, Source(pair.after.node))[0]
        finding = self.finding(step.name, site, what, node, d, allowed, dtype, added)
        source, new_source = (None, None) if pair is None else (pair.before, pair.after)
        spec = next((mark.spec for mark in self.subject.marks), None) if added else None
        after = private_copy(self.graph)
        return Wrong(finding, step, before, after, source, new_source, inputs=self._inputs(added), spec=spec)

    def finding(
        self, step: str, site: str | None, what: str, node: Node, d: Difference, allowed: float, dtype: str, added: bool
    ) -> Finding:
        """Return the finding about a value, with the module and the source line of its site."""
        known = next((s for s in self.subject.residual if s.site == site), None)
        return Finding(
            step, site, what, node.name, d.error, d.scale, allowed, dtype,
            values="the streams at their start" if added else "moved stream parameters" if self.subject.moved
            else "the model's own parameters",
            module=known.module if known else module_path(node),
            source=known.source if known else source_line(node),
        )  # fmt: skip

    def _broken(self, step: Pass, before: GraphModule, error: Exception) -> Wrong:
        node = broken_node(self.graph, error)
        site, what = None, f"the graph cannot be run: {str(error).splitlines()[0]}"
        if node is not None and node.op != "output":
            places = places_of(self.graph, self.subject.residual).by_node.get(node.name)
            pair = Pair(Source(node.name), Source(node.name), places[0] if places else None)
            site, _ = site_of(pair, self.graph, self.subject.residual)
        self.checked.append(Checked(step.name, True, float("inf")))
        infinite = Difference(float("inf"), 0.0)
        finding = self.finding(
            step.name, site, what, node or self.graph.graph.output_node(), infinite, 0.0, "float64", False
        )
        return Wrong(finding, step, before, private_copy(self.graph), None, None, inputs=self.subject.own)


def anchors(sources: list[Source], values: Values) -> dict[str, Any]:
    """Return the `values` of `sources` by node, as `run_as_it_is` takes them; other items of tuples are None."""
    anchored: dict[str, Any] = {}
    for source in sources:
        whole = values.get(source.node)
        if source.item is None:
            anchored[source.node] = whole
        elif isinstance(whole, (tuple, list)):
            items = anchored.setdefault(source.node, [None] * len(whole))
            items[source.item] = whole[source.item]
    return anchored


def dtype_of(x: Any) -> torch.dtype | None:
    """Return the dtype of a floating-point value; None for anything else."""
    tensors = [t for t in tree_leaves(x) if isinstance(t, Tensor)]
    return tensors[0].dtype if tensors and tensors[0].is_floating_point() else None


def broken_node(gm: GraphModule, error: Exception) -> Node | None:
    """Return the node that an error of the verifier or of a run names."""
    text = str(error)
    # The first that is named is the node itself; its operands follow.
    at = {
        n: min(i for i in (text.find(f"%{n.name} "), text.find(f"%{n.name}:"), len(text)) if i >= 0)
        for n in gm.graph.nodes
    }
    node = min(at, key=lambda n: at[n])
    return node if at[node] < len(text) else None


def not_finite(values: Values, gm: GraphModule) -> str | None:
    """Return the first node whose value holds NaN: infinities are put into masks on purpose."""
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output") or not isinstance(value(node), Tensor):
            continue
        result = values.get(node.name)
        if isinstance(result, Tensor) and result.is_floating_point() and result.isnan().any():
            return str(node.name)
    return None
