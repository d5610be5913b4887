"""Golden files: what a graph looks like before and after a pass, as text that a reader can check."""

from pathlib import Path

import torch
from torch.fx import GraphModule, Node

from mhc_compile.passes.base import call_nodes, is_tensor, module_path, op_name, value
from mhc_compile.passes.results import ResidualStream

FOLDER = Path(__file__).parent / "golden"


def golden_path(test_file: Path, test: str) -> Path:
    """`golden/normalize-in_place_add.txt` for `test_in_place_add` in `test_normalize.py`."""
    return FOLDER / f"{test_file.stem.removeprefix('test_')}-{test.removeprefix('test_')}.txt"


def check_golden(path: Path, text: str, *, accept: bool) -> None:
    """Assert that the file at `path` holds `text`, or put it there."""
    text = text.strip() + "\n"
    if accept:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return
    assert path.exists(), f"no golden file {path.name}: look at the text below and run pytest --accept\n\n{text}"
    assert text == path.read_text(), f"{path.name} differs: if the new text is right, run pytest --accept"


class Printer:
    """Prints one graph, its computing nodes numbered, its inputs by their place in the module."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.names: dict[Node, str] = {}
        for node in gm.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self.names[node] = short(str(node.target))
        for i, node in enumerate(call_nodes(gm)):
            self.names[node] = f"%{i}"

    def __str__(self) -> str:
        lines = [f"{self.names[n]} = {self.call(n)}{form(n)}{where(n)}" for n in call_nodes(self.gm)]
        last = next(n for n in self.gm.graph.nodes if n.op == "output")
        return "\n".join([*lines, f"return {self.argument(last.args[0])}"])

    def call(self, node: Node) -> str:
        arguments = [self.argument(a) for a in node.args]
        arguments += [f"{k}={self.argument(v)}" for k, v in node.kwargs.items()]
        if node.op == "call_method":
            return f"{arguments[0]}.{node.target}({', '.join(arguments[1:])})"
        return f"{function(node)}({', '.join(arguments)})"

    def argument(self, a: object) -> str:
        if isinstance(a, Node):
            return self.names[a]
        if isinstance(a, (tuple, list, torch.Size)):
            return f"[{', '.join(self.argument(x) for x in a)}]"
        if isinstance(a, str) and a.startswith("streams="):
            return f"'{a.split(' ')[0]} {a.split(' ')[-1]}'"
        if isinstance(a, (torch.dtype, torch.device)):
            return str(a).removeprefix("torch.")
        return repr(a)


def short(target: str) -> str:
    """A placeholder's name without Dynamo's spelling of the module path."""
    for part in ("L_self_", "L_args_0_", "modules_", "parameters_", "buffers_", "L_"):
        target = target.replace(part, "")
    return target.strip("_")


def function(node: Node) -> str:
    """`add` for the operator, `torch.add` for the function, `mhc.expand` for an op of the dialect."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{op_name(node)}"
    home = getattr(target, "__module__", None) or "torch"
    return op_name(node) if home == "_operator" else f"{home.split('.')[0].lstrip('_')}.{op_name(node)}"


def form(node: Node) -> str:
    """The value's shape: `: [2, 3, 8]`, with its dtype where it is not float64."""
    if not is_tensor(node):
        return ""
    v = value(node)
    dtype = "" if v.dtype == torch.float64 else f" {str(v.dtype).removeprefix('torch.')}"
    return f": {list(v.shape)}{dtype}"


def where(node: Node) -> str:
    return f"  @{path}" if (path := module_path(node)) else ""


def graph_text(gm: GraphModule) -> str:
    """The graph, one computing node a line."""
    return str(Printer(gm))


def streams_text(gm: GraphModule, streams: list[ResidualStream]) -> str:
    """What the analysis found, in the numbers of `graph_text`."""
    names = Printer(gm).names
    lines = []
    for s in streams:
        lines.append(f"stream of {s.owner or '(root)'} from {names[s.entry]} to {names[s.exit]}")
        for site in s.sites:
            carried = "".join(f" -> {names[n]}" for n in site.chain)
            lines.append(f"  {site.name}: {names[site.add]} = {names[site.previous]}{carried}")
            lines[-1] += "".join(f" + {names[b]}" for b in site.branches)
            for v, readers in site.reads.items():
                lines.append(f"    reads {names[v]} in {', '.join(names[r] for r in readers) or 'the add'}")
    return "\n".join(lines)
