"""`mhc-compile data`: prepare text for training."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from mhc_compile.runtime.data.prepare import Prepared

NAME = "data"
_REFRESH = 0.1
_DESCRIPTION = """\
Tokenise text once, for `mhc-compile train`: an end-of-text token after every document, packed into
shards of plain numbers that training maps into memory.

SOURCE is a text file (one document), a .jsonl file (one document a line), a folder of such files, or
hf:NAME[:SPLIT]: a folder saved by the library datasets, a file or folder that it reads, or a name on
its hub (pip install "mhc-compile[data]"). OUT appears when it is complete or not at all, and does
not depend on --workers.
"""
_EXAMPLES = """\
examples:
  mhc-compile data ./books notes.jsonl ./tokens --tokenizer ./Qwen3-0.6B
      all text below ./books and the field "text" of every line of notes.jsonl
  mhc-compile data ./books ./tokens-split --tokenizer ./Qwen3-0.6B --validation 0.01 --workers 2
      about every hundredth document to ./tokens-split/validation, the others to ./tokens-split/train
  mhc-compile data hf:./saved:train ./tokens-rows --tokenizer ./Qwen3-0.6B --field content
      the column "content" of a dataset that save_to_disk wrote
  mhc-compile data pairs.jsonl ./tokens-pairs --tokenizer ./Qwen3-0.6B --prompt question --field answer
      for fine-tuning: documents of a question and its answer, whose loss counts the answers alone

OUT then has
  data.json            format, dtype, counts, sha256 of every file, fingerprint of the tokenizer
  tokens-00000.bin     uint16 or, with more than 65,536 ids, uint32; little endian
  documents-00000.bin  where documents begin in it, uint64
  masks-00000.bin      with --prompt: a byte a token, 1 where the loss counts it
"""


def add_parser(subparsers: Any) -> None:
    """Register the command with argparse."""
    parser = subparsers.add_parser(
        NAME,
        help="tokenise text into shards to train on",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help="a file, a folder, or hf:NAME[:SPLIT]")
    parser.add_argument("out", metavar="OUT", help="a folder that does not exist yet, or is empty")
    parser.add_argument("--tokenizer", metavar="DIR", required=True, help="the folder of the model to be trained")
    parser.add_argument("--field", metavar="NAME", default="text", help="of rows that holds the text (default: text)")
    parser.add_argument("--prompt", metavar="NAME", help="of rows that are pairs: a text before it, not in the loss")
    parser.add_argument(
        "--workers",
        metavar="N",
        type=_workers,
        default=0,
        help="processes that tokenise (default: threads of this one)",
    )
    parser.add_argument(
        "--validation",
        metavar="FRACTION",
        type=_fraction,
        default=0.0,
        help="of the documents, chosen by a hash of their text: OUT/train and OUT/validation",
    )


def run(args: argparse.Namespace) -> int:
    """Prepare as the arguments say. Raises `MHCError` as `prepare` does."""
    # Here, because every command is registered when any of them runs.
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

        done = prepare(
            args.sources,
            args.out,
            tokenizer=args.tokenizer,
            field=args.field,
            prompt=args.prompt,
            workers=args.workers,
            validation=args.validation,
            progress=progress,
        )
        seconds = bar.get_time() - began
    print(_summary(done, seconds))
    if done.left_out:
        print(f"left out, not text: {', '.join(map(str, done.left_out))}", file=sys.stderr)
    return 0


def _workers(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return number


def _fraction(text: str) -> float:
    number = float(text)
    if not 0.0 <= number < 1.0:
        raise argparse.ArgumentTypeError("must be at least 0 and less than 1")
    return number


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
