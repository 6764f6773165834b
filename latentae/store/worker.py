"""From inputs to latents: threads read, decode and crop ahead; one thread feeds batches to the model.

What is wrong with one input is written into its sample and the work goes on. What is wrong with the machine (memory,
disk) stops the work and loses nothing.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from latentae.codec import LatentCodec
from latentae.data.decode import BadImage, DecodePolicy, decode_picture, probe_size
from latentae.data.framing import Framing
from latentae.data.sources import Item
from latentae.errors import DataError, RequestError, ResumableError
from latentae.nn.pixels import to_float
from latentae.store.configuration import DTYPES, Options
from latentae.store.memory import BatchRunner
from latentae.store.plan import UNKNOWN_SHAPE
from latentae.store.shard import Sample

PREFETCH_BYTES = 256 * 2**20

Task = TypeVar("Task")
Result = TypeVar("Result")


class Reader(Protocol):
    """What gives the bytes of an input: a source, or `latentae.data.sources.reading.UriReader`."""

    def read(self, item: Item) -> bytes: ...


@dataclass(frozen=True)
class Loader:
    """Reads an input and prepares its pixels as ``framing`` says."""

    reader: Any  # a Reader; of clips what opens them
    framing: Framing
    policy: DecodePolicy

    @property
    def fixed_shape(self) -> tuple[int, ...] | None:
        """The shape of the pixels of every input, None where they differ."""
        return self.framing.fixed_shape

    def shape(self, item: Item) -> tuple[int, ...]:
        """Height and width of an input when prepared, from its header; (0, 0) if that cannot be read."""
        try:
            height, width = probe_size(self._read(item))
        except BadImage:
            return UNKNOWN_SHAPE
        if height * width > self.policy.max_pixels:  # refused when it is decoded; its shape may not fit a table
            return UNKNOWN_SHAPE
        return self.framing.shape(height, width)

    def load(self, item: Item, planned: tuple[int, ...] | None = None) -> Sample:
        """The sample of ``item`` with its pixels, or with the reason why there are none, such as a shape other than
        the ``planned`` one."""
        sample = Sample(item, bytes=item.size)
        try:
            self._load(sample)
        except BadImage as error:
            sample.fail(error.reason, error.explanation)
        except MemoryError as error:
            raise ResumableError(f"Out of memory while decoding {item.uri}: run the same command with more.") from error
        except OSError as error:
            raise _storage_error(item, error) from error
        if planned is not None and sample.pixels is not None and tuple(sample.pixels.shape[1:]) != planned:
            sample.fail(
                "other-shape",
                f"Its size of {sample.height}x{sample.width} (height x width) does not fit the "
                f"{'x'.join(map(str, planned))} of the shard that it was planned for; encode it into a new store.",
            )
        return sample

    def _load(self, sample: Sample) -> None:
        data = self._read(sample.item)
        sample.bytes, sample.sha256 = len(data), hashlib.sha256(data).hexdigest()
        picture = decode_picture(data, self.policy)
        sample.width, sample.height = picture.size
        sample.pixels, sample.crop = self.framing.apply(picture, self.framing.shape(sample.height, sample.width))

    def _read(self, item: Item) -> bytes:
        try:
            return self.reader.read(item)
        except OSError as error:
            raise _storage_error(item, error) from error


def _storage_error(item: Item, error: OSError) -> ResumableError:
    return ResumableError(
        f"{item.uri} cannot be read ({error.strerror or error}): run the same command when its storage is back."
    )


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


class LoadedAhead:
    """Tasks in groups, and the results of a function, which threads compute ahead: within a group and, as soon as it is
    there, in the next one.

    Args:
        groups: drawn one ahead of the group that is being used, never more; a group that is not there yet (None) is
            asked for again.
        tasks: of a group.
        cost: bytes that each result of a group holds.
        budget: bytes that may be held by results that nobody has taken yet; one result may always be.
    """

    def __init__(
        self,
        draw: Callable[[], Any],
        tasks: Callable[[Any], Iterable[Any]],
        function: Callable[[Any, Any], Any],
        *,
        cost: Callable[[Any], int],
        workers: int,
        budget: int,
    ):
        self.draw, self.tasks, self.function, self.cost, self.budget = draw, tasks, function, cost, budget
        self._groups: deque[tuple[Any, Iterator[Any], deque[Future[Any]]]] = deque()
        self._held = 0
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="latentae-load")

    def results(self, group: Any) -> Iterator[Any]:
        """The results of a group, in the order of its tasks; groups in the order in which they were drawn."""
        if not self._groups:
            self._add(group)
        assert self._groups[0][0] is group
        futures = self._groups[0][2]
        while True:
            self._fill()
            if not futures:
                self._groups.popleft()
                return
            result = futures.popleft().result()
            self._held -= self.cost(group)
            yield result

    def next_group(self) -> Any:
        """The group that is already being loaded, or None."""
        return self._groups[0][0] if self._groups else None

    def _add(self, group: Any) -> None:
        self._groups.append((group, iter(self.tasks(group)), deque()))

    def _fill(self) -> None:
        number = 0
        while number < 2:
            if number == len(self._groups):
                group = self.draw()
                if group is None:
                    return
                self._add(group)
            group, tasks, futures = self._groups[number]
            cost = self.cost(group)
            while not self._held or self._held + cost <= self.budget:
                try:
                    task = next(tasks)
                except StopIteration:
                    break
                self._held += cost
                futures.append(self._pool.submit(self.function, group, task))
            else:
                return
            number += 1

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class BatchEncoder:
    """Gives samples their latents, a batch at a time."""

    def __init__(self, codec: LatentCodec, options: Options, batch_size: int):
        self.codec, self.options, self.dtype = codec, options, DTYPES[options.dtype]
        self.runner = BatchRunner(batch_size)

    def encode(self, samples: list[Sample]) -> None:
        """Set the latents of samples of one shape, or say why they have none."""
        for sample, latents in zip(samples, self.runner.run(lambda part: self._latents(part, False), samples)):
            sample.latents = self._stored(sample, latents)
        if self.options.flip:
            for sample, latents in zip(samples, self.runner.run(lambda part: self._latents(part, True), samples)):
                if sample.latents is not None:
                    sample.flipped = self._stored(sample, latents)
        for sample in samples:
            sample.pixels = None

    @torch.no_grad()
    def _latents(self, samples: Sequence[Sample], flip: bool) -> Tensor:
        # (B, 3, H, W), or (B, 3, T, H, W) of clips
        images = torch.stack([sample.pixels for sample in samples if sample.pixels is not None])
        if flip:
            images = images.flip(-1)
        posterior = raw_posterior(self.codec, to_float(images.to(self.codec.device)))
        if self.options.kind == "moments":
            latents = moments_of(posterior)
        elif self.options.kind == "sample":
            purpose = "flip" if flip else ""
            latents = posterior.sample([key_generator(self.options.seed, s.item.key, purpose) for s in samples])
        else:
            latents = posterior.mode()
        if self.options.clips and latents.shape[2] * self.codec.temporal_ratio < images.shape[2]:
            raise RequestError(
                f"{type(self.codec.autoencoder).__name__} makes {latents.shape[2]} frames of latents of "
                f"{images.shape[2]} frames, too few for its ratio in time of {self.codec.temporal_ratio}: clips would "
                "lose their ends; take another number of --frames."
            )
        return latents.float().cpu()

    def _stored(self, sample: Sample, latents: Tensor) -> Tensor | None:
        """Latents as they are stored; None, and a reason, where they cannot be."""
        stored = latents.to(self.dtype, copy=True)
        if not latents.isfinite().all():
            sample.fail("not-finite", "The model gives NaN or infinite latents for it.")
        elif not stored.isfinite().all():
            largest = latents.abs().max().item()
            sample.fail("overflow", f"Its largest latent, {largest:.4g}, does not fit into {self.dtype}.")
        else:
            return stored
        return None


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
