"""One rank of a Trainer over a sharded model: `python sharded_trainer.py FOLDER`, with torchrun's environment."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import mhc_compile
from mhc_compile.integrations.trainer import shard


def trained(folder: Path, *, batch: int, sharded: bool) -> Any:
    """The model after two steps, saved by all ranks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=64, tie_word_embeddings=True, **sizes))
    mhc_compile.convert(model, inner="eager")
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (8, 8))]
    arguments = TrainingArguments(
        str(folder / "run"), max_steps=2, save_strategy="no", per_device_train_batch_size=batch, learning_rate=1e-2,
        report_to=[], disable_tqdm=True, use_cpu=True, ddp_backend="gloo" if sharded else None,
    )  # fmt: skip
    if sharded:
        _ = arguments.device  # joins the other ranks
        shard(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    if sharded:
        assert all(isinstance(p, DTensor) for p in model.parameters())
    trainer.save_model(str(folder / "saved"))
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    trained(Path(sys.argv[1]), batch=2, sharded=True)
    dist.destroy_process_group()
