"""What other libraries call things, and where this package has to follow them."""

# Without those that import torchtitan, which only its engine needs.
__all__ = ["accelerate", "attributes", "diffusion", "peft", "saving", "torchtitan", "trainer", "transformers"]
