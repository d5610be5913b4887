"""A process that turns texts into ids. It is started by this file's path, so that it need not import torch.

    worker.py DESCRIPTOR    of one end of a pipe (`multiprocessing.Pipe`)

The first message that it receives is a tokenizer as text, or None, and its folder; every other one a list of texts,
which it answers with their ids. It ends when the other end is closed: with its parent, however that ends.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.uint32]
Encode = Callable[[list[str]], list[Ids]]


def make_encoder(serialised: str | None, folder: str) -> Encode:
    """Return the function from texts to their ids, without the special tokens that a tokenizer puts around them."""
    if serialised is None:
        from transformers import AutoTokenizer

        slow: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

        def encode(texts: list[str]) -> list[Ids]:
            batch = slow(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
            return [np.array(ids, dtype="<u4") for ids in batch]

        return encode
    from tokenizers import Tokenizer

    fast = Tokenizer.from_str(serialised)
    # Without the offsets, which nobody reads.
    return lambda texts: [np.array(e.ids, dtype="<u4") for e in fast.encode_batch_fast(texts, add_special_tokens=False)]


def main(descriptor: int) -> None:
    """Answer until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent closes the pipe when it is interrupted
    pipe = Connection(descriptor)
    try:
        encode = make_encoder(*pipe.recv())
        while True:
            pipe.send(encode(pipe.recv()))
    except (EOFError, ConnectionError):
        return


if __name__ == "__main__":
    main(int(sys.argv[1]))
