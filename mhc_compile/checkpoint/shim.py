"""Make transformers' own loaders refuse a converted folder, or load it by this package.

`config.json` names a weight file that there is not, so that every plain `from_pretrained` raises an error that quotes
the name, and by `auto_map` a file of code. With `trust_remote_code=True` the Auto class of the model runs that code,
which calls `mhc_compile.from_pretrained`, or says what to install.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

NOTICE = "converted by mhc-compile: load this folder with mhc_compile.from_pretrained"
_WEIGHTS = f'\n  "transformers_weights": "{NOTICE}",'
SHIM = "loading_mhc.py"
_CLASS = "loading_mhc.Converted"
SHIM_TEXT = '''\
"""Loads this folder's model, whose streams are code of mhc-compile, for transformers' Auto classes."""


class Converted:
    @staticmethod
    def register_for_auto_class(auto_class):
        """Do nothing: a folder that is saved has this file again."""

    @staticmethod
    def from_pretrained(folder, config, trust_remote_code=True, adapter_kwargs=None, _from_auto=True, **options):
        try:
            import mhc_compile
        except ImportError as error:
            raise ImportError(f"{folder} was converted by mhc-compile: pip install mhc-compile") from error
        return mhc_compile.from_pretrained(folder, config=config, **options)
'''


def guarded(config: bytes, auto_classes: Sequence[str]) -> bytes:
    """Return the text of a `config.json` by which transformers loads the folder through `SHIM` or not at all.

    `auto_classes` are the names of the Auto classes that make the model.
    """
    places = json.dumps(dict.fromkeys(auto_classes, _CLASS))
    return unguarded(config).replace(b"{", f'{{{_WEIGHTS}\n  "auto_map": {places},'.encode(), 1)


def unguarded(config: bytes) -> bytes:
    """Return the text that `guarded` was given, byte for byte."""
    ours = rf'{re.escape(_WEIGHTS)}(\n  "auto_map": \{{("\w+": "{re.escape(_CLASS)}"(, )?)*\}},)?'
    return re.sub(ours.encode(), b"", config, count=1)


def is_shim(auto_map: Any) -> bool:
    """Return whether the entry `auto_map` of a configuration names `SHIM` alone."""
    return isinstance(auto_map, Mapping) and set(auto_map.values()) <= {_CLASS}
