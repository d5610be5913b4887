"""Every error and warning of this package: one table of codes, one exception, one warning.

This module imports nothing of ours, so every room of the house may import it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass


@dataclass(frozen=True)
class Diagnostic:
    """One row of the table: what the code means and what a user can do about it."""

    title: str
    way_out: str


# 1xx: the graph, 2xx: parameters and configuration, 3xx: the backend, 4xx: checkpoint folders, 5xx: export and tools,
# 6xx: training and plans.
TABLE: dict[str, Diagnostic] = {
    "MHC101": Diagnostic(
        "no residual stream",
        "the model has no chain `x + branch(x)` from its input to its output; run `mhc-compile inspect` to see how far "
        "the stream was followed",
    ),
    "MHC102": Diagnostic(
        "two candidate streams",
        "the stream forks into two chains; convert the submodule that holds the one you mean",
    ),
    "MHC103": Diagnostic(
        "the stream was lost",
        "layers with parameters lie between the input and the output that no site covers; please report the model, "
        "or convert the submodule whose layers are regular",
    ),
    "MHC104": Diagnostic(
        "graph break inside the stream",
        "make the forward capturable in one graph (`torch.compile(model, fullgraph=True)` names the break)",
    ),
    "MHC105": Diagnostic(
        "shapes change along the stream",
        "every site of one stream must add tensors of one shape; hierarchical models need one stream a stage",
    ),
    "MHC106": Diagnostic(
        "a stream value is mutated in place",
        "replace the in-place operation by its out-of-place form",
    ),
    "MHC107": Diagnostic(
        "already multi-stream",
        "this model carries several residual streams of its own; use it as it is: "
        'torch.compile(model, backend="mhc") fuses the hyper-connections that it recognises',
    ),
    "MHC108": Diagnostic(
        "an operation on the stream has no n-stream form",
        "move the operation into a branch, or before the first or after the last layer",
    ),
    "MHC110": Diagnostic(
        "a pass changed the results",
        "this is a mistake of ours: please report the model and the text above",
    ),
    "MHC201": Diagnostic("streams out of range", "choose an integer number of streams from 1 to 8"),
    "MHC202": Diagnostic("unknown convention", "use one of the names listed"),
    "MHC203": Diagnostic(
        "manifold not possible", "use one of the manifolds listed, with a number of streams it allows"
    ),
    "MHC204": Diagnostic("invalid option", "see `mhc_compile.StreamSpec` for the fields and their values"),
    "MHC205": Diagnostic(
        "no conversion between these conventions",
        "keep the convention the checkpoint was trained with, or train the new one from its function-preserving start",
    ),
    "MHC206": Diagnostic(
        "sites and stream parameters do not match",
        "the model's structure changed since it was converted, or its forward breaks into several graphs; convert the "
        "original model again",
    ),
    "MHC207": Diagnostic(
        "the stream owner cannot be kept converted",
        "convert the model before its forward is replaced, and call it with a tensor argument",
    ),
    "MHC208": Diagnostic(
        "already converted",
        "use the model as it is, or start again from the residual model to choose other options",
    ),
    "MHC209": Diagnostic(
        "no example inputs",
        "pass one call's inputs: convert(model, *example_args, example_kwargs={...})",
    ),
    "MHC210": Diagnostic(
        "the streams are frozen while the rest trains",
        'name them where you freeze: LoraConfig(modules_to_save=["mhc"]), or call p.requires_grad_() for p in '
        "mhc_compile.stream_parameters(model).values() afterwards",
    ),
    "MHC211": Diagnostic(
        "accelerate moves the layers between devices",
        'load the model on one device (device_map={"": 0}), or shard it with FSDP',
    ),
    "MHC212": Diagnostic(
        "FSDP shards inside the stream",
        "shard each stream owner as a whole: fully_shard(owner) on the converted model, or FSDP with "
        "use_orig_params=True",
    ),
    "MHC220": Diagnostic("invalid memory", "see `mhc_compile.MemorySettings` for the fields, presets and their values"),
    "MHC221": Diagnostic(
        "ids outside the vocabulary",
        "the memory knows the ids of the tokenizer it was made with: encode the text with that one, and leave out ids "
        "that were added to the model since",
    ),
    "MHC222": Diagnostic(
        "the tokenizer is not the one that the memory was made with",
        "use the tokenizer saved beside the checkpoint: with another one the memory's rows mean other words",
    ),
    "MHC223": Diagnostic(
        "the table does not fit",
        "give the table the rows, width, dtype and hash that the memory was made with, and values of that size",
    ),
    "MHC224": Diagnostic(
        "the table's file is damaged",
        "copy or download the table's folder again, all of its files from one source; nothing in them is executed",
    ),
    "MHC225": Diagnostic(
        "no token ids in the graph",
        "a memory looks n-grams of ids up: call the model with input_ids, not with embeddings made elsewhere",
    ),
    "MHC226": Diagnostic("no such layer for a memory", "name layers by their 0-based index or their module path"),
    "MHC227": Diagnostic(
        "gradients of a table pile up",
        "nothing takes them: train with mhc_compile.TableAdamW and a group of mhc_compile.table_groups(model, lr), or "
        "set table.trainable = False",
    ),
    "MHC228": Diagnostic(
        "this table cannot be trained",
        "float8 and mapped tables are for inference: train a float32 or bfloat16 table on the device or in host memory",
    ),
    "MHC229": Diagnostic(
        "the cache lacks the memory's state",
        "fill the cache by this model from its first token on, under torch.no_grad(), and generate without assistants "
        "that take tokens back",
    ),
    "MHC301": Diagnostic(
        "the converted model was compiled without backend 'mhc'",
        'call torch.compile(model, backend="mhc"), or run the model uncompiled',
    ),
    "MHC302": Diagnostic(
        "the model was converted at its first call",
        "an optimizer made before this call does not hold the new parameters: make it after the first call, or call "
        "mhc_compile.convert(model) first",
    ),
    "MHC303": Diagnostic(
        "an unconverted model cannot be converted here",
        "call mhc_compile.convert(model) before wrapping or compiling it",
    ),
    "MHC304": Diagnostic(
        "options differ from those the model was converted with",
        "leave stream options out of torch.compile for a converted model, or convert the residual model again",
    ),
    "MHC305": Diagnostic(
        "compiled without streams",
        "this graph holds no residual stream and the model is not converted; call mhc_compile.convert(model) first, or "
        "make the forward capturable in one graph",
    ),
    "MHC306": Diagnostic(
        "DDP splits the graph before the backend sees it",
        "set torch._dynamo.config.optimize_ddp = False before the first call",
    ),
    "MHC307": Diagnostic(
        "too many compiled graphs",
        'TORCH_LOGS="recompiles" names what changes from call to call; pad inputs to a few sizes, and pass numbers '
        "that vary as tensors",
    ),
    "MHC308": Diagnostic(
        "the model's own streams are not fused",
        "nothing needs to be done: the inner compiler compiles the model as it is, without a gain from this package",
    ),
    "MHC309": Diagnostic(
        "no kernels can be compiled on this machine",
        "plain PyTorch computes the streams, correctly and more slowly: install a C++ compiler (gcc or clang) that "
        "torch.compile finds, or set CXX",
    ),
    "MHC310": Diagnostic(
        "a graph break cuts through the model's hyper-connections",
        "sites that lie in two graphs stay as they are: torch.compile(..., fullgraph=True) also captures sizes that "
        "depend on data, or names what cannot be captured",
    ),
    "MHC401": Diagnostic(
        "not a checkpoint folder",
        "give a local folder as transformers saves it: config.json beside model.safetensors, or beside "
        "model.safetensors.index.json and its shards",
    ),
    "MHC402": Diagnostic(
        "incomplete checkpoint",
        "copy or download the folder again; every file and tensor that it names must be there",
    ),
    "MHC403": Diagnostic("damaged safetensors file", "copy or download the file again"),
    "MHC404": Diagnostic(
        "the weights do not fit the configuration",
        "put the config.json beside the weights that belongs to them",
    ),
    "MHC405": Diagnostic(
        "not an architecture of transformers",
        "only architectures inside transformers are loaded, never code from a folder: load the model yourself, then "
        "mhc_compile.convert(model, *example_inputs)",
    ),
    "MHC406": Diagnostic(
        "quantised checkpoint",
        "convert the checkpoint that was quantised, in its original precision",
    ),
    "MHC407": Diagnostic(
        "the weights are not safetensors",
        "nothing here unpickles a file: load the model with transformers where you trust it and save it again, "
        "save_pretrained writes safetensors",
    ),
    "MHC408": Diagnostic(
        "weights that are not finite",
        "a NaN or an infinity makes every output useless: find the checkpoint from before it appeared",
    ),
    "MHC409": Diagnostic(
        "the folder is converted already",
        "load it with mhc_compile.from_pretrained, or convert the residual checkpoint again to choose other options",
    ),
    "MHC410": Diagnostic(
        "not converted",
        "convert first: mhc_compile.convert(model), or `mhc-compile convert CKPT_DIR OUT_DIR` for a folder",
    ),
    "MHC411": Diagnostic(
        "the streams are trained",
        "a trained n-stream model computes what no residual model can: go back to the checkpoint it was converted from",
    ),
    "MHC412": Diagnostic(
        "the output folder cannot be used",
        "name a folder that does not exist yet or is empty, outside of the input, where you may write",
    ),
    "MHC413": Diagnostic(
        "reading or writing failed",
        "see to what the system says above and run again: the input is untouched and nothing unfinished is left",
    ),
    "MHC414": Diagnostic(
        "mhc.json does not fit",
        "use the version of mhc-compile that wrote the folder or a later one; if the folder was edited or damaged, "
        "copy it again",
    ),
    "MHC415": Diagnostic("transformers or accelerate is not installed", "pip install 'mhc-compile[hf]'"),
    "MHC501": Diagnostic(
        "no n-stream program to export",
        "convert the model first, mhc_compile.convert(model), and export a call that runs its converted part",
    ),
    "MHC502": Diagnostic(
        "exported in training mode",
        "the program drops values at random at every call; call model.eval() first to export for inference",
    ),
    "MHC503": Diagnostic(
        "these dynamic shapes do not hold",
        "leave out the dimension named, give it the range named, or export with an example whose sizes differ",
    ),
    "MHC504": Diagnostic(
        "this call cannot be exported",
        "pass and return tensors, numbers and plain containers: example_kwargs={'use_cache': False} for Hugging Face",
    ),
    "MHC505": Diagnostic("torch-mlir is not installed", "pip install 'mhc-compile[mlir]'"),
    "MHC506": Diagnostic(
        "torch-mlir cannot take this program",
        "the operation named above has no lowering in the torch-mlir that is installed; try dialect='torch', other "
        "static shapes, or another version of it",
    ),
    "MHC507": Diagnostic("no such layer in the graph", "name one of the modules listed"),
    "MHC508": Diagnostic(
        "no model to inspect",
        "name a Hugging Face checkpoint folder or its config.json, of an architecture that transformers itself has",
    ),
    "MHC600": Diagnostic("no recipe", "name a TOML file: `mhc-compile train --fields` lists its sections and fields"),
    "MHC601": Diagnostic(
        "unknown field in the recipe", "`mhc-compile train --fields` lists every section and field with its meaning"
    ),
    "MHC602": Diagnostic(
        "the recipe's values do not fit", "`mhc-compile train --fields` says what every field may be"
    ),
    "MHC603": Diagnostic(
        "the number of processes is not the recipe's",
        "start parallel.stages x parallel.data x parallel.engram processes with torchrun",
    ),
    "MHC604": Diagnostic(
        "the schedule cannot run so",
        "change parallel.schedule, parallel.stages_per_rank, or the microbatches a step: "
        "train.batch / replicas / train.microbatch",
    ),
    "MHC605": Diagnostic(
        "another rank is lost",
        "see what that rank said last; torchrun --max-restarts N starts all of them again from the last checkpoint. "
        "Where ranks are slow and not lost, raise parallel.timeout",
    ),
    "MHC606": Diagnostic("tensorboard is not installed", "pip install 'mhc-compile[train]'"),
    "MHC610": Diagnostic(
        "the text cannot be read",
        "name UTF-8 text files, folders of them, .jsonl files with a text in every line (--field names it), or "
        "hf:NAME[:SPLIT]",
    ),
    "MHC611": Diagnostic(
        "the data folder is missing or damaged",
        "copy the folder again from where it was whole, or run `mhc-compile data` again",
    ),
    "MHC612": Diagnostic(
        "the data was tokenised for another model",
        "run `mhc-compile data` again with --tokenizer naming the model's own folder",
    ),
    "MHC613": Diagnostic(
        "too little data", "prepare more text with `mhc-compile data`, or lower data.sequence or train.batch"
    ),
    "MHC614": Diagnostic(
        "the tokenizer cannot be used",
        "name a folder with tokenizer.json and, in tokenizer_config.json or config.json, its end-of-text token, as "
        "save_pretrained of the tokenizer and the model write them",
    ),
    "MHC615": Diagnostic(
        "a checkpoint of the run is missing or damaged",
        "copy the folder again from where it was whole, or remove it: the run then goes on from the one before it",
    ),
    "MHC616": Diagnostic(
        "a checkpoint could not be saved",
        "make room where [checkpoint].folder lies: what was saved before is whole, and the next save is tried again",
    ),
    "MHC617": Diagnostic(
        "the checkpoint belongs to another model or other data",
        "give the recipe that the checkpoint was made with, or another [checkpoint].folder to begin a new run; to train "
        "these weights on, export them and name the result as [model].folder",
    ),
    "MHC618": Diagnostic(
        "the loss or its gradient is not finite, or explodes",
        "look at the step's tokens and figures in the folder named; a lower train.lr, a longer train.warmup or "
        'train.clip often helps, and train.on_nonfinite = "skip" leaves such steps out',
    ),
    "MHC619": Diagnostic(
        "the folder of checkpoints cannot be used",
        "wait for the other run to end, or name another [checkpoint].folder where you may write",
    ),
    "MHC620": Diagnostic(
        "the model cannot be cut into these stages",
        "choose at most as many stages as there are sites (two a layer), and a number of sites for each of them",
    ),
    "MHC621": Diagnostic(
        "a value would cross between stages that cannot be sent",
        "choose other cuts (parallel.balance names the sites of every stage), or fewer stages",
    ),
    "MHC622": Diagnostic(
        "weights of this stage are missing",
        "copy or download the folder again; every tensor of the model must be in it, as transformers saves it",
    ),
    "MHC625": Diagnostic(
        "nothing can be computed again by the inner compiler `eager`",
        'choose inner="inductor" or inner="aot_eager", or recompute="off"',
    ),
    "MHC626": Diagnostic(
        "the stream part does not fit into the bytes given for it",
        'give more bytes, recompute="auto" for the least possible, a smaller microbatch, or more pipeline stages',
    ),
    "MHC627": Diagnostic(
        "the bytes of the stream part are not known when it is compiled",
        'choose recompute="auto" or a number of sites, which need no sizes',
    ),
    "MHC630": Diagnostic(
        "the ranks of a group have different tables",
        "start all ranks with one recipe, one seed and the same files: each holds other rows of the same tables",
    ),
    "MHC631": Diagnostic(
        "a look-up in a sharded table failed on another rank",
        "see what that rank itself says; all ranks must run the same graphs on microbatches of the same shapes",
    ),
    "MHC635": Diagnostic(
        "weights' gradients cannot be split off",
        'set model.inner to "inductor" or "aot_eager", which make a backward graph, or choose the schedule "1f1b"',
    ),
    "MHC636": Diagnostic(
        "two inputs of a compiled stage are one tensor",
        "give each input a tensor of its own, or take the gradient of one of them only",
    ),
    "MHC640": Diagnostic(
        "no hardware to plan for",
        "--hardware NAME, or --flops, --bandwidth, --link and --memory, each a number such as 989e12",
    ),
    "MHC641": Diagnostic(
        "the recipe does not fit into memory",
        "more ranks (parallel.stages, parallel.data with mode = 'fsdp'), recompute.blocks, smaller microbatches",
    ),
    "MHC642": Diagnostic(
        "no such pipeline schedule",
        "1f1b with one stage a rank, the others with two or more; as many microbatches a step as stages",
    ),
}


class MHCError(Exception):
    """A coded error: `code` is a key of `TABLE`; the text names node, module path and source line if there are any."""

    def __init__(
        self,
        code: str,
        detail: str = "",
        *,
        node: str | None = None,
        module: str | None = None,
        source: str | None = None,
        way_out: str | None = None,
    ) -> None:
        self.code = code
        self.detail = detail
        self.node = node
        self.module = module
        self.source = source
        row = TABLE[code]
        lines = [f"{code} {row.title}" + (f": {detail}" if detail else "")]
        if node:
            lines.append(f"  node:   {node}")
        if module:
            lines.append(f"  module: {module}")
        if source:
            lines.append(f"  source: {source}")
        lines.append(f"  way out: {way_out or row.way_out}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.code, self.detail, str(self)))


class _Rebuilt(MHCError):
    """An `MHCError` that crossed a process boundary: same code and text."""

    def __init__(self, code: str, detail: str, text: str) -> None:
        Exception.__init__(self, text)
        self.code, self.detail = code, detail
        self.node = self.module = self.source = None


def _rebuild(code: str, detail: str, text: str) -> MHCError:
    return _Rebuilt(code, detail, text)


class MHCWarning(UserWarning):
    """A coded warning: its text begins with a key of `TABLE`."""


def warn(code: str, detail: str = "", *, stacklevel: int = 2) -> None:
    """Issue the coded warning `code` with the table's title and way out."""
    row = TABLE[code]
    text = f"{code} {row.title}" + (f": {detail}" if detail else "") + f"\n  way out: {row.way_out}"
    warnings.warn(MHCWarning(text), stacklevel=stacklevel + 1)
