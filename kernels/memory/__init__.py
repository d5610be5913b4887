"""Engram (arXiv 2601.07372): hashed n-gram memory, its ops, kernels and tables."""
