"""ReLU linear attention (EfficientViT, arXiv 2205.14756): cost linear in the pixels, fp32 under any precision."""

from contextlib import AbstractContextManager, nullcontext

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
    return attend_to_sums(q, *relu_attention_sums(k, v), eps)


def relu_attention_sums(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """All that the attention needs of keys and values, (B, heads, D, D) and (B, heads, D, 1): sums over the pixels,
    which add up over parts of an image."""
    with _without_autocast(k):
        k, v = widen(k).relu(), widen(v)
        return k.transpose(-1, -2) @ v, k.sum(dim=-2).unsqueeze(-1)


def attend_to_sums(q: Tensor, context: Tensor, total: Tensor, eps: float = 1e-15) -> Tensor:
    """The attention of queries (B, heads, N, D) to the sums of `relu_attention_sums`."""
    with _without_autocast(q):
        q = widen(q).relu()
        return (q @ context) / (q @ total + eps)


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
