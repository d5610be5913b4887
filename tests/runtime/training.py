"""Training in several processes and in one without any of the runtime, to be compared; started by file path."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import mhc_compile
from mhc_compile.runtime import optimizer
from mhc_compile.runtime.engine import Engine, build_engine
from mhc_compile.runtime.launch import launch
from mhc_compile.runtime.recipe import Recipe, parse_recipe

VOCAB, LENGTH = 64, 8
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
"""A small DeepSeek-V3's attention and experts."""
TIMES = ("seconds", "tokens_per_second", "tokens_per_second_per_device", "mfu", "peak_memory")
"""Figures of a run that differ from one time to the next."""
Result = tuple[list[float], list[float], dict[str, Tensor]]
"""The losses and the gradients' norms of all steps, and the trained parameters."""


def model_folder(folder: Path, **config: Any) -> Path:
    """A converted Llama, or a Mixtral or DeepSeek-V3, with random streams and a tied head, on the disk."""
    torch.manual_seed(0)
    fields = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0,
        "initializer_range": 0.1, "tie_word_embeddings": True,
    }  # fmt: skip
    extra = {name: config.pop(name) for name in ("engram", "ultramem", "streams", "form") if name in config}
    start = {"engram_start": "paper"} if "engram" in extra else {}
    if "num_local_experts" in config:
        model: Any = MixtralForCausalLM(MixtralConfig(**(fields | config)))
    elif "n_routed_experts" in config:
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**(fields | LATENT | config)))
    else:
        model = LlamaForCausalLM(LlamaConfig(**(fields | config)))
    mhc_compile.convert(model, scratch=True, start="paper", inner="eager", **extra, **start)
    for name, p in mhc_compile.stream_parameters(model).items():
        if name.endswith(".projection"):  # the values found make a difference from the first step on
            nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    return folder


def recipe(folder: Path, *, steps: int = 4, **tables: dict[str, Any]) -> Recipe:
    content: dict[str, Any] = {
        "model": {"folder": str(folder), "inner": "aot_eager"},
        "data": {"folder": "none", "sequence": LENGTH},
        "train": {"steps": steps, "batch": 8, "microbatch": 1, "lr": 1e-2, "warmup": 2, "clip": 0.5},
        "parallel": {"timeout": 60},
        "checkpoint": {"folder": "none", "every": 0},
    }
    for name, fields in tables.items():
        content[name] = content.get(name, {}) | fields
    return parse_recipe(content, folder)


def batch(step: int, size: int = 8) -> dict[str, Tensor]:
    """The whole batch of a step."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, VOCAB, (size, LENGTH + 1), generator=generator)
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def plain(recipe: Recipe) -> Result:
    """The same training by a loop of a few lines in this process, eagerly, without pipeline, ranks or microbatches."""
    model = mhc_compile.from_pretrained(recipe.model.folder, inner="eager").train()
    t = recipe.train
    groups = mhc_compile.parameter_groups(model, weight_decay=t.weight_decay, lr=t.lr, steps=t.steps)
    adamw = mhc_compile.TableAdamW(groups, betas=t.betas)
    gates = counted_gates(model)
    losses, norms = [], []
    for step in range(1, t.steps + 1):
        given = batch(step, t.batch)
        logits = model(given["input_ids"]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), given["labels"].flatten())
        if weight := getattr(model.config, "router_aux_loss_coef", 0.0):
            parts = given["input_ids"].split(t.microbatch)
            loss = loss + weight * torch.stack([model(part).aux_loss for part in parts]).mean()
        loss.backward()
        norms.append(float(clip(model, t.clip)))
        for group in adamw.param_groups:
            group["lr"] = group["ratio"] * optimizer.learning_rate(step, t)
        adamw.step()
        adamw.zero_grad()
        for gate in gates:
            gate.e_score_correction_bias += t.balance_rate * torch.sign(gate.load.mean() - gate.load)
            gate.load.zero_()
        losses.append(loss.item())
    biases = {name: b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()} | biases


def counted_gates(model: nn.Module) -> list[Any]:
    """DeepSeek-V3's routers, which from now on add the tokens of each expert to their buffer `load`."""
    gates: list[Any] = [m for m in model.modules() if hasattr(m, "e_score_correction_bias")]
    for gate in gates:
        gate.register_buffer("load", torch.zeros_like(gate.e_score_correction_bias), persistent=False)
        gate.register_forward_hook(_count)
    return gates


def _count(gate: Any, _: Any, out: tuple[Tensor, Tensor, Tensor]) -> None:
    with torch.no_grad():
        gate.load += F.one_hot(out[2], len(gate.load)).sum((0, 1))


def clip(model: nn.Module, most: float) -> Tensor:
    """Clip all gradients of `model` together, those of tables too; returns the norm before."""
    from mhc_compile.memory.tables import MemoryTable

    found = [p.grad for p in model.parameters() if p.grad is not None]
    found += [m.gradient.values for m in model.modules() if isinstance(m, MemoryTable) and m.gradient is not None]
    norm = torch.stack([g.norm() for g in found]).norm()
    for g in found:
        g.mul_(min(1.0, most / (float(norm) + 1e-6)))
    return norm


def spread(recipes: dict[str, Recipe], answers: Path) -> dict[str, Result]:
    """Train by every recipe, one after the other, in as many processes as the largest needs."""
    world = max(r.parallel.world for r in recipes.values())
    # As torchrun does: a store for all of them, at a port that the system chooses.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # Forked from a process that has imported everything.
    mp.get_context("forkserver").set_forkserver_preload(["mhc_compile.runtime.engine", "transformers"])
    mp.start_processes(_rank, (recipes, store.port, answers), nprocs=world, start_method="forkserver")
    found: dict[str, Result] = {}
    for name, r in recipes.items():
        parts = [torch.load(answers / f"{name}-{rank}.pt") for rank in range(r.parallel.world)]
        for part in parts:
            assert part[:2] == parts[0][:2], f"{name}: ranks know different losses"
        found[name] = (*parts[0][:2], {k: v for part in parts for k, v in part[2].items()})
    return found


def _rank(rank: int, recipes: dict[str, Recipe], port: int, answers: Path) -> None:
    torch.set_num_threads(1)
    optimizer.BUCKET = 20_000  # bytes; most gradients then share a message, and some have one of their own
    for name, r in recipes.items():
        if rank >= r.parallel.world:
            continue
        os.environ |= environment(rank, r.parallel.world, port)
        try:
            torch.save(_train(r), answers / f"{name}-{rank}.pt")
        except BaseException:  # raised again: a rank's own traceback is otherwise lost
            print(f"{name}, rank {rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            raise


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun sets for a rank."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    return {k: str(v) for k, v in {**where, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}.items()}


def _train(recipe: Recipe) -> Result:
    losses, norms = [], []
    with launch(recipe.parallel) as world:
        engine = build_engine(recipe, world)
        engine.compile()
        share = recipe.train.batch // recipe.parallel.replicas
        for step in range(1, recipe.train.steps + 1):
            rows = slice(world.replica * share, (world.replica + 1) * share)
            found = engine.gradients({k: v[rows] for k, v in batch(step, recipe.train.batch).items()}, step)
            engine.update(step, found)
            losses.append(found.loss)
            norms.append(found.norm)
            assert not kept(engine), "messages of a step that is over"
        return losses, norms, _weights(engine)


def kept(engine: Engine) -> int:
    """Values of received messages that torch's stages hold."""
    pipeline: Any = engine.pipeline.schedule
    stages = [pipeline._stage] if hasattr(pipeline, "_stage") else pipeline._stages
    held = [infos for s in stages for of in (s.args_recv_info, s.grad_recv_info) for infos in of.values()]
    return sum(b.numel() for infos in held for info in infos if (b := getattr(info, "buffer", None)) is not None)


def _weights(engine: Engine) -> dict[str, Tensor]:
    """What this rank's stages hold, shards put together; of spread tables its own rows, by where they begin."""
    found: dict[str, Tensor] = {}
    for stage in engine.stages:
        rows = {f"{name}.weight": t for name, t in stage.tables.items()}
        for name, p in stage.named_parameters():
            whole = p.full_tensor() if isinstance(p, DTensor) else p
            begin = getattr(rows.get(name), "begin", 0)
            found[f"{name}[{begin}:]" if begin else name] = whole.detach()
    return found
