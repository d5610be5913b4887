"""Benchmarks that print the figures of docs/figures.md: one module each, run as `mhc-compile bench NAME`."""
