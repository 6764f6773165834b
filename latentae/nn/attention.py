"""ReLU linear attention (EfficientViT, arXiv 2205.14756): cost linear in the pixels, fp32 under any precision."""

from contextlib import nullcontext

import torch
from torch import Tensor

from latentae.nn.precision import widen


def relu_linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-15) -> Tensor:
    """softmax-free attention with the kernel ``relu(q) . relu(k)``.

    The sums over all pixels overflow half precision and lose bf16's few digits, so this part leaves autocast.

    Args:
        q, k, v: (B, heads, N, D) in any float dtype.

    Returns:
        (B, heads, N, D) in fp32, or in fp64 if the arguments are.
    """
    device = q.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        q, k, v = widen(q).relu(), widen(k).relu(), widen(v)
        context = k.transpose(-1, -2) @ v  # (B, heads, D, D)
        total = k.sum(dim=-2).unsqueeze(-1)  # (B, heads, D, 1)
        return (q @ context) / (q @ total + eps)
