"""The decode policy against closed forms, NumPy and hand-made files; hostile bytes; threads."""

import contextlib
import io
import json
import pickle
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, TiffImagePlugin

from latentae.data.decode import BadImage, DecodePolicy, decode_image, probe_size
from latentae.errors import DataError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}, "TIFF": {}, "PPM": {}, "JPEG2000": {}}


def save(image, form, **options):
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, form, **options)
    return stream.getvalue()


def smooth(height=48, width=64):
    y, x = np.mgrid[:height, :width]
    return np.stack([128 + 100 * np.sin(x / 9 + c) * np.cos(y / 11 - c) for c in range(3)], -1).astype(np.uint8)


def over(pixels, alpha, background):
    """Alpha compositing in real numbers."""
    a = alpha[..., None] / 255
    return np.floor(a * pixels + (1 - a) * np.array(background) + 0.5).astype(np.uint8)


def grey_to_rgb(grey):
    return np.stack([grey] * 3, -1)


def png(samples, colour_type, depth, extra=b"", tail=b""):
    """A PNG written by hand: (H, W, C) samples, the first three row filters in turn."""
    height, width, channels = samples.shape
    rows = samples.astype(">u2" if depth == 16 else "u1").reshape(height, -1).view(np.uint8)
    step = channels * depth // 8
    above, coded = np.zeros_like(rows[0]), b""
    for number, row in enumerate(rows):
        before = np.concatenate([np.zeros(step, np.uint8), row[:-step]])
        coded += bytes([number % 3]) + (row - (np.zeros_like(row), before, above)[number % 3]).tobytes()
        above = row
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(coded))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + data + tail + chunk(b"IEND", b"")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# ordinary pictures


@pytest.mark.parametrize("form", LOSSLESS)
def test_rgb_is_exact_in_lossless_formats(form):
    pixels = decode_image(save(RGB, form, **LOSSLESS[form]))
    np.testing.assert_array_equal(pixels, RGB)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable


def test_jpeg_and_avif_are_decoded():
    image = smooth()
    for form in ("JPEG", "AVIF"):
        error = decode_image(save(image, form, quality=95)).astype(int) - image
        assert np.abs(error).mean() < 2


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP", "PPM"])
def test_grey_is_repeated(form):
    np.testing.assert_array_equal(decode_image(save(GREY, form)), grey_to_rgb(GREY))


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP", "PPM"])
def test_one_bit_is_black_and_white(form):
    bits = GREY > 127
    np.testing.assert_array_equal(decode_image(save(Image.fromarray(bits), form)), grey_to_rgb(bits * np.uint8(255)))


def palette_image():
    colours = RNG.integers(0, 256, (16, 3), dtype=np.uint8)
    indices = RNG.integers(0, 16, (5, 7), dtype=np.uint8)
    image = Image.new("P", (7, 5))
    image.putdata(indices.ravel().tolist())
    image.putpalette(colours.tobytes())
    return image, colours, indices


@pytest.mark.parametrize("form", ["PNG", "GIF", "BMP", "TIFF"])
def test_palette(form):
    image, colours, indices = palette_image()
    np.testing.assert_array_equal(decode_image(save(image, form)), colours[indices])


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_transparent_palette_entry_shows_the_background(form):
    image, colours, indices = palette_image()
    expected = colours[indices]
    expected[indices == 3] = (9, 8, 7)
    pixels = decode_image(save(image, form, transparency=3), DecodePolicy(background=(9, 8, 7)))
    np.testing.assert_array_equal(pixels, expected)


def test_palette_with_an_alpha_per_entry():
    image, colours, indices = palette_image()
    alphas = RNG.integers(0, 256, 16, dtype=np.uint8)
    pixels = decode_image(save(image, "PNG", transparency=alphas.tobytes()))
    np.testing.assert_array_equal(pixels, over(colours[indices], alphas[indices], (255, 255, 255)))


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 200, 77)])
@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})])
def test_alpha_is_composited(form, options, background):
    data = save(np.dstack([RGB, ALPHA]), form, **options)
    pixels = decode_image(data, DecodePolicy(background=background))
    np.testing.assert_array_equal(pixels, over(RGB, ALPHA, background))


def test_hidden_colour_of_transparent_pixels_does_not_appear():
    data = save(np.dstack([RGB, np.zeros_like(ALPHA)]), "PNG")
    assert (decode_image(data) == 255).all()


def test_grey_with_alpha():
    data = save(np.dstack([GREY, ALPHA]), "PNG")
    np.testing.assert_array_equal(decode_image(data), over(grey_to_rgb(GREY), ALPHA, (255, 255, 255)))


def test_transparent_colour_of_grey_and_rgb():
    grey, rgb = GREY.copy(), RGB.copy()
    grey[1, 2], rgb[1, 2] = 17, (1, 2, 3)
    grey[grey == 17], expected_grey = 17, grey_to_rgb(np.where(grey == 17, np.uint8(255), grey))
    np.testing.assert_array_equal(decode_image(save(grey, "PNG", transparency=17)), expected_grey)
    expected = rgb.copy()
    expected[(rgb == (1, 2, 3)).all(-1)] = 255
    np.testing.assert_array_equal(decode_image(save(rgb, "PNG", transparency=(1, 2, 3))), expected)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_several(form):
    frames = [Image.fromarray(np.full((6, 8, 3), value, np.uint8)) for value in (30, 120, 210)]
    options = {"lossless": True} if form == "WEBP" else {}
    data = save(frames[0], form, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(decode_image(data), np.full((6, 8, 3), 30))


# inks


def naive_rgb(ink):
    """(H, W, 4) inks from 0 to 255 to RGB."""
    return (255 - ink[..., :3].astype(float)) * (255 - ink[..., 3:].astype(float)) / 255


def test_cmyk_tiff():
    ink = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    pixels = decode_image(save(Image.fromarray(ink, "CMYK"), "TIFF"))
    np.testing.assert_allclose(pixels, naive_rgb(ink), atol=1)


def test_cmyk_jpeg_is_inverted_as_adobe_writes_it():
    ink = np.full((16, 16, 4), (200, 40, 10, 30), np.uint8)
    pixels = decode_image(save(Image.fromarray(ink, "CMYK"), "JPEG", quality=100))
    np.testing.assert_allclose(pixels, naive_rgb(ink), atol=2)


def test_ycck_jpeg():
    """A CMYK file whose Adobe marker is changed to say that the first three channels are YCbCr."""
    y, cb, cr, k = 150, 90, 160, 220  # as stored
    stored = np.full((16, 16, 4), (y, cb, cr, k), np.uint8)
    data = bytearray(save(Image.fromarray(255 - stored, "CMYK"), "JPEG", quality=100))
    marker = data.index(b"Adobe")
    assert data[marker + 11] == 0
    data[marker + 11] = 2
    shown = [y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)]
    # The YCbCr of YCCK is that of 255 - C', and Adobe's C' is 255 - C, so that `shown` is the ink.
    ink = np.full((16, 16, 4), [*np.clip(shown, 0, 255), 255 - k])
    np.testing.assert_allclose(decode_image(bytes(data)), naive_rgb(ink), atol=2)


# deep samples


def deep(*channels):
    return RNG.integers(0, 65536, (9, 7, len(channels)), dtype=np.uint16)


def scaled(samples):
    return np.rint(samples / 257).astype(np.uint8)


def test_16_bit_grey_png_is_scaled_and_not_saturated():
    samples = deep("grey")
    pixels = decode_image(png(samples, 0, 16))
    np.testing.assert_array_equal(pixels, np.repeat(scaled(samples), 3, -1))
    np.testing.assert_array_equal(decode_image(save(samples[..., 0], "PNG")), pixels)


def test_16_bit_rgb_png_is_rounded():
    samples = deep(*"rgb")
    samples[0, 0] = (128, 129, 65535 - 128)  # either side of a half, which taking the high byte gets wrong
    np.testing.assert_array_equal(decode_image(png(samples, 2, 16)), scaled(samples))


@pytest.mark.parametrize("colour_type", [4, 6])
def test_16_bit_alpha_png(colour_type):
    samples = deep(*"rgba") if colour_type == 6 else deep(*"ga")
    colour, alpha = samples[..., :-1], samples[..., -1]
    expected = over(np.broadcast_to(scaled(colour), (9, 7, 3)), scaled(alpha), (255, 255, 255))
    np.testing.assert_array_equal(decode_image(png(samples, colour_type, 16)), expected)


@pytest.mark.parametrize("colour_type", [0, 2])
def test_16_bit_transparent_colour(colour_type):
    samples = deep(*"rgb") if colour_type == 2 else deep("grey")
    samples[2, 3] = samples[4, 5] = 4242
    samples[5, 5] = 4243  # the same colour in 8 bits, but not transparent
    data = png(samples, colour_type, 16, extra=chunk(b"tRNS", struct.pack(">H", 4242) * samples.shape[-1]))
    expected = np.broadcast_to(scaled(samples), (9, 7, 3)).copy()
    expected[2, 3] = expected[4, 5] = (1, 2, 3)
    np.testing.assert_array_equal(decode_image(data, DecodePolicy(background=(1, 2, 3))), expected)


TIFF_LAYOUTS = [
    {},
    {"byteorder": ">"},
    {"compression": "zlib"},
    {"byteorder": ">", "compression": "zlib"},
    {"compression": "zlib", "predictor": True},
    {"tile": (16, 16)},
]


@pytest.mark.parametrize("layout", TIFF_LAYOUTS, ids=str)
def test_16_bit_tiff(layout):
    tifffile = pytest.importorskip("tifffile")

    def tiff(samples, **options):
        stream = io.BytesIO()
        tifffile.imwrite(stream, samples, **options, **layout)
        return stream.getvalue()

    samples = deep(*"rgba")
    rgb, grey = np.ascontiguousarray(samples[..., :3]), np.ascontiguousarray(samples[..., 0])
    np.testing.assert_array_equal(decode_image(tiff(rgb, photometric="rgb")), scaled(rgb))
    np.testing.assert_array_equal(decode_image(tiff(grey, photometric="minisblack")), grey_to_rgb(scaled(grey)))
    unassociated = tiff(samples, photometric="rgb", extrasamples=["unassalpha"])
    expected = over(scaled(rgb), scaled(samples[..., 3]), (255, 255, 255))
    np.testing.assert_array_equal(decode_image(unassociated), expected)


def test_tiff_whose_white_is_zero():
    tifffile = pytest.importorskip("tifffile")
    for samples in (deep("grey")[..., 0], GREY):
        stream = io.BytesIO()
        tifffile.imwrite(stream, samples, photometric="miniswhite")
        white = np.iinfo(samples.dtype).max
        expected = np.rint((white - samples.astype(float)) * 255 / white).astype(np.uint8)
        np.testing.assert_array_equal(decode_image(stream.getvalue()), grey_to_rgb(expected))


def test_12_bit_tiff_is_scaled_to_the_full_range():
    samples = RNG.integers(0, 4096, (5, 8), dtype=np.uint16)
    samples[0, :2] = 0, 4095
    pairs = samples.reshape(5, 4, 2).astype(int)
    packed = np.stack([pairs[..., 0] >> 4, (pairs[..., 0] & 15) << 4 | pairs[..., 1] >> 8, pairs[..., 1] & 255], -1)
    data = packed.astype(np.uint8).tobytes()
    tags = {256: 8, 257: 5, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 5, 279: len(data)}
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in tags.items())
    tiff = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + bytes(4)
    expected = np.floor(samples * (255 / 4095) + 0.5).astype(np.uint8)
    np.testing.assert_array_equal(decode_image(tiff), grey_to_rgb(expected))


@pytest.mark.parametrize("channels", [1, 3])
def test_premultiplied_alpha(channels):
    tifffile = pytest.importorskip("tifffile")
    if channels == 1 and ("La", "La") not in TiffImagePlugin.OPEN_INFO.values():
        pytest.skip("this Pillow does not read premultiplied grey TIFF")
    stream = io.BytesIO()
    premultiplied = np.dstack([GREY // 2] * channels + [np.full_like(GREY, 128)])
    photometric = "rgb" if channels == 3 else "minisblack"
    tifffile.imwrite(stream, premultiplied, photometric=photometric, planarconfig="contig", extrasamples=["assocalpha"])
    np.testing.assert_array_equal(decode_image(stream.getvalue()), grey_to_rgb(GREY // 2 + 127))


def test_16_bit_planes_are_refused_rather_than_scrambled():
    tifffile = pytest.importorskip("tifffile")
    stream = io.BytesIO()
    tifffile.imwrite(stream, deep(*"rgb").transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    with pytest.raises(BadImage, match="separate planes") as caught:
        decode_image(stream.getvalue())
    assert caught.value.reason == "unsupported"


def test_float_tiff():
    values = RNG.random((5, 7), dtype=np.float32)
    values[0, :2] = 0, 1
    pixels = decode_image(save(values, "TIFF"))
    np.testing.assert_array_equal(pixels, grey_to_rgb(np.rint(values.astype(float) * 255).astype(np.uint8)))


def test_pfm():
    values = RNG.random((5, 7), dtype=np.float32)
    data = b"Pf\n7 5\n-1.0\n" + values[::-1].astype("<f4").tobytes()  # bottom row first
    np.testing.assert_array_equal(decode_image(data), grey_to_rgb(np.rint(values.astype(float) * 255).astype(np.uint8)))


def test_16_bit_premultiplied_tiff_keeps_the_high_byte():
    tifffile = pytest.importorskip("tifffile")
    stream = io.BytesIO()
    samples = deep(*"rgba")
    samples[..., 3] = 65535
    tifffile.imwrite(stream, samples, photometric="rgb", extrasamples=["assocalpha"])
    np.testing.assert_array_equal(decode_image(stream.getvalue()), samples[..., :3] >> 8)


@pytest.mark.parametrize("value", [1.5, -0.1, np.nan, np.inf])
def test_float_samples_outside_of_0_to_1_are_refused(value):
    values = np.full((4, 4), 0.5, np.float32)
    values[1, 1] = value
    with pytest.raises(BadImage, match="not from 0 to 1") as caught:
        decode_image(save(values, "TIFF"))
    assert caught.value.reason == "unsupported"


def test_32_bit_integers_are_refused():
    with pytest.raises(BadImage, match="convert it to 8 or 16 bit RGB") as caught:
        decode_image(save(np.full((4, 4), 70000, np.int32), "TIFF"))
    assert caught.value.reason == "unsupported"


def test_16_bit_ppm():
    samples = deep("grey")
    data = b"P5 7 9 65535\n" + samples.astype(">u2").tobytes()
    np.testing.assert_array_equal(decode_image(data), np.repeat(scaled(samples), 3, -1))


# orientation

UPRIGHT = {  # what each EXIF orientation asks for, in NumPy
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
    8: lambda a: np.rot90(a),
}


def exif(orientation):
    tags = Image.Exif()
    tags[274] = orientation
    return tags


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF"])
def test_exif_orientation(form, orientation):
    image = smooth(33, 50)
    options = {"lossless": True} if form == "WEBP" else {}
    plain = decode_image(save(image, form, **options))
    turned = save(image, form, exif=exif(orientation), **options)
    np.testing.assert_array_equal(decode_image(turned), UPRIGHT[orientation](plain))
    assert probe_size(turned) == UPRIGHT[orientation](plain).shape[:2]


def test_exif_orientation_turns_alpha_too():
    data = save(np.dstack([RGB, ALPHA]), "PNG", exif=exif(6))
    np.testing.assert_array_equal(decode_image(data), np.rot90(over(RGB, ALPHA, (255, 255, 255)), -1))


def test_exif_orientation_of_16_bit_png():
    samples = deep(*"rgb")
    extra = chunk(b"eXIf", exif(8).tobytes()[6:])
    np.testing.assert_array_equal(decode_image(png(samples, 2, 16, extra)), np.rot90(scaled(samples)))


def test_exif_chunk_behind_the_pixels_of_a_png():
    data = png(RGB, 2, 8, tail=chunk(b"eXIf", exif(6).tobytes()[6:]))
    np.testing.assert_array_equal(decode_image(data), np.rot90(RGB, -1))
    assert probe_size(data) == (7, 5)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("broken", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"x"])
@pytest.mark.filterwarnings("ignore")
def test_broken_exif_is_ignored(form, broken):
    options = {"lossless": True} if form == "WEBP" else {}
    data = save(RGB, form, exif=broken, **options)
    np.testing.assert_array_equal(decode_image(data), decode_image(save(RGB, form, **options)))
    assert probe_size(data) == (5, 7)


@pytest.mark.parametrize("value", [0, 9, 77])
def test_orientation_that_does_not_exist_is_ignored(value):
    np.testing.assert_array_equal(decode_image(save(RGB, "PNG", exif=exif(value))), RGB)


# colour profiles, written by hand

D50 = (0.9642, 1.0, 0.8249)
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))  # to D50 XYZ
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))


def profile(space, tags, connection=b"XYZ ", kind=b"mntr"):
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += b"\0" * (-len(data) % 4)
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    header = struct.pack(
        ">I4sI4s4s4s12s4s", start + len(body), b"\0" * 4, 0x02400000, kind, space, connection, b"", b"acsp"
    )
    header += b"\0" * 28 + struct.pack(">3i", *(round(v * 65536) for v in D50))
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def xyz(values):
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))


def gamma(value):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def text(words):
    return b"desc\0\0\0\0" + struct.pack(">I", len(words) + 1) + words + b"\0" * 80


def encode_srgb(linear):
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)


def adobe_rgb_profile():
    tags = {b"desc": text(b"wide"), b"wtpt": xyz(D50)}
    tags |= {name + b"XYZ": xyz(colour) for name, colour in zip([b"r", b"g", b"b"], ADOBE_RGB)}
    return profile(b"RGB ", tags | {name + b"TRC": gamma(2.2) for name in [b"r", b"g", b"b"]})


def adobe_rgb_to_srgb(pixels):
    linear = (pixels / 255) ** (round(2.2 * 256) / 256)
    return 255 * encode_srgb(linear @ np.array(ADOBE_RGB) @ np.linalg.inv(np.array(SRGB)))


def grey_profile():
    return profile(b"GRAY", {b"desc": text(b"old Mac"), b"wtpt": xyz(D50), b"kTRC": gamma(1.8)})


MILD = RNG.integers(110, 160, (6, 9, 3), dtype=np.uint8)  # inside of sRGB, so that nothing is clipped


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_wide_gamut_is_converted_to_srgb(form):
    options = {"lossless": True} if form == "WEBP" else {}
    pixels = decode_image(save(MILD, form, icc_profile=adobe_rgb_profile(), **options))
    np.testing.assert_allclose(pixels, adobe_rgb_to_srgb(MILD), atol=1.5)
    assert np.abs(pixels.astype(int) - MILD).max() > 3


def test_wide_gamut_under_alpha_16_bits_and_a_turn():
    icc = chunk(b"iCCP", b"wide\0\0" + zlib.compress(adobe_rgb_profile()))
    alpha = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
    data = png(np.dstack([MILD, alpha]).astype(np.uint16) * 257, 6, 16, icc + chunk(b"eXIf", exif(3).tobytes()[6:]))
    expected = over(adobe_rgb_to_srgb(MILD), alpha, (255, 255, 255))[::-1, ::-1]
    np.testing.assert_allclose(decode_image(data), expected, atol=1.5)


def test_srgb_in_any_words_changes_nothing():
    tags = {b"desc": text(b"some camera"), b"wtpt": xyz(D50)}
    tags |= {name + b"XYZ": xyz(colour) for name, colour in zip([b"r", b"g", b"b"], SRGB)}
    curve = (np.linspace(0, 1, 1024) + 0.055) / 1.055
    curve = np.where(np.linspace(0, 1, 1024) <= 0.04045, np.linspace(0, 1, 1024) / 12.92, curve**2.4)
    points = b"curv\0\0\0\0" + struct.pack(">I", 1024) + np.rint(curve * 65535).astype(">u2").tobytes()
    tags |= {name + b"TRC": points for name in [b"r", b"g", b"b"]}
    pixels = RNG.integers(0, 256, (100, 100, 3), dtype=np.uint8)  # a conversion would round some of them differently
    for icc in (profile(b"RGB ", tags), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        np.testing.assert_array_equal(decode_image(save(pixels, "PNG", icc_profile=icc)), pixels)


def test_grey_profile():
    pixels = decode_image(save(GREY, "PNG", icc_profile=grey_profile()))
    linear = (GREY / 255) ** (round(1.8 * 256) / 256)
    np.testing.assert_allclose(pixels, grey_to_rgb(255 * encode_srgb(linear)), atol=1.6)
    assert np.abs(pixels - grey_to_rgb(GREY).astype(int)).max() > 5


def ink_profile():
    """A printer that is only moved by its black ink: lightness 100 to 0; the table has its two ends."""
    identity = bytes(range(256))
    ends = b"".join(bytes([0 if corner & 1 else 255, 128, 128]) for corner in range(16))  # K varies fastest
    matrix = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + identity * 4 + ends + identity * 3
    return profile(b"CMYK", {b"desc": text(b"ink"), b"wtpt": xyz(D50), b"A2B0": lut}, b"Lab ", b"prtr")


@pytest.mark.parametrize("form", ["TIFF", "JPEG"])
def test_cmyk_profile(form):
    black = 100
    ink = np.full((16, 16, 4), (77, 88, 99, black), np.uint8)
    options = {"quality": 100} if form == "JPEG" else {}
    pixels = decode_image(save(Image.fromarray(ink, "CMYK"), form, icc_profile=ink_profile(), **options))
    lightness = 100 * (1 - black / 255)
    luminance = ((lightness + 16) / 116) ** 3
    np.testing.assert_allclose(pixels, 255 * encode_srgb(np.array(luminance)), atol=2)


@pytest.mark.parametrize("icc", [b"", b"not a profile", adobe_rgb_profile()[:300], b"\0" * 500])
def test_broken_profile_is_ignored(icc):
    np.testing.assert_array_equal(decode_image(save(RGB, "PNG", icc_profile=icc)), RGB)


def test_profile_of_another_colour_space_is_ignored():
    np.testing.assert_array_equal(decode_image(save(GREY, "PNG", icc_profile=adobe_rgb_profile())), grey_to_rgb(GREY))
    np.testing.assert_array_equal(decode_image(save(RGB, "PNG", icc_profile=grey_profile())), RGB)


# hostile bytes

WHOLE = {
    "JPEG": save(smooth(), "JPEG"),
    "JPEG progressive": save(smooth(), "JPEG", progressive=True),
    "PNG": save(smooth(), "PNG"),
    "WEBP": save(smooth(), "WEBP"),
    "GIF": save(smooth(), "GIF"),
    "BMP": save(smooth(), "BMP"),
    "TIFF": save(smooth(), "TIFF"),
    "TIFF deflate": save(smooth(), "TIFF", compression="tiff_deflate"),
    "PPM": save(smooth(), "PPM"),
    "JPEG2000": save(smooth(), "JPEG2000"),
    "AVIF": save(smooth(), "AVIF"),
}
HOSTILE = {
    "zero bytes": (b"", "empty"),
    "a web page": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not-an-image"),
    "text": (b"the photo that you asked for is gone", "not-an-image"),
    "zeros": (bytes(4096), "not-an-image"),
    "noise": (bytes(range(1, 256)) * 40, "not-an-image"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "not-an-image"),
    "only a PNG signature": (b"\x89PNG\r\n\x1a\n", "truncated"),
    "only a JPEG signature": (b"\xff\xd8\xff\xe0", "truncated"),
    "JPEG without a picture": (b"\xff\xd8\xff\xd9", "damaged"),
    "PNG with a flipped bit": (WHOLE["PNG"][:1000] + bytes([WHOLE["PNG"][1000] ^ 1]) + WHOLE["PNG"][1001:], "damaged"),
    "PNG of no width": (png(RGB, 2, 8).replace(struct.pack(">II", 7, 5), struct.pack(">II", 0, 5)), "damaged"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name):
    data, reason = HOSTILE[name]
    with pytest.raises(BadImage) as caught:
        decode_image(data)
    assert caught.value.reason == reason
    assert str(caught.value).startswith(reason + ": ")
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, DataError)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", WHOLE)
def test_cut_files_are_refused(name, share):
    data = WHOLE[name][: int(share * len(WHOLE[name]))]
    with pytest.raises(BadImage) as caught:
        decode_image(data)
    assert caught.value.reason == "truncated"


@pytest.mark.parametrize("name", ["JPEG", "JPEG progressive", "PNG", "GIF"])
def test_tail_of_zeros_counts_as_truncated(name):
    whole = WHOLE[name]
    cut = int(0.6 * len(whole))
    with pytest.raises(BadImage) as caught:
        decode_image(whole[:cut] + bytes(len(whole) - cut))
    assert caught.value.reason == "truncated"


def test_bytes_after_the_picture_do_no_harm():
    for name in ("JPEG", "PNG", "GIF", "TIFF"):
        np.testing.assert_array_equal(decode_image(WHOLE[name] + b"trailer"), decode_image(WHOLE[name]))


def huge_png(width, height):
    return png(RGB, 2, 8).replace(chunk(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 8, 2, 0, 0, 0)),
                                  chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)))  # fmt: skip


def test_too_large_is_known_before_decoding(monkeypatch):
    def refuse(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    for data, size in [(huge_png(60000, 60000), 2**27), (save(RGB, "PNG"), 34)]:
        with pytest.raises(BadImage, match="max_pixels") as caught:
            decode_image(data, DecodePolicy(max_pixels=size))
        assert caught.value.reason == "too-large"
    assert probe_size(huge_png(60000, 40000)) == (40000, 60000)


def test_limit_is_inclusive():
    np.testing.assert_array_equal(decode_image(save(RGB, "PNG"), DecodePolicy(max_pixels=35)), RGB)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_any_damage_gives_pixels_or_bad_image(name, draw):
    data = bytearray(WHOLE[name])
    for _ in range(draw.draw(st.integers(1, 6))):
        data[draw.draw(st.integers(0, min(len(data) - 1, 400)))] = draw.draw(st.integers(0, 255))
    policy = DecodePolicy(max_pixels=100_000)
    with contextlib.suppress(BadImage):
        pixels = decode_image(bytes(data), policy)
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3
        assert probe_size(bytes(data)) == pixels.shape[:2]


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_pixels_or_bad_image(data):
    with contextlib.suppress(BadImage):
        decode_image(data)


@pytest.mark.parametrize("name", WHOLE)
def test_probe_size_reads_no_pixels(name, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert probe_size(WHOLE[name]) == (48, 64)


# threads, globals, records


def test_threads_and_pillow_globals(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # another library's choice; ours is the policy's
    corpus = [data for name, data in WHOLE.items() if name[:4] not in ("WEBP", "TIFF")]  # whose readers obey it too
    corpus += [save(MILD, "PNG", icc_profile=adobe_rgb_profile()), png(deep(*"rgb"), 2, 16)]
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    expected = [decode_image(data) for data in corpus]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(decode_image, corpus * 20))
    for pixels, reference in zip(results, expected * 20):
        np.testing.assert_array_equal(pixels, reference)
    assert Image.MAX_IMAGE_PIXELS == 10
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_policy_is_json():
    described = DecodePolicy(max_pixels=5, background=(1, 2, 3)).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["max_pixels"] == 5
    assert described["background"] == [1, 2, 3]


def test_bad_image_survives_pickling():
    error = pickle.loads(pickle.dumps(BadImage("damaged", "it is.")))
    assert (error.reason, str(error), error.exit_code) == ("damaged", "damaged: it is.", 3)
