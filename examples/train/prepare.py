"""Make what demo.toml trains on: a tokenizer, the config of a small Llama, Python's standard library as tokens.

Run: python examples/train/prepare.py [FOLDER]. Without FOLDER: `work`, beside this file, where demo.toml looks.
"""

import json
import sys
from pathlib import Path

from mhc_compile.demo.experiment import model_config
from mhc_compile.demo.settings import FULL
from mhc_compile.demo.text import divided, source_texts, train_tokenizer
from mhc_compile.runtime.data.prepare import prepare


def main(folder: Path) -> None:
    if folder.exists():
        sys.exit(f"{folder} is there already: remove it to make it anew")
    texts = source_texts(FULL.text_bytes)
    train, held_out = divided(texts)
    print(f"{len(texts)} files of the standard library; training a tokenizer on {len(train)} of them")
    tokenizer = train_tokenizer(train, FULL.vocabulary)
    tokenizer.save_pretrained(folder / "model")
    model_config(FULL, tokenizer).save_pretrained(folder / "model")
    for name, documents in (("train", train), ("validation", held_out)):
        # One document a line; `mhc-compile data SOURCE OUT --tokenizer DIR` does the same from the command line.
        source = folder / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
        (written,) = prepare([str(source)], folder / "data" / name, tokenizer=folder / "model").folders
        print(f"{written.folder}: {written.documents:,} documents, {written.tokens:,} tokens")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "work")
