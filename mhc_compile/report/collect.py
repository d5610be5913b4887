"""Make the report of a run of passes."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from mhc_compile.config import Options
from mhc_compile.diagnostics import TABLE, MHCError, MHCWarning
from mhc_compile.kernels import targets
from mhc_compile.kernels.chain import Chain
from mhc_compile.kernels.kernelspec import DIRECTIONS, Direction, KernelSpec
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.kernels.target import Source
from mhc_compile.parameters import StreamParameters, names, owners
from mhc_compile.passes.base import Pass, device_of, is_tensor, kernels_of, module_stack, shape, value
from mhc_compile.passes.fuse import UNFUSED, kernels_in
from mhc_compile.passes.ownership import INPUT, is_owned
from mhc_compile.passes.results import Block
from mhc_compile.passes.text import describe
from mhc_compile.report.draw import draw
from mhc_compile.report.lines import Line, Sources, form, input_name, is_buffer, short_path
from mhc_compile.report.overlay import overlay
from mhc_compile.report.placement import Placement, in_order
from mhc_compile.report.reach import reach
from mhc_compile.report.report import (
    FORMAT,
    BlockReport,
    Diagnostic,
    KernelReport,
    LayerReport,
    MemoryReport,
    PassReport,
    Report,
    StageReport,
    StepReport,
)
from mhc_compile.report.timing import RUNS, WARM_UP, device_name, kept_gradients, measure
from mhc_compile.report.watch import Stage, Watcher

MAX_WIDTH = 160
"""Characters of a line of a layer's graph."""


def collect(
    model: nn.Module,
    watcher: Watcher,
    options: Options,
    spec: StreamSpec,
    *,
    layer: str | None,
    refusal: MHCError | None,
    warnings: Sequence[MHCWarning],
) -> Report:
    """Return the report of `model` after the passes that `watcher` saw. Raises MHC507 for an unknown `layer`."""
    parameters = owners(model)
    added = {id(p) for of_owner in parameters.values() for p in of_owner.parameters()}
    numbered = _Numbered(model, watcher)
    lost = watcher.without_streams if refusal is not None and watcher.native is None else None
    state = "native" if watcher.native else "refused" if refusal else "converted" if parameters else "not converted"
    specs = dict.fromkeys(e.spec for e in numbered.drawing.elements if e.kind == "site" and e.spec) or [str(spec)]
    return Report(
        format=FORMAT,
        versions={
            "mhc_compile": version("mhc-compile"), "torch": torch.__version__, "python": platform.python_version()
        },
        model=type(model).__name__,
        state=state,  # type: ignore[arg-type]
        parameters=sum(p.numel() for p in model.parameters() if id(p) not in added),
        options={
            "streams": "; ".join(specs), **{f.name: str(getattr(options, f.name)) for f in fields(options)},
            **({} if watcher.count is None else {"stages": str(watcher.count)}),
        },
        **numbered.parts(),
        diagnostics=(*([_error(refusal)] if refusal else ()), *(_diagnostic(w, "warning") for w in warnings)),
        memories=tuple(memory for path, of_owner in parameters.items() for memory in _memories(path, of_owner)),
        coverage=None if refusal else watcher.context.coverage,
        reach=None if lost is None else reach(lost),
        layer=None if layer is None else _layer(watcher, layer),
    )  # fmt: skip


class _Numbered:
    """The parts of a report that refer to each other by number."""

    def __init__(self, model: nn.Module, watcher: Watcher) -> None:
        self.model, self.watcher = model, watcher
        self.sources = Sources()
        self.lines: dict[tuple[str, int, int | None, str], int] = {}
        self.drawing = draw(watcher)
        nested = not self.drawing.elements
        by_name = {node.name: node for node in watcher.nodes}
        self.place = Placement(self.drawing, by_name, type(model).__name__, nested=nested)
        if nested and not watcher.graphs:
            for path, _ in model.named_modules():
                if path:
                    self.place.at(path)

    def parts(self) -> dict[str, Any]:
        """Return those fields of the report."""
        code = [self._code(lines) for lines in self.watcher.graphs]
        first, last = ([line.node for line in self.watcher.graphs[i]] if code else [] for i in (0, -1))
        roots = in_order(self.drawing, first, self.place)
        kernels = tuple(self._kernels(last))
        for k, kernel in enumerate(kernels):
            for number in kernel.elements:
                self.drawing.elements[number].kernels.append(k)
        blocks, stages = self._blocks(self.watcher.context.blocks), self._stages(self.watcher.stages)
        self._show_values(last)
        self._count_traffic(last)
        self._count_parameters(first)
        steps = zip(self.watcher.records, self.watcher.steps, code[1:], strict=True)
        return {
            "elements": tuple(self.drawing.elements), "roots": tuple(roots), "lines": tuple(self.lines),
            "captured": code[0] if code else (), "sources": tuple(self.sources.numbers), "kernels": kernels,
            "passes": tuple(
                PassReport(
                    r.name, describe(step), _purpose(step), 1e3 * r.seconds, 1e3 * r.verify_seconds, r.nodes_before,
                    r.nodes_after, tuple(r.notes), after,
                )
                for r, step, after in steps
            ),
            "blocks": blocks, "stages": stages, "step": self._step(),
            "probes": overlay(self.watcher.samples, self.watcher.marks, self.drawing.elements),
        }  # fmt: skip

    def _code(self, lines: Sequence[Line]) -> tuple[int, ...]:
        keys = ((line.text, self.place(line.node), self.sources.of(line.node), line.form) for line in lines)
        return tuple(self.lines.setdefault(key, len(self.lines)) for key in keys)

    def _show_values(self, last: Sequence[Node]) -> None:
        """Fill in source, shape and dtype: of the node chosen by the drawing, else of the last tensor of an element."""
        at = self.drawing.at
        for node in reversed(last):
            if is_tensor(node) and node.op not in ("placeholder", "output"):
                at.setdefault(self.place(node), node)
        for number, element in enumerate(self.drawing.elements):
            if number not in at:
                continue
            node = at[number]
            element.source = self.sources.of(node)
            if is_tensor(node):
                element.shape = f"[{', '.join(map(str, shape(node)))}]"
                element.dtype = str(value(node).dtype).removeprefix("torch.")

    def _count_parameters(self, first: Sequence[Node]) -> None:
        for node in first:
            if node.op == "placeholder" and is_owned(node) and is_tensor(node) and not is_buffer(node):
                number: int | None = self.place(node)
                while number is not None:
                    self.drawing.elements[number].parameters += value(node).numel()
                    number = self.drawing.parent.get(number)

    def _count_traffic(self, last: Sequence[Node]) -> None:
        """Fill in why sites were not fused, and the bytes of those kernels that are a site's own or end at it."""
        elements = self.drawing.elements
        for node in self.watcher.nodes:
            if reasons := node.meta.get(UNFUSED):
                element = elements[self.place(node)]
                element.unfused = tuple(dict.fromkeys((*element.unfused, *reasons)))
        for node in last:
            for spec in kernels_of(node):
                element, device = elements[self.place(node)], device_of(node.all_input_nodes[0])
                for direction, suffix in zip(DIRECTIONS, ("", "_backward"), strict=True):
                    source = _source(spec, direction, device)
                    moved = spec.bytes_token(direction, source.passes if source else None)
                    name = f"bytes_token{suffix}"
                    setattr(element, name, getattr(element, name) + moved)
                    element.limit_token += spec.bytes_token(direction)

    def _kernels(self, last: Sequence[Node]) -> Iterator[KernelReport]:
        elements: dict[KernelSpec, dict[int, None]] = {}
        for node in last:
            for spec in kernels_of(node):
                number = self.place(node)
                both = isinstance(spec, Chain) and spec.mixes and spec.collapses  # a part of two sites
                before = [self.drawing.before.get(number, number)] if both else []
                elements.setdefault(spec, {}).update(dict.fromkeys([*before, number]))
        calls = {} if self.watcher.gm is None else kernels_in(self.watcher.gm)
        for (spec, device), count in calls.items():
            code: dict[str, Any] = {}
            for direction, suffix in zip(DIRECTIONS, ("", "_backward"), strict=True):
                source = _source(spec, direction, device)
                code[direction] = source.text if source else None
                code[f"bytes_token{suffix}"] = spec.bytes_token(direction, source.passes if source else None)
                code[f"limit_token{suffix}"] = spec.bytes_token(direction)
            yield KernelReport(spec.name, spec.kind, device, count, elements=tuple(elements[spec]), **code)

    def _step(self) -> StepReport | None:
        """Run the graph after the last pass, where there are inputs for it; fill in what its parts take."""
        watcher, elements = self.watcher, self.drawing.elements
        if not watcher.runs or watcher.gm is None:
            return None
        shared = {node for mark in watcher.marks for node in mark.inputs.values()}
        names = [e.shown for e in elements]
        with kept_gradients(self.model):
            times, whole = measure(watcher.gm, watcher.inputs, shared, self.place, names, watcher.trace)
        for number, time in times.items():
            elements[number].time = time
        streams = [e.time.ms for e in elements if e.time and (e.kind == "exit" or (e.kind != "branch" and e.spec))]
        parts = sum(time.ms for time in times.values())
        given = (n for n in watcher.gm.graph.nodes if n.op == "placeholder" and INPUT in n.meta)
        shown = tuple(f"{input_name(n)} {form(value(n))}".strip() for n in given)
        return StepReport(device_name(watcher.inputs), shown, WARM_UP, RUNS, whole, parts, sum(streams))

    # --- blocks and stages ---------------------------------------------------------------------------------------

    def _blocks(self, blocks: Sequence[Block]) -> tuple[BlockReport, ...]:
        ends = self._ends("block", [block.sites for block in blocks], {})
        return tuple(BlockReport(*both, b.kept, b.recomputed) for both, b in zip(ends, blocks, strict=True))

    def _stages(self, stages: Sequence[Stage]) -> tuple[StageReport, ...]:
        of: dict[int, set[int]] = {}
        for k, stage in enumerate(stages):
            for node in stage.nodes:
                if node.op != "placeholder":
                    of.setdefault(self.place(node), set()).add(k)
        ends = self._ends("stage", [stage.sites for stage in stages], of)
        return tuple(StageReport(*both, stage.parameters) for both, stage in zip(ends, stages, strict=True))

    def _ends(self, name: str, parts: Sequence[Sequence[Node]], of: dict[int, set[int]]) -> list[tuple[int, int]]:
        """Note the part of each element; return the first and last site of every part."""
        sites = [[self.place(node) for node in part] for part in parts]
        self._spread(name, of | {number: {k} for k, numbers in enumerate(sites) for number in numbers})
        return [(numbers[0], numbers[-1]) for numbers in sites]

    def _spread(self, name: str, of: dict[int, set[int]]) -> None:
        """Note the block or stage of each element: a branch is where its site is, a layer where all its sites are."""
        elements = self.drawing.elements

        def visit(number: int, around: set[int]) -> set[int]:
            element = elements[number]
            parts = around if element.kind == "branch" else of.get(number, set())
            below = [visit(child, parts) for child in element.children]
            if element.kind in ("stream", "layer"):
                parts = set().union(*below)
            if len(parts) == 1:
                setattr(element, name, next(iter(parts)))
            return parts

        for root in self.drawing.roots:
            visit(root, set())


def _source(spec: KernelSpec, direction: Direction, device: str) -> Source | None:
    """Return the generated code; None where plain PyTorch computes the kernel."""
    try:
        return targets.source(spec, direction, device)
    except ValueError:
        return None


def _purpose(step: Pass) -> str:
    """Return the first line of the docstring of the pass's module."""
    doc = sys.modules[type(step).__module__].__doc__ or ""
    return doc.strip().partition("\n")[0].rstrip(".").replace("`", "")


def _error(error: MHCError) -> Diagnostic:
    source = None if error.source is None else short_path(error.source)
    return _diagnostic(error, "error", node=error.node, module=error.module, source=source)


def _diagnostic(problem: MHCError | MHCWarning, severity: Any, **places: str | None) -> Diagnostic:
    row = TABLE[problem.code]
    way_out = problem.way_out if isinstance(problem, MHCError) else row.way_out
    return Diagnostic(problem.code, row.title, short_path(problem.detail), way_out, severity, **places)


def _layer(watcher: Watcher, path: str) -> LayerReport | None:
    """Return the graphs of the module at `path` before and after `widen`. Raises MHC507 where no node lies in it."""
    if watcher.widening is None:
        return None
    before, after = (_inside(watcher.graphs[watcher.widening + i], path) for i in (-1, 0))
    return LayerReport(path, before, after)


def _inside(graph: Sequence[Line], path: str) -> tuple[str, ...]:
    lines = [line for line in graph if line.node.op not in ("placeholder", "output")]
    inside = [x for x in lines if any(p == path or p.startswith(f"{path}.") for p in module_stack(x.node))]
    if not inside:
        modules = dict.fromkeys(p for line in lines for p in module_stack(line.node) if p)
        raise MHCError("MHC507", f"{path!r}; modules in the graph: {names(modules)}")
    short = (x.text if len(x.text) <= MAX_WIDTH else f"{x.text[: MAX_WIDTH - 4]}...)" for x in inside)
    return tuple(f"{text}  {x.form}".rstrip() for text, x in zip(short, inside, strict=True))


def _memories(owner: str, parameters: StreamParameters) -> Iterator[MemoryReport]:
    for name, spec in parameters.memories.tables.items():
        table = parameters.table(name)
        yield MemoryReport(
            layer=f"{owner}.{name}".strip("."),
            orders=spec.shown,
            table=table.extra_repr(),
            rows=table.rows * table.width,
            parameters=sum(p.numel() for path, p in parameters.in_graph().items() if path.startswith(f"{spec.place}.")),
        )
