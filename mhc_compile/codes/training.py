"""Codes 6xx: training runs, their data and checkpoints, stages, and plans."""

from mhc_compile.codes import rows

TRAINING = rows("""
MHC600 no recipe
    name a TOML file: `mhc-compile train --fields` lists its sections and fields
MHC601 unknown field in the recipe
    `mhc-compile train --fields` lists every section and field with its meaning
MHC602 the recipe's values do not fit
    `mhc-compile train --fields` says what every field may be
MHC603 the number of processes is not the recipe's
    start parallel.stages x parallel.data x parallel.engram processes with torchrun
MHC604 the schedule does not fit these sizes
    change parallel.schedule, parallel.stages_per_rank, or the microbatches a step: train.batch / replicas /
    train.microbatch
MHC605 another rank is lost
    read that rank's last output; torchrun --max-restarts N starts all of them again from the last checkpoint. Where
    ranks are slow and not lost, raise parallel.timeout
MHC606 figures cannot be written as the recipe says
    pip install 'mhc-compile[train]'
MHC607 figures of the run are not written
    make room where [metrics].folder lies: training goes on, and later lines are written when there is room
MHC608 the recipe is not that of the checkpoint
    give the old values again; to go on with the new ones, add --accept-changes; to begin a new run, name another
    [checkpoint].folder
MHC609 the model's auxiliary loss cannot be told from its loss
    return the logits alone; or take labels and return the loss as a sum with the auxiliary loss times its weight
MHC610 the text cannot be read
    name UTF-8 text files, folders of them, .jsonl files with a text in every line (--field names it), or
    hf:NAME[:SPLIT]
MHC611 the data folder is missing or damaged
    copy the folder again from where it was whole, or run `mhc-compile data` again
MHC612 the data was tokenised for another model
    run `mhc-compile data` again with --tokenizer naming the model's own folder
MHC613 too little data
    prepare more text with `mhc-compile data`, or lower data.sequence or train.batch
MHC614 the tokenizer cannot be used
    name a folder with tokenizer.json and, in tokenizer_config.json or config.json, its end-of-text token, as
    save_pretrained of the tokenizer and the model write them
MHC615 a checkpoint of the run is missing or damaged
    copy the folder again from where it was whole, or remove it: the run then goes on from the one before it
MHC616 a checkpoint could not be saved
    make room where [checkpoint].folder lies: what was saved before is whole, and the next save is tried again
MHC617 the checkpoint belongs to another model
    give the recipe that the checkpoint was made with, or another [checkpoint].folder to begin a new run; to train these
    weights on, export them and name the result as [model].folder
MHC618 the loss or its gradient is not finite, or explodes
    look at the step's tokens and figures in the folder named; a lower train.lr, a longer train.warmup or train.clip
    often helps, and train.on_nonfinite = "skip" leaves such steps out
MHC619 the folder of checkpoints cannot be used
    wait for the other run to end, or name another [checkpoint].folder where you may write
MHC620 the model cannot be cut into these stages
    choose at most as many stages as there are sites (two a layer), and a number of sites for each of them
MHC621 a value would cross between stages that cannot be sent
    choose other cuts (parallel.balance names the sites of every stage), or fewer stages
MHC622 weights of this stage are missing
    copy or download the folder again; every tensor of the model must be in it, as transformers saves it
MHC623 what balances the experts is not clear
    train.balance_rate = 0 leaves these buffers as they are; a bias is balanced that is added to the scores of experts,
    [experts] values, for their choice alone
MHC625 the inner compiler `eager` cannot recompute
    choose inner="inductor" or inner="aot_eager", or recompute="off"
MHC626 the stream part does not fit into the bytes given for it
    give more bytes, recompute="auto" for the least possible, a smaller microbatch, or more pipeline stages
MHC627 the bytes of the stream part are not known when it is compiled
    choose recompute="auto" or a number of sites, which need no sizes
MHC630 the ranks of a group have different tables
    start all ranks with one recipe, one seed and the same files: each holds other rows of the same tables
MHC631 a look-up in a sharded table failed on another rank
    read that rank's own error; all ranks must run the same graphs on microbatches of the same shapes
MHC635 weights' gradients cannot be split off
    set model.inner to "inductor" or "aot_eager", which make a backward graph, or choose the schedule "1f1b"
MHC636 two inputs of a compiled stage are one tensor
    give each input a tensor of its own, or take the gradient of one of them only
MHC640 no hardware to plan for
    --hardware NAME, or --flops, --bandwidth, --link and --memory, each a number such as 989e12
MHC641 the recipe does not fit into memory
    more ranks (parallel.stages, parallel.data with mode = 'fsdp'), recompute.blocks, smaller microbatches
MHC643 two schedules compute different losses
    please report the model: gradients of at least one of them are wrong
MHC644 the recipe cannot be measured here
    measure a small model with parallel.data = 1, parallel.engram = 1 and a rank for each processor at most
MHC650 torchtitan cannot be used here
    pip install 'torch>=2.14' 'mhc-compile[titan]' on a machine with an accelerator, or leave --engine out
MHC651 torchtitan does not carry this setting with our stages
    change it, or train with the engine of this package (without --engine)
""")
