"""Normalisation over channels."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class RMSNorm2d(nn.Module):
    """RMS norm over the channels of each pixel, with weight and bias; computed in fp32 and rounded once.

    Shape: (B, C, H, W) to the same; channels-last memory is read and written in place order.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 3, 1).float()  # (B, H, W, C)
        y = F.rms_norm(y, (y.shape[-1],), self.weight.float(), self.eps) + self.bias.float()
        return y.permute(0, 3, 1, 2).to(x.dtype)
