"""iFID: how real the images are that lie halfway between latents (arXiv 2603.05630), as a part of a benchmark.

Each image's latents go halfway along the sphere to those of a near neighbour, are decoded, and the Fréchet distance of
all these to the originals is measured. In the paper it follows the FID of diffusion models on 14 autoencoders, where
rFID does not. The paper looks for neighbours among ImageNet's training images; here they come from the measured images
themselves, so that a figure compares only with those of as many images.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from latentae.bench.quality import Quality
from latentae.bench.report import Section
from latentae.bench.state import merge
from latentae.codec import LatentCodec
from latentae.metrics.frechet import FrechetDistance
from latentae.nn.pixels import to_uint8

NEIGHBOURS = 10
BATCH = 8
MOST_BYTES = 2**30  # of the latents that are kept


class LatentInterpolation:
    """Keeps the latents of the first images, then decodes what lies between them.

    Args:
        noise: makes the generators of a decoder that samples, one for each name of an image.
        images: how many; each costs one more decoding. 0 measures nothing.
        quality: the metrics of the benchmark, whose network for rFID serves here.
    """

    def __init__(self, codec: LatentCodec, noise: Callable[[list[str]], Any], images: int, quality: Quality):
        self.codec, self.noise, self.wanted = codec, noise, images
        self.kept: list[tuple[int, str, Tensor]] = []
        self.skipped = quality.skipped.get("rfid", "" if quality.frechet else "rfid was not asked for")
        self.device = torch.device("cpu") if codec.device.type == "mps" else codec.device  # MPS has no float64
        self.distance: FrechetDistance | None = None
        if quality.frechet and images:
            self.distance = quality.frechet.fresh().to(self.device)

    def add(self, places: Sequence[int], keys: list[str], originals: Tensor, z: Tensor) -> None:
        """Take uint8 images (B, 3, H, W) and raw latents (B, C, ...), of which the first ``wanted`` places count."""
        if self.distance is None or self.skipped:
            return
        wanted = [i for i, place in enumerate(places) if place < self.wanted and z[i].isfinite().all()]
        if not wanted:
            return
        if self.wanted * z[0].numel() * 4 > MOST_BYTES:
            self.skipped = f"latents of {self.wanted} images do not fit into {MOST_BYTES >> 30} GiB"
            return
        self.kept += [(places[i], keys[i], z[i].float().cpu().clone()) for i in wanted]
        self.distance.update(self.distance.features(originals[wanted].to(self.device)), original=True)

    def merge(self, other: "LatentInterpolation") -> None:
        """Take what another process kept."""
        self.skipped = self.skipped or other.skipped
        self.kept = sorted(self.kept + other.kept, key=lambda kept: kept[0])
        merge(self.distance, other.distance)

    def results(self) -> dict[str, Any]:
        """``{"interpolation": {"ifid", "images"}}``, or why there is none."""
        if not self.skipped and len(self.kept) < 3:
            self.skipped = "neighbours need at least three images"
        if self.skipped or self.distance is None:
            return {"interpolation": {"skipped": self.skipped}}
        keys = [key for _, key, _ in self.kept]
        z = self.codec.normalise(torch.stack([z for *_, z in self.kept]))  # (N, C, ...)
        halfway = slerp_halfway(z, z[choose_neighbours(z)])
        for start in range(0, len(z), BATCH):
            noise = self.noise(keys[start : start + BATCH])
            pixels = self.codec.decode(halfway[start : start + BATCH], generator=noise)
            pixels = pixels[:, :, 0] if pixels.ndim == 5 else pixels
            self.distance.update(self.distance.features(to_uint8(pixels).to(self.device)), original=False)
        return {"interpolation": {"ifid": float(self.distance.compute()), "images": len(z)}}


def choose_neighbours(z: Tensor, seed: int = 0) -> Tensor:
    """For each of the latents (N, C, ...) another one, (N,): of the ten with the highest cosine, one drawn with
    probability softmax(-mean squared distance)."""
    flat = z.flatten(1)
    unit = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-12)
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for i in range(len(flat)):  # row by row: N x N cosines of many images would not fit
        cosine = unit @ unit[i]
        cosine[i] = -torch.inf
        near = cosine.topk(min(NEIGHBOURS, len(flat) - 1)).indices
        share = torch.softmax(-(flat[near] - flat[i]).square().mean(1), dim=0)
        chosen.append(near[torch.multinomial(share, 1, generator=generator)])
    return torch.cat(chosen)


def slerp_halfway(a: Tensor, b: Tensor) -> Tensor:
    """The points halfway along the great circles between vectors (N, ...), whose lengths may differ: (a + b) / (2 cos
    of half the angle); the plain mean where they point in opposite directions."""
    x, y = a.flatten(1), b.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(x, y).clamp(-1, 1)
    half = ((1 + cosine) / 2).sqrt()  # cosine of half the angle
    scale = torch.where(half > 1e-3, 2 * half, 2.0)
    return (a + b) / scale.view(-1, *[1] * (a.ndim - 1))


def interpolation_section(models: list[dict[str, Any]]) -> Section:
    """The part of the report that shows it."""
    rows = []
    for model in models:
        found = model["latents"].get("interpolation") or {}
        value = "–" if found.get("ifid") is None else f"{found['ifid']:.3g}"
        rows.append([model["name"], value, found.get("images", "–"), found.get("skipped", "").split(":")[0]])
    return Section(
        "Between latents",
        "iFID: the Fréchet distance between the originals and what is decoded halfway between the latents of an image "
        "and of one of its nearest neighbours among these images (arXiv 2603.05630, where neighbours come from all of "
        "ImageNet). Lower means that the space between latents holds images. It compares only with that of as many "
        "images, and is biased upwards below 10,000.",
        ["Model", "iFID", "Images", ""],
        rows,
    )
