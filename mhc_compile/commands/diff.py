"""`mhc-compile diff`: two compiled forms of a model side by side."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from mhc_compile.output import PLAIN, Output
from mhc_compile.overrides import CompileOverrides

Form = Annotated[str, Parameter(help="A checkpoint folder, a config.json, a Hub repository's id, or a report's JSON.")]


def diff(
    a: Form,
    b: Form,
    /,
    *,
    of_a: Annotated[CompileOverrides | None, Parameter(name="--a")] = None,
    of_b: Annotated[CompileOverrides | None, Parameter(name="--b")] = None,
    seed: Annotated[int, Parameter(help="The seed of random weights and inputs.")] = 0,
    no_run: Annotated[bool, Parameter(help="Compare graphs alone, without weights.")] = False,
    output: Output = PLAIN,
) -> int:
    """Compare two compiled forms of a model.

    Compare their sites, the nodes of their graphs, the bytes that their kernels move, and what they compute from the
    same weights and inputs. A report is what `mhc-compile inspect MODEL --json FILE` wrote, perhaps with another
    version of this package. The exit code is 0 where nothing differs, and 1 where the forms differ.

    ```sh
    mhc-compile diff ./Llama-3.2-1B ./Llama-3.2-1B --b.streams 2
    mhc-compile diff ./Llama-3.2-1B ./Llama-3.2-1B --a.kernels all --b.kernels all --b.convention deepseek_v4
    mhc-compile diff before.json ./Llama-3.2-1B
    ```
    """
    from mhc_compile.diff import compare, read_form

    forms = (read_form(path, options, seed=seed, run=not no_run) for path, options in ((a, of_a), (b, of_b)))
    comparison = compare(*forms)
    with output.printing():
        comparison.show()
    output.write(comparison.to_json())
    return 0 if comparison.same else 1
