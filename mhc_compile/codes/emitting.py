"""Codes 7xx: writing a model's source with the streams in it."""

from mhc_compile.codes import rows

EMITTING = rows("""
MHC701 a function that cannot be rewritten
    its source must be a file on disk, and the adds must lie in methods of modules or in plain functions that they call:
    move them there
MHC702 one expression, two meanings
    a layer that is called twice, or a loop in one forward, needs sites of its own for each: write the layers as modules
    of their own, or use mhc_compile.convert, which tells the calls apart
MHC703 the stream's first value was not followed
    assign it to a name before the first layer reads it
MHC704 a read of the stream was not followed
    pass the stream on by itself, not inside of a container that a layer changes
MHC705 a read lies in another module than its add
    read and add in one module, or let the module that reads hold the one that adds
MHC706 an add in another form
    write it as `x + branch(x)` or `x += branch(x)` with both operands of one shape
MHC707 a class or name that cannot be imported
    put the classes into a module of their own, each under a name of its own, and give other things names of their own
MHC708 no source for these streams
    mHC with any matrices and an exit by the mean or the sum is written: exit='mean' in place of a learned head
MHC709 the emitted model computes something else
    this is a bug of mhc-compile: please report the model and the text above; nothing was written
""")
