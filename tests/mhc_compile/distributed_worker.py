"""One rank of a two-process job: `python distributed_worker.py CHECK RANK STORE`. It prints what the test asks for."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mhc_compile import MHCError, Probes, convert, parameter_groups, stream_parameters

# With PYTHONSAFEPATH a script does not find what lies beside it.
sys.path.insert(0, str(Path(__file__).parent))

from tiny_models import chain, code_of, disagree, gradients, ids, loss_of, shake

WORLD = 2


def converted(**options: Any) -> nn.Module:
    model = convert(chain(), ids(), **({"inner": "eager"} | options))
    shake(model)
    return model


def expected() -> dict[str, torch.Tensor]:
    """The mean gradient of the ranks' batches, computed in one process."""
    model = converted()
    parts = [gradients(model, rank) for rank in range(WORLD)]
    return {name: sum(part[name] for part in parts) / WORLD for name in parts[0]}


def same_as_one_process(model: nn.Module) -> str:
    wrapped = gradients(model, dist.get_rank())
    found = {name.replace("_orig_mod.", "").removeprefix("module."): g for name, g in wrapped.items()}
    wrong = disagree(found, expected(), 1e-5)
    return "same" if found and not wrong else f"differ: {wrong}"


def ddp_eager() -> str:
    return same_as_one_process(DistributedDataParallel(converted()))


def ddp_aot() -> str:
    return same_as_one_process(DistributedDataParallel(converted(inner="aot_eager")))


def ddp_probes() -> str:
    model = DistributedDataParallel(converted(inner="aot_eager"))
    probes = Probes(model, every=1)
    with probes.step():
        found = same_as_one_process(model)
    (sample,) = probes.samples
    assert (sample.owner, sample.tokens, sample.sites) == ("", 16, ("layers.0#0", "layers.1#0"))
    assert sample.values["branch_gradient"].min() > 0
    return found


def ddp_compiled() -> str:
    torch._dynamo.config.optimize_ddp = False
    return same_as_one_process(
        torch.compile(DistributedDataParallel(converted()), backend="mhc", options={"inner": "aot_eager"})
    )


def compiled_in_ddp() -> str:
    torch._dynamo.config.optimize_ddp = False
    inner = torch.compile(converted(), backend="mhc", options={"inner": "aot_eager"})
    return same_as_one_process(DistributedDataParallel(inner))


def ddp_no_sync() -> str:
    model = DistributedDataParallel(converted())
    with model.no_sync():
        loss_of(model, dist.get_rank()).backward()
    loss_of(model, dist.get_rank()).backward()
    found = {name.removeprefix("module."): 0.5 * p.grad for name, p in model.named_parameters()}
    wrong = disagree(found, expected(), 1e-5)
    return "same" if not wrong else f"differ: {wrong}"


def ddp_split_graphs() -> str:
    model = torch.compile(DistributedDataParallel(converted()), backend="mhc", options={"inner": "eager"})
    return refusal(lambda: model(ids()))


def ddp_unconverted() -> str:
    torch._dynamo.config.optimize_ddp = False
    wrapped = DistributedDataParallel(chain())
    codes = [refusal(lambda: torch.compile(wrapped, backend="mhc", options={"inner": "eager"})(ids()))]
    codes.append(refusal(lambda: convert(wrapped, ids())))
    assert not stream_parameters(wrapped)
    return " ".join(codes)


def ddp_trains() -> str:
    model = DistributedDataParallel(converted(inner="aot_eager"))
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2)
    for step in range(3):
        loss_of(model, 2 * step + dist.get_rank()).backward()
        optimizer.step()
        optimizer.zero_grad()
    total = torch.stack([p.detach().double().sum() for p in stream_parameters(model).values()])
    other = [torch.empty_like(total) for _ in range(WORLD)]
    dist.all_gather(other, total)
    return "same" if torch.equal(other[0], other[1]) else "differ"


def fsdp2() -> str:
    model = converted(inner="aot_eager")
    fully_shard(model)
    loss_of(model, dist.get_rank()).backward()
    found = {}
    for name, p in model.named_parameters():
        assert isinstance(p.grad, DTensor)
        found[name] = p.grad.full_tensor()
    wrong = disagree(found, expected(), 1e-5)
    return "same" if not wrong else f"differ: {wrong}"


def fsdp2_layers(inner: str = "eager") -> str:
    model = converted(inner=inner)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    with torch.no_grad():
        model(ids())
    assert all(isinstance(p, DTensor) for p in model.layers.parameters())  # sharded again
    for _ in range(2):
        model.zero_grad()
        loss_of(model, dist.get_rank()).backward()
        assert all(isinstance(p, DTensor) for p in model.layers.parameters())
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    wrong = disagree(found, expected(), 1e-5)
    return "same" if not wrong else f"differ: {wrong}"


def fsdp2_layers_aot() -> str:
    return fsdp2_layers("aot_eager")


def fsdp2_layers_train() -> str:
    torch.manual_seed(0)
    model, whole = converted(), converted()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2) for m in (model, whole)]
    for step in range(3):
        loss_of(model, 2 * step + dist.get_rank()).backward()
        (sum(loss_of(whole, 2 * step + rank) for rank in range(WORLD)) / WORLD).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    found = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    wrong = disagree(found, {name: p.detach() for name, p in whole.named_parameters()}, 1e-5)
    return "same" if not wrong else f"differ: {wrong}"


def fsdp2_layers_alone() -> str:
    model = converted()
    for layer in model.layers:
        fully_shard(layer)
    codes = [refusal(lambda: model(ids()))]
    model = converted()
    for layer in model.layers:
        fully_shard(layer, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    fully_shard(model)
    codes.append(refusal(lambda: model(ids())))
    return " ".join(codes)


def fsdp1() -> str:
    wrapped = FullyShardedDataParallel(converted(), device_id=torch.device("cpu"), use_orig_params=True)
    loss_of(wrapped, dist.get_rank()).backward()
    with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
        found = {name.replace("_fsdp_wrapped_module.", ""): p.grad.clone() for name, p in wrapped.named_parameters()}
    wrong = disagree(found, expected(), 1e-5)
    return "same" if not wrong else f"differ: {wrong}"


def fsdp1_flat() -> str:
    wrapped = FullyShardedDataParallel(converted(), device_id=torch.device("cpu"))
    return refusal(lambda: wrapped(ids()))


def fsdp_unconverted() -> str:
    wrapped = FullyShardedDataParallel(chain(), device_id=torch.device("cpu"), use_orig_params=True)
    codes = [refusal(lambda: torch.compile(wrapped, backend="mhc", options={"inner": "eager"})(ids()))]
    codes.append(refusal(lambda: convert(wrapped, ids())))
    sharded = fully_shard(chain())
    codes.append(refusal(lambda: torch.compile(sharded, backend="mhc", options={"inner": "eager"})(ids())))
    codes.append(refusal(lambda: convert(sharded, ids())))
    return " ".join(codes)


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except (MHCError, torch._dynamo.exc.BackendCompilerFailed) as error:
        return code_of(error)
    return "no refusal"


CHECKS = {
    f.__name__: f
    for f in (
        ddp_eager, ddp_aot, ddp_probes, ddp_compiled, compiled_in_ddp, ddp_no_sync, ddp_split_graphs, ddp_unconverted,
        ddp_trains, fsdp2, fsdp2_layers, fsdp2_layers_aot, fsdp2_layers_train, fsdp2_layers_alone, fsdp1, fsdp1_flat,
        fsdp_unconverted,
    )
}  # fmt: skip


if __name__ == "__main__":
    checks, rank, store = sys.argv[1].split(","), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    for check in checks:
        torch._dynamo.reset()
        with torch._dynamo.config.patch(optimize_ddp=True):
            print(f"{check}: {CHECKS[check]()}", flush=True)
        dist.barrier()
    dist.destroy_process_group()
