"""From inputs to the latents of a shard: threads read, decode and crop; this thread feeds batches to the model.

What is wrong with one input is written into its sample and the work goes on. What is wrong with the machine (memory,
disk) stops the work and loses nothing.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from latentae.codec import LatentCodec
from latentae.data.decode import BadImage, DecodePolicy, decode_image, probe_size
from latentae.data.sources import Item, Source
from latentae.data.transforms import adm_center_crop, to_tensor
from latentae.errors import DataError, RequestError, ResumableError
from latentae.nn.pixels import pad_to_multiple, to_float
from latentae.store.configuration import DTYPES, Options
from latentae.store.memory import BatchRunner, batch_for
from latentae.store.plan import UNKNOWN_SHAPE, Shard
from latentae.store.shard import Sample

PREFETCH_BYTES = 256 * 2**20

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Loader:
    """Reads an input and prepares its pixels: an ADM centre crop of ``size``, or the whole image if size is None,
    padded to a multiple of ``multiple``."""

    source: Source
    size: int | None
    multiple: int
    policy: DecodePolicy

    @property
    def fixed_shape(self) -> tuple[int, ...] | None:
        """The shape of the pixels of every input, None where they have their own."""
        return None if self.size is None else (self.size, self.size)

    def shape(self, item: Item) -> tuple[int, ...]:
        """Height and width of a whole image when padded, from its header; (0, 0) if that cannot be read."""
        try:
            height, width = probe_size(self._read(item))
        except BadImage:
            return UNKNOWN_SHAPE
        if height * width > self.policy.max_pixels:  # refused when it is decoded; its shape may not fit a table
            return UNKNOWN_SHAPE
        return height + -height % self.multiple, width + -width % self.multiple

    def load(self, item: Item) -> Sample:
        """The sample of ``item`` with its pixels, or with the reason why there are none."""
        sample = Sample(item)
        try:
            data = self._read(item)
            sample.bytes, sample.sha256 = len(data), hashlib.sha256(data).hexdigest()
            image = decode_image(data, self.policy)
        except BadImage as error:
            sample.fail(error.reason, error.explanation)
            return sample
        except MemoryError as error:
            raise ResumableError(f"Out of memory while decoding {item.uri}: run the same command with more.") from error
        height, width = image.shape[:2]
        sample.height, sample.width = height, width
        if self.size is None:
            sample.crop = (0, 0, height, width)
            pixels = to_tensor(image)
            sample.pixels = pad_to_multiple(pixels.float(), self.multiple).to(torch.uint8)
        else:
            side = min(height, width)
            sample.crop = ((height - side) // 2, (width - side) // 2, side, side)
            sample.pixels = to_tensor(adm_center_crop(image, self.size))
        return sample

    def _read(self, item: Item) -> bytes:
        try:
            return self.source.read(item)
        except OSError as error:
            raise ResumableError(
                f"{item.uri} cannot be read ({error.strerror or error}): run the same command when its storage is back."
            ) from error

    def load_for(self, shard: Shard, item: Item) -> Sample:
        """As `load`, and held to the shape that ``shard`` was planned for."""
        sample = self.load(item)
        if sample.pixels is not None and tuple(sample.pixels.shape[1:]) != shard.shape:
            planned = "x".join(map(str, shard.shape))
            sample.fail(
                "other-shape",
                f"Its size of {sample.height}x{sample.width} (height x width) does not fit the {planned} of the shard "
                "that it was planned for; encode it into a new store.",
            )
        return sample


def prefetch(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    workers: int,
    cost: Callable[[Task], int],
    budget: int,
) -> Generator[Result, None, None]:
    """Results of ``function`` in the order of ``tasks``, computed ahead by threads.

    Args:
        cost: bytes that a result holds.
        budget: bytes that may be held by results that nobody has taken yet; one result may always be.
    """
    window: deque[tuple[int, Future[Result]]] = deque()
    held = 0
    pool = ThreadPoolExecutor(workers, thread_name_prefix="latentae-load")
    try:
        for task in tasks:
            while window and held + cost(task) > budget:
                size, future = window.popleft()
                yield future.result()
                held -= size
            held += cost(task)
            window.append((cost(task), pool.submit(function, task)))
        while window:
            yield window.popleft()[1].result()
    finally:
        pool.shutdown(cancel_futures=True)


class BatchEncoder:
    """Gives samples their latents, a batch at a time; ``bad`` counts those that have none in the end."""

    def __init__(self, codec: LatentCodec, options: Options, batch_size: int):
        self.codec, self.options, self.dtype = codec, options, DTYPES[options.dtype]
        self.runner = BatchRunner(batch_size)
        self.bad = 0

    def encode_shard(
        self, shard: Shard, loaded: Iterator[Sample], advance: Callable[[int], None]
    ) -> tuple[list[Sample], int]:
        """The samples of ``shard``, encoded, and the size of its batches (of the smallest, where memory was short).

        Calls ``advance`` with the number of samples that were done since it was called last.
        """
        samples: list[Sample] = []
        batch: list[Sample] = []
        for sample in loaded:
            samples.append(sample)
            if sample.pixels is None:
                self.bad += 1
                advance(1)
                continue
            batch.append(sample)
            if len(batch) >= self._batch_size(shard):
                self._encode(batch)
                advance(len(batch))
                batch = []
        if batch:
            self._encode(batch)
            advance(len(batch))
        return samples, self._batch_size(shard)

    def _batch_size(self, shard: Shard) -> int:
        size = self.runner.batch_size
        return size if self.options.size and not self.options.clips else batch_for(size, shard.shape)

    def _encode(self, samples: list[Sample]) -> None:
        for sample, latents in zip(samples, self.runner.run(self._latents, samples)):
            self._accept(sample, latents)
            self.bad += sample.latents is None

    @torch.no_grad()
    def _latents(self, samples: list[Sample]) -> Tensor:
        # (B, 3, H, W), or (B, 3, T, H, W) of clips
        images = torch.stack([sample.pixels for sample in samples if sample.pixels is not None])
        posterior = raw_posterior(self.codec, to_float(images.to(self.codec.device)))
        if self.options.kind == "moments":
            latents = moments_of(posterior)
        elif self.options.kind == "sample":
            latents = posterior.sample([key_generator(self.options.seed, sample.item.key) for sample in samples])
        else:
            latents = posterior.mode()
        if self.options.clips and latents.shape[2] * self.codec.temporal_ratio < images.shape[2]:
            raise RequestError(
                f"{type(self.codec.autoencoder).__name__} makes {latents.shape[2]} frames of latents of "
                f"{images.shape[2]} frames, too few for its ratio in time of {self.codec.temporal_ratio}: clips would "
                "lose their ends; take another number of --frames."
            )
        return latents.float().cpu()

    def _accept(self, sample: Sample, latents: Tensor) -> None:
        stored = latents.to(self.dtype, copy=True)
        if not latents.isfinite().all():
            sample.fail("not-finite", "The model gives NaN or infinite latents for it.")
        elif not stored.isfinite().all():
            largest = latents.abs().max().item()
            sample.fail("overflow", f"Its largest latent, {largest:.4g}, does not fit into {self.dtype}.")
        else:
            sample.latents, sample.pixels = stored, None


def key_generator(seed: int, key: str, purpose: str = "") -> torch.Generator:
    """The random numbers of one input: a function of the seed and the key, never of order, batch, rank or device.

    Another ``purpose`` gives others: the noise that a decoder starts from is not that of the posterior's sample.
    """
    digest = hashlib.sha256(f"{seed}\0{key}{purpose and chr(0) + purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def raw_posterior(codec: LatentCodec, pixels: Tensor) -> Any:
    """The codec's posterior of images (B, 3, H, W), for a video autoencoder videos of one frame, or (B, 3, T, H, W)."""
    return codec.posterior(pixels.unsqueeze(2) if codec.is_video and pixels.ndim == 4 else pixels)


def moments_of(posterior: Any) -> Tensor:
    """Means and log variances, one after the other along the channels; of planes as volumes."""
    if hasattr(posterior, "moments"):
        return posterior.moments
    return torch.cat([posterior.mean, posterior.logvar], dim=1)


def check_max_bad(max_bad: float) -> None:
    """Refuse what is neither a share nor a number of inputs, NaN included."""
    if not max_bad >= 0:
        raise RequestError(f"max_bad={max_bad}; expected a share such as 0.01, or a number of inputs.")


def refuse_too_many_bad(reasons: Sequence[str], inputs: int, max_bad: float, remedy: str) -> None:
    """Compare the number of bad inputs, given by their reasons, with what is allowed.

    Raises:
        DataError: there are more than ``max_bad``, a share of ``inputs`` (a float up to 1) or a number (an int).
    """
    allowed = max_bad if isinstance(max_bad, int) or max_bad > 1 else max_bad * inputs
    if len(reasons) > allowed:
        listed = ", ".join(f"{count} {reason}" for reason, count in Counter(reasons).most_common())
        raise DataError(
            f"{len(reasons)} of {inputs} inputs are bad ({listed}), more than max_bad={max_bad} allows. {remedy}"
        )
