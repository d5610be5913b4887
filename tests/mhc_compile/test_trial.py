"""`mhc-compile trial`: forms of one model trained side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import llama
from transformers import GPT2Config, LlamaConfig, ViTConfig, ViTForImageClassification

from mhc_compile import MHCError
from mhc_compile.cli import main
from mhc_compile.trial.run import Arm

WORDS = "the quick brown fox jumps over the lazy dog and goes home again\n" * 200


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A configuration whose vocabulary is that of bytes."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=256, max_position_embeddings=32, **sizes)
    config.architectures = ["LlamaForCausalLM"]
    config.bos_token_id = config.eos_token_id = 0
    config.save_pretrained(tmp_path / "model")
    (tmp_path / "words.txt").write_text(WORDS)
    return tmp_path / "model"


def trial(model: Path, *more: str) -> int:
    flags = {
        "--data": str(model.parent / "words.txt"), "--steps": "8", "--batch": "2", "--length": "16",
        "--inner": "eager", "--lr": "1e-2", "--out": str(model.parent / "out"),
    }  # fmt: skip
    flags |= dict(zip(more[::2], more[1::2], strict=True))
    return main(["trial", str(model), *(word for flag in flags.items() for word in flag)])


def test_forms_start_alike_and_see_the_same_batches(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forms = ("residual", "mhc", "hc:streams=2:start=paper", "attnres")
    assert trial(model, "--forms", ",".join(forms), "--seeds", "2") == 0
    out = model.parent / "out"
    results = json.loads((out / "trial.json").read_text())["results"]
    assert [r["form"] for r in results] == list(forms)
    for seed in (0, 1):
        firsts = [r["losses"][seed][0] for r in results]
        assert firsts == pytest.approx([firsts[0]] * 4, rel=1e-4)
        assert len({r["losses"][seed][-1] for r in results}) == 4
        assert all(r["held_out"][seed] < firsts[0] for r in results)
    assert results[0]["losses"][0] != results[0]["losses"][1]
    assert results[0]["parameters"] < min(r["parameters"] for r in results[1:])
    assert all(r["saved"] > 10_000 for r in results)
    assert [len(r["gain"]) for r in results] == [0, 2, 2, 0]
    table = (out / "trial.md").read_text()
    assert table in capsys.readouterr().out
    assert (out / "trial.png").read_bytes()[:4] == b"\x89PNG"


def test_a_folder_with_weights_starts_from_them(model: Path) -> None:
    trained = llama()
    trained.save_pretrained(model.parent / "trained")
    (model.parent / "words.txt").write_bytes(bytes(range(64)) * 20)
    assert trial(model.parent / "trained", "--forms", "residual,denseformer", "--seeds", "2", "--length", "8") == 0
    a, b = json.loads((model.parent / "out" / "trial.json").read_text())["results"]
    assert a["losses"][0][0] == pytest.approx(b["losses"][0][0], rel=1e-4)


@pytest.mark.parametrize(
    ("more", "code", "status"),
    [
        (("--forms", "residual,nothing"), "MHC204", 2),
        (("--forms", "residual:streams=2"), "MHC204", 2),
        (("--forms", "mhc:start=never"), "MHC204", 2),
        (("--forms", "mhc:streams=99"), "MHC201", 2),
        (("--forms", "mhc,mhc"), "MHC204", 2),
        (("--length", "4000"), "MHC528", 3),
        (("--data", "nowhere.txt"), "MHC528", 3),
    ],
)
def test_what_is_refused(
    model: Path, more: tuple[str, ...], code: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trial(model, *more) == status
    assert capsys.readouterr().err.startswith(code)
    assert not (model.parent / "out").exists()


def test_tokens_that_the_model_does_not_have(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(model.parent / "small")
    assert trial(model.parent / "small") == 3
    assert "MHC528" in capsys.readouterr().err


def test_a_model_that_reads_no_tokens(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(model.parent / "vit")
    assert trial(model.parent / "vit") == 3
    assert "reads no tokens" in capsys.readouterr().err


def test_more_tokens_than_the_model_has_positions(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = GPT2Config(vocab_size=256, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(model.parent / "short")
    assert trial(model.parent / "short") == 3
    message = capsys.readouterr().err
    assert message.startswith("MHC528")
    assert "(2, 16) tokens: IndexError" in message
    assert not (model.parent / "out").exists()


def test_a_model_without_a_loss_of_its_own(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LlamaConfig.from_pretrained(model)
    config.architectures = ["LlamaModel"]
    config.save_pretrained(model.parent / "bare")
    assert trial(model.parent / "bare") == 3
    assert capsys.readouterr().err.startswith("MHC528")


@pytest.mark.parametrize("option", ["--steps", "--seeds", "--batch", "--length"])
def test_numbers_that_are_too_small_are_wrong_arguments(model: Path, option: str) -> None:
    assert trial(model, option, "0") == 2


def test_an_arm_without_options_is_the_residual_model() -> None:
    assert Arm.parse("residual").options is None
    assert Arm.parse("mhc:streams=2").options == {"form": "mhc", "streams": 2}
    with pytest.raises(MHCError, match="MHC204"):
        Arm.parse("mhc:streams")
