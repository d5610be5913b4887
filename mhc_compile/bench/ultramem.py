"""Values found by content: the fused look-up and sums against Inductor, and what they add to a training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import mhc_compile.kernels.memory.sum_rows  # noqa: F401  (registers the ops)
from mhc_compile.bench.contest import Contender, Row, contest, distance, show
from mhc_compile.bench.engram_step import Steps, relative
from mhc_compile.conversion import convert
from mhc_compile.demo.experiment import residual_model
from mhc_compile.demo.settings import FULL, QUICK, Settings
from mhc_compile.demo.text import build_corpus, training_batches
from mhc_compile.kernels.memory.ultramem import expand
from mhc_compile.kernels.memory.ultramem_settings import UltraMem, UltraMemSettings
from mhc_compile.memory.tables import MemoryTable
from mhc_compile.parameters import owners
from mhc_compile.trial.training import threads

OURS = "mhc-compile"
NONE = "without a memory"
_BATCHES = 16


def run(console: Console, *, quick: bool) -> dict[str, Any]:
    """Measure both; print the tables and return all rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    groups: dict[str, Sequence[dict[str, Any]]] = {}
    for backward in (False, True):
        title, rows = sums_contest(console, device, backward=backward, quick=quick)
        groups[title] = show(console, title, rows)
    steps, shares = run_steps(console, quick=quick)
    return {"groups": {**groups, **steps}, "added_share": shares}


def sums_contest(console: Console, device: torch.device, *, backward: bool, quick: bool) -> tuple[str, list[Row]]:
    """Measure look-up and sums of one layer of the first version, for rows that are found evenly."""
    tokens, more = (64, {"side": 16, "value_width": 32, "top": 4}) if quick else (2048, {})
    settings = UltraMemSettings.preset("v1", layers=(0,), skip=0, **more)
    spec = UltraMem(settings=settings, hidden=1, layers=(("0", "0"),)).spec(0)
    rng, V = torch.Generator().manual_seed(0), settings.value_width
    rows = torch.randint(spec.rows, (tokens, spec.top), generator=rng).to(device)
    groups = torch.randint(spec.groups, rows.shape, generator=rng).to(device)
    scores = torch.randn(*rows.shape, settings.cores, generator=rng).to(device).requires_grad_()
    flow = torch.randn(tokens, spec.groups * V, generator=rng).to(device)
    table = MemoryTable(spec.rows, V).start(0).to(device)
    weight = table.weight.detach().clone().requires_grad_()

    def dense() -> Tensor:
        return expand(weight[rows].flatten(-2), groups, scores, None, spec)

    def sparse() -> Tensor:
        return expand(table(rows), groups, scores, None, spec)

    def fused() -> Tensor:
        return torch.ops.engram_kernels.sum_rows(
            rows, groups, scores, None, table.anchor, table.handle, V, str(spec)
        )  # fmt: skip

    def contender(name: str, sums: Callable[[], Tensor], leaf: Tensor) -> Contender:
        def step() -> Sequence[Tensor]:
            out = sums()
            if not backward:
                return (out,)
            d_scores, d_weight = torch.autograd.grad(out, (scores, leaf), flow)
            taken = table.take_gradient()
            return out, d_scores, d_weight if taken is None else torch.sparse_coo_tensor(
                taken.rows[None], taken.values, weight.shape, is_coalesced=True, check_invariants=False
            )  # fmt: skip

        return Contender(name, step, None, lambda found: distance([t.to_dense() for t in found], exact))

    double = weight.detach().double().requires_grad_()
    wanted = expand(double[rows].flatten(-2), groups, scores.double(), None, spec)
    exact: list[Tensor] = [wanted.detach()]
    exact += torch.autograd.grad(wanted, (scores, double), flow.double()) if backward else []
    contenders = [
        contender(OURS, fused, table.anchor),
        contender("Inductor", torch.compile(dense, dynamic=False), weight),
        contender("Inductor, rows by our op", torch.compile(sparse, dynamic=False), table.anchor),
        contender("eager", dense, weight),
    ]
    shape = f"{tokens} tokens, k={spec.top}, V={V}, E={spec.groups}, {spec.rows} values, float32"
    measured = contest(console, contenders, ours=OURS, device=device, shape=shape, rounds=5 if quick else 41)
    return f"look-up and sums, forward{' and backward' * backward}, {shape}", measured


def sizes(settings: Settings) -> dict[str, UltraMemSettings]:
    """Return a memory of each version for a demo's model of C channels: C^2 values, and C/2 squared in every layer."""
    C = settings.hidden
    return {
        "v1": UltraMemSettings.preset(
            "v1", layers=(0,), skip=1, side=C, key_width=C // 2, value_width=C // 2, top=16
        ),
        "v2": UltraMemSettings.preset(
            "v2", side=C // 2, key_width=C // 4, value_width=C // 4, input_width=C // 4, top=16
        ),
    }  # fmt: skip


def run_steps(console: Console, *, quick: bool) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Measure steps; return rows by title, and what the memories and their look-ups add."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours are shown
    settings = QUICK if quick else FULL
    corpus = build_corpus(settings)
    batches = training_batches(corpus, settings, stream=1)[: 3 if quick else _BATCHES]
    shape = (
        f"{settings.layers} layers, C={settings.hidden}, {settings.batch} x {settings.length} tokens, "
        f"{settings.threads} thread"
    )
    steps: dict[str, Steps] = {}
    contenders = []

    def add(name: str, memory: UltraMemSettings | None, *, given: bool = False) -> None:
        torch.manual_seed(0)
        model: Any = residual_model(settings, corpus)
        convert(model, streams=settings.streams, inner="eager", ultramem=memory)
        scatter(model)
        with torch.no_grad():
            exact = float(model(input_ids=batches[0], labels=batches[0], use_cache=False).loss)
        steps[name] = Steps(model.train(), batches, settings.inner, given=() if given else None)
        # With random sums in the place of what is looked up, the loss is another.
        check = None if given else (lambda loss: abs(float(loss) - exact) / exact)
        contenders.append(Contender(name, steps[name], check=check, tolerance=1e-5))

    with threads(settings.threads):
        add(NONE, None)
        for version, memory in sizes(settings).items():
            add(version, memory)
            add(f"{version}, sums given", memory, given=True)
        rows = contest(
            console, contenders, ours=NONE, device=torch.device("cpu"), shape=shape, rounds=5 if quick else 41
        )
    title = f"training step with UltraMem, {shape}"
    groups = {title: show(console, title, rows)}
    shares = {}
    for version in sizes(settings):
        for what, base in (("memory", NONE), ("look-ups", f"{version}, sums given")):
            share = relative(steps[base], steps[version])
            shares[f"{version}, {what}"] = asdict(share)
            console.print(
                f"{version}: its {what} add {share.median - 1:+.1%} to a step without (quartiles of paired steps "
                f"{share.low - 1:+.1%} .. {share.high - 1:+.1%})"
            )
    return groups, shares


@torch.no_grad()
def scatter(model: torch.nn.Module) -> None:
    """Set the projections, which start at zero, to random values: the loss depends on what is looked up."""
    for parameters in owners(model).values():
        for name, p in parameters.in_graph().items():
            if name.endswith(".projection"):
                p.normal_(std=0.2)
