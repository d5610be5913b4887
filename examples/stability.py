"""Published claims on stability, tried at a size that a laptop trains: composite gain, losses, gradient norms.

Hyper-Connections (HC, arXiv 2409.19606) mix residual streams by any matrix H, mHC (arXiv 2512.24880) by doubly
stochastic ones. All forms start from the same residual model, whose function `convert` keeps, and see the same batches.

Run: python examples/stability.py [--quick] [--out FOLDER]
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch

import mhc_compile
from mhc_compile import palette
from mhc_compile.demo.experiment import residual_model
from mhc_compile.demo.settings import FULL, Settings
from mhc_compile.demo.text import Corpus, build_corpus, held_out_batches, training_batches
from mhc_compile.kernels.measures import gains
from mhc_compile.kernels.reference import sinkhorn
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.measure import CompositeGain, measuring
from mhc_compile.trial import studies
from mhc_compile.trial.studies import Claim, markdown, plus_minus
from mhc_compile.trial.training import Contender, adamw, train

RESIDUAL, HC, FREE, MHC, MEMORY = "residual", "HC", "mHC, H free", "mHC", "mHC + Engram"
FORMS: dict[str, dict[str, Any]] = {
    RESIDUAL: {},
    HC: {"form": "hc"},
    FREE: {"manifold": "unconstrained"},  # the equations of mHC without its constraint
    MHC: {},
    MEMORY: {},
}
LOOKS = dict(zip(FORMS, ("residual", "hc", "free", "mhc", "engram"), strict=True))
LOGITS_STD = 1.0
"""Of the random logits that Sinkhorn is tried on."""
NOISE = 1e-4
"""Gains that are closer to each other are the same: they are measured on float32 matrices."""
WARM_UP = 0.1
"""The share of the steps in which the learning rate rises; gradient norms are judged after it."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained. The learning rates are those of 1e-3, 2e-3 and 4e-3 that were best for the residual model, of
    `losses` and of the greatest depth; all forms take them."""

    losses: Settings
    """Of the comparison of losses, gradient norms and gains over seeds."""
    deep: Settings
    """Of the gain along depth and by iterations; its layers are those of `depths`."""
    depths: tuple[int, ...]
    """Decoder layers: two sites each. The first is that of the comparison of iterations."""
    iterations: tuple[int, ...]
    seeds: int
    measures: int
    """How often gains are measured in a training, besides the start."""
    kernels: str
    processes: int


def _memory(*layers: int) -> mhc_compile.MemorySettings:
    return mhc_compile.MemorySettings.preset("paper", heads=4, rows_per_head=4096, row_width=16, layers=layers)


_LOSSES = replace(
    FULL, layers=8, hidden=96, heads=4, vocabulary=1024, length=96, batch=8, steps=250, text_bytes=3_000_000,
    held_out_batches=16, learning_rate=4e-3, initializer_range=0.02, memory=_memory(1, 4),
)  # fmt: skip
_SMALL = replace(
    _LOSSES, layers=1, hidden=32, heads=2, vocabulary=512, length=32, batch=4, steps=12, text_bytes=400_000,
    held_out_batches=4, memory=_memory(0),
)  # fmt: skip
RECIPE = Recipe(
    losses=_LOSSES, deep=replace(_LOSSES, hidden=64, length=64, batch=4, steps=100, learning_rate=2e-3),
    depths=(24, 48, 96), iterations=(0, 1, 5, 20), seeds=3, measures=4, kernels="all", processes=2,
)  # fmt: skip
QUICK = Recipe(
    losses=_SMALL, deep=_SMALL, depths=(1, 2), iterations=(0, 20), seeds=1, measures=1, kernels="none", processes=1
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training."""

    form: str
    settings: Settings
    """With the seed; without steps the gain at the start is all that is asked for."""
    measures: int
    kernels: str
    iterations: int = 20
    scratch: bool = False

    def __str__(self) -> str:
        s = self.settings
        return f"{self.form}, {s.layers} layers, {self.iterations} iterations, seed {s.seed}, {s.steps} steps"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training showed."""

    job: Job
    parameters: int
    losses: list[float]
    """Of every step."""
    norms: list[float]
    """Of every step's gradient before clipping to 1, without the rows of tables."""
    held_out: float | None
    """At the end, in nats per token; None without steps."""
    gains: dict[int, CompositeGain]
    """After so many steps."""

    def __str__(self) -> str:
        loss = "" if self.held_out is None else f"loss {self.held_out:.4f} "
        return loss + (f"gain {_larger(self.last_gain):.4g}" if self.gains else "")

    @property
    def usual_norm(self) -> float:
        """The median of the second half."""
        return statistics.median(self.norms[len(self.norms) // 2 :])

    @property
    def spike(self) -> float:
        """The largest norm after the warm-up over the usual one."""
        return max(self.norms[math.ceil(len(self.norms) * WARM_UP) :]) / self.usual_norm

    @property
    def last_gain(self) -> CompositeGain:
        """At the end."""
        return self.gains[max(self.gains)]


def run(corpus: Corpus, job: Job) -> Trained:
    """Train one form from the residual model of its seed."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    settings = job.settings
    torch.manual_seed(settings.seed)
    model = residual_model(settings, corpus)
    if job.form != RESIDUAL:
        memory = {"engram": settings.memory, "tokenizer": corpus.tokenizer} if job.form == MEMORY else {}
        counted = {"iterations": job.iterations} if job.form == MHC else {}
        options = {**FORMS[job.form], **counted, **memory, "inner": "eager", "kernels": job.kernels}
        mhc_compile.convert(model, streams=settings.streams, scratch=job.scratch, start="paper", **options)
    held_out = held_out_batches(corpus, settings)
    measured: dict[int, CompositeGain] = {}

    streams = measuring(model, {"input_ids": held_out[0], "use_cache": False}) if job.form != RESIDUAL else dict

    def measure() -> None:
        for measures in streams().values():
            measured[len(contender.losses)] = measures.gain

    def tick() -> None:
        done = len(contender.losses)
        if any(done == settings.steps * (i + 1) // job.measures for i in range(job.measures)):
            measure()

    contender = Contender(job.form, model, model, adamw(model))
    measure()
    train([contender], training_batches(corpus, settings, stream=0), settings.learning_rate, tick)
    return Trained(
        job=job,
        parameters=sum(p.numel() for p in model.parameters()),
        losses=contender.losses,
        norms=contender.norms,
        held_out=statistics.fmean(contender.held_out(held_out)) if settings.steps else None,
        gains=measured,
    )


def jobs_of(recipe: Recipe) -> tuple[list[Job], list[Job], list[Job], list[Job]]:
    """Return the trainings by depth, by iterations, from scratch, and by form and seed: the longest first."""
    plain = partial(Job, measures=recipe.measures, kernels=recipe.kernels)
    ends = partial(plain, measures=1)
    by_depth = [
        plain(form=form, settings=replace(recipe.deep, layers=layers))
        for layers in sorted(recipe.depths, reverse=True)
        for form in (HC, MHC)
    ]
    first = replace(recipe.deep, layers=recipe.depths[0])
    counts = [i for i in recipe.iterations if i != 20]  # by depth there is one with 20
    by_count = [ends(form=MHC, settings=first, iterations=i) for i in counts]
    untrained = replace(first, steps=0)
    scratch = [ends(form=MHC, settings=untrained, iterations=i, scratch=True) for i in recipe.iterations]
    by_form = [
        ends(form=form, settings=replace(recipe.losses, seed=seed)) for seed in range(recipe.seeds) for form in FORMS
    ]
    return by_depth, by_count, scratch, by_form


def random_gain(iterations: int, sites: int, draws: int = 256) -> CompositeGain:
    """Return the gain of an untrained product of `sites` matrices H, with logits from N(0, LOGITS_STD)."""
    random = torch.Generator().manual_seed(0)
    logits = LOGITS_STD * torch.randn(sites, draws, 4, 4, dtype=torch.float64, generator=random)
    product = torch.eye(4, dtype=torch.float64)
    for H in sinkhorn(logits, StreamSpec(iterations=iterations)):
        product = H @ product
    rows, columns = gains(product)
    return CompositeGain(float(rows.mean()), float(rows.max()), float(columns.mean()), float(columns.max()))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    recipe: Recipe
    by_depth: list[Trained]
    by_count: list[Trained]
    scratch: list[Trained]
    by_form: list[Trained]

    def deep(self, form: str) -> dict[int, Trained]:
        """Return the trainings by layers, fewest first."""
        return {t.job.settings.layers: t for t in reversed(self.by_depth) if t.job.form == form}

    def seeds(self, form: str) -> list[Trained]:
        return [t for t in self.by_form if t.job.form == form]

    def differences(self, form: str, other: str) -> list[float]:
        """Return the held-out losses of `form` minus those of `other`, seed by seed."""
        return [a.held_out - b.held_out for a, b in zip(self.seeds(form), self.seeds(other), strict=True)]

    @property
    def counted(self) -> dict[int, Trained]:
        """The trainings at the first depth, by iterations."""
        by_iterations = {t.job.iterations: t for t in [*self.by_count, self.deep(MHC)[self.recipe.depths[0]]]}
        return dict(sorted(by_iterations.items()))


def explore(recipe: Recipe) -> Outcome:
    """Run everything."""
    corpus = build_corpus(recipe.losses)
    parts = jobs_of(recipe)
    taken = iter(studies.in_processes(partial(run, corpus), [job for part in parts for job in part], recipe.processes))
    by_depth, by_count, scratch, by_form = ([next(taken) for _ in part] for part in parts)
    return Outcome(recipe=recipe, by_depth=by_depth, by_count=by_count, scratch=scratch, by_form=by_form)


def claims(outcome: Outcome) -> list[Claim]:
    """Compare the published findings with the outcome."""
    hc, mhc = outcome.deep(HC), outcome.deep(MHC)
    deepest, layers = max(hc), outcome.recipe.losses.layers
    gain = _apart(f"composite gain, {deepest} layers: HC, mHC", [hc[deepest]], [mhc[deepest]])
    seeds = _apart(f"the same, {layers} layers and more steps", outcome.seeds(HC), outcome.seeds(MHC))
    grown = [_larger(t.last_gain) for t in hc.values()]
    depth = Claim(
        f"the gain of HC grows with depth ({', '.join(map(str, hc))} layers)",
        "it compounds over sites",
        ", ".join(f"{g:.4g}" for g in grown),
        "each is larger than the one before",
        all(a < b for a, b in pairwise(grown)),
    )
    counted = {i: _distance(t.last_gain) for i, t in outcome.counted.items()}
    iterations = Claim(
        f"Sinkhorn iterations ({', '.join(map(str, counted))}) bring the trained gain to 1",
        "20 are enough",
        "off by " + ", ".join(f"{d:.2g}" for d in counted.values()),
        f"none is farther off than the one before, the last is nearer than the first (by {NOISE:g}) and within 0.1",
        all(b < a + NOISE for a, b in pairwise(counted.values()))
        and counted[min(counted)] > counted[max(counted)] + NOISE
        and counted[max(counted)] < 0.1,
    )
    spikes = {form: [t.spike for t in outcome.seeds(form)] for form in (HC, MHC)}
    smoother = Claim(
        "gradient norms of HC have higher spikes than those of mHC",
        "yes; the loss surges at 12,000 steps",
        f"{plus_minus(spikes[HC], 2)}, {plus_minus(spikes[MHC], 2)} times the usual norm",
        "with every seed",
        all(a > b for a, b in zip(spikes[HC], spikes[MHC], strict=True)),
    )
    others = ((HC, RESIDUAL, "-0.027 (27B)"), (MHC, RESIDUAL, "-0.021 (27B)"), (MEMORY, MHC, "-0.014 (equal size)"))
    return [gain, seeds, depth, iterations, smoother, *(_lower(outcome, *pair) for pair in others)]


def _apart(finding: str, hc: list[Trained], mhc: list[Trained]) -> Claim:
    first, second = ([_larger(t.last_gain) for t in runs] for runs in (hc, mhc))
    here, holds = (
        f"{plus_minus(first, 1)}, {plus_minus(second, 3)}",
        min(first) >= 10 * max(second) and max(second) <= 1.6,
    )
    criterion = "that of HC is at least 10 times that of mHC, which is at most 1.6, with every seed"
    return Claim(finding, "3000, 1.6 (27B)", here, criterion, holds)


def _lower(outcome: Outcome, form: str, other: str, published: str) -> Claim:
    differences = outcome.differences(form, other)
    here, holds = plus_minus(differences, sign=True), all(d < 0 for d in differences)
    return Claim(f"loss of {form} minus {other}", published, here, "it is lower with every seed", holds)


def _larger(gain: CompositeGain) -> float:
    """Return the larger gain of forward and backward, the mean over tokens."""
    return max(gain.forward_mean, gain.backward_mean)


def _distance(gain: CompositeGain) -> float:
    """Return the larger distance from 1 of forward and backward, the mean over tokens."""
    return max(abs(gain.forward_mean - 1), abs(gain.backward_mean - 1))


def report(outcome: Outcome) -> str:
    """Return all tables, as markdown."""
    recipe, losses, deep = outcome.recipe, outcome.recipe.losses, outcome.recipe.deep
    both = [
        (str(layers), str(2 * layers), *_gain_cells(a), *_gain_cells(b))
        for (layers, a), b in zip(outcome.deep(HC).items(), outcome.deep(MHC).values(), strict=True)
    ]
    sides = [f"{form} {way}" for form in (HC, MHC) for way in ("forward", "backward")]
    counts = []
    for (i, trained), start in zip(outcome.counted.items(), outcome.scratch, strict=True):
        at_random = random_gain(i, 2 * recipe.depths[0])
        composites = (at_random, start.last_gain, trained.last_gain)
        counts.append((str(i), *(f"{g.forward_mean:.6g}, {g.backward_mean:.6g}" for g in composites)))
    forms = []
    for form in FORMS:
        seeds = outcome.seeds(form)
        more = plus_minus(outcome.differences(form, RESIDUAL), sign=True) if form != RESIDUAL else "–"
        gain = [_larger(t.last_gain) for t in seeds if t.gains]
        forms.append(
            (
                form, f"{seeds[0].parameters:,}", plus_minus([t.losses[0] for t in seeds], 6),
                plus_minus([t.held_out for t in seeds]), more, plus_minus([t.usual_norm for t in seeds], 3),
                plus_minus([t.spike for t in seeds], 2), plus_minus(gain, 3) if gain else "–",
            )
        )  # fmt: skip
    heads = ("form", "parameters", "first loss", "held-out loss", "minus residual", "gradient norm", "largest", "gain")
    return "\n\n".join(
        (
            markdown(studies.CLAIMS_HEAD, [c.row for c in claims(outcome)]),
            f"Composite gain of all sites after {deep.steps} steps of {deep.batch} x {deep.length} tokens, mean over "
            f"tokens (largest token), n = {deep.streams}, C = {deep.hidden}, seed {deep.seed}:",
            markdown(("layers", "sites", *sides), both),
            f"Losses in nats a token and gradient norms, {losses.layers} layers, C = {losses.hidden}, {losses.steps} "
            f"steps of {losses.batch} x {losses.length} tokens, mean ± standard deviation of {recipe.seeds} seeds "
            "(differences are paired). Gradient norm: median of the second half, before clipping to 1; largest: over "
            "that median, after the warm-up; gain: the larger of forward and backward.",
            markdown(heads, forms),
            f"Composite gain of mHC (forward, backward) by Sinkhorn iterations, {2 * recipe.depths[0]} sites: of "
            f"random logits with standard deviation {LOGITS_STD:g}, untrained; of a model that starts from scratch; "
            f"after {deep.steps} steps.",
            markdown(("iterations", "random logits", "from scratch", "trained"), counts),
        )
    )


def _gain_cells(of: Trained) -> tuple[str, str]:
    g = of.last_gain
    return f"{g.forward_mean:.4g} ({g.forward_max:.4g})", f"{g.backward_mean:.4g} ({g.backward_max:.4g})"


def draw(outcome: Outcome) -> Any:
    """Draw the gain in training and by iterations, losses, gradient norms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (gain, counts), (loss, norm) = figure.subplots(2, 2)
    for form in (HC, MHC):
        for i, (layers, trained) in enumerate(outcome.deep(form).items()):
            values = [_larger(g) for g in trained.gains.values()]
            how = palette.look(LOOKS[form], points=True, nth=i)
            gain.plot([*trained.gains], values, label=f"{form}, {layers} layers", **how)
    gain.set(title="Composite gain in training", xlabel="step", yscale="log")
    for i, (name, at) in enumerate((
        ("random logits", [random_gain(i, 2 * outcome.recipe.depths[0]) for i in outcome.counted]),
        ("from scratch", [t.last_gain for t in outcome.scratch]),
        ("trained", [t.last_gain for t in outcome.counted.values()]),
    )):  # fmt: skip
        how = palette.series(i, points=True)
        counts.plot([str(n) for n in outcome.counted], [_distance(g) for g in at], label=name, **how)
    counts.set(title="Distance of mHC's gain from 1", xlabel="Sinkhorn iterations", yscale="log")
    base = outcome.seeds(RESIDUAL)
    for form, name in LOOKS.items():
        seeds, how = outcome.seeds(form), palette.look(name)
        if form != RESIDUAL:
            apart = [[a - b for a, b in zip(t.losses, r.losses, strict=True)] for t, r in zip(seeds, base, strict=True)]
            loss.plot(studies.smooth(apart), label=form, **how)
        norm.plot(studies.smooth([t.norms for t in seeds]), label=form, **how)
    loss.axhline(0, color=palette.NEUTRAL, linewidth=1)
    loss.set(title="Training loss minus residual, mean of seeds", xlabel="step")
    norm.set(title="Gradient norm, mean of seeds", xlabel="step", yscale="log")
    palette.finish(figure)
    return figure


def main() -> None:
    arguments = studies.parser(__doc__.splitlines()[0], "stability").parse_args()
    outcome = explore(QUICK if arguments.quick else RECIPE)
    print(text := report(outcome))
    studies.write(arguments.out, "stability", text, asdict(outcome), draw(outcome))


if __name__ == "__main__":
    main()
