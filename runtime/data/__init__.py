"""Text as data of a training run: tokenised once into memory-mapped shards, read in an order that a seed determines."""
