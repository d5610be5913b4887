"""Tiny models with random weights, one for each architecture that a rewriter of residual streams may meet.

`tiny(model_type)` starts from the defaults of an architecture's configuration and shrinks every field that
is a size; a table of overrides supplies what no rule can know. Models come in eval mode, in float32, with
every parameter that its initialisation leaves constant (norm weights, biases, gates) moved off that constant.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from overrides import BATCH, HEAD_DIM, HEADS, HIDDEN, INNER, KV_HEADS, LAYER_COUNTS, LENGTH, OVERRIDES, SIZE_OF, VOCAB
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

Inputs = dict[str, Any]


class Size(NamedTuple):
    """How many sequences a model's inputs hold, and how many tokens each has."""

    batch: int = BATCH
    length: int = LENGTH


SIZE = Size()


def causal_architectures() -> list[str]:
    """Every model type that `AutoModelForCausalLM` of the installed transformers can build."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _layer_choice(config: PretrainedConfig, lists: dict[str, list[Any]]) -> list[int]:
    """Indices of at least two layers that show every value of every per-layer list."""
    chosen: set[int] = set()
    for values in lists.values():
        seen: list[Any] = [values[i] for i in sorted(chosen)]
        for i, value in enumerate(values):
            if value not in seen:
                seen.append(value)
                chosen.add(i)
    rest = iter(i for i in range(len(next(iter(lists.values())))) if i not in chosen)
    while len(chosen) < 2:
        chosen.add(next(rest))
    return sorted(chosen)


def shrunk(config: PretrainedConfig) -> dict[str, Any]:
    """The fields of `config` that a tiny model changes, nested configurations as dictionaries."""
    out: dict[str, Any] = {}
    special = 100
    depth = next((n for f in LAYER_COUNTS if isinstance(n := getattr(config, f, None), int)), 0)
    per_layer: dict[str, list[Any]] = {}
    latent = hasattr(config, "qk_rope_head_dim")  # latent attention has a key for each query head
    for field in dataclasses.fields(config):
        name = field.name
        value = vars(config).get(config.attribute_map.get(name, name))
        if isinstance(value, PretrainedConfig):
            out[name] = shrunk(value)
        elif isinstance(value, bool) or name in ("id2label", "label2id"):
            continue
        elif isinstance(value, int):
            if field.default is None:
                continue  # the class derives it from others
            if name.endswith(("token_id", "token_index")) and value >= special:
                out[name] = special = special + 1
            elif latent and name == "num_key_value_heads":
                out[name] = HEADS
            elif value > SIZE_OF.get(name, value):
                out[name] = SIZE_OF[name]
        elif name in ("initializer_range", "init_std") and isinstance(value, float):
            out[name] = 0.15  # branches as large as the stream, so that a wrong one shows in the logits
        elif isinstance(value, list | tuple) and len(value) == depth > 3:
            per_layer[name] = list(value)
    if per_layer:
        kept = _layer_choice(config, per_layer)
        for name, values in per_layer.items():
            limit = SIZE_OF.get(name)
            out[name] = [min(v, limit) if limit and isinstance(v, int) else v for v in (values[i] for i in kept)]
        for name in LAYER_COUNTS:
            if name in out:
                out[name] = len(kept)
    return out


def _merge(into: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
    return into


def tiny_config(model_type: str, **more: Any) -> PretrainedConfig:
    """The tiny configuration of an architecture; `more` goes over the table of overrides."""
    cls = CONFIG_MAPPING[model_type]
    overrides = copy.deepcopy(OVERRIDES.get(model_type, {}))
    try:
        fields = shrunk(cls())
    except Exception:  # some defaults are invalid by themselves
        fields = shrunk(cls(**overrides))
    return cls(**_merge(_merge(fields, overrides), more))


def unsettle(model: nn.Module) -> None:
    """Move parameters and buffers that initialisation leaves constant, and all vectors, by a little noise."""
    kept = model.state_dict(keep_vars=True).values()  # parameters, and the buffers that a checkpoint holds
    with torch.no_grad():
        for p in {id(p): p for p in [*model.parameters(), *kept]}.values():
            if not p.numel() or not p.is_floating_point():
                continue
            constant = bool((p == p.flatten()[0]).all())
            if constant or (p.ndim <= 1 and isinstance(p, nn.Parameter)):
                p.add_(torch.randn_like(p), alpha=0.05)


def seed(name: str) -> None:
    torch.manual_seed(zlib.crc32(name.encode()))


def ids(size: Size, low: int = 10, high: int = 90) -> Tensor:
    """Return token ids that are never special."""
    return torch.randint(low, high, (size.batch, size.length))


def _from_auto(auto: Any, model_type: str, **more: Any) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return auto.from_config(tiny_config(model_type, **more), dtype=torch.float32)


def tiny(model_type: str, task: str = "causal", size: Size = SIZE) -> tuple[nn.Module, Inputs]:
    """A tiny model of that architecture in eval mode, and keyword inputs for it.

    `task` is `causal` or one of `TASKS`; for `home`, `model_type` names one of our own modules.
    """
    seed(f"{task}/{model_type}")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        model, inputs = TASKS[task](model_type, size)
    finally:
        transformers.logging.set_verbosity(verbosity)
    seed(f"{task}/{model_type}/noise")
    unsettle(model)
    return model.eval(), inputs


def _causal(model_type: str, size: Size) -> tuple[nn.Module, Inputs]:
    auto = transformers.AutoModelForCausalLM
    if model_type.startswith("musicgen"):  # the class takes the decoder's part of this configuration
        whole = tiny_config(model_type)
        config = whole.decoder
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(whole)]._from_config(config, dtype=torch.float32)
        codes = torch.randint(10, 90, (size.batch * config.num_codebooks, size.length))
        return model, {"input_ids": codes, "use_cache": False}
    model = _from_auto(auto, model_type)
    config = model.config.get_text_config()
    if model_type.endswith("_assistant"):  # drafts from the hidden states and the keys and values of another model
        states = torch.randn(size.batch, size.length, 2 * model.config.backbone_hidden_size)
        shape = (size.batch, KV_HEADS, size.length, HEAD_DIM)
        kinds = ("full_attention", "sliding_attention")
        return model, {
            "inputs_embeds": states,
            "position_ids": torch.arange(size.length).expand(size.batch, -1),
            "shared_kv_states": {kind: (torch.randn(shape), torch.randn(shape)) for kind in kinds},
        }
    inputs = {"input_ids": ids(size), "use_cache": False}
    if model_type == "mllama":  # without them its cross-attention layers are left out
        inputs["cross_attention_states"] = torch.randn(size.batch, 5, HIDDEN)
    return model, inputs


def _text(model_type: str, size: Size) -> tuple[nn.Module, Inputs]:
    return _from_auto(transformers.AutoModel, model_type), {"input_ids": ids(size), "use_cache": False}


def _masked(model_type: str, size: Size) -> tuple[nn.Module, Inputs]:
    return _from_auto(transformers.AutoModelForMaskedLM, model_type), {"input_ids": ids(size)}


def _seq2seq(model_type: str, size: Size) -> tuple[nn.Module, Inputs]:
    model = _from_auto(transformers.AutoModelForSeq2SeqLM, model_type)
    return model, {
        "input_ids": ids(size),
        "decoder_input_ids": ids(size._replace(length=size.length - 3)),
        "use_cache": False,
    }


def _vision(model_type: str, size: Size) -> tuple[nn.Module, Inputs]:
    if model_type == "deit":  # the table of classes has two for it
        config = tiny_config(model_type)
        model = transformers.DeiTForImageClassification._from_config(config, dtype=torch.float32)
    elif model_type == "dinov3_vit":  # it has no classifier
        model = _from_auto(transformers.AutoModel, model_type)
    else:
        model = _from_auto(transformers.AutoModelForImageClassification, model_type)
    return model, {"pixel_values": torch.randn(size.batch, 3, 32, 32)}


def _image_text(model_type: str, size: Size) -> tuple[nn.Module, Inputs]:
    """Build the whole model and give it text alone: how many tokens an image has is data to most of them."""
    return _from_auto(transformers.AutoModelForImageTextToText, model_type), {
        "input_ids": ids(size),
        "use_cache": False,
    }


def _codec(model_type: str, size: Size) -> tuple[nn.Module, Inputs]:
    return _from_auto(transformers.AutoModel, model_type), {"input_values": torch.randn(size.batch, 1, 480)}


def _speech(model_type: str, size: Size) -> tuple[nn.Module, Inputs]:
    if model_type == "whisper":
        model = _from_auto(transformers.AutoModelForSpeechSeq2Seq, model_type)
        features = torch.randn(size.batch, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        return model, {"input_features": features, "decoder_input_ids": ids(size), "use_cache": False}
    if model_type == "omniasr":  # the frames of the encoder replace as many placeholders in the decoder's text
        model = _from_auto(transformers.AutoModelForSpeechSeq2Seq, model_type)
        placeholders = torch.full((size.batch, 12), model.config.audio_token_id)
        text = torch.cat([placeholders, ids(size)], 1)
        return model, {"input_ids": text, "input_values": torch.randn(size.batch, 1, 4000), "use_cache": False}
    model = _from_auto(transformers.AutoModelForCTC, model_type)
    channels = (1,) if model_type == "omniasr_ctc" else ()
    return model, {"input_values": torch.randn(size.batch, *channels, 4000)}


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(-2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class NanoGPT(nn.Module):
    """Token and position embeddings, blocks, a norm and a tied head."""

    def __init__(self, vocab: int = VOCAB, width: int = HIDDEN, heads: int = HEADS, depth: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _home(name: str, size: Size) -> tuple[nn.Module, Inputs]:
    layout: dict[str, Any] = {"d_model": HIDDEN, "nhead": HEADS, "dim_feedforward": INNER, "batch_first": True}
    x = torch.randn(size.batch, size.length, HIDDEN)
    if name == "nanogpt":
        return NanoGPT(), {"input_ids": ids(size)}
    first = name.endswith("pre_norm")
    if name.startswith("encoder"):
        norm = nn.LayerNorm(HIDDEN) if first else None
        one = nn.TransformerEncoderLayer(**layout, norm_first=first)
        return nn.TransformerEncoder(one, 2, norm=norm, enable_nested_tensor=False), {"src": x}
    layer = nn.TransformerDecoderLayer(**layout, norm_first=first)
    return nn.TransformerDecoder(layer, 2), {"tgt": x, "memory": torch.randn(size.batch, 7, HIDDEN)}


TASKS: dict[str, Callable[[str, Size], tuple[nn.Module, Inputs]]] = {
    "causal": _causal,
    "text": _text,
    "masked": _masked,
    "seq2seq": _seq2seq,
    "vision": _vision,
    "image_text": _image_text,
    "speech": _speech,
    "codec": _codec,
    "home": _home,
}
_OTHERS: dict[str, str] = {
    "text": "glm5_next_text hy_v4_vl_text",  # no classes of their own for language modelling
    "masked": "albert bert convbert deberta-v2 distilbert electra esm funnel mobilebert modernbert mpnet roberta"
    " squeezebert",
    "seq2seq": "bart blenderbot led longt5 m2m_100 marian mbart mt5 pegasus prophetnet switch_transformers t5 umt5",
    "vision": "beit convnext deit dinov2 dinov3_vit pvt swin vit",
    "image_text": "apertus1p5 exaone4_5 hy_v4_vl inkling2 inkling2_loop",  # of 5.24; older ones are causal as well
    "speech": "hubert omniasr omniasr_ctc wav2vec2 whisper",
    "codec": "wavtokenizer",
    "home": "nanogpt encoder_pre_norm encoder_post_norm decoder_pre_norm decoder_post_norm",
}


def all_names() -> list[str]:
    """Every row of the zoo: causal architectures by model type, the others as `task/model_type`."""
    return causal_architectures() + [f"{task}/{m}" for task, types in _OTHERS.items() for m in types.split()]


def named(name: str, size: Size = SIZE) -> tuple[nn.Module, Inputs]:
    """Return the model of a row, with inputs of that size."""
    task, _, model_type = name.rpartition("/")
    return tiny(model_type, task or "causal", size)
