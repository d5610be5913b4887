"""How many sites each architecture has, counted from its code."""

from __future__ import annotations

from typing import cast

from overrides import LAYER_COUNTS
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

# The models whose layers have another number of sites than two.
_SITES_A_LAYER: dict[int, str] = {
    1: """
        codegen cohere cohere2 cohere2_moe cohere_compass_text falcon falcon_mamba gpt_neox gptj mamba mamba2
        masked/mobilebert nemotron_h phi zamba zamba2
        """,
    3: "gemma4 gemma4_text xmod",
    4: "dory",
}
_LAYER_SITES = {name: count for count, names in _SITES_A_LAYER.items() for name in names.split()}
# How many sites there are in all, where no rule says it.
_SITES: dict[str, int] = {
    "home/encoder_pre_norm": 4,
    "home/encoder_post_norm": 4,
    "home/decoder_pre_norm": 6,
    "home/decoder_post_norm": 6,
    "home/nanogpt": 4,
    "seq2seq/led": 10,
    "speech/omniasr": 9,  # with the convolution that adds positions, and the decoder's four
    "speech/omniasr_ctc": 5,
    "speech/hubert": 5,  # with the convolution that adds positions
    "speech/wav2vec2": 5,
    "speech/whisper": 10,
}
# Parts of these run under `torch.no_grad()` in their own forward: their stream parameters get no gradient.
PARTLY_FROZEN = {"blt", "hrm_text"}
# Models that carry several streams already, one stream inside another, reversible pairs, or stages.
_UNUSUAL = {
    "blt",
    "codec/wavtokenizer",
    "deepseek_v4",
    "gemma3n",
    "gemma3n_text",
    "hrm_text",
    "hy_v4",
    "image_text/hy_v4_vl",
    "image_text/inkling2",
    "image_text/inkling2_loop",
    "inkling2_loop_text",
    "inkling2_text",
    "masked/funnel",
    "qwen4_exp",
    "qwen4_exp_text",
    "reformer",
    "text/glm5_next_text",
    "text/hy_v4_vl_text",
    "vision/convnext",
    "vision/pvt",
    "vision/swin",
}


def expected_sites(name: str, model: nn.Module) -> int | None:
    """How many additions to the stream the architecture's code makes, if it is a plain stream."""
    if name in _UNUSUAL:
        return None
    if name in _SITES:
        return _SITES[name]
    if name.startswith("seq2seq/"):
        return 10  # two encoder layers with two, two decoder layers with three
    config: PretrainedConfig = cast(PreTrainedModel, model).config.get_text_config()
    depth = next((d for f in LAYER_COUNTS if isinstance(d := getattr(config, f, None), int)), None)
    return None if depth is None else depth * _LAYER_SITES.get(name, 2)
