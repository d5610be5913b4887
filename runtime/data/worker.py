"""A process that turns texts into ids. It is started by this file's path, so that it need not import torch.

On its standard input and output: frames, 8 bytes of length (little endian) and a body. The first frame it gets is a
JSON list of the tokenizer as text or null and its folder, and every other one a JSON list of texts; it answers each of
those with the number of ids of every text (int64) and all ids (uint32). It ends when its input does: with its parent,
however that ends.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from collections.abc import Callable
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.uint32]
Encode = Callable[[list[str]], list[Ids]]


def make_encoder(serialised: str | None, folder: str) -> Encode:
    """The function from texts to their ids, without the special tokens that a tokenizer puts around them."""
    if serialised is None:
        from transformers import AutoTokenizer

        slow: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

        def encode(texts: list[str]) -> list[Ids]:
            found = slow(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
            return [np.array(ids, dtype="<u4") for ids in found]

        return encode
    from tokenizers import Tokenizer

    fast = Tokenizer.from_str(serialised)
    # Without the offsets, which nobody reads.
    return lambda texts: [np.array(e.ids, dtype="<u4") for e in fast.encode_batch_fast(texts, add_special_tokens=False)]


def send(file: IO[bytes], *parts: bytes) -> None:
    """Write one frame."""
    file.write(struct.pack("<Q", sum(map(len, parts))))
    for part in parts:
        file.write(part)
    file.flush()


def receive(file: IO[bytes]) -> bytes | None:
    """Read one frame; None where the other side has closed, at whatever place."""
    head = file.read(8)
    if len(head) < 8:
        return None
    (length,) = struct.unpack("<Q", head)
    body = file.read(length)
    return body if len(body) == length else None


def unpack(body: bytes, count: int) -> list[Ids]:
    """The ids of `count` texts from an answer's body."""
    lengths = np.frombuffer(body, dtype="<i8", count=count)
    return np.split(np.frombuffer(body, dtype="<u4", offset=8 * count), np.cumsum(lengths)[:-1])


def main() -> None:
    """Answer until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent closes the pipes when it is interrupted
    # Whatever a library prints must not mix into the frames.
    with os.fdopen(os.dup(1), "wb") as answers, os.fdopen(os.dup(0), "rb") as requests:
        os.dup2(2, 1)
        first = receive(requests)
        if first is None:
            return
        encode = make_encoder(*json.loads(first))
        while (body := receive(requests)) is not None:
            ids = encode(json.loads(body))
            lengths = np.array([len(i) for i in ids], dtype="<i8")
            try:
                send(answers, lengths.tobytes(), *(i.tobytes() for i in ids))
            except BrokenPipeError:
                sys.stderr.close()  # nobody is left to read why
                os._exit(0)


if __name__ == "__main__":
    main()
