"""Make a network of next tokens a parallel generator: Seed Diffusion Preview (arXiv 2508.02193).

    attend(model, "block:16")        what its calls see: blocks, by the pass `blockmask`; residual or n streams
    denoising_loss(...)              the objective: the two-stage curriculum; corrupt(...), what it shows the network
    sample(model, prompt, ...)       block after block, several positions a step

`mhc_compile.integrations.diffusion.add_mask_token` gives the model a mask token.
"""

from mhc_compile.diffusion.attend import attend
from mhc_compile.diffusion.corruption import edit_tokens, mask_tokens
from mhc_compile.diffusion.objective import Corrupted, corrupt, denoising_loss
from mhc_compile.diffusion.sampler import Sampled, sample

__all__ = ["Corrupted", "Sampled", "attend", "corrupt", "denoising_loss", "edit_tokens", "mask_tokens", "sample"]
