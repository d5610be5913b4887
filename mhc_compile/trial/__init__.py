"""Train the forms of a model side by side from the same start, on the same batches, and compare them."""
