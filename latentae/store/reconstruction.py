"""Images through an autoencoder and back, from folder to folder, at their own sizes."""

import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentae.codec import LatentCodec
from latentae.console import Progress, say
from latentae.data.decode import DecodePolicy
from latentae.data.sources import Source, open_source, refuse_output_in_input
from latentae.store.configuration import check_counts, open_codec
from latentae.store.decode import noise_generator
from latentae.store.images import ImageWriter
from latentae.store.memory import BatchRunner, batch_for
from latentae.store.shard import Sample
from latentae.store.worker import PREFETCH_BYTES, Loader, check_max_bad, prefetch, refuse_too_many_bad

PIXEL_BYTES_PER_FILE_BYTE = 20  # roughly, of a photograph


@dataclass(frozen=True)
class ReconstructSummary:
    """What a run of `reconstruct` wrote; ``bad`` tells for each input that could not be decoded why."""

    folder: str
    images: int
    bad: dict[str, str]
    seconds: float

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "images_per_second": self.images_per_second}


def reconstruct(
    src: str | Path | Source,
    dst: str | Path,
    model: LatentCodec | nn.Module | str | Path,
    *,
    format: str = "png",
    batch_size: int = 4,
    max_bad: float = 0.01,
    limit: int | None = None,
    workers: int = 2,
    device: str | torch.device | None = None,
    autocast: torch.dtype | None = None,
    random_weights: bool = False,
    seed: int = 0,
    num_inference_steps: int | None = None,
) -> ReconstructSummary:
    """Write below ``dst`` what an autoencoder makes of every image of ``src``, at the size of each, lossless.

    The image ``a/b.jpg`` becomes ``a/b.png``. The mode of the latents is decoded.

    Args:
        format: ``png`` or ``webp``.
        batch_size: images of one size in a row that are run together, for 512 x 512; larger ones go in smaller batches.
        max_bad: how many images may be broken, as a share of all (float) or as a number (int).
        seed: with the name of an image, that of its noise, where the decoder samples.
        num_inference_steps: of a decoder that samples; None for the model's own number.

    Raises:
        RequestError: no images, no model, ``dst`` would overwrite or feed ``src``, or steps where the decoder has none.
        DataError: more images than ``max_bad`` are broken; all others are written by then.
    """
    check_counts(batch_size=batch_size, workers=workers, limit=limit)
    check_max_bad(max_bad)
    source = open_source(src) if isinstance(src, (str, Path)) else src
    folder = Path(dst)
    refuse_output_in_input(src, folder)
    items = source.items()[:limit]
    keys, inputs = [item.key for item in items], (item.uri for item in items)
    writer = ImageWriter(folder, keys, inputs, format=format, workers=workers)
    codec, _ = open_codec(model, device=device, autocast=autocast, random_weights=random_weights)
    if num_inference_steps is not None:
        codec = codec.with_inference_steps(num_inference_steps)
    loader = Loader(source, None, 1, DecodePolicy())
    runner = BatchRunner(batch_size)

    def through(batch: list[Sample]) -> Tensor:
        pixels = torch.stack([sample.pixels for sample in batch if sample.pixels is not None])  # (B, 3, H, W)
        return codec.reconstruct(pixels, generator=[noise_generator(seed, sample.item.key) for sample in batch])

    bad: list[Sample] = []
    started = time.monotonic()
    loaded = prefetch(
        loader.load,
        items,
        workers=workers,
        cost=lambda item: PIXEL_BYTES_PER_FILE_BYTE * item.size,
        budget=PREFETCH_BYTES,
    )
    with closing(loaded), writer, Progress("reconstruct", len(items)) as progress:
        for batch in _batches(loaded, batch_size):
            if batch[0].pixels is None:
                bad += batch
            else:
                for sample, image in zip(batch, runner.run(through, batch)):
                    writer.write(sample.item.key, image)
            progress.advance(len(batch))
    for sample in bad:
        say(f"bad: {sample.item.key}: {sample.message}")
    refuse_too_many_bad([str(sample.reason) for sample in bad], len(items), max_bad, f"All others are in {dst}.")
    reasons = {sample.item.key: str(sample.reason) for sample in bad}
    return ReconstructSummary(str(dst), len(items) - len(bad), reasons, time.monotonic() - started)


def _batches(samples: Iterable[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Neighbours of one shape together, a broken sample alone."""
    for shape, group in groupby(samples, key=lambda sample: sample.pixels is not None and tuple(sample.pixels.shape)):
        step = batch_for(batch_size, shape[1:]) if shape else 1
        while batch := list(islice(group, step)):
            yield batch
