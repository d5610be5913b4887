"""`mhc-compile bisect`: find the pass and the site at which a model's results leave the tolerance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from mhc_compile.commands.arguments import Compiling, Model, Passes
from mhc_compile.output import PLAIN, Output


def bisect(
    model: Model,
    /,
    *,
    options: Compiling = None,
    passes: Passes = None,
    seed: Annotated[int, Parameter(help="The seed of random weights and token ids.")] = 0,
    reproducer: Annotated[Path | None, Parameter(help="Write a Python file that shows what is wrong.")] = None,
    output: Output = PLAIN,
) -> int:
    """Find the pass and the site at which results go wrong.

    Run a Hugging Face model on one batch through every pass, every generated kernel and the inner compiler, and find
    the first of them, and the first site, at which results leave the tolerance. Weights are those of the folder, or
    random ones where it has none; nothing in it is executed. The exit code is 0 where nothing is wrong, and 1 where
    something is.

    ```sh
    mhc-compile bisect ./Llama-3.2-1B
    mhc-compile bisect ./Llama-3.2-1B --streams 2 --inner eager
    mhc-compile bisect ./config.json --seed 3 --reproducer wrong.py
    ```
    """
    from mhc_compile.bisect import bisect
    from mhc_compile.checkpoint.hub import local_folder
    from mhc_compile.configured import refuse_stream_options, weighted
    from mhc_compile.conversion.example_inputs import seeded_inputs

    chosen: dict[str, Any] = {**(options or {})}
    if passes is not None:
        chosen["pipeline"] = passes
    folder = local_folder(model)
    module, converted, _ = weighted(folder, seed=seed)
    if converted:
        refuse_stream_options(folder, chosen)
    bisection = bisect(module, example_kwargs=seeded_inputs(module, seed), reproducer=reproducer, **chosen)
    with output.printing():
        bisection.show()
    output.write(bisection)
    return 1 if bisection.finding else 0
