"""Capture and convert every model of the zoo, each in a worker process that may crash or hang.

python tests/zoo/sweep.py --only llama,gpt2
python tests/zoo/sweep.py --capture-only --json capture.json
python tests/zoo/sweep.py --causal --batch 3 --length 11
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import re
import sys
import threading
import time
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, Queue
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from overrides import BATCH, LENGTH

WORKER_LIFE = 30  # models a worker takes before a fresh one replaces it
TOLERANCE = 1e-5
STEPS = 3

Row = dict[str, Any]


def first_line(error: BaseException) -> str:
    """The first line of the innermost error that says something."""
    error = getattr(error, "inner_exception", None) or error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def graph_break(error: BaseException) -> str:
    """Why Dynamo stopped, and where in the model: `reason @ file:line`."""
    text = str(error)
    reason = first_line(error)
    hint = re.search(r"^\s*(?:Hint|Explanation): (.*)$", text, re.MULTILINE)
    where = re.findall(r'File "([^"]+)", line (\d+)', text)
    parts = [reason, *([hint[1]] if hint else [])]
    if where:
        parts.append(f"@ {Path(where[-1][0]).name}:{where[-1][1]}")
    return " ".join(parts)[:400]


def logits_of(output: Any) -> Any:
    """The tensor that a comparison reads."""
    import torch

    if isinstance(output, torch.Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output[0]


def loss_of(logits: Any, inputs: Row) -> Any:
    import torch.nn.functional as F

    ids = inputs.get("input_ids")
    if logits.ndim == 3 and ids is not None and logits.shape[:2] == ids.shape and logits.shape[2] > int(ids.max()):
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
    return logits.float().pow(2).mean()


def capture(name: str, row: Row, size: tuple[int, int]) -> None:
    """Build, run and capture in one graph."""
    import models
    import torch

    try:
        model, inputs = models.named(name, models.Size(*size))
    except Exception as e:  # a foreign model may raise anything: the sweep's table says what
        row.update(builds=False, reason=first_line(e), trace=traceback.format_exc(limit=-3))
        return
    row.update(builds=True, parameters=sum(p.numel() for p in model.parameters()))
    try:
        with torch.no_grad():
            reference = logits_of(model(**inputs))
        row.update(runs=True, finite=bool(reference.isfinite().all()), shape=list(reference.shape))
    except Exception as e:  # as above
        row.update(runs=False, reason=first_line(e), trace=traceback.format_exc(limit=-3))
        return
    nodes: list[int] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        nodes.append(len(gm.graph.nodes))
        return gm.forward

    torch._dynamo.reset()
    try:
        captured = logits_of(torch.compile(model, backend=backend, fullgraph=True)(**inputs))
        row.update(captures=len(nodes) == 1, nodes=sum(nodes))
        if len(nodes) != 1:
            row["reason"] = f"{len(nodes)} graphs"
        if not torch.allclose(captured, reference, atol=1e-5, rtol=1e-4, equal_nan=True):
            row["reason"] = f"the captured graph differs from eager by {float((captured - reference).abs().max()):.2g}"
    except Exception as e:  # as above, or Dynamo does
        row.update(captures=False, reason=graph_break(e))
    torch._dynamo.reset()


def convert(name: str, row: Row, size: tuple[int, int]) -> None:
    """Convert a fresh model, compare logits, train its stream parameters."""
    import models
    import torch
    from expected import PARTLY_FROZEN, expected_sites

    import mhc_compile

    model, inputs = models.named(name, models.Size(*size))
    row["expected"] = expected_sites(name, model)
    with torch.no_grad():
        before = logits_of(model(**inputs)).clone()
    torch._dynamo.reset()
    try:
        model = mhc_compile.convert(model, streams=4, inner="eager", example_kwargs=inputs) or model
        with torch.no_grad():
            after = logits_of(model(**inputs))
        error = float((after - before).abs().max() / before.abs().max())
        ours = {n: p for n, p in model.named_parameters() if ".mhc." in f".{n}"}
        sites = sorted({n.rsplit(".", 1)[0] for n in ours})
        row.update(error=error, sites=sites, found=len(sites))
        if not error <= TOLERANCE:
            row.update(result="wrong answer", reason=f"relative error {error:.2g}")
            return
        if not ours:
            row.update(result="wrong answer", reason="no stream parameters")
            return
        still = train(model, inputs, ours)
        if still and (name not in PARTLY_FROZEN or len(still) == len(ours)):
            row.update(result="wrong answer", reason=f"{len(still)} of {len(ours)} did not train: {still[:3]}")
            return
        row["result"] = "ok"
    except Exception as e:  # whatever it is, the sweep goes on; what has no code of ours is told apart below
        code = re.search(r"\bMHC\d{3}\b", str(e))
        if code:
            row.update(result=f"refused {code[0]}", reason=" | ".join(str(e).split("\n")[:4])[:400])
        else:
            inner = getattr(e, "inner_exception", None) or e
            trace = "".join(traceback.format_exception(inner, limit=-6, chain=False))
            row.update(result="traceback", reason=first_line(e), trace=trace)


def train(model: Any, inputs: Row, ours: Row) -> list[str]:
    """Names of stream parameters that a few optimizer steps leave as they were."""
    import torch

    start = {n: p.detach().clone() for n, p in ours.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(logits_of(model(**inputs)), inputs).backward()
        optimizer.step()
    return [n for n, p in ours.items() if torch.equal(p, start[n])]


def work(pipe: Connection, capture_only: bool, size: tuple[int, int]) -> None:
    """A worker: names in; for each a row after the capture, and the final row with True."""
    import torch

    torch.set_num_threads(1)
    while True:
        name = pipe.recv()
        row: Row = {"name": name}
        start = time.perf_counter()
        capture(name, row, size)
        convertible = bool(row.get("captures")) and not capture_only
        row["seconds"] = round(time.perf_counter() - start, 1)
        pipe.send((row, not convertible))
        if convertible:
            convert(name, row, size)
            row["seconds"] = round(time.perf_counter() - start, 1)
            pipe.send((row, True))


def drive(
    names: Queue[str], rows: list[Row], capture_only: bool, total: int, timeout: float, size: tuple[int, int]
) -> None:
    """Feed one worker after another until no names are left."""
    context = mp.get_context("spawn")
    while not names.empty():
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, capture_only, size), daemon=True)
        process.start()
        theirs.close()
        for _ in range(WORKER_LIFE):
            try:
                name = names.get_nowait()
            except Empty:
                break
            ours.send(name)
            row: Row = {"name": name}
            alive = True
            try:
                done = False
                while alive and not done:
                    if ours.poll(timeout):
                        row, done = ours.recv()
                    else:
                        alive = False
                        row.update(result="timeout", reason=f"no answer in {timeout:.0f} s")
            except (EOFError, ConnectionError):
                process.join(5)
                alive = False
                row.update(result="crash", reason=f"worker ended with code {process.exitcode}")
            rows.append(row)
            print(f"[{len(rows)}/{total}] {status(row)}", flush=True)
            if not alive:
                break
        process.kill()
        process.join()


def status(row: Row) -> str:
    """One line of the table."""
    if "result" in row:
        state = row["result"]
    elif not row.get("builds"):
        state = "does not build"
    elif not row.get("runs"):
        state = "does not run"
    elif not row.get("captures"):
        state = "not one graph"
    else:
        state = "captured" if row.get("finite") else "captured, not finite"
    found = f"{row['found']}/{row.get('expected') or '?'} sites" if "found" in row else ""
    error = f"{row['error']:.1e}" if "error" in row else ""
    times = f"{row.get('seconds', 0):5} s"
    return f"{row['name']:28} {state:18} {times} {found:14} {error:8} {row.get('reason', '')}".rstrip()


def report(rows: list[Row], capture_only: bool, sites: bool) -> None:
    """The table and the counts."""
    print()
    for row in sorted(rows, key=lambda r: r["name"]):
        print(status(row))
        if sites:
            print("".join(f"    {site}\n" for site in row.get("sites", ())), end="")
    runs = [r for r in rows if r.get("runs")]
    captured = [r for r in runs if r.get("captures")]
    print(f"\n{len(rows)} models, {len(runs)} run, {len(captured)} captured in one graph")
    if capture_only:
        return
    results = Counter(r.get("result", "none") for r in captured)
    equal = [r for r in captured if r.get("error", 1.0) <= TOLERANCE]
    share = len(equal) / max(1, len(captured))
    print(f"converted with equal logits: {len(equal)} of {len(captured)} ({share:.1%})")
    for result, count in results.most_common():
        print(f"  {result}: {count}")
    off = [r for r in captured if r.get("expected") and r.get("found") not in (None, r["expected"])]
    print(
        "sites other than expected: " + (", ".join(f"{r['name']} {r['found']}/{r['expected']}" for r in off) or "none")
    )


def main() -> None:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="comma-separated names, as in the table")
    parser.add_argument("--causal", action="store_true", help="only the causal language models")
    parser.add_argument("--capture-only", action="store_true")
    parser.add_argument("--sites", action="store_true", help="list the names of the sites found")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--batch", type=int, default=BATCH, help="sequences in a model's inputs")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens in each sequence")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one model")
    options = parser.parse_args()

    import models

    chosen = models.causal_architectures() if options.causal else models.all_names()
    if options.only:
        chosen = options.only.split(",")
        if unknown := set(chosen) - set(models.all_names()):
            parser.error(f"unknown: {', '.join(sorted(unknown))}")
    names: Queue[str] = Queue()
    for name in chosen:
        names.put(name)
    rows: list[Row] = []
    drivers = [
        threading.Thread(
            target=drive,
            args=(names, rows, options.capture_only, len(chosen), options.timeout, (options.batch, options.length)),
        )
        for _ in range(min(options.jobs, len(chosen)))
    ]
    for d in drivers:
        d.start()
    for d in drivers:
        d.join()
    report(rows, options.capture_only, options.sites)
    if options.json:
        options.json.write_text(json.dumps(sorted(rows, key=lambda r: r["name"]), indent=1))


if __name__ == "__main__":
    main()
