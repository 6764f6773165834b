"""Images and clips through an autoencoder and back, from folder to folder, at their own sizes."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentae.codec import LatentCodec
from latentae.console import Progress, say
from latentae.data.clips import ClipSource, open_inputs
from latentae.data.decode import BadImage, DecodePolicy
from latentae.data.framing import Framing
from latentae.data.sources import Item, Source, refuse_output_in_input
from latentae.data.video import FrameChoice
from latentae.store.clips import ClipWriter, check_frames, chosen_frames, clip_windows, frames_of
from latentae.store.configuration import check_counts, open_codec
from latentae.store.decode import noise_generator
from latentae.store.images import ImageWriter
from latentae.store.memory import BatchRunner, batch_for
from latentae.store.shard import Sample
from latentae.store.worker import PREFETCH_BYTES, Loader, check_max_bad, prefetch, refuse_too_many_bad

PIXEL_BYTES_PER_FILE_BYTE = 20  # roughly, of a photograph


@dataclass(frozen=True)
class ReconstructSummary:
    """What a run of `reconstruct` wrote; ``bad`` tells for each input that could not be decoded why.

    ``images`` counts clips where these were the inputs, and ``unit`` says so.
    """

    folder: str
    images: int
    bad: dict[str, str]
    seconds: float
    unit: str = "images"

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "images_per_second": self.images_per_second}


def reconstruct(
    src: str | Path | Source | ClipSource,
    dst: str | Path,
    model: LatentCodec | nn.Module | str | Path,
    *,
    format: str | None = None,
    batch_size: int = 4,
    max_bad: float = 0.01,
    limit: int | None = None,
    workers: int = 2,
    device: str | torch.device | None = None,
    autocast: torch.dtype | None = None,
    random_weights: bool = False,
    seed: int = 0,
    num_inference_steps: int | None = None,
    frames: int | str | None = None,
    window: int | None = None,
) -> ReconstructSummary:
    """Write below ``dst`` what an autoencoder makes of every image of ``src``, or every clip, at the size of each.

    The image ``a/b.jpg`` becomes ``a/b.png``, lossless, and the clip ``a/b.webm`` becomes ``a/b.mp4`` with as many
    frames and as many a second. An autoencoder of images takes clips frame by frame. The mode of the latents is
    decoded.

    Args:
        format: ``png`` (default) or ``webp``; of clips ``mp4`` (default) or ``mkv``, which is lossless.
        batch_size: images of one size in a row that are run together, for 512 x 512; larger ones go in smaller batches.
        frames: of each clip, from its first on: a number or ``"all"``; where it is given, also images in a folder are
            the frames of a clip and GIFs move; else only videos are clips (`latentae.data.clips.open_inputs`).
        window: frames of a clip that go through the model at once, by default all (of an autoencoder of images,
            ``batch_size``), which long clips have no memory for. Windows know nothing of each other: seams may show.
        max_bad: how many images may be broken, as a share of all (float) or as a number (int).
        seed: with the name of an image, that of its noise, where the decoder samples.
        num_inference_steps: of a decoder that samples; None for the model's own number.

    Raises:
        RequestError: no images, no model, ``dst`` would overwrite or feed ``src``, or steps where the decoder has none.
        DataError: more images than ``max_bad`` are broken; all others are written by then.
    """
    check_counts(batch_size=batch_size, workers=workers, limit=limit, window=window)
    check_max_bad(max_bad)
    choice = chosen_frames(frames)
    source = open_inputs(src, clips=choice is not None) if isinstance(src, (str, Path)) else src
    folder = Path(dst)
    refuse_output_in_input(src, folder)
    items = source.items()[:limit]
    keys, inputs = [item.key for item in items], (item.uri for item in items)
    clips = isinstance(source, ClipSource)
    kind = ClipWriter if clips else ImageWriter
    format = format or ("mp4" if clips else "png")
    writer: Any = kind(folder, keys, inputs, format=format, workers=workers)
    codec, _ = open_codec(model, device=device, autocast=autocast, random_weights=random_weights)
    if num_inference_steps is not None:
        codec = codec.with_inference_steps(num_inference_steps)
    runner = BatchRunner(batch_size)
    started = time.monotonic()
    if isinstance(source, ClipSource):
        bad = _reconstruct_clips(source, items, writer, codec, runner, choice or FrameChoice(), window, seed)
    else:
        bad = _reconstruct_images(source, items, writer, codec, runner, workers, seed)
    for sample in bad:
        say(f"bad: {sample.item.key}: {sample.message}")
    refuse_too_many_bad([str(sample.reason) for sample in bad], len(items), max_bad, f"All others are in {dst}.")
    reasons = {sample.item.key: str(sample.reason) for sample in bad}
    seconds, unit = time.monotonic() - started, "clips" if clips else "images"
    return ReconstructSummary(str(dst), len(items) - len(bad), reasons, seconds, unit)


def _reconstruct_images(
    source: Source,
    items: Sequence[Item],
    writer: ImageWriter,
    codec: LatentCodec,
    runner: BatchRunner,
    workers: int,
    seed: int,
) -> list[Sample]:
    """The samples of those that could not be decoded."""
    loader = Loader(source, Framing(()), DecodePolicy())

    def through(batch: list[Sample]) -> Tensor:
        pixels = torch.stack([sample.pixels for sample in batch if sample.pixels is not None])  # (B, 3, H, W)
        return codec.reconstruct(pixels, generator=[noise_generator(seed, sample.item.key) for sample in batch])

    bad: list[Sample] = []
    loaded = prefetch(
        loader.load,
        items,
        workers=workers,
        cost=lambda item: PIXEL_BYTES_PER_FILE_BYTE * item.size,
        budget=PREFETCH_BYTES,
    )
    with closing(loaded), writer, Progress("reconstruct", len(items)) as progress:
        for batch in _batches(loaded, runner.batch_size):
            if batch[0].pixels is None:
                bad += batch
            else:
                for sample, image in zip(batch, runner.run(through, batch)):
                    writer.write(sample.item.key, image)
            progress.advance(len(batch))
    return bad


def _reconstruct_clips(
    source: ClipSource,
    items: Sequence[Item],
    writer: ClipWriter,
    codec: LatentCodec,
    runner: BatchRunner,
    choice: FrameChoice,
    window: int | None,
    seed: int,
) -> list[Sample]:
    """Clip by clip and window by window, so that no clip must fit into memory; the samples of the bad ones."""
    if not codec.is_video:
        window = window or runner.batch_size
    bad: list[Sample] = []
    with writer, Progress("reconstruct", len(items), "clips") as progress:
        for item in items:
            try:
                video = source.open(item)
                windows = (
                    _through(codec, runner, pixels, item, seed) for pixels in clip_windows(video, window, choice)
                )
                frames = (frame for pixels in windows for frame in frames_of(pixels))
                writer.write_now(item.key, frames, choice.rate(video.info))
            except BadImage as error:
                bad.append(Sample(item))
                bad[-1].fail(error.reason, error.explanation)
            progress.advance()
    return bad


def _through(codec: LatentCodec, runner: BatchRunner, window: Tensor, item: Item, seed: int) -> Tensor:
    """One window (3, T, H, W) of a clip and back; all frames and windows of a clip have the same noise."""
    batch = window.unsqueeze(0) if codec.is_video else window.transpose(0, 1)  # (1, 3, T, H, W) or (T, 3, H, W)

    def reconstruct_batch(pixels: Tensor) -> Tensor:
        return codec.reconstruct(pixels, generator=[noise_generator(seed, item.key) for _ in pixels])

    pixels = runner.run(reconstruct_batch, batch)
    clip = pixels[0] if codec.is_video else pixels.transpose(0, 1)
    check_frames(codec, clip, window.shape[1])
    return clip


def _batches(samples: Iterable[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Neighbours of one shape together, a broken sample alone."""
    for shape, group in groupby(samples, key=lambda sample: sample.pixels is not None and tuple(sample.pixels.shape)):
        step = batch_for(batch_size, shape[1:]) if shape else 1
        while batch := list(islice(group, step)):
            yield batch
