"""One model's way through the images or clips: encode, decode, and all that is counted on the way."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentae.bench.altered import PERFECT, AlteredLatents, psnr_of_each
from latentae.bench.checkpoints import Checkpoints
from latentae.bench.codecs import ClassicalCodec
from latentae.bench.diagnostics import LatentDiagnostics
from latentae.bench.equivariance import LatentEquivariance
from latentae.bench.folders import ReconstructionFolder, warn_of_resizing
from latentae.bench.images import Batch, ImageFacts, ImageSet
from latentae.bench.interpolation import LatentInterpolation
from latentae.bench.latents import LatentStatistics
from latentae.bench.pairs import Pair
from latentae.bench.planes import has_planes, independent_values
from latentae.bench.processes import Processes
from latentae.bench.quality import Measurement, Quality
from latentae.bench.samples import Samples
from latentae.bench.state import dump_state, load_state, merge, merge_attributes, metrics_of
from latentae.codec import LatentCodec
from latentae.console import Progress
from latentae.nn.pixels import to_float, to_uint8
from latentae.store.clips import check_frames
from latentae.store.decode import noise_generator
from latentae.store.worker import key_generator

Competitor = LatentCodec | ClassicalCodec | ReconstructionFolder
OF_GRIDS = ("spectrum", "spatial_correlation", "effective_rank")
NO_GRID = "its latents are planes and have no common grid of places"


class Pass:
    """What has been counted so far: `latentae.bench.state` saves it, continues it and merges it with others.

    Args:
        index: which model it is.
        facts: of the images, which fill up on the way.
        quality: the metrics; rFID's originals are counted in the first pass only.
        seed: of the noise from which a decoder that samples starts.
        rated: on how many images, the first ones, to measure rate and robustness.
        equivariance: on how many images to measure it.
        interpolation: on how many images to measure iFID.
    """

    def __init__(
        self,
        index: int,
        codec: Competitor,
        facts: ImageFacts,
        quality: Quality,
        *,
        seed: int,
        rated: int,
        equivariance: int,
        interpolation: int,
    ):
        self.index, self.next_batch = index, 0
        self.facts, self.quality = facts, quality
        self.measurement = Measurement(quality, device=pair_device(codec))
        self.statistics, self.diagnostics = LatentStatistics(), LatentDiagnostics()
        self.equivariance: LatentEquivariance | None = None
        self.altered: AlteredLatents | None = None
        self.interpolation: LatentInterpolation | None = None
        self.files: FirstFiles | None = None
        self.resized: dict[int, str] = {}  # of a folder's reconstructions, the size before, by place
        if isinstance(codec, ClassicalCodec):
            self.files = FirstFiles(rated)
        elif isinstance(codec, LatentCodec):
            self.altered = AlteredLatents(codec, partial(_noise, seed), rated)
            if interpolation:
                self.interpolation = LatentInterpolation(codec, partial(_noise, seed), interpolation, quality)
            self.equivariance = LatentEquivariance(codec, equivariance, quality) if equivariance else None

    def take_originals(self, quality: Quality) -> None:
        """Continue with metrics that have seen the originals."""
        self.quality = quality
        self.measurement = Measurement(quality, device=self.measurement.device)

    def merge(self, other: "Pass") -> None:
        merge_attributes(self, other)
        self.resized |= other.resized

    def results(self, size: int) -> dict[str, Any]:
        """All figures that come from the images, of this size; of clips also ``floats_per_pixel`` of each frame."""
        quality = self.measurement.results()
        if self.resized:
            quality["warnings"].append(warn_of_resizing(self.resized, size))
        if self.altered is None:  # there are no latents
            rate = self.files.rate() if self.files else None
            return {**quality, "latents": {}, "rate": rate, "noise_robustness": None}
        figures = self.statistics.results() | self.diagnostics.results()
        autoencoder, frames = self.altered.codec.autoencoder, self.quality.frames
        if has_planes(autoencoder) and self.statistics.shape:
            quality["skipped"] |= dict.fromkeys(OF_GRIDS, NO_GRID)
        if frames and self.statistics.shape:
            floats = independent_values(autoencoder, torch.empty(1, *self.statistics.shape, device="meta"))
            quality["floats_per_pixel"] = sum(map(torch.numel, floats)) / (frames * size**2)
        if self.equivariance:
            figures |= self.equivariance.results()
        if self.interpolation:
            figures |= self.interpolation.results()
        return {**quality, "latents": figures, **self.altered.results()}


class FirstFiles:
    """Rate and distortion of the files of a classical codec, of the first ``count`` images, as `AlteredLatents` has it.

    Attributes:
        kept: of each image its place in the order, bits per pixel and PSNR.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.kept: list[tuple[int, float, float]] = []

    def add(self, places: list[int], reconstruction: "Reconstruction", originals: Tensor) -> None:
        pixels = math.prod(originals.shape[2:])
        for place, bits, files, original in zip(places, reconstruction.bits, reconstruction.pixels, originals):
            if len(self.kept) < self.count:
                quality = psnr_of_each(to_uint8(files[None]), original[None]).item()
                self.kept.append((place, bits / pixels, min(quality, PERFECT)))

    def merge(self, other: "FirstFiles") -> None:
        """Take what another process kept, so that the first images of all are left."""
        self.kept = sorted(self.kept + other.kept)[: self.count]

    def rate(self) -> dict[str, Any] | None:
        if not self.kept:
            return None
        _, bits, quality = zip(*self.kept)
        return {"images": len(self.kept), "bits_per_pixel": float(np.mean(bits)), "psnr": float(np.mean(quality))}


def measure(
    name: str,
    codec: Competitor,
    images: ImageSet,
    fresh: Pass,
    samples: Samples,
    checkpoints: Checkpoints,
    processes: Processes,
    *,
    sample: bool,
    seed: int,
    quantisation: str,
) -> tuple[Pass, Pass | None]:
    """Go through the images, from where a killed run was.

    Returns:
        What this process counted, and in the first process what all did.
    """
    current = checkpoints.load(fresh)
    device = pair_device(codec)
    for metric in metrics_of(current.quality):
        metric.to(device)
    images.facts = current.facts
    done = current.next_batch * images.batch_size
    with Progress(name, len(images.items), images.unit, done) as progress:
        for batch in images.batches(current.next_batch, processes.rank, processes.count):
            keys, originals = batch.keys, batch.pixels
            reconstruction = reconstruct(codec, batch, images, sample=sample, seed=seed)
            z, posterior = reconstruction.latents, reconstruction.posterior
            current.resized |= reconstruction.resized
            if current.files:
                current.files.add(batch.places, reconstruction, originals)
            if isinstance(codec, LatentCodec) and z is not None:
                current.statistics.add(posterior.sample(_generators(seed, keys)))
                quantizer = getattr(codec.autoencoder, "quantize", None)
                current.diagnostics.add(z, posterior, batch.places, quantizer)
                if current.altered:
                    current.altered.add(batch.places, keys, originals, z)
                if current.interpolation:
                    current.interpolation.add(batch.places, keys, originals, z)
            pair = Pair(reconstruction.pixels.to(device), originals.to(device), quantisation)
            current.measurement.add(batch.places, keys, pair, reconstruction.missing)
            if current.equivariance:
                current.equivariance.add(originals, batch.places)
            samples.save(fresh.index, keys, pair, z)
            current.next_batch = batch.number + 1
            checkpoints.save(current)
            progress.advance(len(keys) * processes.count)
    current.quality.knows_originals = True
    checkpoints.save(current, now=True)
    if processes.count == 1:
        return current, current
    parts = [load_state(part, fresh) for part in processes.gather(dump_state(current))]
    for part in parts[1:]:
        merge(parts[0], part)
    for metric in metrics_of(parts):
        metric.distributed_available_fn = _alone  # they are together already
    return current, parts[0] if parts else None


@dataclass(frozen=True)
class Reconstruction:
    """What came of a batch.

    Attributes:
        pixels: float, (B, 3, size, size) or of clips (B, 3, T, size, size), NaN where there is none.
        latents: raw ones, (B, C, ...), and ``posterior``, of an autoencoder.
        bits: of the file of each image, or of all files of a clip, of a classical codec.
        missing: of a folder, by the place of an image why it is not there.
        resized: of a folder, by the place of an image its size before.
    """

    pixels: Tensor
    latents: Tensor | None = None
    posterior: Any = None
    bits: list[int] = field(default_factory=list)
    missing: dict[int, str] = field(default_factory=dict)
    resized: dict[int, str] = field(default_factory=dict)


def reconstruct(codec: Competitor, batch: Batch, images: ImageSet, *, sample: bool, seed: int) -> Reconstruction:
    """The images of a batch as a model, a classical codec or a folder gives them back."""
    if isinstance(codec, ReconstructionFolder):
        pixels, missing, resized = codec.read(batch, images)
        return Reconstruction(pixels, missing=missing, resized=resized)
    if isinstance(codec, ClassicalCodec):
        files = [codec.reconstruct(original.movedim(0, -1).numpy()) for original in batch.pixels]
        pixels = torch.stack([torch.from_numpy(array).movedim(-1, 0) for array, _ in files])  # (B, 3, ...)
        return Reconstruction(to_float(pixels), bits=[bits for _, bits in files])
    latents = codec.encode(batch.pixels, sample=sample, generator=_generators(seed, batch.keys))
    pixels = codec.decode(latents, generator=_noise(seed, batch.keys))  # (B, 3, ...)
    if images.frames:
        check_frames(codec, pixels[0], images.frames)
    return Reconstruction(pixels, codec.denormalise(latents.tensor), latents.posterior)


def save_samples(
    codec: Competitor,
    images: ImageSet,
    samples: Samples,
    index: int,
    keys: Collection[str],
    *,
    sample: bool,
    seed: int,
    quantisation: str,
) -> None:
    """Save images that were chosen for the report when the model's pass had gone by."""
    for batch in images.batches(keys=keys):
        reconstruction = reconstruct(codec, batch, images, sample=sample, seed=seed)
        device = pair_device(codec)
        pair = Pair(reconstruction.pixels.to(device), batch.pixels.to(device), quantisation)
        samples.save(index, batch.keys, pair, reconstruction.latents)


def pair_device(codec: Competitor) -> torch.device:
    """Where a model's pairs are compared: MPS has no float64."""
    return torch.device("cpu") if codec.device.type == "mps" else codec.device


def _alone() -> bool:
    return False


def _noise(seed: int, keys: list[str]) -> Any:
    return [noise_generator(seed, key) for key in keys]


def _generators(seed: int, keys: list[str]) -> Any:
    """One for each image, so that neither the batch nor the device changes what is drawn."""
    return [key_generator(seed, key) for key in keys]
