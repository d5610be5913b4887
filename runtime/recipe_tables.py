"""The tables of a recipe: every field typed, described and checked by itself."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, NonNegativeInt

from mhc_compile.config import Options, stream_spec
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.spec import Exit, Manifold, StreamSpec
from mhc_compile.kernels.start import StartName, start_of
from mhc_compile.overrides import Inner
from mhc_compile.passes.cost import parse_blocks

ScheduleName = Literal["1f1b", "interleaved1f1b", "zbv", "dualpipev"]
SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Part = Annotated[float, Field(ge=0, le=1)]
ConventionName = Literal["paper", "deepseek_v4", "glm5_next", "megatron_main", "liger", "hy_v4", "deepseek_v41"]


@dataclass(frozen=True, kw_only=True)
class ModelTable:
    """`[model]`: What is trained."""

    folder: str
    """A checkpoint folder: residual (its streams are added as it is read) or converted; with `start = "scratch"` only
    its config.json and tokenizer are read."""
    start: Literal["checkpoint", "scratch"] = "checkpoint"
    """Whether training goes on from the folder's weights or begins with random ones."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the graph computes. Weights and their moments are kept in float32 either way."""
    inner: Inner = "inductor"
    """What compiles the stages."""
    kernels: str = "auto"
    """Which fused kernels may be used, as in mhc_compile's options."""

    def __post_init__(self) -> None:
        Options(inner=self.inner, kernels=self.kernels)


@dataclass(frozen=True, kw_only=True)
class StreamsTable:
    """`[mhc]`: The streams that a residual folder gets, or a model from scratch."""

    streams: int = 4
    """n, 1 to 8."""
    convention: ConventionName = "paper"
    """Whose equations."""
    manifold: Manifold | None = None
    """What the mixing matrix may be; left out, the convention's."""
    iterations: int = 20
    """Sinkhorn iterations."""
    exit: Exit | None = None
    """How the streams become one again; left out, the convention's."""
    form: str = "mhc"
    """`mhc` or another form, which have no convention, manifold and iterations."""
    start: StartName = "default"
    """How the coefficients start, as in `convert`: `default`, or `paper` as published."""
    sites: str = ""
    """Which adds become sites, by patterns of names as in `convert`; left out, all."""

    def __post_init__(self) -> None:
        _ = self.spec
        start_of(self.start)

    @property
    def spec(self) -> StreamSpec:
        """As the compiler takes it."""
        own = {name: value for name, value in asdict(self).items() if name not in ("start", "sites")}
        return stream_spec({name: value for name, value in own.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class DataTable:
    """`[data]`: Folders that `mhc-compile data` has written."""

    folder: str
    """Tokens to train on."""
    mixture: tuple[str, ...] = ()
    """Further folders, whose samples are mixed among those of `folder`."""
    weights: tuple[float, ...] = ()
    """The parts of `folder` and of every folder of `mixture` in the samples, in proportion; left out, all alike."""
    validation: str | None = None
    """Tokens to evaluate on."""
    sequence: Count
    """S: tokens a sequence."""
    documents: bool = False
    """Whether positions begin again with every document of a sequence: transformers' models attend, and memories look
    n-grams up, within documents alone then, and a document's first token does not count in the loss. False: a sequence
    is read as one text."""
    seed: NonNegativeInt = 0
    """Of the order of sequences."""
    workers: NonNegativeInt = 0
    """Threads a rank that read ahead; 0: the rank itself reads."""

    def __post_init__(self) -> None:
        total, count = sum(self.weights), len(self.folders)
        fits = not self.weights or (len(self.weights) == count and min(self.weights) >= total / 1000 > 0)
        what = f"{count} numbers above 0, one a folder, none below a thousandth of all"
        require(fits, "data.weights", list(self.weights), what)

    @property
    def folders(self) -> tuple[str, ...]:
        """All folders to train on."""
        return (self.folder, *self.mixture)


@dataclass(frozen=True, kw_only=True)
class TrainTable:
    """`[train]`: How long, how much at a time, and how the weights move."""

    steps: Count
    """Optimizer steps of the whole run."""
    batch: Count
    """Sequences a step, over all ranks."""
    microbatch: Count
    """Sequences that a stage computes at a time; gradients of a step's microbatches add up."""
    lr: Positive
    """The highest learning rate. Tables of memories have 5 times it; those of UltraMem 4 times, falling to once."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How the learning rate falls after the warm-up; `wsd` (warm-up, stable, decay) falls at the end alone."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The part of all steps in which `wsd` falls, linearly."""
    warmup: NonNegativeInt = 0
    """Steps over which the learning rate rises linearly from 0 to `lr`."""
    final: Part = 0.1
    """Where cosine, linear and wsd end, as a part of `lr`."""
    weight_decay: NonNegative = 0.1
    """Of matrices; vectors, coefficients of streams and tables have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW's moments."""
    clip: NonNegative = 1.0
    """The largest norm of all gradients together, tables included; 0: no clipping."""
    balance_rate: NonNegative = 0.001
    """How far a step moves the biases that balance experts, where the model has such (DeepSeek-V3); 0: they stay."""
    seed: NonNegativeInt = 0
    """Of random weights and dropout."""
    evaluate_every: NonNegativeInt = 0
    """Steps between evaluations; 0: none."""
    evaluate_batches: Count = 8
    """Batches of the size of a step that an evaluation reads; every evaluation reads the same."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a NaN, an infinity or an exploding loss does: stop with the step's data saved, or skip the step."""
    explode: float = 0.0
    """A loss above this multiple of its running median explodes; 0: none does."""
    profile: str = ""
    """Steps that torch's profiler records, `"10-12"`: a Chrome trace a rank in the folder `profile` of metrics."""

    def __post_init__(self) -> None:
        require(self.warmup <= self.steps, "train.warmup", self.warmup, f"at most train.steps = {self.steps}")
        require(all(0 <= b < 1 for b in self.betas), "train.betas", list(self.betas), "from 0, below 1")
        require(self.explode == 0 or self.explode > 1, "train.explode", self.explode, "0, or greater than 1")
        if self.schedule == "wsd":
            most = 1 - self.warmup / self.steps
            require(self.decay <= most, "train.decay", self.decay, f"at most {most:.3g}, the steps after the warm-up")
        first, last = self.profiled
        window = f'steps as "10-12", from 1 to train.steps = {self.steps}'
        require(not self.profile or 1 <= first <= last <= self.steps, "train.profile", self.profile, window)

    @property
    def profiled(self) -> tuple[int, int]:
        """The first and the last step that the profiler records; (0, 0) for none, or where `profile` is no window."""
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", self.profile)
        return (int(match[1]), int(match[2] or match[1])) if match else (0, 0)


@dataclass(frozen=True, kw_only=True)
class DiffusionTable:
    """`[diffusion]`: The model learns to restore corrupted text instead of next tokens, as a parallel generator."""

    attention: str
    """What positions see: with `block:16` their block of 16 and all blocks before it, with `bidirectional`
    everything."""
    mask_token: NonNegativeInt | None = None
    """The id of the mask token; left out, the one that the tokenizer names."""

    def __post_init__(self) -> None:
        Options(attention=self.attention)


@dataclass(frozen=True, kw_only=True)
class ParallelTable:
    """`[parallel]`: How the run is spread. There are stages x data x engram ranks."""

    stages: Count = 1
    """Ranks a pipeline."""
    data: Count = 1
    """Replicas of the pipeline, each with its share of every batch."""
    engram: Count = 1
    """Ranks over which the rows of tables are spread; they are replicas for everything else."""
    schedule: ScheduleName = "1f1b"
    """The order of forward and backward passes; `zbv` and `dualpipev` have two stages a rank, in the shape of a V."""
    stages_per_rank: Count = 1
    """Stages a rank: 1 for `1f1b`, 2 for `zbv` and `dualpipev`, 2 or more for `interleaved1f1b`."""
    mode: Literal["replicate", "fsdp"] = "replicate"
    """Whether replicas hold whole parameters or a shard of each."""
    balance: Literal["model", "measure"] | tuple[int, ...] = "model"
    """Where stages are cut: by the cost model (operations; on accelerators the time of what is computed and moved), by
    a measurement, or by the number of sites of every stage."""
    timeout: Positive = 600.0
    """Seconds after which a peer is lost that does not answer in a step, or gives no sign of life at any time."""
    patience: Positive = 3600.0
    """Seconds that ranks wait for one that compiles, or reads or writes weights, and gives signs of life."""

    def __post_init__(self) -> None:
        if isinstance(self.balance, tuple):
            fits = len(self.balance) == self.stage_count and all(b >= 1 for b in self.balance)
            what = f"{self.stage_count} numbers of at least 1, one a stage"
            require(fits, "parallel.balance", list(self.balance), what)

    @property
    def stage_count(self) -> int:
        """Stages of the whole pipeline."""
        return self.stages * self.stages_per_rank

    @property
    def replicas(self) -> int:
        """Ranks that hold the same stages."""
        return self.data * self.engram

    @property
    def world(self) -> int:
        """Ranks of the run."""
        return self.stages * self.replicas

    @property
    def is_v_shaped(self) -> bool:
        """Whether the first and the last stage are on one rank."""
        return self.schedule in ("zbv", "dualpipev")

    def place_of(self, stage: int) -> int:
        """Return the place in the pipeline of the rank that holds a stage."""
        return min(stage, 2 * self.stages - 1 - stage) if self.is_v_shaped else stage % self.stages

    def local_stages(self, place: int) -> list[int]:
        """Return the stages of the rank at a place of its pipeline, in ascending order."""
        return [stage for stage in range(self.stage_count) if self.place_of(stage) == place]


@dataclass(frozen=True, kw_only=True)
class RecomputeTable:
    """`[recompute]`: What the backward pass computes again instead of keeping it."""

    blocks: Literal["off", "auto", "stage"] | int | str = "off"
    """`off`; `auto`: the blocks that keep least; `stage`: one block a stage; sites a block; or the memory that the
    streams of a stage may keep (`2GiB`)."""

    def __post_init__(self) -> None:
        parse_blocks(self.blocks)


@dataclass(frozen=True, kw_only=True)
class CheckpointTable:
    """`[checkpoint]`: Where the run goes on after a stop."""

    folder: str
    """Written by this run; one that holds a checkpoint of the same run is gone on from."""
    every: NonNegativeInt
    """Steps between checkpoints; 0: one at the end."""
    keep: Count = 2
    """How many of the newest stay."""
    asynchronous: bool = True
    """Whether training goes on while a checkpoint is written."""


@dataclass(frozen=True, kw_only=True)
class MetricsTable:
    """`[metrics]`: What is written down on the way."""

    every: Count = 10
    """Steps between lines of metrics.jsonl."""
    probes_every: NonNegativeInt = 0
    """Steps between measurements of stream separation and composite gain, by layer; 0: none."""
    tensorboard: bool = False
    """Whether the same goes to TensorBoard's files."""
    wandb: str | None = None
    """The project at Weights & Biases that the same goes to; `WANDB_MODE=offline` keeps it in files of `folder`."""
    folder: str | None = None
    """Left out: checkpoint.folder."""


def require(fits: bool, name: str, value: Any, wanted: str) -> None:
    """Raise MHC602 unless it `fits`."""
    if isinstance(value, float) and not math.isfinite(value):
        fits = False
    if not fits:
        raise MHCError("MHC602", f"{name} = {value}; wanted: {wanted}")
