"""Batches that adapt to the memory there is: one that does not fit is halved, and so are all later ones."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from latentae.errors import ResumableError

REFERENCE_PIXELS = 512 * 512


def batch_for(batch_size: int, shape: tuple[int, ...]) -> int:
    """How many images of ``shape`` (height, width) go into one batch where images keep their own sizes, or clips of
    (frames, height, width).

    ``batch_size`` is meant for 512 x 512; larger images and clips count for as many as they have pixels.
    """
    return max(1, batch_size * REFERENCE_PIXELS // max(math.prod(shape), REFERENCE_PIXELS))


class BatchRunner:
    """Runs functions on batches of at most ``batch_size``, which shrinks where memory does not suffice."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size

    def run(self, function: Callable[[Any], Tensor], batch: Sequence[Any] | Tensor) -> Tensor:
        """``function`` of the whole batch: of its parts, concatenated, where it does not fit.

        Raises:
            ResumableError: not even one element fits.
        """
        results: list[Tensor] = []
        done = 0
        while done < len(batch):
            part = batch[done : done + self.batch_size]
            result = _unless_out_of_memory(function, part)
            if result is not None:
                results.append(result)
                done += len(part)
            elif len(part) == 1:
                raise ResumableError(
                    "Out of memory with a single image: run the same command where there is more, or take smaller ones."
                )
            else:
                self.batch_size = len(part) // 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        return results[0] if len(results) == 1 else torch.cat(results)


def _unless_out_of_memory(function: Callable[[Any], Tensor], batch: Any) -> Tensor | None:
    # a function of its own, so that the failed attempt's tensors are free when it returns
    try:
        return function(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a device or the machine has no memory left, in any of PyTorch's ways to say so."""
    told = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("out of memory" in told or "can't allocate memory" in told)
    )
