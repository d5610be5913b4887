"""A converted model in ONNX, by way of `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from tiny_models import gpt2, ids, llama, shake
from torch.export import Dim

import mhc_compile


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: llama(num_hidden_layers=1), {"streams": 2, "iterations": 2}),
        pytest.param(llama, {}, marks=pytest.mark.slow),
        pytest.param(gpt2, {}, marks=pytest.mark.slow),
    ],
    ids=["small", "llama", "gpt2"],
)
def test_onnxruntime_computes_the_same(make: Any, options: dict[str, int], tmp_path: Path) -> None:
    model: Any = mhc_compile.convert(make(), inner="eager", **options)
    shake(model)
    shapes = {"input_ids": {0: Dim("batch"), 1: Dim("length", max=64)}}
    program = mhc_compile.export(model, ids(), example_kwargs={"use_cache": False}, dynamic_shapes=shapes)
    path = tmp_path / "model.onnx"
    torch.onnx.export(program, f=path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    for inputs in (ids(), ids(3, 11, seed=1)):
        (result,) = session.run(None, {"input_ids": inputs.numpy()})
        torch.testing.assert_close(torch.from_numpy(result), model(inputs).logits.detach(), rtol=1e-4, atol=1e-5)
