"""Folders with trained streams in the conventions of the layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tiny_models import llama, shake
from torch import nn

import mhc_compile
from mhc_compile.checkpoint.layouts import LAYOUTS, LayoutName

NAMES = get_args(LayoutName)
V4 = {"convention": "deepseek_v4", "exit": "head"}
OF_V4 = ["deepseek_v4", "nemo", "megatron_dev"]


def trained(model: nn.Module, folder: Path, **options: Any) -> Path:
    """A folder with streams far from their start, matrices far from symmetric, and a negative zero in phi."""
    model = mhc_compile.convert(model, inner="eager", **{"streams": 3, **options})
    shake(model)
    with torch.no_grad():
        for name, p in mhc_compile.stream_parameters(model).items():
            if name.endswith(".bias"):
                p[6:] = 0.7 * torch.randn(9, generator=torch.Generator().manual_seed(len(folder.name)))
            elif name.endswith(".phi"):
                p[-2, 0] = -0.0
    model.save_pretrained(folder, max_shard_size="30KB")
    (folder / "model.safetensors.index.json").unlink()  # for Trainer, which has no folders of `convert_folder`
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders in the conventions of the layouts, and in the paper's with either exit."""
    place = tmp_path_factory.mktemp("sources")
    options: dict[str, dict[str, Any]] = {
        "deepseek_v4": {**V4, "iterations": 7},
        "megatron_main": {"convention": "megatron_main", "exit": "mean"},
        "paper_head": {"exit": "head"},
        "paper_mean": {},
    }
    return {name: trained(llama(), place / name, **chosen) for name, chosen in options.items()}


def source_of(layout: str, sources: dict[str, Path], *, paper: bool = False) -> Path:
    system = LAYOUTS[layout]
    return sources[f"paper_{system.exit}" if paper else system.convention.value]
