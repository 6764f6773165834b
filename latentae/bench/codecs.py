"""Classical codecs as reference points: what files of so many bits keep of an image or a clip without any training."""

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, features

from latentae.bench.h264 import through_h264
from latentae.data.video.container import import_av
from latentae.errors import RequestError

FORMATS = {"jpeg": (1, 100), "webp": (0, 100), "avif": (0, 100), "h264": (0, 51)}  # with the range of their quality
OPTIONS: dict[str, dict[str, Any]] = {"jpeg": {"optimize": True}, "webp": {"method": 6}, "avif": {}}


@dataclass(frozen=True)
class ClassicalCodec:
    """JPEG (4:2:0, optimised tables), WebP (method 6) or AVIF (4:2:0) of one quality, as Pillow writes them.

    Of clips each frame is a file of its own; or H.264 of a constant rate factor, where lower is better.
    """

    format: str
    quality: int
    device: ClassVar[torch.device] = torch.device("cpu")
    samples: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"{self.format}:{self.quality}"

    def reconstruct(self, image: np.ndarray) -> tuple[np.ndarray, int]:
        """What files keep of an image, uint8 (H, W, 3), or of a clip (T, H, W, 3), and their whole size in bits."""
        if self.format == "h264":
            return through_h264(image, self.quality)
        if image.ndim == 4:
            frames, bits = zip(*map(self.reconstruct, image))
            return np.stack(frames), sum(bits)
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, self.format, quality=self.quality, **OPTIONS[self.format])
        bits = 8 * stream.tell()
        return np.array(Image.open(stream).convert("RGB")), bits


def classical_codec(name: str, *, clips: bool = False) -> ClassicalCodec | None:
    """The codec of a name such as ``jpeg:75``; None for other names.

    Raises:
        RequestError: a quality that the format does not have, a format that this Pillow does not write, or H.264 for
            other than ``clips``.
        MissingExtra: H.264 without PyAV.
    """
    if name in FORMATS and not Path(name).exists():
        raise RequestError(f"{name} needs a quality: say {name}:{23 if name == 'h264' else 75}.")
    match = re.fullmatch(rf"({'|'.join(FORMATS)}):(.*)", name)
    if match is None:
        return None
    format, text = match.groups()
    lowest, highest = FORMATS[format]
    if not re.fullmatch(r"\d{1,3}", text) or not lowest <= int(text) <= highest:
        raise RequestError(f"{name}: the quality of {format} is a whole number from {lowest} to {highest}.")
    if format == "h264":
        if not clips:
            raise RequestError(f"{name} is a codec of clips, and these are images: choose jpeg, webp or avif.")
        import_av()
    elif format != "jpeg" and not features.check(format):
        raise RequestError(f"{name}: the Pillow on this machine writes no {format.upper()}; install a newer one.")
    return ClassicalCodec(format, int(text))
