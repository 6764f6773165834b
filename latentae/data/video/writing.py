"""Clips out: whole files or none."""

import os
from collections.abc import Iterable
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from latentae.data.video.base import frame_rate
from latentae.data.video.container import import_av
from latentae.errors import RequestError
from latentae.files import atomic_write

VIDEO_FORMATS: dict[str, dict[str, Any]] = {
    "mp4": {"codec": "libx264", "format": "mp4", "options": {"crf": "12", "preset": "medium"}},
    "mkv": {"codec": "ffv1", "format": "matroska", "options": {"level": "3", "slicecrc": "1"}},
}
"""By the ending of a file's name: H.264 of high quality, or FFV1, which keeps every pixel as it is."""


def write_video(path: str | os.PathLike[str], frames: Iterable[np.ndarray], fps: Fraction | float) -> None:
    """Write frames, one at a time in memory, to a file that appears when it is whole.

    ``.mp4`` is H.264 in BT.709 colours, limited range and marked so: 4:2:0 where both sides are even, else 4:4:4, so
    that no clip changes its size (some players cannot show these). ``.mkv`` is FFV1 in RGB, lossless.

    Args:
        frames: uint8 (H, W, 3), all of one size.
        fps: kept exactly where it is a fraction with a denominator up to 1001.

    Raises:
        RequestError: another ending, no frame, frames of other kinds or sizes, or an FFmpeg without the encoder.
        MissingExtra: PyAV is not installed.
    """
    path, rate = Path(path), frame_rate(fps)
    kind = VIDEO_FORMATS.get(path.suffix[1:].lower())
    if kind is None:
        raise RequestError(f"{path} ends in none of {', '.join('.' + name for name in VIDEO_FORMATS)}: rename it.")
    av = import_av()
    try:
        av.Codec(kind["codec"], "w")
    except av.codec.codec.UnknownCodecError as error:
        raise RequestError(f"PyAV was built without the encoder {kind['codec']}: install it from its wheel.") from error
    rest = iter(frames)
    first = next(rest, None)
    if first is None:
        raise RequestError(f"There are no frames to write to {path}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file, av.open(file, "w", format=kind["format"]) as container:
        stream = container.add_stream(kind["codec"], rate=rate, options=kind["options"])
        stream.height, stream.width = first.shape[:2]
        if kind["codec"] == "ffv1":
            stream.pix_fmt, colours = "bgr0", {}
        else:
            odd = stream.height % 2 or stream.width % 2
            stream.pix_fmt, colours = "yuv444p" if odd else "yuv420p", _bt709(av, stream.codec_context)
        reformatter = av.video.reformatter.VideoReformatter()
        for number, pixels in enumerate(chain([first], rest)):
            if pixels.shape != first.shape or pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
                raise RequestError(
                    f"Frame {number} for {path} is {pixels.dtype} of shape {pixels.shape}; expected uint8 "
                    f"{(*first.shape[:2], 3)}."
                )
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = reformatter.reformat(frame, format=stream.pix_fmt, threads=1, **colours)
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _bt709(av: Any, codec: Any) -> dict[str, Any]:
    """Mark the stream, and say the same to the conversion."""
    reformatter = av.video.reformatter
    codec.colorspace, codec.color_range = reformatter.Colorspace.ITU709, reformatter.ColorRange.MPEG
    codec.color_primaries, codec.color_trc = reformatter.ColorPrimaries.BT709, reformatter.ColorTrc.BT709
    return {"dst_colorspace": reformatter.Colorspace.ITU709, "dst_color_range": reformatter.ColorRange.MPEG}
