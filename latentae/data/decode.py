"""Bytes to pixels: the only place that decodes images. One policy, safe in threads, Pillow underneath.

| in the file                 | in the pixels                                                                       |
|-----------------------------|-------------------------------------------------------------------------------------|
| EXIF (or XMP) orientation   | applied; a broken one is ignored                                                    |
| grayscale, 1 bit, palette   | expanded to RGB                                                                     |
| alpha, transparent colour   | composited over a background, white unless stated                                   |
| embedded ICC profile        | converted to sRGB, relative colorimetric with black point compensation; a broken    |
|                             | one, or one for another colour space than the samples', is ignored                  |
| CMYK, YCCK                  | by its profile, or (255 - ink) (255 - black) / 255; JPEG inks inverted as Adobe's   |
| 16 bit (and 12 bit TIFF)    | scaled to the full 8-bit range and rounded: x / 257; inks, premultiplied TIFF and   |
|                             | colour in JPEG 2000 keep the high byte                                              |
| float (TIFF, PFM)           | must lie in [0, 1], scaled by 255                                                   |
| several frames or pages     | the first                                                                           |
| PNG gAMA, cHRM, cICP chunks | ignored                                                                             |

What cannot be decoded raises `BadImage` with a reason: ``empty``, ``not-an-image``, ``truncated``, ``damaged``,
``too-large`` (by the header, before anything is decoded) or ``unsupported``. JPEG, WebP, AVIF and BMP carry no
checksum: bits that flipped inside them are not noticed.
"""

import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageCms,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from latentae.errors import DataError

# Readers are called by name and not through Image.open, whose size limit is a global that threads would share; those
# of TIFF and WebP look at it all the same, at twice Image.MAX_IMAGE_PIXELS.
FORMATS: dict[str, tuple[type[ImageFile.ImageFile], bytes]] = {
    "JPEG": (JpegImagePlugin.JpegImageFile, rb"\xff\xd8\xff"),
    "PNG": (PngImagePlugin.PngImageFile, rb"\x89PNG\r\n\x1a\n"),
    "WEBP": (WebPImagePlugin.WebPImageFile, rb"RIFF....WEBP"),
    "GIF": (GifImagePlugin.GifImageFile, rb"GIF8[79]a"),
    "BMP": (BmpImagePlugin.BmpImageFile, rb"BM"),
    "TIFF": (TiffImagePlugin.TiffImageFile, rb"II[*+]\0|MM\0[*+]"),
    "PPM": (PpmImagePlugin.PpmImageFile, rb"P[1-6f]\s"),
    "JPEG2000": (Jpeg2KImagePlugin.Jpeg2KImageFile, rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    "AVIF": (AvifImagePlugin.AvifImageFile, rb"....ftyp(avi[fs]|(mif1|msf1).{4,32}?avi[fs])"),
}
END_MARKS = {"JPEG": b"\xff\xd9", "JPEG2000": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION_TAG, WIDTH_TAG, HEIGHT_TAG, BITS_TAG, PHOTOMETRIC_TAG, PLANAR_TAG = 274, 256, 257, 258, 262, 284


@dataclass(frozen=True)
class DecodePolicy:
    """What is left open by the table above: the largest picture, in pixels, and what shows through transparency."""

    max_pixels: int = 2**27
    background: tuple[int, int, int] = (255, 255, 255)

    def describe(self) -> dict[str, Any]:
        """The whole policy as JSON, for the record of a store."""
        return {
            "version": 1,
            "max_pixels": self.max_pixels,
            "background": list(self.background),
            "orientation": "exif applied, broken ignored",
            "alpha": "composited over background",
            "icc_profile": "converted to srgb, relative colorimetric, black point compensation, broken ignored",
            "cmyk": "icc profile, else (255-ink)(255-black)/255",
            "deep": "16 bit / 257 rounded, float in [0, 1] times 255",
            "frames": "first",
        }


DEFAULT_POLICY = DecodePolicy()


class BadImage(DataError):
    """These bytes are no picture that can be decoded; ``reason`` is the short code that tables are made of."""

    def __init__(self, reason: str, explanation: str = ""):
        super().__init__(reason, explanation)
        self.reason = reason
        self.explanation = explanation

    def __str__(self) -> str:
        return f"{self.reason}: {self.explanation}"


def decode_image(data: bytes, policy: DecodePolicy = DEFAULT_POLICY) -> np.ndarray:
    """Decode one picture to sRGB pixels: uint8 (height, width, 3), contiguous and writable.

    Raises:
        BadImage: as `decode_picture`.
    """
    return np.array(decode_picture(data, policy))


def decode_picture(data: bytes, policy: DecodePolicy = DEFAULT_POLICY) -> Image.Image:
    """`decode_image` as an RGB image of Pillow, which costs a copy less where Pillow goes on with it.

    Raises:
        BadImage: the bytes are empty, cut short, damaged, too large, or no picture of a known kind.
    """
    image = _open(data)
    if image.width * image.height > policy.max_pixels:
        raise BadImage(
            "too-large", f"{image.width} x {image.height} pixels are more than max_pixels, {policy.max_pixels}."
        )
    with _explained(image.format, data):
        orientation = 1 if image.format == "TIFF" else _orientation(image, data)  # Pillow turns TIFF by itself
        colour, alpha = _colour_and_alpha(image, data)
        picture = _to_srgb(colour, image.info.get("icc_profile"))
        if orientation != 1:
            picture = picture.transpose(TURNS[orientation])
            alpha = alpha and alpha.transpose(TURNS[orientation])
        if alpha is None:
            return picture
        return Image.fromarray(composite(np.asarray(picture), np.asarray(alpha), policy.background))


def probe_size(data: bytes) -> tuple[int, int]:
    """(height, width) that `decode_image` would give, read from the header only, without a size limit.

    Raises:
        BadImage: the header cannot be read.
    """
    image = _open(data)
    width, height = image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        width, height = image.tag_v2[WIDTH_TAG], image.tag_v2[HEIGHT_TAG]
    return (width, height) if _orientation(image, data) >= 5 else (height, width)


def _open(data: bytes) -> ImageFile.ImageFile:
    """The picture with its header read and nothing decoded."""
    if not data:
        raise BadImage("empty", "the file has no bytes.")
    for name, (reader, signature) in FORMATS.items():
        if re.match(signature, data, re.DOTALL):
            with _explained(name, data):
                return reader(io.BytesIO(data))
    raise BadImage("not-an-image", f"the file begins with {data[:16]!r}, as none of {', '.join(FORMATS)} does.")


@contextmanager
def _explained(name: str | None, data: bytes) -> Iterator[None]:
    """Turn what Pillow raises into `BadImage`."""
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadImage("too-large", f"the {name} file is refused by Pillow ({error}).") from error
    except Exception as error:  # a hostile file makes Pillow's readers stumble over anything, AttributeError included
        if "truncated" in str(error).lower() or _is_cut(name, data):
            raise BadImage("truncated", f"the {name} file ends before its picture does.") from error
        reason = "unsupported" if re.search("support|unknown pixel mode|unknown data org", str(error)) else "damaged"
        raise BadImage(reason, f"the {name} file cannot be decoded ({error}).") from error


def _is_cut(name: str | None, data: bytes) -> bool:
    """Whether a file that failed to decode misses its end, or has zeros there, as broken downloads leave."""
    if name in END_MARKS:
        return not data.endswith(END_MARKS[name])
    if name == "WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if name == "BMP":
        return len(data) < int.from_bytes(data[2:6], "little")
    if name == "TIFF":  # its directory often stands at the end
        return len(data) <= int.from_bytes(data[4:8], "little" if data[:2] == b"II" else "big")
    if name == "AVIF":
        end = 0
        while end + 8 <= len(data) and (length := int.from_bytes(data[end : end + 4], "big")) >= 8:
            end += length  # from box to box
        return end + 8 > len(data) and end != len(data)
    return False


def _orientation(image: ImageFile.ImageFile, data: bytes) -> int:
    """The EXIF orientation, 1 to 8."""
    try:
        if image.format == "PNG" and "exif" not in image.info and (exif := _late_png_exif(data)):
            image.info["exif"] = exif
        # The base class's method: that of PNG decodes the whole file in search of a late chunk.
        orientation = Image.Image.getexif(image).get(ORIENTATION_TAG, 1)
    except Exception:  # broken EXIF is common and says nothing about the pixels
        return 1
    return orientation if orientation in TURNS else 1


def _late_png_exif(data: bytes) -> bytes | None:
    """The eXIf chunk of a PNG wherever it stands: exiftool puts it behind the pixels."""
    start = 8
    while start + 8 <= len(data):
        length = int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] == b"eXIf":
            return data[start + 8 : start + 8 + length]
        start += 12 + length
    return None


def _colour_and_alpha(image: ImageFile.ImageFile, data: bytes) -> tuple[Image.Image, Image.Image | None]:
    """The picture in its own colour space as L, RGB or CMYK of 8 bits, and its alpha as L if it has any."""
    samples = _deep_samples(image, data)
    if samples is not None:
        return _split_deep(samples, image.info.get("transparency"))
    image.load()
    if image.mode in ("L", "RGB", "CMYK") and "transparency" not in image.info:
        return image, None
    if image.mode in ("LA", "La"):
        grey = image.convert("LA")
        return grey.getchannel("L"), grey.getchannel("A")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")
    if image.mode in ("1", "P", "RGBX", "YCbCr"):
        return image.convert("L" if image.mode == "1" else "RGB"), None
    raise BadImage("unsupported", f"the {image.format} file has {image.mode} samples: convert it to 8 or 16 bit RGB.")


def _deep_samples(image: ImageFile.ImageFile, data: bytes) -> np.ndarray | None:
    """Samples of more than 8 bits, uint16 over their full range, (H, W) or (H, W, C); None for ordinary pictures."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if not (values.min() >= 0 and values.max() <= 1):  # NaN fails too
            raise BadImage("unsupported", f"float samples go from {values.min()} to {values.max()}, not from 0 to 1.")
        samples = 257 * np.floor(255 * values + 0.5)
    elif image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        samples = np.asarray(image)
        if tags.get(BITS_TAG) == (12,):
            samples = 257 * np.floor(samples * (255 / 4095) + 0.5)
    else:
        return _deep_colours(image, data)
    if tags.get(PHOTOMETRIC_TAG) == 0:  # white is zero, which Pillow leaves to us
        samples = 65535 - samples
    return samples.astype(np.uint16)


def _deep_colours(image: ImageFile.ImageFile, data: bytes) -> np.ndarray | None:
    """16-bit colour, (H, W, C) uint16. Pillow keeps one byte of each sample, so it decodes once for each of the two."""
    arguments = image.tile[0].args if image.tile else None
    rawmode = arguments[0] if isinstance(arguments, tuple) else arguments
    if rawmode == "LA;16B":
        pairs = _load_as(image, "RGBA").astype(np.uint16)  # (H, W, 4): high and low byte of grey and of alpha
        grey, alpha = pairs[..., 0] << 8 | pairs[..., 1], pairs[..., 2] << 8 | pairs[..., 3]
        return np.stack([grey, grey, grey, alpha], axis=-1)
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if tags.get(PLANAR_TAG) == 2 and max(tags.get(BITS_TAG, (8,))) > 8:  # Pillow would scramble it
        raise BadImage("unsupported", "the TIFF file has 16-bit channels in separate planes: interleave them.")
    if not isinstance(rawmode, str) or not re.fullmatch("RGB[AX]?;16[BLN]", rawmode):
        return None
    other = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}[rawmode[-1]]
    high = np.asarray(image).astype(np.uint16)
    low = _load_as(_open(data), rawmode[:-1] + other)
    return high << 8 | low


def _load_as(image: ImageFile.ImageFile, rawmode: str) -> np.ndarray:
    """Decode with the samples taken apart as ``rawmode`` says, instead of as the header does."""
    image.tile = [
        tile._replace(args=(rawmode, *tile.args[1:]) if isinstance(tile.args, tuple) else rawmode)
        for tile in image.tile
    ]
    return np.asarray(image)


def _split_deep(samples: np.ndarray, transparent: Any) -> tuple[Image.Image, Image.Image | None]:
    """8-bit colour and alpha of uint16 samples (H, W), (H, W, 3) or (H, W, 4)."""
    alpha = None
    if samples.ndim == 3 and samples.shape[-1] == 4:
        samples, alpha = samples[..., :3], Image.fromarray(_to_8_bits(samples[..., 3]))
    elif transparent is not None:
        matches = samples == np.asarray(transparent)
        opaque = ~(matches.all(axis=-1) if samples.ndim == 3 else matches)
        alpha = Image.fromarray(opaque.astype(np.uint8) * np.uint8(255))
    return Image.fromarray(_to_8_bits(samples)), alpha


def _to_8_bits(samples: np.ndarray) -> np.ndarray:
    return ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _to_srgb(colour: Image.Image, profile: bytes | None) -> Image.Image:
    transform = _srgb_transform(profile, colour.mode) if profile else None
    if transform is not None:
        converted = ImageCms.applyTransform(colour, transform)
        assert converted is not None
        return converted
    return colour if colour.mode == "RGB" else colour.convert("RGB")


@lru_cache(maxsize=32)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the profile's colours to sRGB; None where there is nothing to do or the profile cannot do it."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if mode == "CMYK":
            return transform
        # The many profiles that say sRGB in other words would only add rounding errors.
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
        probe = Image.fromarray(grid if mode == "RGB" else np.arange(256, dtype=np.uint8)[None])
        converted = ImageCms.applyTransform(probe, transform)
        assert converted is not None
        change = np.abs(np.asarray(converted).astype(int) - np.asarray(probe.convert("RGB")))
        return transform if change.max() > 2 else None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def composite(pixels: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """(H, W, 3) over a background by alpha (H, W): round((a p + (255 - a) b) / 255)."""
    if alpha.min() == 255:
        return pixels
    weight = alpha[..., None].astype(np.uint16)  # 255 * 255 + 127 fits
    mixed = weight * pixels + (255 - weight) * np.array(background, np.uint16) + 127
    return (mixed // 255).astype(np.uint8)
