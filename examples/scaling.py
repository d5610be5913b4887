"""Loss against the share of parameters given to Engram, at a fixed total and equal parameters a token uses.

A mixture of experts has parameters that a token does not use: those of the experts it is not routed to. Engram
(arXiv 2601.07372) gives a part of that budget to tables of n-grams instead; published is a U-shape, best at 20 to 25 %.
Here experts leave a small Mixtral one by one, and tables get what they had, with the same seeds and batches.

`--kinds` compares none, Engram, UltraMem (arXiv 2411.12364) and both at one share, with equal parameters in all: the
memories pay for their keys and projections as well as for their tables, and without a memory all of it is experts.

Run: python examples/scaling.py [--kinds] [--quick] [--out FOLDER]
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

import mhc_compile
from mhc_compile import palette
from mhc_compile.demo.settings import FULL, Settings
from mhc_compile.demo.text import Corpus, build_corpus, held_out_batches, training_batches
from mhc_compile.memory.tables import MemoryTable
from mhc_compile.runtime.plan.allocation import BEST_SHARES, allocate
from mhc_compile.trial import studies
from mhc_compile.trial.studies import Claim, markdown, plus_minus
from mhc_compile.trial.training import Contender, adamw, train

ROUTED = 2
"""Experts a token is routed to."""
BALANCE = 0.01
"""Weight of the auxiliary loss that spreads tokens over experts, which is not part of the losses reported."""
NO_MEMORY = "none"
KINDS = {NO_MEMORY: (None, None), "Engram": (1.0, None), "UltraMem": (None, 1.0), "both": (0.5, 0.5)}
"""The parts of the memories' parameters that Engram and UltraMem get."""
LOOKS = dict(zip(KINDS, ("mhc", "engram", "ultramem", "both"), strict=True))
LEAST = "least"
"""All experts, and the smallest tables that a memory can have: a token uses as much as with larger ones."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained."""

    settings: Settings
    values: mhc_compile.UltraMemSettings
    """The UltraMem that `--kinds` compares with the Engram in `settings`."""
    expert: int
    """Width of an expert's hidden layer."""
    spare: int
    """Experts per layer that a token is not routed to, when all of the budget is theirs."""
    spared: tuple[int, ...]
    """Of these, how many are left at each share: from `spare` - 1 to 1."""
    kept: int
    """How many are left beside the memories of `--kinds`."""
    seeds: int
    kernels: str
    processes: int

    @property
    def budget(self) -> int:
        """Parameters of the spare experts of all layers: three matrices, and a row of the router, each."""
        s = self.settings
        return s.layers * self.spare * (3 * s.hidden * self.expert + s.hidden)


_MEMORY = mhc_compile.MemorySettings.preset("paper", heads=4, rows_per_head=2, row_width=8, layers=(1, 2))
_VALUES = mhc_compile.UltraMemSettings.preset("v1", layers=(0, 1), key_width=16, value_width=32, side=8)
RECIPE = Recipe(
    settings=replace(
        FULL, layers=4, hidden=64, heads=4, vocabulary=2048, length=96, batch=8, steps=350, text_bytes=6_000_000,
        held_out_batches=24, learning_rate=4e-3, initializer_range=0.02, memory=_MEMORY,
    ),
    values=_VALUES, expert=96, spare=20, spared=(18, 16, 15, 12, 8, 2), kept=15, seeds=3, kernels="all", processes=2,
)  # fmt: skip
QUICK = Recipe(
    settings=replace(
        RECIPE.settings, layers=2, hidden=32, heads=2, vocabulary=512, length=32, batch=4, steps=12,
        text_bytes=400_000, held_out_batches=4, memory=replace(_MEMORY, layers=(0, 1)),
    ),
    values=replace(_VALUES, layers=(0,), skip=1, key_width=8), expert=192, spare=4, spared=(3, 1), kept=2, seeds=1,
    kernels="none", processes=1,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training."""

    recipe: Recipe
    name: str
    """The name in the tables."""
    spare: int
    """Experts per layer besides those a token is routed to."""
    seed: int
    engram: float | None = None
    """Engram's share of the budget; 0: the smallest tables, None: no Engram."""
    ultramem: float | None = None
    """UltraMem's."""
    whole: bool = False
    """Whether memories pay for their dense parameters, too."""

    @property
    def share(self) -> float:
        """The memories' share of the budget."""
        return (self.engram or 0.0) + (self.ultramem or 0.0)

    def sized(self, settings: Any, share: float | None) -> tuple[Any, int]:
        """Return the settings of a memory that `share` pays for, and how many values of rows a token reads."""
        if share is None:
            return None, 0
        if not share:
            return settings, len(settings.layers) * settings.memory_width
        s, budget = self.recipe.settings, self.recipe.budget
        sizes = {"hidden": s.hidden, "streams": s.streams, "vocab": s.vocabulary}
        allocation = allocate(budget, settings, share=share, **sizes)
        if self.whole:
            allocation = allocate(budget, settings, share=share - allocation.dense / budget, **sizes)
        return allocation.settings, allocation.read

    def __str__(self) -> str:
        return f"memory {self.name}, {ROUTED + self.spare} experts, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training showed."""

    name: str
    share: float
    experts: int
    seed: int
    rows: int
    """Of all tables."""
    tables: int
    """Parameters in them."""
    parameters: int
    """All of them."""
    used: int
    """Those that a token uses: without other experts, and of the tables the rows it looks up."""
    losses: list[float]
    """Of every step, with the auxiliary loss."""
    first: float
    """Held-out loss at the start, in nats per token."""
    held_out: float
    """At the end."""

    def __str__(self) -> str:
        return f"loss {self.held_out:.4f}"


def mixture(settings: Settings, corpus: Corpus, experts: int, width: int) -> nn.Module:
    """Return a small Mixtral at its random start."""
    from transformers import MixtralConfig, MixtralForCausalLM

    tokenizer = corpus.tokenizer
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=settings.hidden, intermediate_size=width,
        num_hidden_layers=settings.layers, num_attention_heads=settings.heads, num_key_value_heads=settings.heads,
        num_local_experts=experts, num_experts_per_tok=ROUTED, output_router_logits=True, router_aux_loss_coef=BALANCE,
        max_position_embeddings=settings.length, sliding_window=None, tie_word_embeddings=True, use_cache=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model: nn.Module = MixtralForCausalLM(config)
    return model


def run(corpus: Corpus, job: Job) -> Trained:
    """Train a mixture with `job.spare` spare experts per layer, and tables for what the others had."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    recipe, settings = job.recipe, replace(job.recipe.settings, seed=job.seed)
    torch.manual_seed(settings.seed)
    full = mixture(settings, corpus, ROUTED + recipe.spare, recipe.expert).state_dict()
    model = mixture(settings, corpus, ROUTED + job.spare, recipe.expert)
    with torch.no_grad():  # the experts that stay, and all else, are the same at every share
        for name, p in model.named_parameters():
            p.copy_(full[name][: len(p)])
    torch.manual_seed(settings.seed)
    (engram, in_engram), (ultramem, in_ultramem) = (
        job.sized(memory, share) for memory, share in ((settings.memory, job.engram), (recipe.values, job.ultramem))
    )
    memory: dict[str, Any] = {"engram": engram, "tokenizer": corpus.tokenizer} if engram else {}
    options: dict[str, Any] = {"start": "paper", "inner": "eager", "kernels": recipe.kernels}
    mhc_compile.convert(model, streams=settings.streams, ultramem=ultramem, **options, **memory)

    def held_out() -> float:
        outputs = [model(input_ids=batch, labels=batch) for batch in held_out_batches(corpus, settings)]
        return statistics.fmean((out.loss - BALANCE * out.aux_loss).item() for out in outputs)

    contender = Contender(job.name, model, model, adamw(model, settings.steps))
    first = held_out()
    train([contender], training_batches(corpus, settings, stream=0), settings.learning_rate, lambda: None)
    tables = [m for m in model.modules() if isinstance(m, MemoryTable)]
    in_tables = sum(t.rows * t.width for t in tables)
    everything = sum(p.numel() for p in model.parameters())
    spare = recipe.budget // recipe.spare * job.spare
    return Trained(
        name=job.name,
        share=job.share,
        experts=ROUTED + job.spare,
        seed=job.seed,
        rows=sum(t.rows for t in tables),
        tables=in_tables,
        parameters=everything,
        used=everything - spare - in_tables + in_engram + in_ultramem,
        losses=contender.losses,
        first=first,
        held_out=held_out(),
    )


def jobs_of(recipe: Recipe) -> list[Job]:
    """Return every share with every seed: no memory, the smallest, then fewer and fewer experts."""
    jobs = []
    for seed in range(recipe.seeds):
        job = partial(Job, recipe=recipe, seed=seed)
        jobs += [job(name=NO_MEMORY, spare=recipe.spare), job(name=LEAST, spare=recipe.spare, engram=0.0)]
        for spare in recipe.spared:
            share = 1 - spare / recipe.spare
            jobs.append(job(name=f"{share:.0%}", spare=spare, engram=share))
    return jobs


def jobs_of_kinds(recipe: Recipe) -> list[Job]:
    """Return every kind of memory with every seed, all with as many parameters."""
    share = 1 - recipe.kept / recipe.spare
    return [
        Job(
            recipe=recipe, name=name, seed=seed, spare=recipe.kept if name != NO_MEMORY else recipe.spare, whole=True,
            **{kind: part and share * part for kind, part in zip(("engram", "ultramem"), parts, strict=True)},
        )
        for seed in range(recipe.seeds)
        for name, parts in KINDS.items()
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The results of all trainings."""

    recipe: Recipe
    trained: list[Trained]

    @property
    def by_name(self) -> dict[str, list[Trained]]:
        """All seeds of every share, in the order of the shares."""
        names = dict.fromkeys(t.name for t in self.trained)
        return {name: [t for t in self.trained if t.name == name] for name in names}

    def differences(self, name: str) -> list[float]:
        """Return the held-out losses of `name` minus those without a memory, seed by seed."""
        pairs = zip(self.by_name[name], self.by_name[NO_MEMORY], strict=True)
        return [a.held_out - b.held_out for a, b in pairs]


def claims(outcome: Outcome) -> list[Claim]:
    """Compare the published findings with the outcome."""
    paid = [name for name, seeds in outcome.by_name.items() if seeds[0].share]
    means = {name: statistics.fmean(outcome.differences(name)) for name in outcome.by_name}
    best, last = min(means, key=lambda name: means[name]), paid[-1]
    low, high = BEST_SHARES
    near = [name for name in paid if low <= outcome.by_name[name][0].share <= high] or paid[:1]
    near_best = min(near, key=lambda name: means[name])
    differences = (outcome.differences(name) for name in (near_best, LEAST))
    from_least = [a - b for a, b in zip(*differences, strict=True)]
    apart = [a.held_out - b.held_out for a, b in zip(outcome.by_name[last], outcome.by_name[best], strict=True)]
    return [
        Claim(
            f"{' or '.join(near)} of the budget as memory is better than none",
            "1.7248 -> 1.7109",
            f"{near_best}: {plus_minus(outcome.differences(near_best), sign=True)}",
            "it is lower with every seed",
            all(d < 0 for d in outcome.differences(near_best)),
        ),
        Claim(
            "and better than the smallest memory, with as many parameters a token",
            "not stated",
            f"{near_best}: {plus_minus(from_least, sign=True)}",
            "it is lower with every seed",
            all(d < 0 for d in from_least),
        ),
        Claim(
            "the best share",
            f"{low:.0%} to {high:.0%}",
            best,
            "it is in that range",
            best in near,
        ),
        Claim(
            "a U-shape: too much memory is worse than the best share",
            "yes",
            f"{last}: {plus_minus(apart, sign=True)}" if last != best else f"{last} is the best",
            f"{last} is higher than the best share with every seed",
            all(d > 0 for d in apart),
        ),
    ]


def table(outcome: Outcome, first: str) -> str:
    """Return sizes and losses, as markdown; `first` heads the names."""
    rows = []
    for name, seeds in outcome.by_name.items():
        t = seeds[0]
        more = plus_minus(outcome.differences(name), sign=True) if name != NO_MEMORY else "–"
        losses = plus_minus([t.held_out for t in seeds])
        sizes = (t.rows, t.tables, t.parameters, t.used)
        rows.append((name, str(t.experts), *(f"{n:,}" for n in sizes), losses, more))
    sizes_head = ("rows", "parameters in rows", "in all", "a token uses")
    return markdown((first, "experts a layer", *sizes_head, "held-out loss", "minus none"), rows)


def trained_on(recipe: Recipe) -> str:
    """Return what was trained, and how, in a sentence."""
    s = recipe.settings
    return (
        f"{s.layers} layers, C = {s.hidden}, {s.streams} streams, experts of {recipe.expert}, {ROUTED} a token, "
        f"{s.steps} steps of {s.batch} x {s.length} tokens; losses in nats a token, mean ± standard deviation of "
        f"{recipe.seeds} seeds (differences are paired)."
    )


def report(outcome: Outcome) -> str:
    """Return all tables, as markdown."""
    return "\n\n".join(
        (
            markdown(studies.CLAIMS_HEAD, [c.row for c in claims(outcome)]),
            f"A budget of {outcome.recipe.budget:,} parameters, {trained_on(outcome.recipe)} {LEAST}: all experts, and "
            "the smallest tables that a memory can have: a token uses as many parameters as with larger ones.",
            table(outcome, "memory's share"),
        )
    )


def report_of_kinds(outcome: Outcome) -> str:
    """Return the table of `--kinds`, as markdown."""
    recipe = outcome.recipe
    share = f"{1 - recipe.kept / recipe.spare:.0%} of {recipe.budget:,} sparse parameters go to memories"
    return f"{share}, {trained_on(recipe)}\n\n{table(outcome, 'memory')}"


def draw_kinds(outcome: Outcome) -> Any:
    """Draw the training losses minus those without a memory."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    curves = {name: studies.smooth([t.losses for t in seeds], 20) for name, seeds in outcome.by_name.items()}
    for name, losses in curves.items():
        apart = [a - b for a, b in zip(losses, curves[NO_MEMORY], strict=True)]
        axes.plot(apart, label=name, **palette.look(LOOKS[name]))
    axes.set(title="Training loss minus that without a memory", xlabel="step", ylabel="nats a token")
    palette.finish(axes.figure)
    return axes.figure


def draw(outcome: Outcome) -> Any:
    """Draw the held-out loss against the share, and its paired difference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    loss, paired = figure.subplots(1, 2)
    plain = outcome.by_name[NO_MEMORY]
    names = [name for name in outcome.by_name if name != NO_MEMORY]
    shares = [100 * outcome.by_name[name][0].share for name in names]
    for seed in range(outcome.recipe.seeds):
        how = palette.series(seed, points=True)
        held_out = [outcome.by_name[name][seed].held_out for name in names]
        loss.plot(shares, held_out, label=f"seed {seed}", **how)
        loss.axhline(plain[seed].held_out, color=how["color"], linestyle=":", linewidth=1)
        paired.plot(shares, [outcome.differences(name)[seed] for name in names], **how | {"linestyle": "none"})
    means = [statistics.fmean(outcome.differences(name)) for name in names]
    paired.plot(shares, means, label="mean", **palette.look("engram", points=True))
    paired.axhline(0, color=palette.NEUTRAL, linewidth=1)
    low, high = (100 * share for share in BEST_SHARES)
    for axes in (loss, paired):
        axes.axvspan(low, high, color="0.9", label="published best")
        axes.set(xlabel="share of the sparse budget in memory, %")
    loss.set(title="Held-out loss (dotted: without a memory)", ylabel="nats a token")
    paired.set(title="Minus that without a memory")
    palette.finish(figure)
    return figure


def main() -> None:
    parser = studies.parser(__doc__.splitlines()[0], "scaling")
    parser.add_argument("--kinds", action="store_true", help="compare Engram, UltraMem and both at one share")
    arguments = parser.parse_args()
    recipe = QUICK if arguments.quick else RECIPE
    corpus = build_corpus(recipe.settings)
    jobs = jobs_of_kinds(recipe) if arguments.kinds else jobs_of(recipe)
    outcome = Outcome(recipe=recipe, trained=studies.in_processes(partial(run, corpus), jobs, recipe.processes))
    text, figure = (report_of_kinds, draw_kinds) if arguments.kinds else (report, draw)
    print(written := text(outcome))
    name = "kinds" if arguments.kinds else "scaling"
    studies.write(arguments.out, name, written, asdict(outcome), figure(outcome))


if __name__ == "__main__":
    main()
