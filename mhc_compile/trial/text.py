"""The text of a trial as tokens of the model's own tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mhc_compile.checkpoint.tables import TOKENIZER, read_tokenizer
from mhc_compile.diagnostics import MHCError


def read_tokens(file: Path, folder: Path, vocabulary: int) -> Tensor:
    """Return a text file's token ids `[N]`: those of the tokenizer in `folder`, or its bytes where there is none.

    Raises MHC528 for a text that cannot be read and ids that the model does not have, MHC222 for a broken tokenizer.
    """
    try:
        data = file.read_bytes()
        if not (folder / TOKENIZER).is_file():
            tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).long() if data else torch.empty(0).long()
        else:
            tokens = torch.tensor(read_tokenizer(folder).encode(data.decode(), add_special_tokens=False).ids)
    except (OSError, UnicodeDecodeError) as error:
        raise MHCError("MHC528", f"{file}: {error}") from error
    if len(tokens) and int(tokens.max()) >= vocabulary:
        raise MHCError("MHC528", f"the text has the token {int(tokens.max())}, the model {vocabulary} of them")
    return tokens
