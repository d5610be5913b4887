"""The benches of compile times and steps: no figure of another model, and plain calls beside compiled ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny_models import llama, shake

from mhc_compile import convert
from mhc_compile.bench import compile_time
from mhc_compile.cli import main
from mhc_compile.diagnostics import MHCError


def test_no_compile_time_of_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_time, "_compile", lambda model, ids, _: (1.0, model(ids, use_cache=False).logits))
    models = {compile_time.OURS: convert(llama(), inner="eager"), "residual": llama()}
    assert [row.ratio for row in compile_time._rows(Console(quiet=True), "", models, 2)] == [1, 1]
    shake(models[compile_time.OURS])
    with pytest.raises(MHCError, match="MHC110"):
        compile_time._rows(Console(quiet=True), "", models, 1)


@pytest.mark.slow
def test_compile_time_and_steps_are_measured(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    assert main(["bench", "compile-time", "--quick", "--json", str(file)]) == 0
    _, of_llama = json.loads(file.read_text())["groups"].values()
    assert [row["name"] for row in of_llama] == [compile_time.OURS, "residual, Inductor"]
    assert main(["bench", "step", "--quick", "--json", str(file)]) == 0
    compiled, plain = json.loads(file.read_text())["groups"].values()
    assert {row["name"] for row in plain} < {row["name"] for row in compiled}
    assert all(row["error"] <= 1e-4 for row in (*compiled, *plain))
