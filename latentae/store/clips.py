"""Clips in and out of stores: loading them for the encoder, writing what was decoded."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentae.codec import LatentCodec
from latentae.data.decode import BadImage
from latentae.data.sources import Item
from latentae.data.transforms import adm_center_crop, to_tensor
from latentae.data.video import VIDEO_FORMATS, FrameChoice, Video, check_memory, frame_rate, write_video
from latentae.errors import RequestError, ResumableError
from latentae.nn.pixels import pad_frames, pad_to_multiple, to_uint8
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
    """Reads a clip and prepares its pixels: the chosen frames, each cropped or padded as an image is, and the last one
    repeated until the model takes so many; ``padded_frames`` is the codec's."""

    source: Any  # a ClipSource
    padded_frames: Callable[[int], int]
    choice: FrameChoice

    @property
    def fixed_shape(self) -> tuple[int, ...] | None:
        if self.size is None or self.choice.frames is None:
            return None
        return self._padded(self.choice.frames, self.size, self.size)

    def shape(self, item: Item) -> tuple[int, ...]:
        """Frames, height and width when prepared, without decoding all; (0, 0, 0) if that cannot be found out."""
        try:
            info = self.source.open(item, self.policy).info
            frames = len(self.choice.numbers(info))
        except BadImage:
            return UNKNOWN_CLIP_SHAPE
        height, width = (info.height, info.width) if self.size is None else (self.size, self.size)
        return self._padded(frames, height, width)

    def load(self, item: Item) -> Sample:
        sample = Sample(item, bytes=item.size)
        try:
            sample.sha256 = self.source.sha256(item)
            self._load(sample, self.source.open(item, self.policy))
        except BadImage as error:
            sample.fail(error.reason, error.explanation)
        except MemoryError as error:
            raise ResumableError(f"Out of memory while decoding {item.uri}: run the same command with more.") from error
        except OSError as error:
            raise ResumableError(
                f"{item.uri} cannot be read ({error.strerror or error}): run the same command when its storage is back."
            ) from error
        return sample

    def _load(self, sample: Sample, video: Video) -> None:
        height, width = video.info.height, video.info.width
        sample.height, sample.width = height, width
        numbers = self.choice.numbers(video.info)
        sample.frames, sample.fps = len(numbers), float(self.choice.rate(video.info))
        if self.size is None:
            sample.crop = (0, 0, height, width)
        else:
            side = min(height, width)
            sample.crop = ((height - side) // 2, (width - side) // 2, side, side)
        check_memory(len(numbers), *(self.size or height, self.size or width))
        frames = [self._prepared(frame) for frame in video.frames(numbers)]
        sample.pixels = pad_frames(torch.stack(frames, dim=1), self.padded_frames(len(frames)))  # (3, T, H, W)

    def _prepared(self, frame: np.ndarray) -> Tensor:
        """One frame as uint8 (3, H, W)."""
        if self.size is not None:
            return to_tensor(adm_center_crop(frame, self.size))
        return pad_to_multiple(to_tensor(frame).float(), self.multiple).to(torch.uint8)

    def _padded(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        return self.padded_frames(frames), height + -height % self.multiple, width + -width % self.multiple


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
