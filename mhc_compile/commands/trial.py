"""`mhc-compile trial`: which residual connection a model trains best with."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from mhc_compile.commands.arguments import Model, Positive
from mhc_compile.diagnostics import MHCError
from mhc_compile.output import PLAIN, Output
from mhc_compile.overrides import Inner
from mhc_compile.trial.studies import LEAST_STEPS

if TYPE_CHECKING:
    from torch import Tensor

    from mhc_compile.trial.run import Result, Settings


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of `trial`."""

    data: Path
    """A text file, UTF-8."""
    forms: str = "residual,hc,mhc,attnres,mudd"
    """The forms to train, separated by commas; options of `convert` follow a form after colons."""
    steps: Annotated[int, Parameter(validator=Number(gte=LEAST_STEPS))] = 200
    """Optimizer steps of every form."""
    seeds: Positive = 1
    """Repetitions with other batches, and other weights where the model has none."""
    batch: Positive = 8
    """Sequences in a batch."""
    length: Annotated[int, Parameter(validator=Number(gte=2))] = 128
    """Tokens in a sequence."""
    threads: Positive = 1
    """The number of threads that torch uses."""
    lr: float = 1e-3
    """The highest learning rate, of all forms."""
    inner: Inner = "inductor"
    """The compiler of every form."""
    out: Path = Path("trial")
    """The folder of the results."""


def trial(model: Model, /, *, flags: Flags, output: Output = PLAIN) -> int:
    """Train a model with several residual connections and compare them.

    Train a causal language model with several residual connections from the same weights on the same batches, in turn,
    and compare held-out losses, times and memory. Where MODEL is a config.json, weights are drawn anew for every seed.
    A tenth of the text, its end, is held out. Forms are `residual`, `mhc`, `hc`, `hc_static`, those of docs/choose.md
    and installed ones.

    ```sh
    mhc-compile trial ./Llama-3.2-1B --data corpus.txt --steps 200
    mhc-compile trial ./config.json --data corpus.txt --forms residual,mhc,mhc:streams=2,attnres --seeds 3 --lr 3e-3
    ```
    """
    from mhc_compile.checkpoint.hub import local_folder
    from mhc_compile.trial import outcome, studies
    from mhc_compile.trial.run import Arm, Settings

    path = local_folder(model)
    settings = Settings(
        model=path,
        arms=[Arm.parse(text) for text in flags.forms.split(",")],
        steps=flags.steps,
        seeds=flags.seeds,
        batch=flags.batch,
        length=flags.length,
        lr=flags.lr,
        inner=flags.inner,
    )
    if importlib.util.find_spec("matplotlib") is None:  # said before anything is trained
        raise MHCError("MHC233", "trial draws its losses")
    with output.printing():
        results = _train(settings, _tokens(path, flags.data), flags.threads)
        text = outcome.table(settings, results)
        print(text)
    output.write(results)
    studies.write(flags.out, "trial", text, {"results": [asdict(r) for r in results]}, outcome.draw(results))
    return 0


def _tokens(path: Path, data: Path) -> Tensor:
    """Return the token ids of the text for the model. Raises MHC528 for a model that reads none."""
    from torch import nn

    from mhc_compile.configured import configured
    from mhc_compile.trial.text import read_tokens

    model: Any = configured(path)[0]
    embeddings = model.get_input_embeddings()
    if not isinstance(embeddings, nn.Embedding):
        raise MHCError("MHC528", f"{type(model).__name__} reads no tokens", way_out="name a causal language model")
    return read_tokens(data, path if path.is_dir() else path.parent, embeddings.num_embeddings)


def _train(settings: Settings, tokens: Tensor, count: int) -> list[Result]:
    """Train under a progress bar, on `count` threads."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from mhc_compile.trial.run import run
    from mhc_compile.trial.training import threads

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with threads(count), Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("Training in turn", total=settings.steps * settings.seeds, loss="compiling")
        return run(settings, tokens, lambda loss: bar.update(task, advance=1, loss=loss))
