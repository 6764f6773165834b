"""Clips in and out of stores: loading them for the encoder, writing what was decoded."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from latentae.codec import LatentCodec
from latentae.data.decode import BadImage
from latentae.data.sources import Item
from latentae.data.video import VIDEO_FORMATS, FrameChoice, Video, check_memory, frame_rate, write_video
from latentae.errors import RequestError
from latentae.nn.pixels import pad_frames, to_uint8
from latentae.store.images import FileWriter
from latentae.store.plan import UNKNOWN_CLIP_SHAPE
from latentae.store.shard import Sample
from latentae.store.worker import Loader


def chosen_frames(
    frames: int | str | None, fps: Fraction | float | str | None = None, stride: int = 1
) -> FrameChoice | None:
    """The frames that a user asks for of each clip, None where nothing is said.

    Raises:
        RequestError: no number of frames, no rate, no stride.
    """
    if frames is None and fps is None and stride == 1:
        return None
    if not (frames is None or frames == "all" or isinstance(frames, int)):
        raise RequestError(f"frames={frames!r}; expected a number of frames or 'all'.")
    number = frames if isinstance(frames, int) else None
    return FrameChoice(number, None if fps is None else frame_rate(fps), stride)


@dataclass(frozen=True)
class ClipLoader(Loader):
    """Reads a clip and prepares its pixels: the chosen frames, each framed as an image is, and the last one repeated
    until the model takes so many; ``padded_frames`` is the codec's."""

    padded_frames: Callable[[int], int]
    choice: FrameChoice

    @property
    def fixed_shape(self) -> tuple[int, ...] | None:
        if self.framing.fixed_shape is None or self.choice.frames is None:
            return None
        return self.padded_frames(self.choice.frames), *self.framing.fixed_shape

    def shape(self, item: Item) -> tuple[int, ...]:
        """Frames, height and width when prepared, without decoding all; (0, 0, 0) if that cannot be found out."""
        try:
            info = self.reader.open(item, self.policy).info
            frames = len(self.choice.numbers(info))
        except BadImage:
            return UNKNOWN_CLIP_SHAPE
        return self.padded_frames(frames), *self.framing.shape(info.height, info.width)

    def _load(self, sample: Sample) -> None:
        sample.sha256 = self.reader.sha256(sample.item)
        video: Video = self.reader.open(sample.item, self.policy)
        height, width = video.info.height, video.info.width
        sample.height, sample.width = height, width
        numbers = self.choice.numbers(video.info)
        sample.frames, sample.fps = len(numbers), float(self.choice.rate(video.info))
        shape = self.framing.shape(height, width)
        check_memory(len(numbers), *shape)
        frames = []
        for frame in video.frames(numbers):
            pixels, sample.crop = self.framing.apply(frame, shape)
            frames.append(pixels)
        sample.pixels = pad_frames(torch.stack(frames, dim=1), self.padded_frames(len(frames)))  # (3, T, H, W)


class ClipWriter(FileWriter):
    """Writes a clip for each of ``keys``, ``a/b.webm`` as ``a/b.mp4``; see `FileWriter` and `write_video`."""

    formats = tuple(VIDEO_FORMATS)
    most_pending = 1  # clips are large

    def write(self, key: str, pixels: Tensor, fps: Fraction | float) -> None:
        """Write float pixels (3, T, H, W) in [-1, 1]; waits while another clip is on its way."""
        self._submit(write_video, self.paths[key], frames_of(pixels), fps)

    def write_now(self, key: str, frames: Iterable[np.ndarray], fps: Fraction | float) -> None:
        """Write uint8 frames (H, W, 3) as they come."""
        write_video(self.paths[key], frames, fps)


def clip_windows(video: Video, size: int | None, choice: FrameChoice) -> Iterator[Tensor]:
    """The chosen frames, ``size`` at a time or all at once, as uint8 (3, T, H, W).

    Raises:
        BadVideo: the clip is broken, or too large for memory at once.
    """
    windows: Iterable[np.ndarray] = [video.clip(choice)] if size is None else video.windows(size, choice)
    for window in windows:
        yield torch.from_numpy(window).permute(3, 0, 1, 2)


def check_frames(codec: LatentCodec, clip: Tensor, frames: int) -> None:
    """Refuse a model that made fewer frames (3, T, H, W) than it was given.

    Raises:
        RequestError: it did.
    """
    if clip.shape[1] < frames:
        raise RequestError(
            f"{type(codec.autoencoder).__name__} gives back {clip.shape[1]} of {frames} frames: take another number of "
            "--frames, or another --window."
        )


def frames_of(clip: Tensor) -> Sequence[np.ndarray]:
    """Float pixels (3, T, H, W) in [-1, 1] as frames uint8 (H, W, 3)."""
    return list(to_uint8(clip).permute(1, 2, 3, 0).contiguous().cpu().numpy())
