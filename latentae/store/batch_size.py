"""How many images the model takes at once: on a GPU as many as still make it faster, found by trying."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from latentae.codec import LatentCodec
from latentae.console import say
from latentae.store.configuration import Options
from latentae.store.memory import REFERENCE_PIXELS, is_out_of_memory
from latentae.store.worker import raw_posterior

CPU_BATCH_SIZE = 16  # more makes no CPU faster
FIRST, LAST = 4, 512
WORTH_IT = 1.05  # a larger batch must be faster by this, for each image
FREE_SHARE = 0.9  # of the device's memory, which a batch may take


def find_batch_size(codec: LatentCodec, options: Options, shape: tuple[int, ...]) -> int:
    """A batch size for images of ``shape``, (height, width), or clips, (frames, height, width).

    On a GPU it is doubled while images per second grow by 5 %, up to 512 or nine tenths of the memory. Where shapes
    differ it is for images of 512 x 512, to which that of each shape is in proportion.
    """
    if codec.device.type != "cuda":
        return CPU_BATCH_SIZE
    if not options.framing.fixed_shape or options.clips:
        side = int(REFERENCE_PIXELS**0.5) // codec.spatial_ratio * codec.spatial_ratio
        shape = (side, side) if not options.clips else (codec.padded_frames(1), side, side)

    def encode(batch_size: int) -> None:
        with torch.no_grad():
            raw_posterior(codec, torch.zeros(batch_size, 3, *shape, device=codec.device)).mode()
        torch.cuda.synchronize(codec.device)

    def used_share() -> float:
        free, total = torch.cuda.mem_get_info(codec.device)
        return 1 - free / total

    found = largest_worthwhile(encode, used_share)
    torch.cuda.empty_cache()
    say(f"batch size {found}, found by trying; --batch-size sets another")
    return found


def largest_worthwhile(
    encode: Callable[[int], Tensor | None],
    used_share: Callable[[], float],
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """The batch size from which on doubling does not pay, or does not fit."""
    best, best_rate, size = 1, 0.0, FIRST
    while size <= LAST:
        try:
            encode(size)  # the first of a size also chooses algorithms
            seconds = min(_timed(encode, size, clock) for _ in range(2))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            break
        rate = size / seconds
        if rate < best_rate * WORTH_IT:
            break
        best, best_rate = size, rate
        if 2 * used_share() > FREE_SHARE:  # twice the batch takes about twice the memory
            break
        size *= 2
    return best


def _timed(encode: Callable[[int], Tensor | None], size: int, clock: Callable[[], float]) -> float:
    started = clock()
    encode(size)
    return clock() - started


def last_batch_size(markers: Sequence[dict]) -> int | None:
    """The batch size with which most of a store was encoded, so that a resumed run gives the same bytes."""
    sizes = [marker["batch_size"] for marker in markers if marker["batch_size"]]
    return max(sizes, key=sizes.count) if sizes else None
