"""Taking a converted model back, in memory."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from folders import with_streams
from tiny_models import ids, llama

from mhc_compile import MHCError, convert, to_residual
from mhc_compile.arm import is_armed
from mhc_compile.parameters import owners


@pytest.mark.compat
def test_to_residual_undoes_convert(tmp_path: Path) -> None:
    model = llama()
    kind, names = type(model.model), set(model.state_dict())
    with torch.no_grad():
        before = model(ids()).logits
        assert to_residual(convert(model, inner="eager")) is model
        assert torch.equal(model(ids()).logits, before)
    assert type(model.model) is kind
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path / "residual")
    assert (tmp_path / "residual" / "model.safetensors").is_file()
    convert(model, streams=2, inner="eager")
    assert owners(model)["model"].spec.streams == 2


def test_to_residual_refuses_trained_streams() -> None:
    model = with_streams(llama())
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(MHCError, match="MHC411"):
        to_residual(model)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert is_armed(model.model)


def test_to_residual_refuses_a_residual_model() -> None:
    with pytest.raises(MHCError, match="MHC410"):
        to_residual(llama())
