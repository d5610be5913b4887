"""Kernels generated as C++ for CPUs: written by `forward` and `backward`, compiled by `build`, called by `run`."""
