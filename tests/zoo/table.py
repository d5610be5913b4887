"""Print the table of docs/models.md: every architecture of the zoo by the topology of its residual streams.

python tests/zoo/table.py            (captures and analyses; runs nothing)
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))


def topology_of(name: str) -> str | None:
    """The distinct topologies of all sites, or the code of the refusal; None where the model cannot be built."""
    import models

    import mhc_compile

    try:
        model, inputs = models.named(name)
    except Exception as error:  # an optional dependency, or a configuration that cannot be made tiny
        print(f"{name}: {type(error).__name__}: {error}"[:160], file=sys.stderr)
        return None
    try:
        found = mhc_compile.inspect(model, example_kwargs=inputs)
    except mhc_compile.MHCError as error:
        return f"refused: {error.code}"
    if found.refusal is not None:
        return f"refused: {found.refusal.code}"
    return " + ".join(sorted({site.topology for site in found.sites}))


def main() -> None:
    import models

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    groups: dict[str, list[str]] = defaultdict(list)
    for name in models.all_names():
        kind = topology_of(name)
        torch._dynamo.reset()
        if kind is not None:
            groups[kind].append(name)
            print(f"{name}: {kind}", file=sys.stderr, flush=True)
    print("| topology | architectures |\n|---|---|")
    for kind, names in sorted(groups.items(), key=lambda item: (item[0].startswith("refused"), -len(item[1]))):
        print(f"| {kind} | {len(names)}: {', '.join(names)} |")


if __name__ == "__main__":
    main()
