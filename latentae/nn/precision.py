"""Arithmetic that half precision cannot hold is done in fp32."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
