"""Models that transformers does not have: registered classes, classes and instances given by hand, plain modules."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import chain, ids, llama, shake
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING, MODEL_MAPPING

from mhc_compile import MHCError, convert, convert_folder, from_pretrained, load, save
from mhc_compile.parameters import owners


class OwnConfig(PreTrainedConfig):
    model_type = "own_of_the_tests"
    width: int = 32


class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "own"
    main_input_name = "input_ids"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.net = chain()
        self.post_init()

    def forward(self, input_ids: Tensor) -> Any:
        return self.net(input_ids)


class Tied(nn.Module):
    """A module with a tied weight, a buffer, and parameters that share memory."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        both = torch.randn(2, 8)
        self.left, self.right = nn.Parameter(both[0]), nn.Parameter(both[1])
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


@pytest.fixture
def registered() -> Iterator[None]:
    AutoConfig.register(OwnConfig.model_type, OwnConfig)
    AutoModel.register(OwnConfig, OwnModel)
    yield
    CONFIG_MAPPING._extra_content.pop(OwnConfig.model_type)
    MODEL_MAPPING._extra_content.pop(OwnConfig)


def converted(model: Any) -> Any:
    model = convert(model, ids(), inner="eager", streams=2).eval()
    shake(model)
    return model


def assert_equal(left: nn.Module, right: nn.Module) -> None:
    a, b = left.state_dict(), right.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(t, b[name]) for name, t in a.items())
    assert owners(left).keys() == owners(right).keys()
    with torch.no_grad():
        assert torch.equal(left(ids()), right(ids()))


@pytest.mark.usefixtures("registered")
def test_a_registered_class_is_found(tmp_path: Path) -> None:
    OwnModel(OwnConfig()).save_pretrained(tmp_path / "residual")
    model = converted(OwnModel(OwnConfig()))
    model.save_pretrained(tmp_path / "saved")
    loaded = from_pretrained(tmp_path / "saved", inner="eager")
    assert isinstance(loaded, OwnModel)
    assert_equal(model, loaded)
    with pytest.raises(ValueError, match=r"mhc_compile\.from_pretrained"):
        AutoModel.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("give", [OwnModel, lambda: OwnModel(OwnConfig())])
def test_a_class_or_what_makes_an_instance_is_taken(give: Any, tmp_path: Path) -> None:
    model = converted(OwnModel(OwnConfig()))
    model.save_pretrained(tmp_path / "saved")
    assert_equal(model, from_pretrained(tmp_path / "saved", model=give, inner="eager"))
    with pytest.raises(MHCError, match=r"MHC405.*OwnModel"):
        from_pretrained(tmp_path / "saved")


def test_an_instance_gets_the_folders_values(tmp_path: Path) -> None:
    model = converted(llama())
    model.save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    mine = llama()
    loaded = load(mine, tmp_path / "saved", inner="eager")
    assert loaded is mine
    assert not loaded.training
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("give", [chain, chain()], ids=["function", "module"])
def test_plain_modules(give: Any, tmp_path: Path) -> None:
    model = converted(chain())
    save(model, tmp_path / "saved")
    assert {p.suffix for p in (tmp_path / "saved").iterdir()} == {".json", ".safetensors"}
    assert_equal(model, load(give, tmp_path / "saved", inner="eager"))
    manifest = json.loads((tmp_path / "saved" / "mhc.json").read_text())
    assert manifest["architecture"] == type(model).__name__
    assert set(manifest["sha256"]) == {p.name for p in (tmp_path / "saved").glob("*.safetensors")}
    save(model, tmp_path / "saved")
    assert_equal(model, load(chain(), tmp_path / "saved", inner="eager"))


def test_tied_and_shared_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mhc_compile.checkpoint.saving.SHARD_BYTES", 5_000)
    model = converted(Tied())
    save(model, tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 3
    loaded: Any = load(Tied, tmp_path / "saved", inner="eager")
    assert loaded.first.weight is loaded.second.weight
    assert_equal(model, loaded)


def test_saving_a_model_of_transformers_is_save_pretrained(tmp_path: Path) -> None:
    model = converted(llama())
    save(model, tmp_path / "saved")
    loaded = from_pretrained(tmp_path / "saved", inner="eager")
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())


class Extra(Tied):
    def get_extra_state(self) -> Any:
        return {"words": 3}

    def set_extra_state(self, state: Any) -> None:
        """Nothing."""


class Less(Tied):
    def __init__(self) -> None:
        super().__init__()
        del self.left


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(MHCError, match="MHC410"):
        save(chain(), tmp_path / "saved")
    with pytest.raises(MHCError, match=r"MHC204.*_extra_state"):
        save(converted(Extra()), tmp_path / "saved")
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    save(converted(Tied()), tmp_path / "saved")
    with torch.device("meta"):
        hollow = chain()
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (Less, {}, r"MHC404.*unexpected: left"),
        (chain, {}, r"MHC404.*missing"),
        (hollow, {}, r"MHC204.*meta device"),
        (Tied, {"dtype": torch.float32}, r"MHC204.*dtype"),
        (3, {}, r"MHC204.*int"),
        (lambda: 3, {}, r"MHC204.*int"),
        (converted(Tied()), {}, "MHC208"),
        (None, {}, r"(?s)MHC402.*mhc_compile\.load"),
    ]
    for model, options, text in wrong:
        with pytest.raises(MHCError, match=text):
            from_pretrained(tmp_path / "saved", model=model, **options)
    with pytest.raises(MHCError, match="MHC402"):
        convert_folder(tmp_path / "saved", tmp_path / "back", to="residual")


def test_a_refused_module_is_left_as_it_was(tmp_path: Path) -> None:
    save(converted(Tied()), tmp_path / "saved")
    model = Less()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(MHCError, match="MHC404"):
        load(model, tmp_path / "saved")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    save(converted(chain()), tmp_path / "saved")
    path = tmp_path / "saved" / "model.mhc-00001-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(MHCError, match=r"MHC414.*sha256"):
        load(chain, tmp_path / "saved")
    loaded = load(chain, tmp_path / "saved", verify=False)
    assert all(torch.equal(t, loaded.state_dict()[name]) or t.isnan().any() for name, t in load_file(path).items())


WITHOUT_TRANSFORMERS = """
import sys, torch, mhc_compile
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x
x = torch.randn(2, 4, 8)
model = mhc_compile.convert(Net(), x, inner="eager")
mhc_compile.save(model, sys.argv[1])
assert torch.equal(model(x), mhc_compile.load(Net, sys.argv[1], inner="eager")(x))
assert "transformers" not in sys.modules
"""


def test_plain_modules_need_no_transformers(tmp_path: Path) -> None:
    # A process of its own: this one has imported it.
    subprocess.run([sys.executable, "-c", WITHOUT_TRANSFORMERS, str(tmp_path / "saved")], check=True)
    assert (tmp_path / "saved" / "mhc.json").is_file()
