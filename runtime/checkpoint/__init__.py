"""Checkpoints of training runs: torch.distributed.checkpoint over safetensors and JSON."""
