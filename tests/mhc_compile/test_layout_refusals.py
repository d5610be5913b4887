"""Layouts: streams without a place in them, and folders that are not read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import make, weights
from safetensors.torch import load_file, save_file
from tiny_models import shake
from torch import Tensor
from transformers import (
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
)

import mhc_compile
from mhc_compile import MHCError, convert_folder
from mhc_compile.checkpoint.layouts import LAYOUTS, LayoutName, to_layout
from mhc_compile.kernels.spec import Convention, StreamSpec
from mhc_compile.parameters import StreamParameters


@pytest.mark.parametrize(
    ("options", "layout", "text"),
    [
        ({}, "deepseek_v4", "exit mean, where the layout has head"),
        ({"exit": "head"}, "megatron", "exit head, where the layout has mean"),
        ({"exit": "sum"}, "megatron", "exit sum"),
        ({"exit": "head", "manifold": "kronecker"}, "nemo", "manifold kronecker"),
        ({"exit": "head", "manifold": "identity"}, "deepseek_v4", "manifold identity"),
        ({"form": "hc"}, "megatron", "form hc"),
        ({"exit": "head", "convention": Convention.DEEPSEEK_V41}, "nemo", "the site before"),
        ({"exit": "head", "iterations": 0}, "megatron_dev", "0 iterations"),
    ],
)
def test_streams_without_a_place(options: dict[str, Any], layout: LayoutName, text: str) -> None:
    parameters = StreamParameters(StreamSpec(**options), {"layers.0#0": 8, "layers.0#1": 8})
    with pytest.raises(MHCError, match=f"MHC418.*{text}"):
        to_layout(LAYOUTS[layout], {"model": parameters})


def refused(folder: Path, layout: Any, text: str) -> None:
    with pytest.raises(MHCError, match="MHC418") as caught:
        convert_folder(folder, folder.parent / "out", layout=layout)
    assert text in str(caught.value)
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize(
    ("sites", "text"),
    [
        (["layers.0#0", "layers.0#1", "layers.0#2", "layers.1#0"], "layers.0#2 is the stream's site 2"),
        (["layers.0#0", "layers.1#0"], "layers.1#0 is the stream's site 1"),
        (["layers.0#0", "layers.0#1", "layers.1#0"], "3 sites"),
        (["layers.1#0", "layers.1#1"], "layers.1#0 is the stream's site 0"),
        (["#0", "#1"], "#0 is the stream's site 0"),
    ],
)
def test_layers_without_two_sites(sites: list[str], text: str) -> None:
    parameters = StreamParameters(StreamSpec(), dict.fromkeys(sites, 8))
    with pytest.raises(MHCError, match=f"MHC418.*{text}"):
        to_layout(LAYOUTS["megatron"], {"": parameters})


def test_what_a_folder_has_beside(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "a")
    settings = mhc_compile.OverEncodingSettings(order=2, heads=1, rows=64)
    refused(convert_folder(tmp_path / "a", tmp_path / "b", over_encoding=settings).folder, "megatron", "over-encoding")


def test_a_configuration_that_says_otherwise(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sources["deepseek_v4"], tmp_path / "a"))
    path = folder / "config.json"
    path.write_text(path.read_text().rpartition("}")[0] + ', "hc_mult": 2}')
    refused(folder, "nemo", "config.json has hc_mult=2, not 3")


def test_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    make("t5").save_pretrained(tmp_path / "a")
    refused(convert_folder(tmp_path / "a", tmp_path / "b").folder, "megatron", "2 modules hold streams")


def test_conventions_too_far_apart(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sources["paper_head"], tmp_path / "a"))
    model = mhc_compile.from_pretrained(folder, inner="eager")
    shake(model, scale=3.0)
    model.save_pretrained(tmp_path / "b")
    with pytest.raises(MHCError, match="MHC205"):
        convert_folder(tmp_path / "b", tmp_path / "out", layout="nemo")
    assert not (tmp_path / "out").exists()


def edit(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[-1]
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        kept = {n: f for n, f in content["weight_map"].items() if f != path.name}
        index.write_text(json.dumps({**content, "weight_map": kept | dict.fromkeys(tensors, path.name)}))

    return apply


def configure(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


SITE = "layers.1.hc_ffn_"
DAMAGED: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str, str]] = {
    "a parameter missing": (edit(lambda t: t.pop(f"{SITE}scale")), {}, "MHC404", f"missing: {SITE}scale"),
    "one too many": (edit(lambda t: t.update({"layers.2.hc_attn_fn": t[f"{SITE}fn"].clone()})), {}, "MHC404",
                     "unexpected: layers.2.hc_attn_fn"),
    "another shape": (edit(lambda t: t.update({f"{SITE}fn": torch.ones(15, 48)})), {}, "MHC404", "[15, 48] for"),
    "rows of no n": (edit(lambda t: t.update({"layers.0.hc_attn_fn": torch.ones(14, 96)})), {}, "MHC404", "n * n"),
    "float64": (edit(lambda t: t.update({f"{SITE}base": t[f"{SITE}base"].double()})), {}, "MHC404", "float32 holds"),
    "NaN": (edit(lambda t: t[f"{SITE}base"].fill_(float("nan"))), {}, "MHC408", f"{SITE}base"),
    "another n": (configure(hc_mult=4), {}, "MHC404", "hc_mult is 4"),
    "another eps": (configure(hc_eps=1e-5), {}, "MHC202", "hc_eps=1e-05"),
    "iterations twice": (lambda _: None, {"iterations": 20}, "MHC204", "hc_sinkhorn_iters is 7"),
    "n asked for": (lambda _: None, {"streams": 4}, "MHC204", "streams beside layout='nemo' is not chosen but read"),
    "a memory asked for": (lambda _: None, {"engram": "v41"}, "MHC204", "engram beside"),
    "the other way": (lambda _: None, {"to": "residual"}, "MHC204", "to beside"),
    "another layout": (configure(transformers_weights=None), {"layout": "megatron"}, "MHC404", "no hyper-connections"),
    "no layout": (lambda _: None, {"layout": "fairseq"}, "MHC204", "known: deepseek_v4, nemo, megatron, megatron_dev"),
    "one site ahead": (lambda _: None, {"convention": "deepseek_v41"}, "MHC418", "the site before"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_folder_that_is_not_read(case: str, sources: dict[str, Path], tmp_path: Path) -> None:
    change, options, code, text = DAMAGED[case]
    folder = convert_folder(sources["deepseek_v4"], tmp_path / "nemo", layout="nemo").folder
    change(folder)
    with pytest.raises(MHCError) as caught:
        convert_folder(folder, tmp_path / "out", **{"layout": "nemo", **options})
    assert caught.value.code == code
    assert text in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_half_precision_is_read_into_float32(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = convert_folder(sources["deepseek_v4"], tmp_path / "nemo", layout="nemo").folder
    edit(lambda t: t.update({name: p.bfloat16() for name, p in t.items()}))(folder)
    read = weights(convert_folder(folder, tmp_path / "out", layout="nemo").folder)
    for name, ours in {"fn": "phi", "scale": "alpha", "base": "bias"}.items():
        stored = weights(folder)[f"{SITE}{name}"]
        assert stored.dtype == torch.bfloat16
        assert torch.equal(read[f"model.mhc.layers.1#1.{ours}"], stored.float())


def test_options_of_a_folder_that_has_its_own(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(MHCError, match=r"MHC204.*convention beside"):
        convert_folder(sources["deepseek_v4"], tmp_path / "out", layout="nemo", convention="deepseek_v4")


def test_hyper_connections_of_a_models_own_are_no_layout(tmp_path: Path) -> None:
    config = DeepseekV4Config(
        vocab_size=64, hidden_size=32, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        n_routed_experts=2, num_experts_per_tok=1, head_dim=16, q_lora_rank=16, o_lora_rank=8, o_groups=1,
        index_n_heads=2, index_head_dim=16, index_topk=4, num_hash_layers=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    DeepseekV4ForCausalLM(config).save_pretrained(tmp_path / "v4", save_original_format=False)
    with pytest.raises(MHCError, match="MHC107"):
        convert_folder(tmp_path / "v4", tmp_path / "out", layout="deepseek_v4")
