"""Encoding shards: all that a worker must know to do it anywhere, and the worker."""

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentae.codec import LatentCodec
from latentae.data.decode import DecodePolicy
from latentae.data.sources import Item
from latentae.errors import RequestError, ResumableError
from latentae.loading import load_model, weights_hash
from latentae.store.batch_size import find_batch_size
from latentae.store.clips import ClipLoader
from latentae.store.configuration import Options
from latentae.store.memory import batch_for
from latentae.store.plan import Plan, Shard
from latentae.store.shard import Sample, committed_marker, publish, read_rows, read_samples
from latentae.store.worker import PREFETCH_BYTES, BatchEncoder, LoadedAhead, Loader

Advance = Callable[[int, int], None]
"""Told how many inputs were done, and how many of them were bad, since it was told last."""


@dataclass(frozen=True)
class Model:
    """How an autoencoder is opened, in this process or another.

    ``source`` is a codec, an autoencoder or what `latentae.load` opens; ``weights_sha256`` what it must turn out to be.
    """

    source: LatentCodec | nn.Module | str | Path
    autocast: torch.dtype | None = None
    random_weights: bool = False
    weights_sha256: str | None = None

    def open(self, device: str | torch.device | None = None) -> LatentCodec:
        """A codec on ``device``, by default a GPU where there is one; where a codec was made, it is taken as it is.

        Raises:
            RequestError: it has other weights than when the store was begun.
        """
        if isinstance(self.source, LatentCodec) and device is None and self.weights_sha256 is None:
            return self.source
        source: Any = self.source.autoencoder if isinstance(self.source, LatentCodec) else self.source
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if not isinstance(source, nn.Module):
            source = load_model(source, random_weights=self.random_weights)
        if self.weights_sha256 is not None and weights_hash(source) != self.weights_sha256:
            raise RequestError(f"{self.source} changed since this run began: restore it, or encode into a new store.")
        autocast = self.source.autocast if isinstance(self.source, LatentCodec) else self.autocast
        return LatentCodec(source, device=device, autocast=autocast)


@dataclass(frozen=True)
class Job:
    """The encoding of a store, without saying which shards. Can be sent to other processes and machines.

    Args:
        fingerprint: of the store.
        reader: gives the bytes of inputs, of clips the clips.
        batch_size: None to find one out.
        workers: threads that read and decode.
        retry_failed: encode the bad inputs of shards that are done again.
    """

    store: Path
    fingerprint: str
    plan: Plan
    model: Model
    options: Options
    reader: Any
    policy: DecodePolicy
    batch_size: int | None
    workers: int
    retry_failed: bool = False

    def loader(self, codec: LatentCodec) -> Loader:
        clips = self.options.clips
        if clips is None:
            return Loader(self.reader, self.options.framing, self.policy)
        return ClipLoader(self.reader, self.options.framing, self.policy, codec.padded_frames, clips)


@dataclass(frozen=True)
class Report:
    """What became of a shard: ``inputs`` were encoded now, ``encoded`` are in it, ``bad`` are not."""

    shard: int
    inputs: int
    encoded: int
    bad: int
    seconds: float
    batch_size: int | None


@dataclass(frozen=True)
class _Work:
    """A shard, and those of its inputs that are not encoded yet."""

    shard: Shard
    items: tuple[Item, ...]
    all_items: tuple[Item, ...]
    marker: dict[str, Any] | None = None  # of the shard as it is


class ShardWorker:
    """Encodes and publishes shards: inputs of the next are loaded, and the one before is written, meanwhile."""

    def __init__(self, job: Job, device: str | None = None):
        self.job, self.codec = job, job.model.open(device)
        self.loader = job.loader(self.codec)
        self.carried = job.plan.carried
        self._encoder: BatchEncoder | None = None

    def run(self, shards: Iterable[int], advance: Advance) -> Iterator[Report]:
        """Encode the shards of these numbers; yields a report of each as soon as its marker is on disk.

        Draws from ``shards`` in a thread of its own, at most one number ahead of the shard that is being encoded.
        """
        drawn = _Drawn(shards, self._work)
        loaded = LoadedAhead(
            drawn.try_next,
            lambda work: work.items,
            lambda work, item: self.loader.load(item, work.shard.shape),
            cost=lambda work: 3 * math.prod(work.shard.shape),
            workers=self.job.workers,
            budget=PREFETCH_BYTES,
        )
        publishing: deque[tuple[Future[Any], float, _Work]] = deque()
        with (
            contextlib.closing(loaded),
            drawn,
            ThreadPoolExecutor(1, thread_name_prefix="latentae-publish") as publisher,
        ):
            while (work := loaded.next_group() or drawn.next()) is not None:
                started = time.monotonic()
                samples = list[Sample]()
                for batch in self._batches(work, loaded.results(work)):
                    self._encode(work.shard, batch)
                    advance(len(batch), sum(sample.latents is None for sample in batch))
                    samples += batch
                    if publishing and publishing[0][0].done():
                        yield _report(*publishing.popleft())
                if work.marker and not work.items:  # done already, as by a worker that was lost before it could say so
                    advance(work.shard.inputs, work.marker["bad"])
                drawn.finished()
                while publishing:
                    yield _report(*publishing.popleft())
                any_good = any(sample.latents is not None for sample in samples)
                batch_size = self._encoder.runner.batch_size if self._encoder and any_good else None
                future = publisher.submit(self._publish, work, samples, batch_size)
                publishing.append((future, started, work))
            while publishing:
                yield _report(*publishing.popleft())

    def _work(self, index: int) -> _Work:
        shard = self.job.plan.shards[index]
        items = tuple(self.job.plan.items(shard))
        marker = committed_marker(self.job.store, shard, self.job.fingerprint)
        if marker is None:
            return _Work(shard, items, items)
        if not self.job.retry_failed or not marker["bad"]:
            return _Work(shard, (), items, marker)
        statuses = read_rows(self.job.store, shard, ["status"])["status"]
        return _Work(shard, tuple(item for item, status in zip(items, statuses) if status == "bad"), items, marker)

    def _batches(self, work: _Work, samples: Iterator[Sample]) -> Iterator[list[Sample]]:
        """Samples in their order, with as many good ones in each batch as the model takes."""
        batch, good = list[Sample](), 0
        for sample in samples:
            batch.append(sample)
            good += sample.pixels is not None
            if good and good >= self._batch_size(work.shard):
                yield batch
                batch, good = [], 0
        if batch:
            yield batch

    def _batch_size(self, shard: Shard) -> int:
        if self._encoder is None:
            size = self.job.batch_size or find_batch_size(self.codec, self.job.options, shard.shape)
            self._encoder = BatchEncoder(self.codec, self.job.options, size)
        size = self._encoder.runner.batch_size
        return size if self.loader.framing.fixed_shape and not self.job.options.clips else batch_for(size, shard.shape)

    def _encode(self, shard: Shard, batch: list[Sample]) -> None:
        good = [sample for sample in batch if sample.pixels is not None]
        if good:
            self._batch_size(shard)
            assert self._encoder is not None
            self._encoder.encode(good)

    def _publish(self, work: _Work, samples: list[Sample], batch_size: int | None) -> dict[str, Any]:
        job, tensor = self.job, self.job.options.tensor
        now = committed_marker(job.store, work.shard, job.fingerprint)
        if now is not None and (now != work.marker or not work.items):
            return now  # another process was quicker, perhaps on a machine that gives other bytes
        if work.marker is not None:  # a retry: the others come from the shard as it is
            if now is None:
                raise ResumableError(f"Another process writes {work.shard.name} of {job.store}: run the command again.")
            batch_size = batch_size or work.marker["batch_size"]
            new = {sample.item.key: sample for sample in samples}
            kept = read_samples(job.store, work.shard, work.marker, work.all_items, tensor)
            samples = [new.get(sample.item.key, sample) for sample in kept]
        return publish(
            job.store,
            work.shard,
            samples,
            tensor=tensor,
            carried=self.carried,
            fingerprint=job.fingerprint,
            batch_size=batch_size,
        )


def _report(future: Future[dict[str, Any]], started: float, work: _Work) -> Report:
    marker = future.result()
    seconds = time.monotonic() - started
    return Report(work.shard.index, len(work.items), marker["encoded"], marker["bad"], seconds, marker["batch_size"])


class _Drawn:
    """Shards drawn from an iterator that may keep one waiting, by a thread, one ahead of what is finished."""

    def __init__(self, shards: Iterable[int], work: Callable[[int], _Work]):
        self._shards, self._work = iter(shards), work
        self._ready = threading.Condition()
        self._queue: deque[_Work] = deque()
        self._error: BaseException | None = None
        self._allowed, self._ended = 2, False
        self._thread = threading.Thread(target=self._draw, name="latentae-draw", daemon=True)

    def __enter__(self) -> "_Drawn":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._ready:
            self._ended = True
            self._ready.notify_all()

    def _draw(self) -> None:
        try:
            for index in self._shards:
                work = self._work(index)
                with self._ready:
                    self._queue.append(work)
                    self._allowed -= 1
                    self._ready.notify_all()
                    self._ready.wait_for(lambda: self._allowed > 0 or self._ended)
                    if self._ended:
                        return
        except BaseException as error:  # raised where it is waited for
            self._error = error
        with self._ready:
            self._ended = True
            self._ready.notify_all()

    def try_next(self) -> _Work | None:
        """The next shard, if it is there."""
        with self._ready:
            return self._queue.popleft() if self._queue else None

    def next(self) -> _Work | None:
        """The next shard, waiting for it; None at the end."""
        with self._ready:
            self._ready.wait_for(lambda: self._queue or self._ended)
            if self._queue:
                return self._queue.popleft()
            if self._error is not None:
                raise self._error
            return None

    def finished(self) -> None:
        """A shard has been encoded, so that one more may be drawn."""
        with self._ready:
            self._allowed += 1
            self._ready.notify_all()
