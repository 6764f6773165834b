"""A draw from the posterior that stored moments describe."""

import torch
from torch import Tensor


def draw(moments: Tensor, generator: torch.Generator) -> Tensor:
    """A sample of the posterior with moments (2C, ...), mean and log-variance: (C, ...) in fp32.

    With `key_generator` of the same seed and key it is what encoding with ``--kind sample`` stores.
    """
    mean, log_variance = moments.float().chunk(2)
    return mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
