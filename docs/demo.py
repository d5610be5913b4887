"""Record the demo for the README and docs/demo.md: `python docs/demo.py [--processes N]`.

Runs `mhc-compile demo` with three seeds, writes the first one's terminal to docs/images/demo.svg and docs/demo.md,
and draws all three as docs/images/demo-light.svg and demo-dark.svg. Needs `pip install -e ".[demo]"`.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import tempfile
from contextlib import chdir
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI

from mhc_compile.demo.run import run
from mhc_compile.demo.settings import settings_for
from mhc_compile.trial.studies import in_processes, smooth

DOCS = Path(__file__).parent
SEEDS = (0, 1, 2)
WIDTH = 84
SMOOTHED = 15
COMMAND = "mhc-compile demo"
# No font is downloaded by who looks at the picture.
SVG_FORMAT = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


def recorded(folder: Path, seed: int) -> str:
    """Run the demo in `folder`; write its terminal to SEED.svg and SEED.txt there; return nothing to be told."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(f"$ {COMMAND}", style="bold", highlight=False)
    work = folder / str(seed)
    work.mkdir()
    with chdir(work):
        assert run(settings_for(full=False, steps=None, seed=seed), Path("mhc-demo"), console=console) == 0
    (folder / f"{seed}.txt").write_text(console.export_text(clear=False), encoding="utf-8")
    svg = console.export_svg(title=COMMAND, theme=MONOKAI, code_format=SVG_FORMAT, unique_id="demo")
    (folder / f"{seed}.svg").write_text(svg, encoding="utf-8")
    return ""


def picture(results: list[dict[str, Any]], ink: str) -> Figure:
    """Draw gains, and training losses minus those of the residual model, of all seeds."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    gain, loss = figure.subplots(1, 2)
    steps = results[0]["settings"]["steps"]
    ours, other = "#2a8fd8", "#e07b1a"
    arms = (("any H", other, "--", "any H"), ("mHC", ours, "-", "mHC: H doubly stochastic"))
    for i, result in enumerate(results):
        for name, color, line, text in arms:
            by_step = {int(step): value for step, value in result["gains"][name].items()}
            gain.plot(list(by_step), list(by_step.values()), color=color, linestyle=line, label=None if i else text)
        losses = result["training_loss"]
        deltas = [b - a for a, b in zip(losses["residual"], losses["mHC"], strict=True)]
        label = None if i else "mHC, 4 streams"
        loss.plot(range(1, steps + 1), smooth([deltas], SMOOTHED), color=ours, label=label)
    gain.set(yscale="log", xlabel="step", title="Composite gain of the streams")
    loss.axhline(0, color=ink, linewidth=1, linestyle=":", label="residual")
    loss.set(xlabel="step", title="Training loss minus residual (nats per token)")
    for axes in (gain, loss):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


def publish(folder: Path) -> None:
    """Write the pictures and the page from what was recorded in `folder`."""
    images, page = DOCS / "images", DOCS / "demo.md"
    results = [json.loads((folder / str(s) / "mhc-demo" / "results.json").read_text()) for s in SEEDS]
    (images / "demo.svg").write_text((folder / "0.svg").read_text(encoding="utf-8"), encoding="utf-8")
    for name, ink in (("light", "#1f2328"), ("dark", "#e6edf3")):
        colors = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
        with rc_context({**colors, "font.size": 11, "svg.hashsalt": "demo"}):
            picture(results, ink).savefig(images / f"demo-{name}.svg", transparent=True, metadata={"Date": None})
    lines = (folder / "0.txt").read_text(encoding="utf-8").splitlines()
    block = "\n".join(["```text", *(line.rstrip() for line in lines), "```", ""])
    begin, _, rest = page.read_text(encoding="utf-8").partition("<!-- transcript: begin -->\n")
    _, _, end = rest.partition("<!-- transcript: end -->")
    text = f"{begin}<!-- transcript: begin -->\n{block}<!-- transcript: end -->{end}"
    page.write_text(text, encoding="utf-8")
    for result in results:
        print(*(result[key] for key in ("seconds", "processor_seconds", "held_out", "difference")))
        print({name: list(gains.values())[-1] for name, gains in result["gains"].items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1, help="demos at a time; one gives honest times")
    with tempfile.TemporaryDirectory() as scratch:
        in_processes(partial(recorded, Path(scratch)), SEEDS, parser.parse_args().processes)
        publish(Path(scratch))
