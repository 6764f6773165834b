"""Clips that need no video library: animated images, arrays, and folders of images."""

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentae.data.decode import FORMATS, BadImage, composite, decode_image, probe_size
from latentae.data.sources.base import IMAGE_EXTENSIONS, is_hidden
from latentae.data.video.base import ASSUMED_FPS, BadVideo, ClipBytes, Video, VideoInfo
from latentae.data.video.structure import check_structure

NO_DURATION = 100  # ms that a frame without a duration is shown for, as browsers do
_HEADERS = threading.Lock()  # of arrays, which numpy reads as Python: two threads at once fail before Python 3.11.8


class AnimatedImage(Video):
    """An animated GIF, WebP or PNG. The duration of the last frame plays no part."""

    def _probe(self) -> VideoInfo:
        check_structure(self.path)
        with self._opened() as image:
            self._check_pixels(image.height, image.width)
            durations = []
            for number in range(image.n_frames):
                image.seek(number)
                image.load()  # WebP tells a duration only then
                durations.append(round(image.info.get("duration") or NO_DURATION))
            times = (0, *accumulate(durations[:-1]))
            rate = Fraction(1000, durations[0]) if len(set(durations[:-1] or durations)) == 1 else None
            return VideoInfo(image.height, image.width, times, Fraction(1, 1000), rate)

    def _frames(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        with self._opened() as image:
            for number in numbers:
                image.seek(number)
                rgba = np.asarray(image.convert("RGBA"))  # (H, W, 4)
                yield np.ascontiguousarray(composite(rgba[..., :3], rgba[..., 3], self.policy.background))

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        name = animated_format(self.path)
        try:
            with self.path.open("rb") as file, FORMATS[name or "GIF"][0](file) as image:
                yield image
        except (BadImage, MemoryError):
            raise
        except Image.DecompressionBombError as error:
            raise BadVideo("too-large", f"the {name} file is refused by Pillow ({error}).") from error
        except OSError as error:
            if error.errno is not None:
                raise BadVideo("unreadable", f"the file cannot be read ({error.strerror}).") from error
            reason = "truncated" if "truncated" in str(error).lower() else "damaged"
            raise BadVideo(reason, f"the {name} file cannot be decoded ({error}).") from error
        except Exception as error:  # a hostile file makes Pillow's readers stumble over anything
            raise BadVideo("damaged", f"the {name} file cannot be decoded ({error}).") from error


def animated_format(path: Path | ClipBytes) -> str | None:
    """GIF, WEBP or PNG where the file is one of these, animated or not, by its first bytes."""
    with path.open("rb") as file:
        head = file.read(32)
    return next((name for name in ("GIF", "WEBP", "PNG") if re.match(FORMATS[name][1], head, re.DOTALL)), None)


class FrameArray(Video):
    """A ``.npy`` file of uint8 (T, H, W, 3), read where it lies."""

    def _probe(self) -> VideoInfo:
        array = self._array()
        frames, height, width, _ = array.shape
        self._check_pixels(height, width)
        return VideoInfo(height, width, tuple(range(frames)), 1 / ASSUMED_FPS, ASSUMED_FPS)

    def _frames(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        array = self._array()
        for number in numbers:
            yield np.array(array[number])

    def _array(self) -> np.ndarray:
        try:
            with _HEADERS:
                if isinstance(self.path, ClipBytes):
                    array = np.load(self.path.open(), allow_pickle=False)
                else:
                    array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise BadVideo("unreadable", f"the file cannot be read ({error.strerror or error}).") from error
        except (ValueError, EOFError, OverflowError, SyntaxError) as error:
            cut = any(said in str(error) for said in ("mmap length", "EOF", "cannot reshape"))
            raise BadVideo("truncated" if cut else "damaged", f"the array cannot be read ({error}).") from error
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape:
            raise BadVideo(
                "no-frames" if 0 in array.shape else "unsupported",
                f"the array is {array.dtype} of shape {array.shape}; expected uint8 (frames, height, width, 3).",
            )
        return array


class FrameFolder(Video):
    """A folder of images of one size, its frames in the natural order of their names."""

    def _probe(self) -> VideoInfo:
        files = self._files()
        if not files:
            raise BadVideo("no-frames", "the folder holds no images.")
        height, width = self._explained(files[0], probe_size)
        self._check_pixels(height, width)
        info = VideoInfo(height, width, tuple(range(len(files))), 1 / ASSUMED_FPS, ASSUMED_FPS)
        self._info = info
        for number, file in enumerate(files):
            self._check_size(number, *self._explained(file, probe_size))
        return info

    def _frames(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        files = self._files()
        for number in numbers:
            yield self._explained(files[number], lambda data: decode_image(data, self.policy))

    def _files(self) -> list[Path]:
        return sorted(frame_files(Path(str(self.path))), key=lambda file: natural(file.name))

    def _explained(self, file: Path, decode: Any) -> Any:
        try:
            return decode(file.read_bytes())
        except BadImage as error:
            raise BadVideo(error.reason, f"{file.name}: {error.explanation}") from error
        except OSError as error:
            raise BadVideo("unreadable", f"{file.name} cannot be read ({error.strerror}).") from error


def frame_files(folder: Path) -> list[Path]:
    """The images that lie in a folder itself."""
    try:
        files = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_EXTENSIONS]
    except OSError as error:
        raise BadVideo("unreadable", f"the folder cannot be read ({error.strerror}).") from error
    return [path for path in files if not is_hidden(path.name)]


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts ``frame2`` before ``frame10``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part] + [
        (-2, name)
    ]
