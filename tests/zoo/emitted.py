"""Emit the source of every model of the zoo, each checked against the graph rewrite, some to a process.

python tests/zoo/emitted.py --causal
python tests/zoo/emitted.py --plain
python tests/zoo/emitted.py --only llama,gpt2
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import multiprocessing as mp
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

WORKER_LIFE = 10  # models a worker takes before a fresh one replaces it


def hand_written() -> dict[str, Any]:
    """The table that the modules of hand-written models fill."""
    for module in ("plain", "plain_mixing", "plain_spellings", "plain_vision"):
        importlib.import_module(module)
    table: dict[str, Any] = importlib.import_module("parts").TABLE
    return table


def emitted(name: str) -> dict[str, Any]:
    """Emit one model: an architecture's, or `plain:` and a model of `parts.TABLE`."""
    import models
    import torch

    from mhc_compile.diagnostics import MHCError
    from mhc_compile.emitting.emit import checked_source
    from mhc_compile.kernels.spec import StreamSpec

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch._dynamo.reset()
    args: tuple[Any, ...] = ()
    inputs: dict[str, Any] = {}
    started = time.perf_counter()
    try:
        if name.startswith("plain:"):
            row = hand_written()[name.removeprefix("plain:")]
            torch.manual_seed(0)
            model, args = row.model().eval(), row.inputs()
        else:
            model, inputs = models.named(name)
        source = checked_source(model, args, inputs, StreamSpec())
    except MHCError as error:
        result, reason = error.code, str(error).replace("\n", " ")
    except Exception as error:  # a foreign model may raise anything: the table says what
        result, reason = "traceback", f"{type(error).__name__}: {error}"
    else:
        lines, seconds = source.text.count("\n"), round(time.perf_counter() - started, 1)
        return {"name": name, "result": "ok", "difference": source.difference, "lines": lines, "seconds": seconds}
    return {"name": name, "result": result, "reason": reason[:300]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--causal", action="store_true", help="the causal language models of transformers")
    parser.add_argument("--plain", action="store_true", help="the hand-written models that convert")
    parser.add_argument("--only", default="", help="comma-separated names of architectures")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    names = [name for name in options.only.split(",") if name]
    if options.causal:
        import models

        names += models.causal_architectures()
    if options.plain:
        names += [f"plain:{name}" for name, row in hand_written().items() if row.warns or not row.code]
    rows = []
    with mp.get_context("spawn").Pool(options.jobs, maxtasksperchild=WORKER_LIFE) as pool:
        for row in pool.imap(emitted, names):
            rows.append(row)
            shown = (f"{key} {row[key]}" for key in ("difference", "lines", "seconds", "reason") if key in row)
            print(f"[{len(rows)}/{len(names)}] {row['name']:28} {row['result']:10} {'  '.join(shown)}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))
    results = Counter(row["result"] for row in rows)
    exact = sum(row.get("difference") == 0.0 for row in rows)
    print(f"{dict(results.most_common())}; {exact} bit-equal to the graph rewrite")


if __name__ == "__main__":
    main()
