"""`mhc-compile emit`: write the source of a Hugging Face model with the streams in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from mhc_compile.commands.arguments import Model, Streams
from mhc_compile.output import PLAIN, Output

FILE = "modeling_mhc.py"


def emit(
    model: Model,
    /,
    *,
    out: Annotated[Path, Parameter(help=f"The folder for {FILE}.")],
    streams: Streams = None,
    output: Output = PLAIN,
) -> int:
    """Write a model's source with the streams in it.

    Write the source of a Hugging Face model with n streams in it: the classes whose methods add to the residual stream,
    with these adds and reads rewritten and all else kept. The file needs PyTorch and transformers, not mhc-compile. It
    is written only if it computes what the converted model does, outputs and gradients, in float64.

    ```sh
    mhc-compile emit ./Llama-3.2-1B --out ./source
    mhc-compile emit ./config.json --out ./source --streams 2 --convention liger
    ```

    Then, in Python:

    ```python
    import modeling_mhc
    model = modeling_mhc.add_streams(AutoModelForCausalLM.from_pretrained("./Llama-3.2-1B"))
    ```
    """
    from mhc_compile.checkpoint.hub import local_folder
    from mhc_compile.configured import refuse_stream_options, weighted
    from mhc_compile.emitting import emit

    options: dict[str, Any] = {**(streams or {})}
    folder = local_folder(model)
    module, converted, _ = weighted(folder)
    if converted:
        refuse_stream_options(folder, options)
    file = out / FILE
    emit(module, file, **options)
    with output.printing():
        print(f"{file}: {len(file.read_text(encoding='utf-8').splitlines())} lines")
    output.write({"file": file})
    return 0
