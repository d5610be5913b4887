"""On paper, without weights: how to spend a budget of parameters."""
