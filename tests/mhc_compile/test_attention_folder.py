"""`attention` in folders: what is loaded computes what was saved, and nothing that cannot say so is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mhc_compile
from mhc_compile import MHCError
from mhc_compile.configured import configured
from mhc_compile.diffusion import attend, sample
from mhc_compile.parameters import attention_of

IDS = torch.randint(1, 12, (2, 10), generator=torch.Generator().manual_seed(0))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.6, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def test_a_folder_keeps_its_attention(tmp_path: Path) -> None:
    causal = mhc_compile.convert(llama(), streams=2, inner="eager")
    saved = logits(causal)
    mhc_compile.save_pretrained(causal, tmp_path / "causal")
    assert json.loads((tmp_path / "causal" / "mhc.json").read_text())["format"] == 1
    attend(causal, "block:4", inner="eager")
    assert not torch.equal(logits(causal), saved)
    mhc_compile.save_pretrained(causal, tmp_path / "blocks")
    assert json.loads((tmp_path / "blocks" / "mhc.json").read_text())["format"] == 3

    loaded: Any = mhc_compile.from_pretrained(tmp_path / "blocks", inner="eager")
    assert torch.equal(logits(loaded), logits(causal))
    assert sample(loaded, IDS, 3, mask_token=0).ids.shape == (2, 13)
    mhc_compile.save_pretrained(loaded, tmp_path / "again")
    assert attention_of(mhc_compile.from_pretrained(tmp_path / "again").modules()) == "block:4"
    assert attention_of(configured(tmp_path / "again")[0].modules()) == "block:4"
    same = mhc_compile.from_pretrained(tmp_path / "blocks", inner="eager", attention="block:4")
    assert torch.equal(logits(same), logits(causal))
    assert torch.equal(logits(mhc_compile.from_pretrained(tmp_path / "causal", inner="eager")), saved)


def test_what_cannot_say_so_is_not_written(tmp_path: Path) -> None:
    model = mhc_compile.convert(llama(), streams=4, convention="deepseek_v4", inner="eager", attention="block:4")
    folder = tmp_path / "blocks"
    mhc_compile.save_pretrained(model, folder)
    for code, said, call in (
        ("MHC304", "block:8", lambda: mhc_compile.from_pretrained(folder, attention="block:8")),
        ("MHC204", "residual folder", lambda: mhc_compile.convert_folder(folder, tmp_path / "out", to="residual")),
        ("MHC204", "layout", lambda: mhc_compile.convert_folder(folder, tmp_path / "out", layout="megatron")),
        ("MHC204", "residual model", lambda: mhc_compile.to_residual(model)),
        ("MHC204", "emit", lambda: mhc_compile.emit(model, tmp_path / "out.py", IDS)),
    ):
        with pytest.raises(MHCError, match=code) as caught:
            call()
        assert said in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blocks"]
    content = json.loads((folder / "mhc.json").read_text())
    content["owners"]["model"]["attention"] = "blocks"
    (folder / "mhc.json").write_text(json.dumps(content))
    with pytest.raises(MHCError, match="MHC414"):
        mhc_compile.from_pretrained(folder)
