"""Stream operations: their mathematics, their ops, and the kernels generated for them.

`functions` is for use by hand; `spec` and `chain` say what is computed, `reference` how in plain PyTorch; `cpp` and
`triton` generate kernels; `ops` and `fused` register everything with PyTorch.
"""
