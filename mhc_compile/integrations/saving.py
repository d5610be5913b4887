"""Saving: a converted model's own `save_pretrained` writes its streams, too."""

from __future__ import annotations

import functools
import sys

from torch import nn

from mhc_compile.checkpoint.saving import save_pretrained
from mhc_compile.integrations.attributes import replace_attribute
from mhc_compile.parameters import owners


def on_convert(root: nn.Module) -> None:
    """Make `save_pretrained` of every transformers model of `root` that holds streams that of this package."""
    transformers = sys.modules.get("transformers")
    for module in root.modules():
        # PEFT's models have one too, which saves adapters alone.
        if transformers is not None and isinstance(module, transformers.PreTrainedModel) and owners(module):
            # On the instance: it is copied and pickled with the module, and leaves classes alone.
            replace_attribute(module, "save_pretrained", functools.partial(save_pretrained, module))
