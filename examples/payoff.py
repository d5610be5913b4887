"""Compare a residual model that trains on with its n-stream forms from the same weights: what does a conversion pay?

Everything starts from one residual model of a seed, whose initialisation and learning rate are tuned, and sees the same
batches. What starts from scratch starts from that model's own random weights.

Run: python examples/payoff.py [--quick] [--starts | --sizes | --layers | --wide | --deep] [--out FOLDER]
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn

import mhc_compile
from mhc_compile import palette
from mhc_compile.demo.experiment import SECOND_PEAK, residual_model
from mhc_compile.demo.settings import FULL, Settings
from mhc_compile.demo.text import Corpus, build_corpus, held_out_batches, training_batches
from mhc_compile.measure import CompositeGain, measuring
from mhc_compile.trial import studies
from mhc_compile.trial.studies import Claim, markdown, plus_minus
from mhc_compile.trial.training import Contender, adamw, train

BASE, RESIDUAL, LONGER, PAPER, MHC, FREE, SCRATCH = (
    "residual, before", "residual", "residual, as long as mHC takes", "mHC, published start", "mHC",
    "mHC, H free, alpha 1", "mHC from scratch",
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    PAPER: {"start": "paper"}, MHC: {}, FREE: {"manifold": "unconstrained"}, SCRATCH: {"scratch": True}
}  # fmt: skip
LOOKS = {PAPER: "mhc from its published start", MHC: "mhc", FREE: "free", SCRATCH: "mhc"}
ALPHA = {FREE: (1.0, 1.0)}
"""Values of alpha for pre and post, and for H, where they are neither the default nor the published ones."""
STARTS: dict[str, tuple[dict[str, Any], tuple[float, float] | None]] = {
    "alpha 0.01, of H 0.01 (published)": ({}, (0.01, 0.01)),
    "0.3, 0.01": ({}, (0.3, 0.01)),
    "1, 0.01 (default)": ({}, (1.0, 0.01)),
    "1, 1": ({}, (1.0, 1.0)),
    "1, H = identity": ({"manifold": "identity"}, (1.0, 1.0)),
    "3, 0.01": ({}, (3.0, 0.01)),
    "10, 0.01": ({}, (10.0, 0.01)),
    "1, 0.01, two streams": ({"streams": 2}, (1.0, 0.01)),
    "1, 0.01, eight streams": ({"streams": 8}, (1.0, 0.01)),
    "1, 0.01, H free": ({"manifold": "unconstrained"}, (1.0, 0.01)),
    "Hyper-Connections, 0.01 (published)": ({"form": "hc"}, None),
    "Hyper-Connections, 0.1": ({"form": "hc"}, (0.1, 0.1)),
    "Attention Residuals": ({"form": "attnres"}, None),
    "Attention Residuals, four blocks": ({"form": "attnres_block"}, None),
    "DenseFormer": ({"form": "denseformer"}, None),
    "MUDDFormer": ({"form": "mudd"}, None),
    "value residual": ({"form": "value_residual"}, None),
    "1, 0.01, pre one site ahead": ({"convention": "deepseek_v41"}, (1.0, 0.01)),
    "1, 0.01, transportation": ({"manifold": "transportation"}, (1.0, 0.01)),
}
"""Starts that `--starts` compares: options of `convert`, then alpha for pre and post, and for H."""
CONTINUED = (RESIDUAL, LONGER, PAPER, MHC, FREE)
SPIKE_WINDOW = 20
"""A spike is a loss over the median of so many steps before it."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Sizes and repetitions of the trainings."""

    settings: Settings
    """Settings of every training: of 4e-3, 8e-3 and 16e-3 the best learning rate of the residual model from scratch."""
    seeds: int
    kernels: str
    processes: int


RECIPE = Recipe(
    settings=replace(
        FULL, layers=8, hidden=96, heads=4, vocabulary=1024, length=96, batch=8, steps=250, text_bytes=3_000_000,
        held_out_batches=16, learning_rate=8e-3, initializer_range=96**-0.5,
    ),
    seeds=5, kernels="all", processes=2,
)  # fmt: skip
_NARROW = replace(RECIPE.settings, hidden=64, initializer_range=64**-0.5)
_DEEP = replace(_NARROW, layers=48, length=64, batch=4, steps=1000, learning_rate=4e-3)
_LAYERS = replace(_NARROW, layers=24, batch=6, learning_rate=16e-3)
_WIDE = replace(RECIPE.settings, hidden=192, learning_rate=4e-3, initializer_range=192**-0.5)
_MIXING = tuple((arm, False) for arm in (RESIDUAL, "1, 0.01 (default)", "1, H = identity"))
TABLES: dict[str, tuple[Recipe, tuple[tuple[str, bool], ...], str]] = {
    "starts": (replace(RECIPE, seeds=1), tuple((arm, False) for arm in (RESIDUAL, *STARTS)), "other starts and forms"),
    "sizes": (RECIPE, ((RESIDUAL, False), ("1, 0.01, two streams", False), ("1, 0.01, eight streams", False),
                       (RESIDUAL, True), ("1, 0.01 (default)", True)), "numbers of streams, and bfloat16"),
    "layers": (replace(RECIPE, settings=_LAYERS, seeds=3), _MIXING, "24 layers, continued"),
    "wide": (replace(RECIPE, settings=_WIDE, seeds=3), _MIXING, "C = 192, continued"),
    "deep": (replace(RECIPE, settings=_DEEP), ((BASE, False), (SCRATCH, False)), "48 layers, from scratch"),
}  # fmt: skip
"""Other tables: arms, and whether each trains in bfloat16."""
QUICK = Recipe(
    settings=replace(
        RECIPE.settings, layers=1, hidden=32, heads=2, vocabulary=512, length=32, batch=4, steps=24, text_bytes=400_000,
        held_out_batches=4, initializer_range=32**-0.5,
    ),
    seeds=1, kernels="none", processes=1,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training."""

    arm: str
    settings: Settings
    """With the seed."""
    weights: Path
    """File with the weights of the seed's trained residual model; that model's own job writes it."""
    kernels: str
    more: float = 1.0
    """The steps are so many times those of the settings."""
    bfloat16: bool = False
    """Whether autocast is on."""

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.settings.seed}{', bfloat16' if self.bfloat16 else ''}"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Measurements of one training."""

    arm: str
    seed: int
    parameters: int
    losses: list[float]
    """Training losses of every step."""
    held_out: float
    """At the end, in nats per token."""
    step: float
    """Processor seconds of a step, the median."""
    gain: CompositeGain | None

    def __str__(self) -> str:
        return f"loss {self.held_out:.4f}, {1e3 * self.step:.0f} ms a step"

    @property
    def spike(self) -> float:
        """The largest loss over the median of the `SPIKE_WINDOW` steps before it."""
        window = min(SPIKE_WINDOW, len(self.losses) // 2)
        return max(
            loss / statistics.median(self.losses[i - window : i]) for i, loss in enumerate(self.losses) if i >= window
        )


def run(corpus: Corpus, job: Job) -> Trained:
    """Train one arm."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    settings = job.settings
    torch.manual_seed(settings.seed)
    model = residual_model(settings, corpus)
    first = job.arm in (BASE, SCRATCH)
    if not first:
        load_model(model, job.weights)
    converted = job.arm in OPTIONS or job.arm in STARTS
    if converted:
        options, alpha = STARTS.get(job.arm) or (OPTIONS[job.arm], ALPHA.get(job.arm))
        mhc_compile.convert(model, **{"streams": settings.streams, **options}, inner="eager", kernels=job.kernels)
        if alpha is not None:
            set_alpha(model, *alpha)
    batches = training_batches(corpus, replace(settings, steps=round(settings.steps * job.more)), stream=int(not first))
    held_out = held_out_batches(corpus, settings)
    # In a context around all steps, autocast would go on with its first copy of the weights.
    program = torch.autocast("cpu", torch.bfloat16)(model) if job.bfloat16 else model
    contender = Contender(job.arm, model, program, adamw(model))
    begins = [time.process_time()]
    rate = settings.learning_rate * (1.0 if first else SECOND_PEAK)
    train([contender], batches, rate, lambda: begins.append(time.process_time()))
    if job.arm == BASE:
        save_model(model, str(job.weights))
    gains = measuring(model, {"input_ids": held_out[0], "use_cache": False})() if converted else {}
    return Trained(
        arm=job.arm,
        seed=settings.seed,
        parameters=sum(p.numel() for p in model.parameters()),
        losses=contender.losses,
        held_out=statistics.fmean(contender.held_out(held_out)),
        step=statistics.median(b - a for a, b in pairwise(begins)),
        gain=next((measures.gain for measures in gains.values()), None),
    )


def set_alpha(model: nn.Module, value: float, of_mixing: float) -> None:
    """Set alpha of all sites, `[3]` with that of H last: while phi is zero, the function is unchanged."""
    with torch.no_grad():
        for name, parameter in mhc_compile.stream_parameters(model).items():
            if name.endswith(".alpha"):
                parameter.fill_(value)
                parameter[2:] = of_mixing


@dataclass(frozen=True, kw_only=True)
class Outcome:
    recipe: Recipe
    trained: list[Trained]

    def seeds(self, arm: str) -> list[Trained]:
        """Return the trainings of an arm, by seed."""
        return [t for t in self.trained if t.arm == arm]

    def reference(self, arm: str) -> str:
        """Return the arm with which `arm` is compared."""
        return BASE if arm == SCRATCH else RESIDUAL

    def differences(self, arm: str) -> list[float]:
        """Return the held-out losses of `arm` minus those of its reference, seed by seed."""
        others = self.seeds(self.reference(arm))
        return [a.held_out - b.held_out for a, b in zip(self.seeds(arm), others, strict=True)]

    def slower(self, arm: str) -> float:
        """Return the median duration of a step over that of the residual model."""
        return statistics.median(a.step / b.step for a, b in zip(self.seeds(arm), self.seeds(RESIDUAL), strict=True))


def explore(recipe: Recipe) -> Outcome:
    """Run everything: the residual models first, then what goes on from them."""
    corpus = build_corpus(recipe.settings)
    with tempfile.TemporaryDirectory() as folder:
        jobs = bases(recipe, folder)
        trained = trials_of(corpus, jobs, recipe.processes)
        arms = [arm for arm in (SCRATCH, *CONTINUED) if arm != LONGER]
        trained += trials_of(corpus, [replace(job, arm=arm) for arm in arms for job in jobs], recipe.processes)
        # A step takes longer with streams: the residual model gets that time, too.
        more = Outcome(recipe=recipe, trained=trained).slower(MHC)
        longer = [replace(job, arm=LONGER, more=max(1.0, more)) for job in jobs]
        trained += trials_of(corpus, longer, recipe.processes)
    return Outcome(recipe=recipe, trained=trained)


def bases(recipe: Recipe, folder: str) -> list[Job]:
    """Return the trainings of the residual model from scratch, one for each seed."""
    kernels = recipe.kernels
    return [
        Job(arm=BASE, settings=replace(recipe.settings, seed=seed), weights=Path(folder, str(seed)), kernels=kernels)
        for seed in range(recipe.seeds)
    ]


def compare(recipe: Recipe, arms: Sequence[tuple[str, bool]]) -> str:
    """Return a table of `arms`, compared with the residual model among them that trains at the same precision."""
    corpus = build_corpus(recipe.settings)
    with tempfile.TemporaryDirectory() as folder:
        jobs = bases(recipe, folder)
        if (BASE, False) not in arms:
            trials_of(corpus, jobs, recipe.processes)
        every = [replace(job, arm=arm, bfloat16=half) for arm, half in arms for job in jobs]
        trained = trials_of(corpus, every, recipe.processes)
    of_arm = {arm: trained[i * recipe.seeds : (i + 1) * recipe.seeds] for i, arm in enumerate(arms)}
    residual = {half: of_arm[arm, half] for arm, half in arms if arm in (BASE, RESIDUAL)}
    rows = []
    for (arm, half), seeds in of_arm.items():
        apart = [a.held_out - b.held_out for a, b in zip(seeds, residual[half], strict=True)]
        times = statistics.median(a.step / b.step for a, b in zip(seeds, residual[half], strict=True))
        spike = max(a.spike / b.spike for a, b in zip(seeds, residual[half], strict=True))
        rows.append(
            (
                arm, "bfloat16" if half else "float32", plus_minus([t.held_out for t in seeds]),
                *((plus_minus(apart, sign=True), f"{max(apart):+.4f}") if any(apart) else ("–", "–")), f"{times:.2f}",
                f"{spike:.2f}", f"{max(map(_backward, seeds)):.3f}" if seeds[0].gain else "–",
            )
        )  # fmt: skip
    heads = ("arm", "precision", "held-out loss", "minus residual", "worst seed", "step over residual's",
             "largest spike over residual's", "largest backward gain")  # fmt: skip
    return markdown(heads, rows)


def trials_of(corpus: Corpus, jobs: list[Job], processes: int) -> list[Trained]:
    """Run the jobs, several at a time."""
    return studies.in_processes(partial(run, corpus), jobs, processes)


def claims(outcome: Outcome) -> list[Claim]:
    """Compare what was expected of conversions with what they gave."""
    mhc, paper, scratch, longer = (outcome.differences(arm) for arm in (MHC, PAPER, SCRATCH, LONGER))
    first = {arm: [t.losses[0] for t in outcome.seeds(arm)] for arm in (RESIDUAL, PAPER, MHC, FREE)}
    kept = max(abs(a / b - 1) for arm in (PAPER, MHC, FREE) for a, b in zip(first[arm], first[RESIDUAL], strict=True))
    gains = {arm: [_backward(t) for t in outcome.seeds(arm)] for arm in (MHC, FREE)}
    spikes = {arm: max(t.spike for t in outcome.seeds(arm)) for arm in (RESIDUAL, MHC)}
    return [
        Claim("the conversion keeps the function", "exactly", f"{kept:.0e}", "relative, below 1e-5", kept < 1e-5),
        _lower("continued from a checkpoint, equal steps: mHC minus residual", mhc, 0.04),
        _lower("from scratch, equal steps: mHC minus residual", scratch, 0.2),
        Claim(
            "the published start (alpha = 0.01) gains less", "not stated", plus_minus(paper, sign=True),
            "at most half of what the default gains", statistics.fmean(paper) > statistics.fmean(mhc) / 2,
        ),
        Claim(
            "at equal time: mHC minus the residual model trained longer", "not stated",
            plus_minus([a - b for a, b in zip(mhc, longer, strict=True)], sign=True), "it is lower with every seed",
            all(a < b for a, b in zip(mhc, longer, strict=True)),
        ),
        Claim(
            "with alpha = 1 a free H explodes, and mHC does not", "3000, 1.6 (27B)",
            f"{statistics.median(gains[FREE]):.2g}, {max(gains[MHC]):.3f}",
            "the median backward gain is above 100, that of mHC at most 1.6 with every seed",
            statistics.median(gains[FREE]) > 100 and max(gains[MHC]) <= 1.6,
        ),
        Claim(
            "losses of mHC have no higher spikes", "not stated", f"{spikes[RESIDUAL]:.3f}, {spikes[MHC]:.3f}",
            "the largest is at most 1.2 times the residual model's", spikes[MHC] <= 1.2 * spikes[RESIDUAL],
        ),
    ]  # fmt: skip


def _lower(finding: str, differences: list[float], by: float) -> Claim:
    holds = all(d < 0 for d in differences) and statistics.fmean(differences) <= -by
    criterion = f"it is lower with every seed, by {by:g} on average"
    return Claim(finding, "-0.021 (27B)", plus_minus(differences, sign=True), criterion, holds)


def _backward(trained: Trained) -> float:
    """Return the mean backward gain; infinite where it has overflowed."""
    assert trained.gain is not None
    gain = trained.gain.backward_mean
    return gain if math.isfinite(gain) else math.inf


def report(outcome: Outcome) -> str:
    """Return all tables as markdown."""
    s = outcome.recipe.settings
    rows = []
    for arm in (BASE, SCRATCH, *CONTINUED):
        seeds = outcome.seeds(arm)
        compared = outcome.differences(arm) if arm not in (BASE, RESIDUAL) else []
        gain = statistics.median(map(_backward, seeds)) if seeds[0].gain else None
        rows.append(
            (
                arm, f"{seeds[0].parameters:,}", plus_minus([t.held_out for t in seeds]),
                plus_minus(compared, sign=True) if compared else "–",
                f"{max(compared):+.4f}" if compared else "–", f"{outcome.slower(arm):.2f}",
                "–" if gain is None else f"{gain:.3g}", f"{max(t.spike for t in seeds):.3f}",
            )
        )  # fmt: skip
    heads = (
        "arm", "parameters", "held-out loss", "minus residual", "worst seed", "step over residual's", "backward gain",
        "largest spike",
    )  # fmt: skip
    return "\n\n".join(
        (
            markdown(studies.CLAIMS_HEAD, [c.row for c in claims(outcome)]),
            f"Losses in nats per token, mean ± standard deviation of {outcome.recipe.seeds} seeds (differences are "
            f"paired), {s.layers} layers, C = {s.hidden}, n = {s.streams}: {s.steps} steps of {s.batch} x {s.length} "
            f"tokens from scratch, then {s.steps} at {SECOND_PEAK:g} of the learning rate. Backward gain: mean over "
            "tokens, median of the seeds.",
            markdown(heads, rows),
        )
    )


def draw(outcome: Outcome) -> Any:
    """Draw losses after the conversion minus those of the residual model, and from scratch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    continued, scratch = figure.subplots(1, 2)
    for axes, arms, base in ((continued, (PAPER, MHC, FREE), RESIDUAL), (scratch, (SCRATCH,), BASE)):
        for arm in arms:
            pairs = zip(outcome.seeds(arm), outcome.seeds(base), strict=True)
            apart = [[x - y for x, y in zip(a.losses, b.losses, strict=True)] for a, b in pairs]
            axes.plot(studies.smooth(apart, 20), label=arm, **palette.look(LOOKS[arm]))
        axes.axhline(0, color=palette.NEUTRAL, linewidth=1)
        axes.set(xlabel="step", ylabel="training loss minus residual, nats")
    continued.set(title="Continued from a trained residual model", ylim=(-0.12, 0.12))
    scratch.set(title="From scratch")
    palette.finish(figure)
    return figure


def main() -> None:
    parser = studies.parser(__doc__.splitlines()[0], "payoff")
    instead = parser.add_mutually_exclusive_group()
    for name, (_, _, what) in TABLES.items():
        wanted: dict[str, Any] = {"dest": "table", "action": "store_const", "const": name}
        instead.add_argument(f"--{name}", **wanted, help=f"compare {what}, instead")
    arguments = parser.parse_args()
    if arguments.table is not None:
        recipe, arms, _ = TABLES[arguments.table]
        print(compare(QUICK if arguments.quick else recipe, arms))
        return
    outcome = explore(QUICK if arguments.quick else RECIPE)
    print(text := report(outcome))
    studies.write(arguments.out, "payoff", text, asdict(outcome), draw(outcome))


if __name__ == "__main__":
    main()
