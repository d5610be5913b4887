"""One rank of a job that measures the streams of a pipeline: `python probe_worker.py RANK STORE`.

It prints, for every case, the largest difference to the figures of the unsplit model.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mhc_compile import MemorySettings, convert, stream_parameters
from mhc_compile.config import Options
from mhc_compile.measure import measure_streams
from mhc_compile.runtime.probes import named, stream_figures
from mhc_compile.runtime.program import capture_program
from mhc_compile.runtime.stage import Stage, build_stages, materialise_all

WORLD = 2
BATCH = {"input_ids": torch.randint(2, 64, (2, 8), generator=torch.Generator().manual_seed(0))}


def llama(**options: Any) -> nn.Module:
    """Three layers with dropout, converted, everything that conversion added off its start."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, pad_token_id=0, initializer_range=0.1, attention_dropout=0.5, tie_word_embeddings=True,
    )  # fmt: skip
    return shaken(convert(LlamaForCausalLM(config), inner="eager", **options))


def memory() -> nn.Module:
    """The same with a memory at two layers, whose tables are random."""
    settings = MemorySettings.preset("paper", rows_per_head=97, row_width=4, layers=(0, 2), compress=False)
    model = llama(engram=settings)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".engram." in name:
                p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    return model


def shaken(model: nn.Module) -> nn.Module:
    """The model with its streams apart."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in stream_parameters(model).values():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def stages_of(
    model: nn.Module, starts: list[int], indices: list[int], batch: dict[str, Tensor] = BATCH, **options: Any
) -> list[Stage]:
    """Stages in training mode with the model's weights."""
    program = capture_program(model, batch)
    stages = build_stages(program, starts, indices=indices, options=Options(inner="eager"), **options)
    materialise_all(stages)
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for stage in stages:
            for name, p in stage.named_parameters():
                p.copy_(weights[name])
            for name, table in stage.tables.items():
                table.load_state_dict(model.get_submodule(name).state_dict())
    return stages


def difference(found: dict[str, float], model: nn.Module, batch: dict[str, Tensor] = BATCH) -> float:
    """The largest relative difference to the figures of the unsplit model; infinite where names differ."""
    expected = named(measure_streams(model, batch))
    if list(found) != list(expected):
        return float("inf")
    return max(abs(found[name] - expected[name]) / abs(expected[name]) for name in expected)


def four_stages_in_a_v() -> float:
    model = memory()
    stages = stages_of(model, [1, 2, 4], [[0, 3], [1, 2]][dist.get_rank()])
    return difference(stream_figures(stages[::-1], BATCH, dist.group.WORLD), model)


def fsdp_replicas() -> float:
    model = llama()
    stages = stages_of(model, [3], [0, 1], units="blocks")
    mesh = init_device_mesh("cpu", (WORLD,))
    for stage in stages:
        for unit in stage.units:
            fully_shard(unit, mesh=mesh)
        fully_shard(stage, mesh=mesh)
    before = stream_figures(stages, BATCH)
    assert stream_figures(stages, BATCH) == before
    return difference(before, model)


CASES = (four_stages_in_a_v, fsdp_replicas)


def main(rank: int, store: str) -> None:
    """All cases in one process group."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    for case in CASES:
        torch._dynamo.reset()
        print(f"{case.__name__}: {case()}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
