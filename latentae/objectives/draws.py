"""Random numbers of a training step that do not depend on how many ranks share its batch."""

from typing import Any

import torch
import torch.distributed
from torch import Tensor


def of_this_rank(draw: Any, like: Tensor) -> Tensor:
    """Random numbers in the shape of ``like``: this rank's part of what one rank with the whole batch would draw."""
    rank, ranks = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    drawn = draw(ranks * len(like), *like.shape[1:], device=like.device, dtype=like.dtype)
    return drawn.chunk(ranks)[rank]


def per_image(batch: Tensor) -> Tensor:
    """An empty tensor (B,) of the device of ``batch`` and at least float32, in whose shape to draw."""
    dtype = torch.promote_types(batch.dtype, torch.float32)
    return torch.empty(len(batch), device=batch.device, dtype=dtype)
