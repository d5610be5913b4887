"""Write a checkpoint folder that transformers loads by itself: the emitted source beside the weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from mhc_compile.checkpoint.hub import local_folder
from mhc_compile.checkpoint.manifest import is_converted
from mhc_compile.checkpoint.shards import copy_file, read_shard, write_text
from mhc_compile.checkpoint.skeleton import auto_classes
from mhc_compile.checkpoint.source import CONFIG, companions, open_checkpoint, refuse_links_out
from mhc_compile.checkpoint.staging import check_target, staged
from mhc_compile.configured import refuse_stream_options, weighted
from mhc_compile.conversion.example_inputs import example_inputs
from mhc_compile.diagnostics import MHCError
from mhc_compile.emitting.emit import checked_source, one_spec, stream_overridden
from mhc_compile.emitting.file import Source, load_text
from mhc_compile.emitting.places import Key
from mhc_compile.emitting.vendor import refuse_others, vendored
from mhc_compile.kernels.spec import StreamSpec
from mhc_compile.overrides import StreamOverrides
from mhc_compile.owner import restore_owners
from mhc_compile.parameters import names, owners
from mhc_compile.versions import VERSION

Values = dict[Key, nn.Module]
"""By owner and site the module with the parameters that a converted model has."""
MODULE = "modeling_mhc"
CARD = "README.md"
CONFIGURATION = '''

class {name}({base}):
    """The configuration of the model with streams, which its own class would load without them."""

    model_type = "{model_type}"
    base_model_pp_plan = None  # between stages would go one stream, not all
'''
MODEL = '''

class {name}({base}):
    """`{base}`, under a name that no server takes for that of a model of its own, which has no streams."""

    config_class = {configuration}
'''
CARD_TEXT = """\
---
library_name: transformers
tags:
- mhc
- custom_code
---

# {root} with {streams} residual streams

Converted from `{source}` by mhc-compile {version}: every residual add of the
model is a site of manifold-constrained hyper-connections (mHC, arXiv 2512.24880), {sites} in all, with {parameters:,}
parameters of their own ({spec}). `{module}.py` is the model's source with these sites in it.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{target}", trust_remote_code=True)
```

It needs PyTorch and transformers alone. Without `trust_remote_code` it is not loaded: transformers' own class would
leave the streams out.
"""


def emit_folder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    spec: StreamSpec | None = None,
    vendor: bool = False,
    evaluation: Mapping[str, float] | None = None,
    **overrides: Unpack[StreamOverrides],
) -> Path:
    """Write `target`, which `AutoModel...from_pretrained(target, trust_remote_code=True)` loads without this package.

    It holds the weights of `source` under plain names, a folder that transformers saved or that `convert_folder` wrote,
    or the Hub id of one; the emitted source (`emit`); the configuration, the tokenizer and the like; and a model card,
    with a table of `evaluation` if it is given. With `vendor` it holds the files of the model's classes too, whole, so
    that a later version of transformers does not change them. `spec` and `overrides` describe the streams of a residual
    folder. The whole model is held in memory. `target` appears when everything in it is written, or not at all.

    Raises `MHCError` as `convert_folder` and `emit` do.
    """
    folder = local_folder(source)
    converted = is_converted(folder)
    checkpoint = open_checkpoint(folder, converted=converted)
    destination = check_target(Path(target), folder, size=checkpoint.size)
    taken, _ = companions(checkpoint)
    refuse_links_out(folder, [folder / relative for relative in taken])
    if converted:
        refuse_stream_options(folder, overrides)
    model: Any = weighted(folder)[0]
    stream = stream_overridden(spec, overrides)
    values: Values = {}
    if parameters := owners(model):
        stream = one_spec(parameters)
        values = {(owner, site): p.get_submodule(site) for owner, p in parameters.items() for site in p.sites}
        restore_owners(model)
    written = checked_source(copy.deepcopy(model), (), example_inputs(model), stream)
    try:
        with staged(destination) as staging:
            _save(model, written, values, stream, staging, vendor=vendor)
            for relative in taken:
                if relative.name not in (CONFIG, CARD) and not (staging / relative).exists():
                    (staging / relative).parent.mkdir(parents=True, exist_ok=True)
                    copy_file(folder / relative, staging / relative)
            write_text(staging / CARD, _card(model, written, stream, folder.name, destination.name, evaluation or {}))
    except OSError as error:
        raise MHCError("MHC413", str(error)) from error
    return destination


def _save(model: Any, source: Source, values: Values, spec: StreamSpec, folder: Path, *, vendor: bool) -> None:
    """Write the source, the configuration and the weights, with the values that the sites have already."""
    configuration, text = _text(model, source)
    written, files = vendored(model, text) if vendor else (text, {})
    files[f"{MODULE}.py"] = written
    module = load_text(text, MODULE)
    named = {"model_type": model.config.model_type, "architectures": [type(model).__name__]}
    places = {"AutoConfig": configuration} | ({"AutoModel": _own(source.base)} if source.base else {})
    places |= dict.fromkeys(auto_classes(named), _own(source.root))
    module.add_streams(model)
    model.__class__ = getattr(module, _own(source.root))
    with torch.no_grad():
        for key, of_site in values.items():
            for parameter, value in of_site.named_parameters():
                model.get_parameter(f"{source.sites[key]}.{parameter}").copy_(value)
    model.config = getattr(module, configuration).from_dict(model.config.to_dict())
    model.config.auto_map = {auto: f"{MODULE}.{cls}" for auto, cls in places.items()}
    model.config.mhc = {"spec": str(spec), "version": VERSION}
    # Under the names that the model has in memory: the new kind of configuration has no other layout to translate from.
    model.save_pretrained(folder, save_original_format=False)
    refuse_missing(model, folder)
    if vendor:
        refuse_others(model, files, MODULE, _own(source.root), example_inputs(model))
    for name, content in files.items():
        write_text(folder / name, content)


def refuse_missing(model: nn.Module, folder: Path) -> None:
    """Raise MHC404 where the folder lacks a weight of the model, which transformers would draw at random."""
    stored = {name for file in folder.glob("*.safetensors") for name in read_shard(file).tensors}
    tensors = model.state_dict()
    present = {tensors[name].data_ptr() for name in stored & tensors.keys()}  # tied weights are stored once
    if missing := [name for name, t in tensors.items() if name not in stored and t.data_ptr() not in present]:
        raise MHCError("MHC404", f"transformers saved no {names(missing)}")


def _text(model: Any, source: Source) -> tuple[str, str]:
    """Return the name of a configuration class of the folder's own, and the source with it and with models of it."""
    cls = type(model.config)
    name, base = _own(cls.__name__), f"_{cls.__name__}"
    text = CONFIGURATION.format(name=name, base=base, model_type=f"{cls.model_type}_mhc")
    for known in filter(None, (source.base, source.root)):
        text += MODEL.format(name=_own(known), base=known, configuration=name)
    # At the end of the imports.
    begin, end = source.text.split("\nSTREAMS = ", 1)
    imported = f"from {cls.__module__} import {cls.__name__} as {base}\n"
    return name, f"{begin}{imported}\nSTREAMS = {end.rstrip()}\n{text}"


def _own(name: str) -> str:
    """Return the name of a class that only the folder has."""
    return f"MHC{name}"


def _card(
    model: Any, source: Source, spec: StreamSpec, folder: str, target: str, evaluation: Mapping[str, float]
) -> str:
    added = sum(p.numel() for path in source.sites.values() for p in model.get_submodule(path).parameters())
    text = CARD_TEXT.format(
        root=source.root, streams=spec.streams, source=folder, version=VERSION, sites=len(source.sites),
        parameters=added, spec=spec, module=MODULE, target=target,
    )  # fmt: skip
    rows = "".join(f"| {name} | {value:g} |\n" for name, value in evaluation.items())
    return text + (f"\n## Evaluation\n\n| | |\n|---|---|\n{rows}" if rows else "")
