"""Make the inputs of a small call of a Hugging Face model from its configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mhc_compile.diagnostics import MHCError
from mhc_compile.integrations.transformers import DECODER_IDS, FEATURES, IDS, PIXELS, without_cache

LENGTH = 8


def example_inputs(model: nn.Module, length: int = LENGTH) -> dict[str, Any]:
    """Return keyword inputs of one forward call; raise MHC209 for a model that is not from transformers.

    Ids have `length` positions, or fewer where the model has no more, or does not say how many it has.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    if config is None or name is None or not hasattr(config, "to_dict"):
        raise MHCError("MHC209", f"{type(model).__name__} is not a Hugging Face model")
    device = next(model.parameters()).device
    # Quantised weights may be parameters too.
    kinds = (p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)
    dtype = next(kinds, torch.float32)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = min(length, int(getattr(text, "max_position_embeddings", None) or LENGTH))
    ids = torch.arange(2, 2 + length, device=device).remainder(
        max(int(getattr(text, "vocab_size", LENGTH) or LENGTH), 1)
    )
    # MusicGen takes the codebooks of a sample as rows of the batch.
    rows = 2 * int(getattr(getattr(config, "decoder", text), "num_codebooks", None) or 1)
    ids = ids.expand(rows, -1).contiguous()
    inputs: dict[str, Any]
    if name == IDS:
        inputs = {IDS: ids}
    elif name == PIXELS:
        size = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
        shape = (2, int(getattr(config, "num_channels", 3)), *size)
        inputs = {PIXELS: torch.zeros(shape, device=device, dtype=dtype)}
    elif name == FEATURES and hasattr(config, "num_mel_bins"):
        frames = 2 * int(config.max_source_positions)
        shape = (2, int(config.num_mel_bins), frames)
        inputs = {FEATURES: torch.zeros(shape, device=device, dtype=dtype)}
    else:
        raise MHCError("MHC209", f"{type(model).__name__} takes {name}")
    if getattr(config, "is_encoder_decoder", False):
        inputs[DECODER_IDS] = ids
    return {**inputs, **without_cache(model)}


def seeded_inputs(model: nn.Module, seed: int) -> dict[str, Any]:
    """Return `example_inputs` with ids and pixels drawn from `seed`."""
    inputs = example_inputs(model)
    generator = torch.Generator().manual_seed(seed)
    for name, x in inputs.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            inputs[name] = torch.randn(x.shape, generator=generator).to(x.device, x.dtype)
        elif isinstance(x, torch.Tensor):
            inputs[name] = torch.randint(0, int(x.max()) + 1, x.shape, generator=generator).to(x.device)
    return inputs
