"""Folders by the id of their repository on the Hugging Face Hub."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from mhc_compile.diagnostics import MHCError

OPTIONS = {"revision", "token", "cache_dir", "force_download", "local_files_only"}
"""Keywords of `from_pretrained` that say what is downloaded, and from where."""
_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?")
_DATA = ["*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*"]
"""Names of the files that are downloaded beside the weights. Code in a repository is not among them."""


def local_folder(place: str | os.PathLike[str], *, weights: bool = True, **options: Any) -> Path:
    """Return the path of a folder or file on this machine: `place`, or a download of the repository that it names.

    `org/name` and `org/name@revision` name a repository of the Hub where there is no such path here. It lies in the
    Hub's cache afterwards, and is asked for once more only to see whether it has changed. Without `weights` no tensor
    is downloaded. `options` are those of `OPTIONS`, with the meaning that they have for transformers.

    Raises `MHCError`: MHC204 for a `revision` of a path, MHC415 where `huggingface_hub` is not installed, and MHC417
    where the Hub has no such repository, or cannot be reached.
    """
    path = Path(place)
    named = _ID.fullmatch(str(place))
    if path.exists() or named is None:
        if options.get("revision"):
            raise MHCError("MHC204", f"{path} is a path and has no revision", way_out="leave it out")
        return path
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MHCError("MHC415", f"{place} is not here; the Hub is asked by huggingface_hub")
    import huggingface_hub

    options.setdefault("revision", named["revision"])
    try:
        snapshot = huggingface_hub.snapshot_download(
            named["id"], allow_patterns=[*_DATA, *(["*.safetensors"] if weights else [])], **options
        )
    except Exception as error:  # of the network, of the Hub and of its cache, which share no class
        raise MHCError("MHC417", f"{place} is no path here, and no download: {_first_line(error)}") from error
    return Path(snapshot)


def _first_line(error: Exception) -> str:
    """Return what an error says; the rest of the Hub's messages is advice for its own functions."""
    return next(iter(str(error).splitlines()), type(error).__name__)
