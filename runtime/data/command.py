"""`mhc-compile data`: prepare text for training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from mhc_compile.diagnostics import MHCError
from mhc_compile.output import PLAIN, Output

if TYPE_CHECKING:
    from mhc_compile.runtime.data.prepare import Prepared

_REFRESH = 0.1


def data(
    *paths: Annotated[
        str, Parameter(name="SOURCE", help="Files, folders or hf:NAME[:SPLIT]; last OUT, which is new or empty.")
    ],
    tokenizer: Annotated[Path, Parameter(help="The folder of the model to be trained.")],
    field: Annotated[str, Parameter(help="The column that holds the text.")] = "text",
    prompt: Annotated[
        str | None, Parameter(help="The column of prompts, which the loss ignores; --field then names completions.")
    ] = None,
    workers: Annotated[
        int, Parameter(validator=Number(gte=0), help="Processes that tokenise; 0: threads of this one.")
    ] = 0,
    validation: Annotated[
        float,
        Parameter(
            validator=Number(gte=0, lt=1),
            help="Fraction of the documents, chosen by a hash of their text, for OUT/validation beside OUT/train.",
        ),
    ] = 0.0,
    output: Output = PLAIN,
) -> int:
    """Tokenise text into shards to train on.

    Tokenise text once, for `mhc-compile train`: an end-of-text token after every document, packed into shards of plain
    numbers that training maps into memory. A source is a text file (one document), a .jsonl file (one document per
    line), a folder of such files, or hf:NAME[:SPLIT]: a folder saved by the library datasets, a file or folder that it
    reads, or a name on its hub (pip install "mhc-compile[data]"). OUT appears when it is complete or not at all, and
    does not depend on `--workers`.

    ```sh
    # all text below ./books and the field "text" of every line of notes.jsonl
    mhc-compile data ./books notes.jsonl ./tokens --tokenizer ./Qwen3-0.6B
    # about every hundredth document to ./tokens-split/validation, the others to ./tokens-split/train
    mhc-compile data ./books ./tokens-split --tokenizer ./Qwen3-0.6B --validation 0.01 --workers 2
    # the column "content" of a dataset that save_to_disk wrote
    mhc-compile data hf:./saved:train ./tokens-rows --tokenizer ./Qwen3-0.6B --field content
    # for fine-tuning: documents of a question and its answer, whose loss counts the answers alone
    mhc-compile data pairs.jsonl ./tokens-pairs --tokenizer ./Qwen3-0.6B --prompt question --field answer
    ```

    OUT then has data.json (format, dtype, counts, sha256 of every file, fingerprint of the tokenizer),
    tokens-00000.bin (uint16 or, with more than 65,536 ids, uint32; little endian), documents-00000.bin (where documents
    begin in it, uint64), and with `--prompt` masks-00000.bin (a byte per token, 1 where the loss counts it).
    """
    if len(paths) < 2:
        raise MHCError("MHC520", "data takes a source and OUT", way_out="name a source, then the folder to write")
    *sources, out = paths
    how: dict[str, Any] = {"field": field, "prompt": prompt, "workers": workers, "validation": validation}
    done, seconds = _prepare(sources, out, tokenizer=tokenizer, **how)
    with output.printing():
        print(_summary(done, seconds))
    if done.left_out:
        print(f"left out, not text: {', '.join(map(str, done.left_out))}", file=sys.stderr)
    output.write({"folders": [data.folder for data in done.folders], "seconds": seconds, "left_out": done.left_out})
    return 0


def _prepare(sources: list[str], out: str, **how: Any) -> tuple[Prepared, float]:
    """Prepare under a progress bar; return the seconds, too. Raises `MHCError` as `prepare` does."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from mhc_compile.runtime.data.prepare import prepare

    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
        TextColumn("{task.fields[tokens]:,} tokens, {task.fields[rate]:,.0f}/s"), TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("opening", total=None, tokens=0, rate=0.0)
        began = shown = bar.get_time()

        def progress(done: int, total: int, tokens: int, name: str) -> None:
            nonlocal shown
            now = bar.get_time()
            if now - shown > _REFRESH:  # told of every document, some of which are words
                shown = now
                rate = tokens / (now - began)
                bar.update(task, completed=done, total=total or None, description=name, tokens=tokens, rate=rate)

        return prepare(sources, out, progress=progress, **how), bar.get_time() - began


def _summary(done: Prepared, seconds: float) -> str:
    lines = [
        f"{data.folder}: {data.documents:,} documents, {data.tokens:,} tokens ({data.dtype}, {data.vocabulary:,} ids), "
        f"{len(data.shards)} shard{'s' if len(data.shards) > 1 else ''}"
        for data in done.folders
    ]
    tokens = sum(data.tokens for data in done.folders)
    lines.append(f"{seconds:.1f} s, {tokens / max(seconds, 1e-3):,.0f} tokens/s")
    names = ("folder", "validation")
    recipe = ", ".join(f'{name} = "{data.folder}"' for name, data in zip(names, done.folders, strict=False))
    return "\n".join([*lines, f"in a recipe: [data] {recipe}"])
