"""Convert, train, generate with, save and load a tiny model."""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mhc_compile
from mhc_compile.diagnostics import MHCError, MHCWarning
from mhc_compile.doctor.machine import Check

STEPS = ("convert", "step", "generate", "save", "load")
_REPORT = "report it with this whole output"


class WrongResultError(Exception):
    """A step ended with a wrong result."""


class Trial:
    """A plain residual model of 2 layers; each step returns a description of its result, or raises."""

    def __init__(self, folder: Path) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.folder = folder
        torch.manual_seed(0)
        self.model: Any = self.make().to(self.device).eval()
        self.ids = torch.randint(0, 64, (2, 8), device=self.device)

    def make(self) -> nn.Module:
        """Return the residual model."""
        return _Plain()

    def logits(self) -> Tensor:
        """Return the model's logits."""
        with torch.no_grad():
            return _logits(self.model(self.ids))

    def convert(self) -> str:
        """Convert to 4 streams: the logits stay what they were."""
        before = self.logits()
        mhc_compile.convert(self.model, self.ids, streams=4, inner="eager")
        change = float((self.logits() - before).abs().max() / before.abs().max())
        if not change < 1e-5:
            raise WrongResultError(f"the conversion changed the logits by {change:.1e} of the largest")
        return f"4 streams, {len(mhc_compile.stream_parameters(self.model))} new parameters, logits within {change:.0e}"

    def step(self) -> str:
        """Train one compiled step: every stream gets a gradient."""
        compiled = torch.compile(self.model, backend="mhc", options={"inner": "inductor"})
        parameters = mhc_compile.stream_parameters(self.model)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        losses = []
        for _ in range(2):
            logits = _logits(compiled(self.ids))
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten())
            loss.backward()
            if without := [n for n, p in parameters.items() if p.grad is None or not bool(p.grad.isfinite().all())]:
                raise WrongResultError(f"no finite gradient for {', '.join(without[:3])}")
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        if not losses[1] < losses[0]:
            raise WrongResultError(f"the loss went from {losses[0]:.4f} to {losses[1]:.4f}")
        return f"compiled on {self.device}, loss {losses[0]:.4f} to {losses[1]:.4f}"

    def generate(self) -> str:
        """Say that there is nothing to generate with."""
        return "not tried: transformers is not installed"

    def save(self) -> str:
        """Write a checkpoint folder."""
        mhc_compile.save(self.model, self.folder / "model")
        return f"{sum(file.stat().st_size for file in (self.folder / 'model').iterdir()):,} bytes"

    def loaded(self) -> nn.Module:
        """Return the model of the folder."""
        return mhc_compile.load(self.make, self.folder / "model", inner="eager")

    def load(self) -> str:
        """Load the folder: the logits are bit-equal."""
        before = self.logits()
        self.model = self.loaded().to(self.device)
        after = self.logits()
        if not torch.equal(after, before):
            raise WrongResultError(f"the loaded model's logits differ by {float((after - before).abs().max()):.1e}")
        return "logits bit-equal"


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


class LlamaTrial(Trial):
    """The same with a Llama of transformers, which also generates and is saved as a folder."""

    def make(self) -> nn.Module:
        """Return a Llama of 2 layers."""
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=64, bos_token_id=None, eos_token_id=None, **sizes))

    def generate(self) -> str:
        """Generate with a cache what is generated without one."""
        fixed: dict[str, Any] = {
            "max_new_tokens": 4,
            "do_sample": False,
            "pad_token_id": 0,
            "attention_mask": torch.ones_like(self.ids),
        }
        cached, plain = (self.model.generate(self.ids, use_cache=use_cache, **fixed) for use_cache in (True, False))
        if not torch.equal(cached, plain):
            raise WrongResultError("with a cache other tokens come out than without")
        return "4 tokens, the same with and without a cache"

    def loaded(self) -> nn.Module:
        """Return the model of the folder."""
        return mhc_compile.from_pretrained(self.folder / "model", inner="eager")


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU()) for _ in range(2))
        self.head = nn.Linear(32, 64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def selftest(folder: Path) -> Iterator[Check]:
    """Run each step in the empty `folder`; after one that fails, the others are not run."""
    trial: Trial | None = None
    failed = ""
    for name in STEPS:
        if failed:
            yield Check(name, "note", f"not run, as {failed} failed")
            continue
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("default", MHCWarning)
                trial = trial or _trial(folder)
                seen = getattr(trial, name)()
        except MHCError as error:
            failed = name
            yield Check(name, "FAIL", str(error), _REPORT)
        except Exception as error:  # whatever it is, its line is what the doctor is for
            failed = name
            yield Check(name, "FAIL", f"{type(error).__name__}: {str(error).strip()}", _REPORT)
        else:
            yield Check(name, "ok", f"{seen} ({time.perf_counter() - start:.1f} s)")


def _trial(folder: Path) -> Trial:
    """Return the trial for what is installed."""
    return (LlamaTrial if importlib.util.find_spec("transformers") else Trial)(folder)
