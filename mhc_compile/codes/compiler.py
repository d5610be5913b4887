"""Codes 1xx: the graph, 2xx: parameters and configuration, 3xx: the backend, 4xx: checkpoint folders, 5xx: export."""

from mhc_compile.codes import rows

COMPILER = rows("""
MHC101 no residual stream
    the model has no chain `x + branch(x)` from its input to its output; run `mhc-compile inspect` to see how far the
    stream was followed
MHC102 two candidate streams
    the stream forks into two chains; convert the submodule that holds the one you mean
MHC103 the stream was lost
    layers with parameters lie between the input and the output that no site covers; please report the model, or convert
    the submodule whose layers are regular
MHC104 graph break inside the stream
    make the forward capturable in one graph (`torch.compile(model, fullgraph=True)` names the break)
MHC105 shapes change along the stream
    every site of one stream must add tensors of one shape; hierarchical models need one stream a stage
MHC106 a stream value is mutated in place
    replace the in-place operation by its out-of-place form
MHC107 already multi-stream
    this model carries several residual streams of its own; use it as it is: torch.compile(model, backend="mhc") fuses
    the hyper-connections that it recognises
MHC108 an operation on the stream has no n-stream form
    move the operation into a branch, or before the first or after the last layer
MHC109 not every residual add is part of a stream
    write the adds as `x + branch(x)`, and convert or compile the whole model rather than its layers one by one: where a
    stream begins again at every layer, its matrices get no gradient; strict=True refuses such models
MHC110 a pass changed the results
    this is a bug of mhc-compile: please report the model and the text above
MHC111 the model's forward fails on these inputs
    call the model with them before it is converted to see its own error, and pass one call's inputs that it takes:
    convert(model, *example_args, example_kwargs={...})
MHC112 attention over depth already
    this model's layers read the values of earlier ones by attention of its own instead of adding to a stream; use it as
    it is: torch.compile(model, backend="mhc") fuses the reads that it recognises
MHC113 no causal mask to rewrite
    leave the option attention out for a model whose attention is not causal; otherwise make the mask in the forward,
    by is_causal=True, by comparing positions (key <= query) or by tril, and pass padding alone from outside
MHC201 streams out of range
    choose an integer number of streams from 1 to 8
MHC202 unknown convention
    use one of the names listed
MHC203 manifold not possible
    use one of the manifolds listed, with a number of streams it allows
MHC204 invalid option
    see `mhc_compile.StreamSpec` for the fields and their values
MHC205 no conversion between these conventions
    keep the convention the checkpoint was trained with, or train the new one from its function-preserving start
MHC206 sites and stream parameters do not match
    the model's structure changed since it was converted, or its forward breaks into several graphs; convert the
    original model again
MHC207 the stream owner cannot be kept converted
    convert the model before accelerate prepares it, register the owner as a submodule, and call it with a tensor
    argument
MHC208 already converted
    use the model as it is, or start again from the residual model to choose other options
MHC209 no example inputs
    pass one call's inputs: convert(model, *example_args, example_kwargs={...})
MHC210 the streams are frozen while the rest trains
    name them where you freeze: LoraConfig(modules_to_save=["mhc"]), or call p.requires_grad_() for p in
    mhc_compile.stream_parameters(model).values() afterwards
MHC211 accelerate moves the layers between devices
    load the model on one device (device_map={"": 0}), or shard it with FSDP
MHC212 FSDP shards inside the stream
    shard each stream owner, and its layers if you like, in one dtype: fully_shard(layer), then fully_shard(owner), on
    the converted model; or FSDP with use_orig_params=True around the owner
MHC213 training and evaluation have different streams
    each site's parameters must belong to the same addition in both modes: convert a submodule that adds the same in
    both, or move what one mode adds into a module of its own
MHC220 invalid memory
    see `mhc_compile.MemorySettings` for the fields, presets and their values
MHC221 ids outside the vocabulary
    encode the text with the tokenizer that the memory was made with, and leave out ids that were added to the model
    since then
MHC222 the tokenizer is not the one that the memory was made with
    use the tokenizer saved beside the checkpoint: with another one the memory's rows mean other words
MHC223 the table does not fit
    give the table the rows, width, dtype and hash that the memory was made with, and values of that size
MHC224 the table's file is damaged
    copy or download the table's folder again, all of its files from one source; nothing in them is executed
MHC225 no token ids in the graph
    memories look up n-grams of ids: call the model with input_ids, not with precomputed embeddings
MHC226 no such layer for a memory
    name layers by their 0-based index or their module path
MHC227 gradients of a table pile up
    no optimizer consumes them: train with mhc_compile.TableAdamW and a group of mhc_compile.table_groups(model, lr), or
    set table.trainable = False
MHC228 this table cannot be trained
    float8 and mapped tables are for inference: train a float32 or bfloat16 table on the device or in host memory
MHC229 the cache lacks the memory's state
    fill the cache by this model from its first token on, under torch.no_grad(), and generate without assistants that
    take tokens back
MHC230 a sampled step recorded nothing
    call the converted model inside `with probes.step():`
MHC231 the model is being sampled already
    leave one step before the next begins, and use one `Probes` for a model
MHC232 not a file of samples
    name a file that `Probes.write` of this version has written
MHC233 matplotlib is not installed
    pip install 'mhc-compile[demo]'
MHC236 an argument may be token ids, a mask or positions
    name the argument with the token ids `input_ids` and, if there are any, that with the mask (0 for padding)
    `attention_mask` and that with the positions `position_ids`: no other argument is then taken for one of them
MHC240 invalid pipeline
    write passes as docs/options.md shows, with the names and options listed; a package that provides a pass declares it
    under [project.entry-points."mhc_compile.passes"]
MHC241 passes cannot run in this order
    put a pass that provides what it requires before it
MHC301 the converted model was compiled without backend 'mhc'
    call torch.compile(model, backend="mhc"), or run the model uncompiled: it compiles itself, so leave torch_compile
    and torch_compile_backend out of TrainingArguments; torch.export and torch.onnx take the n-stream form from
    mhc_compile.export(model, ...), a program of PyTorch's own operations
MHC302 the model was converted at its first call
    an optimizer made before this call does not hold the new parameters: make it after the first call, or call
    mhc_compile.convert(model) first
MHC303 an unconverted model cannot be converted here
    call mhc_compile.convert(model) before wrapping or compiling it
MHC304 options differ from those the model was converted with
    leave stream options out of torch.compile for a converted model, or convert the residual model again
MHC305 compiled without streams
    this graph holds no residual stream and the model is not converted; call mhc_compile.convert(model) first, or make
    the forward capturable in one graph
MHC306 DDP splits the graph before the backend sees it
    set torch._dynamo.config.optimize_ddp = False before the first call
MHC307 too many compiled graphs
    TORCH_LOGS="recompiles" names what changes from call to call; pad inputs to a few sizes, and pass numbers that vary
    as tensors
MHC308 the model's own streams are not fused
    nothing needs to be done: the inner compiler compiles the model as it is, without a gain from this package
MHC309 no kernels can be compiled on this machine
    plain PyTorch computes the streams, correctly and more slowly: install a C++ compiler (gcc or clang) that
    torch.compile finds, or set CXX
MHC310 a graph break cuts through the model's hyper-connections
    sites that lie in two graphs stay as they are: torch.compile(..., fullgraph=True) also captures sizes that depend on
    data, or names what cannot be captured
MHC311 a converted model cannot be transformed
    its owners are compiled, which torch.func.grad, vmap, jvp and forward-mode differentiation cannot trace: compute
    gradients with loss.backward() or torch.autograd.grad; for second derivatives convert the model with inner='eager'
    and kernels='none'
MHC313 a layer of a converted model would run without its streams
    call the model itself, model(x); to read hidden states, put a forward hook on the layer; to run layers by hand, take
    the streams out first with mhc_compile.to_residual(model)
MHC320 newer than the tested version
    nothing needs to be done unless something breaks; then install the tested version and report it with the output of
    `mhc-compile doctor`
MHC401 not a checkpoint folder
    give a local folder as transformers saves it: config.json beside model.safetensors, or beside
    model.safetensors.index.json and its shards
MHC402 incomplete checkpoint
    copy or download the folder again; every file and tensor that it names must be there
MHC403 damaged safetensors file
    copy or download the file again
MHC404 the weights do not fit the configuration
    put the config.json beside the weights that belongs to them
MHC405 not an architecture of transformers
    only architectures inside transformers are loaded, never code from a folder: load the model yourself, then
    mhc_compile.convert(model, *example_inputs)
MHC406 quantised checkpoint
    convert the checkpoint that was quantised, in its original precision
MHC407 the weights are not safetensors
    pickled files are never loaded: if you trust the file, load the model with transformers and save it again
    (save_pretrained writes safetensors)
MHC408 weights that are not finite
    a NaN or an infinity makes every output useless: find the checkpoint from before it appeared
MHC409 the folder is converted already
    load it with mhc_compile.from_pretrained, or convert the residual checkpoint again to choose other options
MHC410 not converted
    convert first: mhc_compile.convert(model), or `mhc-compile convert CKPT_DIR OUT_DIR` for a folder
MHC411 the streams are trained
    a trained n-stream model computes what no residual model can: go back to the checkpoint it was converted from
MHC412 the output folder cannot be used
    name a folder that does not exist yet or is empty, outside of the input, where you may write
MHC413 reading or writing failed
    resolve the system's error above and run again: the input is unchanged and no partial output is left
MHC414 mhc.json does not fit
    use the version of mhc-compile that wrote the folder or a later one; if the folder was edited or damaged, copy it
    again
MHC415 transformers or accelerate is not installed
    pip install 'mhc-compile[hf]'
MHC416 a link leads out of the folder
    put the file itself into the folder, if it belongs there: only links inside the folder, and into the blobs of the
    hub's cache, are followed when it is copied
MHC417 no such repository on the Hub
    check the name, the revision and the connection; a private or gated one needs `hf auth login`. A folder is named by
    its path
MHC418 the layout has no place for these streams
    convert the residual model to streams as the layout has them (docs/convert.md: its exit, sinkhorn, two sites a
    layer, no look-ups), or keep this package's folder
MHC501 no n-stream program to export
    convert the model first, mhc_compile.convert(model), and export a call that runs its converted part
MHC502 exported in training mode
    the program would apply dropout at every call; call model.eval() first to export for inference
MHC503 these dynamic shapes do not hold
    leave out the dimension named, give it the range named, or export with an example whose sizes differ
MHC504 this call cannot be exported
    pass and return tensors, numbers and plain containers: example_kwargs={'use_cache': False} for Hugging Face
MHC505 torch-mlir is not installed
    pip install 'mhc-compile[mlir]'
MHC506 torch-mlir cannot take this program
    the operation named above has no lowering in the torch-mlir that is installed; try dialect='torch', other static
    shapes, or another version of it
MHC507 no such layer in the graph
    name one of the modules listed
MHC508 no model to inspect
    name a Hugging Face checkpoint folder or its config.json, of an architecture that transformers itself has
MHC509 the report cannot be written
    name a file in a folder that exists, where you may write
MHC520 these options do not go together
    print the report, or with --mlir (and --out, --streams) the model in MLIR; run the command twice for both
MHC525 no weights to compute with
    load the model with its weights: bisect runs it
MHC526 the reproducer cannot be written
    name a file in a folder that exists
MHC527 no report to compare
    write one: mhc-compile inspect MODEL --json FILE, with a version of this format
MHC528 nothing to train on
    name a UTF-8 text file of a few thousand tokens, and a model whose vocabulary is that of the tokenizer in its folder
MHC529 no GPU to measure
    run the command where PyTorch finds a GPU; with --device cpu --small it computes everything once on this machine
""")
