"""How much of its codebook a discrete autoencoder uses, counted while the batches stream by."""

from typing import Any

import torch
from torch import Tensor

from latentae.metrics.image import ExactSums


class CodebookUsage(ExactSums):
    """The part of the codes that occur at all, and their perplexity: how many equally frequent codes say as much.

    Both grow with the number of latents until these are many times the codes: compare equal numbers of images.

    Args:
        codes: how many the codebook has.
    """

    is_differentiable = False
    full_state_update = False
    counts: Tensor

    def __init__(self, codes: int, **arguments: object) -> None:
        super().__init__(**arguments)
        self.add_state("counts", torch.zeros(codes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, indices: Tensor) -> None:
        """Add indices of codes, of any shape."""
        self.counts += torch.bincount(indices.flatten().to(self.counts.device), minlength=len(self.counts))

    def compute(self) -> dict[str, Any]:
        """``codes``, the share of them that is ``used``, and ``perplexity``."""
        share = self.counts.double() / self.counts.sum()
        entropy = -torch.special.xlogy(share, share).sum()
        return {"codes": len(self.counts), "used": (share > 0).double().mean(), "perplexity": entropy.exp()}


def indices_of(quantizer: Any, z: Tensor) -> Tensor:
    """Raw latents (B, C, h, w) to indices of codes: of our quantisers, or of the one in diffusers' VQModel."""
    if hasattr(quantizer, "indices_of"):
        return quantizer.indices_of(z)
    return quantizer(z.to(quantizer.embedding.weight))[2][2]


def codes_of(quantizer: Any) -> int:
    """How many codes there are, in our quantisers or in the one of diffusers' VQModel."""
    return int(getattr(quantizer, "codes", 0) or quantizer.n_e)
