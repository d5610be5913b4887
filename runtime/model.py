"""The recipe's model without its weights: parameters that take no memory, buffers with their values, streams added."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mhc_compile.checkpoint.manifest import is_converted
from mhc_compile.checkpoint.shards import read_json
from mhc_compile.checkpoint.skeleton import model_class, quiet, skeleton, transformers_module, weightless
from mhc_compile.checkpoint.source import Checkpoint, open_checkpoint, refuse_config
from mhc_compile.checkpoint.tables import check_tokenizer, read_tokenizer
from mhc_compile.config import Options
from mhc_compile.conversion.memory import convert_streams
from mhc_compile.diagnostics import MHCError
from mhc_compile.kernels.start import start_of
from mhc_compile.loading import load_by_transformers, open_converted, read_streams
from mhc_compile.memory.request import requested
from mhc_compile.memory.tables import MemoryTable
from mhc_compile.owner import convert_owners
from mhc_compile.runtime.recipe import Recipe
from mhc_compile.runtime.recipe_tables import StreamsTable


def hollow_model(
    recipe: Recipe, device: torch.device | str = "cpu", change: Callable[[nn.Module], None] | None = None
) -> nn.Module:
    """Return the converted model of `recipe.model.folder`, to be captured on `device` and never run.

    Its parameters are fake tensors, in `recipe.model.dtype` but for those of the streams, which are float32; rows of
    tables are on the meta device. Buffers have their values, of the model's code or of the folder. `change` is called
    with a residual model before its streams are added.

    Raises MHC401 to 407 and 414 for a folder that cannot be read, MHC404 for weights that do not fit, MHC602 for
    tables of the recipe that a converted folder has settled or that need a memory where there is none, MHC222 for a
    tokenizer that is not the memory's, and what `convert` raises for a model that cannot be converted.
    """
    folder = Path(recipe.model.folder)
    dtype = torch.bfloat16 if recipe.model.dtype == "bfloat16" else torch.float32
    options = replace(recipe.options, recompute="off")  # which is for stages
    scratch = recipe.model.start == "scratch"
    if not scratch and is_converted(folder):
        model = _converted(recipe, folder, dtype, options, device)
    else:
        if scratch:
            model = _build(_config(folder), folder, dtype)
        else:
            checkpoint = open_checkpoint(folder)
            skeleton(checkpoint)  # refuses weights that do not fit
            model = _build(checkpoint.config, folder, dtype)
            _read_buffers(model, checkpoint)
        if change is not None:
            change(model)
        _hollow(model, device)
        streams = recipe.mhc or StreamsTable()
        start = start_of(streams.start, scratch=scratch)
        of_memory: Any = "paper" if scratch else "zero"
        read = functools.partial(read_tokenizer, folder)
        request = requested(
            model, recipe.memory, None, read, start=of_memory, ultramem=recipe.ultramem, tables_on="meta"
        )
        convert_streams(model, (), {}, streams.spec, replace(options, sites=streams.sites), request, start=start)
    if recipe.parallel.engram > 1 and not any(isinstance(m, MemoryTable) for m in model.modules()):
        detail = f"parallel.engram = {recipe.parallel.engram} without a table whose rows it could spread"
        raise MHCError("MHC602", detail, way_out="use parallel.data, or add [memory] or [ultramem]")
    return model


def _converted(
    recipe: Recipe, folder: Path, dtype: torch.dtype, options: Options, device: torch.device | str
) -> nn.Module:
    for name, table in (("mhc", recipe.mhc), ("memory", recipe.memory), ("ultramem", recipe.ultramem)):
        if table is not None:
            raise MHCError("MHC602", f"[{name}] for {folder}, which is converted", way_out=f"leave [{name}] out")
    checkpoint, manifest = open_converted(folder)
    streams = read_streams(checkpoint, manifest, options)
    model = _build(checkpoint.config, folder, dtype)
    _read_buffers(model, checkpoint)
    attention = next((p.options.attention for p in streams.values() if p.options.attention), None)
    if recipe.diffusion is None and attention is not None:
        detail = f"{folder} sees attention={attention!r}: next tokens are among what it sees"
        raise MHCError("MHC602", detail, way_out=f'add [diffusion] attention = "{attention}"')
    for owner, parameters in streams.items():
        check_tokenizer(folder, parameters)
        try:
            model.get_submodule(owner)
        except AttributeError as error:
            raise MHCError("MHC414", f"{folder}: {type(model).__name__} has no module {owner!r}") from error
        parameters._apply(lambda t: t if t.is_meta else t.to(device))  # rows of tables stay on the meta device
    convert_owners(_hollow(model, device), streams)
    return model


def _config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a folder without weights, with a class for it. Raises MHC401, 402, 405 or 406."""
    path = folder / "config.json"
    if not path.is_file():
        raise MHCError("MHC401", f"{path} is missing")
    config = read_json(path)
    refuse_config(path, config)
    if not config.get("architectures"):  # a configuration that no model has saved yet
        known = transformers_module().models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        name = known.get(config.get("model_type"))
        config["architectures"] = [name] if isinstance(name, str) else None
    return config


def _build(content: dict[str, Any], folder: Path, dtype: torch.dtype) -> nn.Module:
    """Return the residual model with parameters on the meta device and real buffers. Raises MHC405."""
    transformers = transformers_module()
    cls = model_class(content)
    with quiet(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            with torch.device("meta"):
                model: nn.Module = cls._from_config(config, dtype=dtype)
        except Exception as error:  # whatever a class in transformers raises for values it cannot work with
            raise MHCError("MHC405", f"{cls.__name__} cannot be built from {folder}: {error}") from error
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    precise = [re.compile(rf"(^|\.){part}(\.|$)") for part in strict]
    for name, p in model.named_parameters():
        if p.is_floating_point() and any(pattern.search(name) for pattern in precise):
            p.data = p.data.float()
    for name, module in model.named_modules():
        _fill_buffers(model, name, module)
    return model


def _fill_buffers(model: Any, path: str, module: nn.Module) -> None:
    """Give a module's buffers, which are on the meta device, their values by the model's code. Raises MHC622."""
    empty = {name: t for name, t in module._buffers.items() if t is not None and t.is_meta}
    if not empty:
        return
    starts: list[dict[str, Tensor]] = []
    for fill in (0, 1):  # a value that the model's code does not set differs
        module._buffers.update({name: torch.full(t.shape, fill, dtype=t.dtype) for name, t in empty.items()})
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model._init_weights(module)  # as transformers' from_pretrained does, which builds on the meta device, too
        starts.append({name: t for name, t in module._buffers.items() if name in empty and t is not None})
    for name, t in starts[0].items():
        if not torch.equal(t, starts[1][name]):
            way_out = "please report the model: its code gives this buffer no value when it is built without weights"
            raise MHCError("MHC622", f"nothing starts {path}.{name}", module=path, way_out=way_out)


def _read_buffers(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Set the buffers that checkpoints hold, also under names of old. Raises MHC402 where the folder lacks one."""
    kept = {name: t for name, t in model.state_dict(keep_vars=True).items() if not isinstance(t, nn.Parameter)}
    for name, values in stored_values(checkpoint, kept):
        kept.pop(name).copy_(values)
    if kept:
        raise MHCError("MHC402", f"{checkpoint.folder} holds no {next(iter(kept))}")


def stored_values(checkpoint: Checkpoint, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a checkpoint's files that are called `names`, one at a time.

    For those that transformers renames or merges (experts) it loads the whole model. What is nowhere is left out.
    """
    files = {name: shard.path for shard in checkpoint.shards for name in shard.tensors}
    renamed = [name for name in names if name not in files]
    for name in [name for name in names if name in files]:
        with safe_open(files[name], framework="pt") as file:
            yield name, file.get_tensor(name)
    if renamed:
        with quiet(transformers_module()):
            loaded, report = load_by_transformers(checkpoint, model_class(checkpoint.config), {})
        values = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
        yield from ((n, values[n].detach()) for n in renamed if n in values and n not in report["missing_keys"])


def _hollow(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Move the model from the meta device to `device`: parameters as fake tensors, buffers as they are.

    Tracing cannot mix real and meta tensors.
    """
    fakes = {  # a tied weight stays tied
        p: nn.Parameter(weightless(p, device), requires_grad=p.requires_grad) for p in model.parameters() if p.is_meta
    }
    for module in model.modules():
        module._parameters |= {name: fakes[p] for name, p in module._parameters.items() if p in fakes}
        module._buffers |= {name: t if t is None else t.to(device) for name, t in module._buffers.items()}
    return model
