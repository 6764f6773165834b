"""Pictures that need no download: the photos inside the scikit-image and scikit-learn wheels, split into those to
train on and those held out, and an endless supply of dead leaves, the simplest synthetic pictures whose statistics
resemble those of photos.
"""

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from latentae.data.decode import decode_image
from latentae.errors import MissingExtra

SKIMAGE, SKLEARN = ("skimage", "data"), ("sklearn", "datasets/images")
PHOTO_FILES = {
    "train": {
        "astronaut": (*SKIMAGE, "astronaut.png"),
        "hubble": (*SKIMAGE, "hubble_deep_field.jpg"),
        "immunohistochemistry": (*SKIMAGE, "ihc.png"),
        "retina": (*SKIMAGE, "retina.jpg"),
        "rocket": (*SKIMAGE, "rocket.jpg"),
    },
    "held_out": {
        "chelsea": (*SKIMAGE, "chelsea.png"),
        "china": (*SKLEARN, "china.jpg"),
        "coffee": (*SKIMAGE, "coffee.png"),
        "flower": (*SKLEARN, "flower.jpg"),
    },
}
PHOTO_CREDITS = {
    "astronaut": ("NASA, Eileen Collins, by way of scikit-image", "public domain"),
    "chelsea": ("Stefan van der Walt, by way of scikit-image", "CC0"),
    "china": ("danielbuechele on Flickr, by way of scikit-learn", "CC BY 2.0"),
    "coffee": ("Rachel Michetti, Pikolo Espresso Bar, by way of scikit-image", "CC0"),
    "flower": ("vultilion on Flickr, by way of scikit-learn", "CC BY 2.0"),
    "hubble": ("NASA, HubbleSite, by way of scikit-image", "public domain"),
    "immunohistochemistry": (
        "Center for Microscopy and Molecular Imaging, by way of scikit-image",
        "no known copyright restrictions",
    ),
    "retina": ("Mikael Häggström, by way of scikit-image", "CC0"),
    "rocket": ("SpaceX, launch of DSCOVR, by way of scikit-image", "public domain"),
}

LEAVES, GROUND_LEAVES = 400, 50
OUTLINE = 24  # corners of a leaf: 3, 4 and 6 divide it, so that triangles, quadrilaterals and hexagons are exact
GRAIN_SIZE = 512  # a power of two


def photos(split: Literal["train", "held_out"]) -> dict[str, np.ndarray]:
    """The photos of one split by name, decoded as all images are: uint8 (height, width, 3) in sRGB.

    No photo is in both splits. `PHOTO_CREDITS` has authors and licences.

    Raises:
        MissingExtra: scikit-image or scikit-learn is not installed.
    """
    return {name: decode_image(_photo_path(*where).read_bytes()) for name, where in PHOTO_FILES[split].items()}


def _photo_path(package: str, folder: str, name: str) -> Path:
    spec = importlib.util.find_spec(package)  # where it is, without the seconds that importing it takes
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra("The sample photos", "demo")
    return Path(spec.submodule_search_locations[0], folder, name)


def dead_leaves(index: int, size: int = 256, seed: int = 0) -> np.ndarray:
    """Picture number ``index``: uint8 (size, size, 3), a pure function of its arguments.

    Opaque leaves of random shape fall on each other until they cover the picture; their radii follow the power law
    r^-3, which makes the statistics scale-invariant as those of photos are (Lee, Mumford and Huang 2001, "Occlusion
    models for natural images"; as training data: Baradad et al. 2021, arXiv 2106.05963). Each leaf has a colour from
    the picture's own palette, a slope of brightness and a 1/f grain. Drawn at twice the size, then averaged.
    """
    rng = np.random.default_rng((seed, index))
    leaf = _scatter(rng, 2 * size)  # (2 size, 2 size): which leaf shows at each point
    brightness = 1 + _slope(rng, leaf) + _grain(rng, leaf)
    pixels = _palette(rng).take(leaf, axis=0) * brightness[..., None]  # (2 size, 2 size, 3)
    return np.asarray(Image.fromarray((255 * pixels.clip(0, 1) + 0.5).astype(np.uint8)).reduce(2)).copy()


def _scatter(rng: np.random.Generator, side: int) -> np.ndarray:
    """Drop `LEAVES` leaves on a square: the number of the topmost leaf at each point, int32 (side, side)."""
    smallest, largest = side / 80, side / 2
    share = rng.random(LEAVES)
    share[:GROUND_LEAVES] = 1 - 0.03 * share[:GROUND_LEAVES]  # the first are large, so that nothing stays bare
    radius = (smallest**-2 - share * (smallest**-2 - largest**-2)) ** -0.5  # density r^-3 between the two
    canvas = Image.new("I", (side, side))
    draw = ImageDraw.Draw(canvas)
    centre = rng.uniform(0, side, (LEAVES, 1, 2))
    outlines = centre + radius[:, None, None] * _unit_outlines(rng)
    for number, outline in enumerate(outlines.reshape(LEAVES, -1).tolist()):
        draw.polygon(outline, fill=number)
    return np.asarray(canvas)


def _unit_outlines(rng: np.random.Generator) -> np.ndarray:
    """Outlines of radius about one around zero, (LEAVES, OUTLINE, 2): ellipses, polygons, stones and blades."""
    turn = 2 * np.pi * np.arange(OUTLINE) / OUTLINE
    ellipse = np.ones((LEAVES, OUTLINE))
    sector = 2 * np.pi / rng.choice([3, 4, 4, 6], (LEAVES, 1))
    polygon = 1.2 * np.cos(sector / 2) / np.cos(turn % sector - sector / 2)
    waves = np.arange(2, 7)
    phase, height = rng.uniform(0, 2 * np.pi, (LEAVES, 5, 1)), rng.normal(0, 0.3, (LEAVES, 5, 1)) / waves[:, None]
    stone = 1 + (height * np.cos(waves[:, None] * turn + phase)).sum(axis=1)

    kind = rng.choice(4, (LEAVES, 1), p=[0.25, 0.3, 0.3, 0.15])
    reach = np.select([kind == 1, kind == 2], [polygon, stone], ellipse)  # (LEAVES, OUTLINE)
    stretch = np.exp(np.where(kind == 3, 1.2, rng.normal(0, 0.35, (LEAVES, 1))))  # blades are thin
    x, y = reach * np.cos(turn) * stretch, reach * np.sin(turn) / stretch
    y = y + np.where(kind == 3, 0.1 * rng.normal(size=(LEAVES, 1)) * x**2, 0)  # and bent
    angle = rng.uniform(0, 2 * np.pi, (LEAVES, 1))
    return np.stack([np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y], axis=-1)


def _palette(rng: np.random.Generator) -> np.ndarray:
    """A colour for each leaf, float32 (LEAVES, 3), spread about as the colours of photos are.

    Grey, red against blue, and green against both are drawn around the picture's own means; photos of the Berkeley
    set have means 0.42 +- 0.11, 0.07 +- 0.14, 0.04 +- 0.05 and deviations within a picture of 0.19, 0.12, 0.05.
    """
    means = rng.normal([0.43, 0.07, 0.03], [0.1, 0.13, 0.05])
    hues = rng.normal(0, [0.1, 0.045], (4, 2))  # a few materials, each with some spread
    grey = np.abs(rng.normal(means[0], 0.18, LEAVES))
    hue = means[1:] + hues[rng.integers(0, 4, LEAVES)] + rng.normal(0, [0.06, 0.02], (LEAVES, 2))
    red_blue, green = (hue * (grey / 0.43).clip(0.2, 1.6)[:, None]).T  # dark things have little colour
    middle = grey - green / 3
    return np.stack([middle + red_blue / 2, middle + green, middle - red_blue / 2], axis=1).astype(np.float32)


def _slope(rng: np.random.Generator, leaf: np.ndarray) -> np.ndarray:
    """Brightness that changes linearly across each leaf, as on a surface turned to the light: (side, side)."""
    ramp = np.linspace(-1, 1, len(leaf), dtype=np.float32)
    right, down = rng.normal(0, 0.2, (2, LEAVES)).astype(np.float32)
    return right.take(leaf) * ramp + down.take(leaf) * ramp[:, None]


def _grain(rng: np.random.Generator, leaf: np.ndarray) -> np.ndarray:
    """Each leaf's own cut from one sheet of noise, stretched along both axes and stronger or weaker: (side, side)."""
    strength = rng.gamma(1.0, 0.11, LEAVES).astype(np.float32)
    stretch_down, stretch_right = rng.integers(1, 4, (2, LEAVES), dtype=np.int32)
    top, left = rng.integers(0, GRAIN_SIZE, (2, LEAVES), dtype=np.int32)
    steps = np.arange(len(leaf), dtype=np.int32)
    row = (top.take(leaf) + stretch_down.take(leaf) * steps[:, None]) % GRAIN_SIZE
    column = (left.take(leaf) + stretch_right.take(leaf) * steps) % GRAIN_SIZE
    return strength.take(leaf) * _noise_sheet().take(row * GRAIN_SIZE + column)


@lru_cache(maxsize=1)
def _noise_sheet() -> np.ndarray:
    """Periodic noise whose amplitude falls as 1/f, of unit variance: float32 (GRAIN_SIZE, GRAIN_SIZE)."""
    frequency = np.hypot(np.fft.fftfreq(GRAIN_SIZE)[:, None], np.fft.rfftfreq(GRAIN_SIZE))
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(np.random.default_rng(0).normal(size=(GRAIN_SIZE, GRAIN_SIZE))) / frequency
    noise = np.fft.irfft2(spectrum)
    return (noise / noise.std()).astype(np.float32)
