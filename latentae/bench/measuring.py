"""One model's way through the images: encode, decode, and all that is counted on the way."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentae.bench.altered import PERFECT, AlteredLatents
from latentae.bench.checkpoints import Checkpoints
from latentae.bench.codecs import ClassicalCodec
from latentae.bench.diagnostics import LatentDiagnostics
from latentae.bench.equivariance import LatentEquivariance
from latentae.bench.folders import ReconstructionFolder, warn_of_resizing
from latentae.bench.images import Batch, ImageFacts, ImageSet
from latentae.bench.interpolation import LatentInterpolation
from latentae.bench.latents import LatentStatistics
from latentae.bench.pairs import Pair
from latentae.bench.processes import Processes
from latentae.bench.quality import Measurement, Quality
from latentae.bench.samples import Samples
from latentae.bench.state import dump_state, load_state, merge, merge_attributes, metrics_of
from latentae.codec import LatentCodec
from latentae.console import Progress
from latentae.metrics.image import psnr
from latentae.nn.pixels import to_float
from latentae.store.decode import noise_generator
from latentae.store.worker import key_generator


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
        codec: LatentCodec | ClassicalCodec | ReconstructionFolder,
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
        """All figures that come from the images, of this size."""
        quality = self.measurement.results()
        if self.resized:
            quality["warnings"].append(warn_of_resizing(self.resized, size))
        if self.altered is None:  # there are no latents
            rate = self.files.rate() if self.files else None
            return {**quality, "latents": {}, "rate": rate, "noise_robustness": None}
        figures = self.statistics.results() | self.diagnostics.results()
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

    def add(self, place: int, bits_per_pixel: float, quality: float) -> None:
        if len(self.kept) < self.count:
            self.kept.append((place, bits_per_pixel, min(quality, PERFECT)))

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
    codec: LatentCodec | ClassicalCodec | ReconstructionFolder,
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
    with Progress(name, len(images.items), done=done) as progress:
        for batch in images.batches(current.next_batch, processes.rank, processes.count):
            keys, originals = batch.keys, batch.pixels
            z: Tensor | None = None
            reasons: dict[int, str] = {}
            if isinstance(codec, ClassicalCodec):
                pixels = _through_files(codec, batch, current)
            elif isinstance(codec, ReconstructionFolder):
                pixels, reasons, resized = codec.read(batch, images)
                current.resized |= resized
            else:
                latents = codec.encode(originals, sample=sample, generator=_generators(seed, keys))
                pixels = codec.decode(latents, generator=_noise(seed, keys))  # (B, 3, size, size)
                z = codec.denormalise(latents.tensor)
                current.statistics.add(latents.posterior.sample(_generators(seed, keys)))
                quantizer = getattr(codec.autoencoder, "quantize", None)
                current.diagnostics.add(z, latents.posterior, batch.places, quantizer)
                if current.altered:
                    current.altered.add(batch.places, keys, originals, z)
                if current.interpolation:
                    current.interpolation.add(batch.places, keys, originals, z)
            pair = Pair(pixels.to(device), originals.to(device), quantisation)
            current.measurement.add(batch.places, keys, pair, reasons)
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


def _through_files(codec: ClassicalCodec, batch: Batch, current: Pass) -> Tensor:
    """What files keep of the images of a batch, as float pixels (B, 3, H, W); counts their sizes."""
    assert current.files is not None
    images = []
    for place, original in zip(batch.places, batch.pixels):
        array, bits = codec.reconstruct(original.permute(1, 2, 0).numpy())
        image = torch.from_numpy(array).permute(2, 0, 1)
        current.files.add(place, bits / (image.shape[1] * image.shape[2]), psnr(image[None], original[None]).item())
        images.append(image)
    return to_float(torch.stack(images))


def pair_device(codec: LatentCodec | ClassicalCodec | ReconstructionFolder) -> torch.device:
    """Where a model's pairs are compared: MPS has no float64."""
    return torch.device("cpu") if codec.device.type == "mps" else codec.device


def _alone() -> bool:
    return False


def _noise(seed: int, keys: list[str]) -> Any:
    return [noise_generator(seed, key) for key in keys]


def _generators(seed: int, keys: list[str]) -> Any:
    """One for each image, so that neither the batch nor the device changes what is drawn."""
    return [key_generator(seed, key) for key in keys]
