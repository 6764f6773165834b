"""Video files by PyAV: their times from the packets, their frames by presentation time, errors told apart."""

import os
import re
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

from latentae.data.decode import composite
from latentae.data.video.base import ASSUMED_FPS, BadVideo, ClipBytes, Video, VideoInfo
from latentae.data.video.structure import check_structure, is_iso, is_matroska
from latentae.errors import MissingExtra

# A file must not make FFmpeg open others, as playlists would.
DEMUXERS = "mov,matroska,avi"
SLACK = 0.25  # seconds that a file may state beyond the end of its last frame
# Hidden frames have packets of their own, or packets no presentation times: only decoding tells what is shown when.
DECODED_FOR_TIMES = {"vp8"}
# What to do for the display matrix ((a, b), (c, d)): x' = a x + c y, y' = b x + d y, with y downwards.
TURNS: dict[tuple[int, ...], Callable[[np.ndarray], np.ndarray]] = {
    (1, 0, 0, 1): lambda frame: frame,
    (0, 1, -1, 0): lambda frame: np.rot90(frame, -1),
    (-1, 0, 0, -1): lambda frame: np.rot90(frame, 2),
    (0, -1, 1, 0): np.rot90,
    (-1, 0, 0, 1): np.fliplr,
    (1, 0, 0, -1): np.flipud,
    (0, 1, 1, 0): lambda frame: frame.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda frame: np.rot90(frame, 2).transpose(1, 0, 2),
}


def import_av() -> Any:
    """PyAV, where it is wanted.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise MissingExtra("Reading and writing videos", "video") from error
    av.logging.set_level(None)
    return av


class ContainerVideo(Video):
    """An mp4, mov, webm, mkv or avi file: its first video stream."""

    def _probe(self) -> VideoInfo:
        check_structure(self.path)
        with self._opened() as (container, stream):
            first = next(container.decode(stream), None)
            if first is None:
                raise BadVideo("no-frames", "its video stream has no frame that can be decoded.")
            height, width = _turned(first, self._pixels(first)).shape[:2]
        with self._opened() as (container, stream):
            rate = Fraction(stream.average_rate) if stream.average_rate else None
            # without their bytes, which are the whole file
            packets = [(p.pts, p.duration or 0, p.is_discard) for p in container.demux(stream) if p.size]
            tick, stated = stream.time_base, _stated_seconds(stream)
            by_order = container.format.name == "avi" or stream.codec_context.name in DECODED_FOR_TIMES
        times = [pts for pts, _, discarded in packets if not discarded]
        if not times:
            raise BadVideo("no-frames", "none of its frames is to be shown.")
        if by_order or None in times or len(set(times)) < len(times):
            return self._probe_by_decoding(height, width, rate, len(packets))
        info = VideoInfo(height, width, tuple(sorted(times)), tick, rate)
        end = max(pts + duration for pts, duration, discarded in packets if not discarded)
        seconds = (end - info.pts[0]) * tick
        if seconds + 2 / info.fps + SLACK < stated:
            raise BadVideo("truncated", f"it states {stated:.3f} s and has frames for {float(seconds):.3f} s.")
        return info

    def _probe_by_decoding(self, height: int, width: int, rate: Fraction | None, packets: int) -> VideoInfo:
        with self._opened() as (container, stream):
            times = [frame.pts for frame in container.decode(stream)]
            tick, in_order = stream.time_base, container.format.name != "avi"
            codec = stream.codec_context
            # DivX packs two frames into one packet and leaves another one empty
            if len(times) < packets and not in_order and not (codec.name == "mpeg4" and codec.has_b_frames):
                raise BadVideo("damaged", f"only {len(times)} of its {packets} frames can be decoded.")
        if in_order and None not in times and all(earlier < later for earlier, later in pairwise(times)):
            return VideoInfo(height, width, tuple(times), tick, rate)
        rate = rate or ASSUMED_FPS
        return VideoInfo(height, width, tuple(range(len(times))), 1 / rate, rate, by_order=True)

    def _frames(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        """From the key frame before the first one; where that fails, once more from the beginning."""
        done = 0
        if numbers[0] > 0 and not self.info.by_order:
            try:
                for frame in self._decode(numbers, seek=True):
                    yield frame
                    done += 1
                return
            except BadVideo:
                pass  # the frames behind a key frame may need those before it
        yield from self._decode(numbers[done:], seek=False)

    def _decode(self, numbers: Sequence[int], *, seek: bool) -> Iterator[np.ndarray]:
        info, wanted = self.info, deque(numbers)
        with self._opened() as (container, stream):
            if seek:
                container.seek(info.pts[numbers[0]], stream=stream)
            for position, frame in enumerate(container.decode(stream)):
                time = position if info.by_order else frame.pts
                if time is None or time > info.pts[wanted[0]]:
                    break
                if time < info.pts[wanted[0]]:
                    continue
                if frame.is_corrupt:
                    raise BadVideo("damaged", f"frame {wanted[0]} is damaged.")
                pixels = np.ascontiguousarray(_turned(frame, self._pixels(frame)))
                while wanted and info.pts[wanted[0]] == time:
                    wanted.popleft()
                    yield pixels
                if not wanted:
                    return
        raise BadVideo("damaged", f"frame {wanted[0]} of {info.frames} is missing.")

    def _pixels(self, frame: Any) -> np.ndarray:
        """(H, W, 3) before rotation."""
        if any(component.is_alpha for component in frame.format.components):
            rgba = self._reformatter.reformat(frame, format="rgba", threads=1).to_ndarray()  # (H, W, 4)
            return composite(rgba[..., :3], rgba[..., 3], self.policy.background)
        return self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """The container and its first video stream; what FFmpeg raises meanwhile becomes `BadVideo`."""
        av = import_av()
        from av.video.reformatter import VideoReformatter

        self._reformatter = VideoReformatter()  # one for all frames: it keeps the tables of the conversion
        options = {"protocol_whitelist": "file", "format_whitelist": DEMUXERS}
        try:
            file = self.path.open() if isinstance(self.path, ClipBytes) else os.path.abspath(self.path)  # noqa: PTH100
            with av.open(file, options=options) as container:
                if not container.streams.video:
                    kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
                    raise BadVideo("no-video-stream", f"it holds {kinds} and no video.")
                stream = container.streams.video[0]
                if stream.codec_context is None:
                    raise BadVideo("unsupported", "no decoder for its video stream is known.")
                self._check_pixels(stream.codec_context.height, stream.codec_context.width)
                stream.codec_context.thread_count = 1  # workers are what runs side by side
                stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(self.policy.max_pixels)}
                yield container, stream
        except av.error.FFmpegError as error:
            raise self._explain(error) from error

    def _explain(self, error: Any) -> BadVideo:
        av = import_av()
        what = str(error.strerror or error)
        if isinstance(error, av.error.MemoryError):  # FFmpeg's limits for tables: a real shortage ends the process
            return BadVideo("damaged", "it states lengths that there is no memory for.")
        if isinstance(error, OSError) and not isinstance(error, av.error.InvalidDataError | av.error.EOFError):
            return BadVideo("unreadable", f"the file cannot be read ({what}).")
        if isinstance(error, av.error.PatchWelcomeError | av.error.DecoderNotFoundError):
            return BadVideo("unsupported", f"FFmpeg cannot decode it ({what}).")
        with self.path.open("rb") as file:
            head = file.read(16)
        if not (is_iso(head) or is_matroska(head) or head.startswith(b"RIFF")):
            return BadVideo("not-a-video", f"the file begins with {head[:16]!r}, as no video that is known does.")
        return BadVideo("damaged", f"it cannot be decoded ({what}).")


def _stated_seconds(stream: Any) -> float:
    """How long the stream is by the file's own account, 0 where it gives none."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    clock = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))  # as muxers of Matroska write it
    return 3600 * int(clock[1]) + 60 * int(clock[2]) + float(clock[3]) if clock else 0.0


def _turned(frame: Any, pixels: np.ndarray) -> np.ndarray:
    """By the display matrix, if the frame has one."""
    from av.sidedata.sidedata import Type

    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return pixels
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data))
    largest = max(abs(value) for value in (a, b, c, d)) or 1
    matrix = tuple(round(value / largest) for value in (a, b, c, d))
    if matrix == (0, 0, 0, 0):
        return pixels
    if matrix not in TURNS:
        raise BadVideo("unsupported", "it is to be shown turned by an angle that is no quarter turn.")
    return TURNS[matrix](pixels)
