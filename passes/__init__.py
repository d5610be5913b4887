"""The compiler passes, one file each, in the order they run: normalize, residual, widen (or native), fuse, lower."""
