"""Normalisation over channels."""

import torch
import torch.nn as nn
from torch import Tensor

from latentae.nn.precision import widen


class RMSNorm2d(nn.Module):
    """RMS norm over the channels of each pixel, with weight and bias; computed in fp32 and rounded once.

    Shape: (B, C, H, W) to the same, fastest in channels-last memory.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """Normalise ``x``; where no gradient is recorded, ``overwrite`` allows to reuse its memory for the result.

        A fresh map of a large image costs more time than the arithmetic, so blocks give up their temporaries here.
        """
        y = widen(x).permute(0, 2, 3, 1)  # (B, H, W, C)
        power = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square() / y.shape[-1]
        scale = torch.rsqrt(power + self.eps)  # (B, H, W, 1)
        if torch.is_grad_enabled():
            y = torch.addcmul(widen(self.bias), y * scale, widen(self.weight))
        else:
            y = y.mul_(scale) if overwrite or y.dtype != x.dtype else y * scale
            y.mul_(widen(self.weight)).add_(widen(self.bias))
        return y.permute(0, 3, 1, 2).to(x.dtype)
