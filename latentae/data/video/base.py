"""What every clip has in common: when its frames are shown, which of them are wanted, and how they are read."""

import bisect
import io
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from latentae.data.decode import BadImage, DecodePolicy
from latentae.errors import RequestError

ASSUMED_FPS = Fraction(24)  # of folders of frames and arrays, which have no rate of their own
MOST_BYTES = 2**33  # of a clip in memory


class BadVideo(BadImage):
    """This is no clip that can be decoded; ``reason`` is the short code that tables are made of."""


@dataclass(frozen=True)
class VideoInfo:
    """The frames of a clip: their size as shown, and when they are.

    ``pts`` are the presentation times, increasing, in units of ``tick`` seconds; ``rate`` is the number of frames per
    second that the file states. ``by_order`` says that the file has no presentation times, and these were counted.
    """

    height: int
    width: int
    pts: tuple[int, ...]
    tick: Fraction
    rate: Fraction | None = None
    by_order: bool = False

    @property
    def frames(self) -> int:
        return len(self.pts)

    @cached_property
    def constant(self) -> bool:
        """Whether the frames follow each other at the stated rate, to the precision of the file's clock."""
        if self.rate is None:
            return False
        step = 1 / (self.rate * self.tick)
        return all(abs(time - self.pts[0] - number * step) <= 1 for number, time in enumerate(self.pts))

    @cached_property
    def fps(self) -> Fraction:
        """Frames per second: the stated rate where it holds, else the mean one."""
        if self.constant and self.rate is not None:
            return self.rate
        if len(self.pts) == 1:
            return self.rate or ASSUMED_FPS
        return frame_rate((len(self.pts) - 1) / ((self.pts[-1] - self.pts[0]) * self.tick))

    @cached_property
    def _clock(self) -> tuple[Sequence[int], Fraction, Fraction]:
        """Times of the frames, the seconds of their unit, and the usual interval in it."""
        if self.constant or len(self.pts) == 1:  # without what the file's clock rounds away
            return range(len(self.pts)), 1 / self.fps, Fraction(1)
        steps = sorted(later - earlier for earlier, later in pairwise(self.pts))
        return self.pts, self.tick, Fraction(steps[(len(steps) - 1) // 2])


def frame_rate(value: Fraction | float | str) -> Fraction:
    """A rate in frames per second, exact where it is one of the usual ones: 29.97003 is 30000/1001.

    Raises:
        RequestError: no positive number.
    """
    try:
        rate = Fraction(value).limit_denominator(1001)
    except (ValueError, OverflowError, ZeroDivisionError):
        rate = Fraction(0)
    if rate <= 0:
        raise RequestError(f"{value!r} frames per second: expected a positive number such as 24 or 30000/1001.")
    return rate


def frame_numbers(info: VideoInfo, *, start: int = 0, fps: Fraction | None = None, stride: int = 1) -> Iterator[int]:
    """Numbers of the source frames that make up a clip, from frame ``start`` to the end of the source.

    Without ``fps``, frame ``k`` is frame ``start + k stride`` of the source. With it, it is the one that is on show at
    the time ``t = k stride / fps`` after the time of frame ``start``, where a frame counts as on show from half a frame
    interval before its time on. At a constant rate that is frame ``start + floor(k stride rate / fps + 1/2)``, the
    nearest in time, the later one of two; at a variable rate, where the interval is the median one, a frame that is
    held for long stays until shortly before the next. The clip ends one interval after the time of its last frame.
    """
    if fps is None:
        yield from range(start, info.frames, stride)
        return
    times, unit, interval = info._clock
    step = stride / (fps * unit)
    time, end = Fraction(times[start]), times[-1] + interval
    while time < end:
        yield bisect.bisect_right(times, math.floor(time + interval / 2)) - 1
        time += step


@dataclass(frozen=True)
class FrameChoice:
    """Which frames of a clip are taken: ``frames`` of them (None: to the end), at ``fps`` (None: all there are), and of
    these every ``stride``-th; see `frame_numbers`."""

    frames: int | None = None
    fps: Fraction | None = None
    stride: int = 1

    def __post_init__(self) -> None:
        for name, value in (("frames", self.frames), ("stride", self.stride)):
            if value is not None and value < 1:
                raise RequestError(f"{name}={value}; expected at least 1.")

    def numbers(self, info: VideoInfo, start: int = 0) -> list[int]:
        """The chosen frames from ``start`` on.

        Raises:
            BadVideo: ``too-short``: there are fewer than ``frames``.
        """
        numbers = list(islice(frame_numbers(info, start=start, fps=self.fps, stride=self.stride), self.frames))
        if self.frames is not None and len(numbers) < self.frames:
            rate = f" at {float(self.fps):.6g} per second" if self.fps else ""
            stride = f", every {self.stride}th" if self.stride > 1 else ""
            raise BadVideo("too-short", f"it has {len(numbers)} frames{rate}{stride} and {self.frames} are asked for.")
        return numbers

    def starts(self, info: VideoInfo) -> int:
        """From how many frames, 0 to this number - 1, a whole choice can start.

        Raises:
            BadVideo: ``too-short``: from none.
        """
        self.numbers(info)
        if self.frames is None:
            return 1
        if self.fps is None:
            return info.frames - (self.frames - 1) * self.stride
        times, unit, interval = info._clock
        latest = times[-1] + interval - (self.frames - 1) * self.stride / (self.fps * unit)  # starts lie before it
        return bisect.bisect_left(times, math.ceil(latest))

    def describe(self) -> dict[str, int | str | None]:
        """The choice as JSON, for the record of a store."""
        return {
            "frames": self.frames or "all",
            "fps": None if self.fps is None else str(self.fps),
            "stride": self.stride,
        }

    def rate(self, info: VideoInfo) -> Fraction:
        """Frames per second of the chosen clip."""
        return (self.fps or info.fps) / self.stride


def check_memory(frames: int, height: int, width: int) -> None:
    """Refuse to hold more than 8 GiB of pixels at once.

    Raises:
        BadVideo: ``too-large``.
    """
    if frames * height * width * 3 > MOST_BYTES:
        raise BadVideo(
            "too-large", f"{frames} frames of {width} x {height} pixels are too many to be in memory at once."
        )


@dataclass(frozen=True, repr=False)
class ClipBytes:
    """A clip in memory, which is opened as a path is."""

    data: bytes
    name: str

    def open(self, mode: str = "rb") -> BinaryIO:
        return io.BytesIO(self.data)

    def is_dir(self) -> bool:
        return False

    def __str__(self) -> str:
        return self.name


class Video(ABC):
    """One clip, open for reading; made by `open_video`."""

    def __init__(self, path: Path | ClipBytes, policy: DecodePolicy, info: VideoInfo | None = None):
        self.path, self.policy = path, policy
        self._info = info

    @property
    def info(self) -> VideoInfo:
        """Size and times, found at the first use.

        Raises:
            BadVideo: it is no clip, or broken, or too large.
        """
        if self._info is None:
            self._info = self._probe()
        return self._info

    @abstractmethod
    def _probe(self) -> VideoInfo: ...

    @abstractmethod
    def _frames(self, numbers: Sequence[int]) -> Iterator[np.ndarray]: ...

    def frames(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        """The frames of these numbers, which do not fall and may repeat: uint8 (H, W, 3), one at a time in memory.

        Raises:
            BadVideo: one of them cannot be decoded, or has another size than the first.
        """
        if any(later < earlier for earlier, later in pairwise(numbers)):
            raise RequestError("Frames are read in the order of their numbers.")
        if not numbers:
            return
        if not 0 <= numbers[0] <= numbers[-1] < self.info.frames:
            raise RequestError(f"Frames {numbers[0]} to {numbers[-1]} of a clip of {self.info.frames}.")
        for number, frame in zip(numbers, self._frames(numbers)):
            self._check_size(number, *frame.shape[:2])
            yield frame

    def clip(self, choice: FrameChoice | None = None, start: int = 0) -> np.ndarray:
        """All chosen frames: uint8 (T, H, W, 3).

        Raises:
            BadVideo: as `frames` and `FrameChoice.numbers`, or ``too-large`` for memory.
        """
        numbers = (choice or FrameChoice()).numbers(self.info, start)
        check_memory(len(numbers), self.info.height, self.info.width)
        clip = np.empty((len(numbers), self.info.height, self.info.width, 3), np.uint8)
        for position, frame in enumerate(self.frames(numbers)):
            clip[position] = frame
        return clip

    def windows(self, size: int, choice: FrameChoice | None = None) -> Iterator[np.ndarray]:
        """The chosen frames, ``size`` at a time, the last time what is left: uint8 (up to size, H, W, 3)."""
        frames = self.frames((choice or FrameChoice()).numbers(self.info))
        while window := list(islice(frames, size)):
            yield np.stack(window)

    def _check_size(self, number: int, height: int, width: int) -> None:
        if (height, width) != (self.info.height, self.info.width):
            raise BadVideo(
                "mixed-sizes",
                f"frame {number} has {width} x {height} pixels and the first {self.info.width} x {self.info.height}.",
            )

    def _check_pixels(self, height: int, width: int) -> None:
        if height * width > self.policy.max_pixels:
            raise BadVideo(
                "too-large", f"{width} x {height} pixels a frame are more than max_pixels, {self.policy.max_pixels}."
            )
