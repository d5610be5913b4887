"""What a process that turns texts into ids runs. It imports no torch, and so starts in a fraction of torch's time."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from multiprocessing import parent_process
from threading import Thread
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


_encode: Encode | None = None


def begin(serialised: str | None, folder: str) -> None:
    """Prepare this process for `encode`. It ends with its parent, however that ends."""
    global _encode  # a process of a pool has one tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool when it is interrupted
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    Thread(target=_follow_parent, daemon=True).start()
    _encode = make_encoder(serialised, folder)


def _follow_parent() -> None:
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def encode(texts: list[str]) -> list[Ids]:
    """Return the ids of each text."""
    assert _encode is not None, "begin() first"
    return _encode(texts)
