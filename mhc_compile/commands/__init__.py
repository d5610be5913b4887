"""The commands of `mhc-compile`: one file each, with a function whose signature is its flags and docstring its help.

They import what is heavy when they run, so that help appears at once.
"""
