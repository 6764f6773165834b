"""The latents of a codec as a probe sees them: of images to train on and of held-out ones, whitened, with what the
codec itself makes of the held-out images."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from latentae.bench.altered import ALLOWED_LOSS, PERFECT
from latentae.bench.images import ImageSet
from latentae.codec import LatentCodec, Latents
from latentae.errors import DataError, RequestError
from latentae.metrics.image import psnr
from latentae.metrics.whitening import Whitening
from latentae.nn.pixels import to_uint8
from latentae.store.decode import noise_generator

HELD_OUT_SHARE = 0.2
MOST_HELD_OUT = 512
MOST_SEEN = 512
LEAST_TRAIN, LEAST_HELD_OUT = 32, 8
BATCH = 16
RATED = 32  # held-out images on which the tolerated noise is searched
LEAST_NOISE, MOST_NOISE = 1e-4, 1e2  # in units of whitened latents
BISECTIONS = 8  # after the search by factors of two: 0.3 % in the noise

Named = tuple[Sequence[str], Tensor]


def split_images(images: ImageSet, limit: int | None = None) -> tuple[ImageSet, ImageSet]:
    """Those to train on, at most ``limit``, and those held out, a fifth but at most 512; by a hash of their names.

    An image is on the same side whatever others there are.

    Raises:
        RequestError: there are too few on a side.
    """
    places = {item.key: _place(item.key) for item in images.good}
    items = sorted(images.good, key=lambda item: places[item.key])
    held_out = [item for item in items if places[item.key] < HELD_OUT_SHARE][:MOST_HELD_OUT]
    train = [item for item in items if places[item.key] >= HELD_OUT_SHARE][:limit]
    _refuse_too_few(len(train), len(held_out))
    first, second = (
        ImageSet(images.source, part, images.size, images.batch_size, images.workers, images.crop)
        for part in (train, held_out)
    )
    return first, second


def _place(key: str) -> float:
    """Where a name stands between 0 and 1."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def _refuse_too_few(train: int, held_out: int) -> None:
    if train < LEAST_TRAIN or held_out < LEAST_HELD_OUT:
        raise RequestError(
            f"A probe needs at least {LEAST_TRAIN} images to train on and {LEAST_HELD_OUT} held out, here are {train} "
            f"and {held_out}: about 60 images are enough to try it, thousands to learn from it."
        )


def named(images: Tensor, what: str) -> Iterable[Named]:
    """Batches of images (N, 3, H, W) with names such as ``training image 0``."""
    for start in range(0, len(images), BATCH):
        pixels = images[start : start + BATCH]
        yield [f"{what} {start + i}" for i in range(len(pixels))], pixels


def named_of(images: ImageSet) -> Iterable[Named]:
    """Batches of a set with their keys."""
    return ((batch.keys, batch.pixels) for batch in images.batches())


class LatentSpace:
    """Latents of a codec, encoded once for all seeds.

    Args:
        codec: of images; discrete latents are taken before they are snapped to codes, which decoding does.
        train, held_out: batches of names and uint8 pixels (B, 3, H, W), all of one size.

    Attributes:
        whitening: over the channels of the training latents.
        train, held_out: whitened latents, (N, C, h, w) float32 on the CPU.
        seen: the first 512 training images, uint8.
        held_out_images, reconstructions: uint8.

    Raises:
        RequestError: a video autoencoder, latents that are no maps, or too few images.
        DataError: latents with NaN or infinity.
    """

    def __init__(self, codec: LatentCodec, train: Iterable[Named], held_out: Iterable[Named]):
        if codec.is_video:
            raise RequestError(
                f"{type(codec.autoencoder).__name__} is a video autoencoder, and the probe is of image latents: leave "
                "it out."
            )
        self.codec = codec
        names, images, latents = _encode(codec, held_out, keep=MOST_HELD_OUT)
        self.held_out_names, self.held_out_images = names, images
        _, self.seen, of_train = _encode(codec, train, keep=MOST_SEEN)
        _refuse_too_few(len(of_train), len(latents))
        self.size = tuple(images.shape[-2:])
        self.whitening = Whitening(of_train)
        self.train, self.held_out = self.whitening(of_train), self.whitening(latents)
        self.reconstructions = self.decode(self.held_out, names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents of one image."""
        channels, height, width = self.held_out.shape[1:]
        return channels, height, width

    @property
    def pixels(self) -> int:
        """Of one image."""
        return math.prod(self.size)

    def decode(self, white: Tensor, names: Sequence[str], seed: int = 0) -> Tensor:
        """Whitened latents (N, C, h, w) to images, uint8 (N, 3, H, W); decoders that sample start from noise seeded by
        the names.

        Raises:
            DataError: what is decoded holds NaN or infinity.
        """
        images = []
        for start in range(0, len(white), BATCH):
            noise: Any = [noise_generator(seed, name) for name in names[start : start + BATCH]]
            latents = self.whitening.undo(white[start : start + BATCH].cpu())
            decoded = self.codec.decode(Latents(latents, *self.size), generator=noise)
            if not decoded.isfinite().all():
                raise DataError(f"{type(self.codec.autoencoder).__name__} decodes to NaN or infinity: it is broken.")
            images.append(to_uint8(decoded).cpu())
        return torch.cat(images)

    def tolerated_noise(self, seed: int = 0) -> dict[str, Any]:
        """The standard deviation of white noise on whitened latents that costs 0.1 dB of PSNR when decoded.

        Found by bisection of its logarithm, with one fixed draw of noise, on the first 32 held-out images.

        Returns:
            ``noise``, None with a ``reason`` where there is none; ``psnr`` without noise, a mean over ``images``.
        """
        originals, white = self.held_out_images[:RATED], self.held_out[:RATED]
        names = self.held_out_names[:RATED]
        drawn = torch.randn(white.shape, generator=torch.Generator().manual_seed(seed))

        def quality(decoded: Tensor) -> float:
            return float(psnr(decoded, originals).clamp(max=PERFECT).mean())

        unaltered = quality(self.reconstructions[:RATED])
        found: dict[str, Any] = {"noise": None, "psnr": unaltered, "images": len(white), "allowed_loss": ALLOWED_LOSS}

        def loses(noise: float) -> bool:
            return quality(self.decode(white + noise * drawn, names)) < unaltered - ALLOWED_LOSS

        low, high = LEAST_NOISE, 0.1
        while high < MOST_NOISE and not loses(high):
            low, high = high, 2 * high
        if high >= MOST_NOISE:
            return found | {"reason": "what is decoded hardly depends on the latents"}
        if low == LEAST_NOISE:
            low = high
            while low >= LEAST_NOISE and loses(low):
                low, high = low / 2, low
            if low < LEAST_NOISE:
                return found | {"reason": "next to no noise is tolerated"}
        for _ in range(BISECTIONS):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if loses(middle) else (middle, high)
        return found | {"noise": math.sqrt(low * high)}


def _encode(codec: LatentCodec, batches: Iterable[Named], keep: int) -> tuple[list[str], Tensor, Tensor]:
    """Names and images of the first ``keep``, and the latents of all, on the CPU."""
    names, images, latents = list[str](), list[Tensor](), list[Tensor]()
    kept = 0
    for keys, pixels in batches:
        if pixels.dtype != torch.uint8:
            raise RequestError(f"The probe takes uint8 images (N, 3, H, W), not {pixels.dtype}.")
        z = codec.encode(pixels).tensor.float().cpu()
        if z.ndim != 4:
            raise RequestError(
                f"{type(codec.autoencoder).__name__} has latents of shape {tuple(z.shape[1:])}, and the probe is of "
                "maps (channels, height, width): leave it out."
            )
        finite = z.isfinite().flatten(1).all(1)
        if not finite.all():
            first = keys[int((~finite).nonzero()[0])]
            raise DataError(
                f"The latents of {first} hold NaN or infinity: the model is broken, or its dtype too narrow for it."
            )
        latents.append(z)
        if kept < keep:
            taken = pixels[: keep - kept].cpu()
            images.append(taken)
            names += keys[: len(taken)]
            kept += len(taken)
    if not latents:
        raise RequestError("The probe got no images, to train on or held out: it needs both.")
    return names, torch.cat(images), torch.cat(latents)
