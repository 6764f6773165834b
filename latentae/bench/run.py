"""`bench`: one pass over the images for each model, and from it every figure.

The way of an image: decode, ADM centre crop, encode, decode, clamp, round half up to uint8; all metrics see that one
uint8 pair.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from latentae.bench.contestants import Model, describe, open_contestants
from latentae.bench.diagnostics import LatentDiagnostics, diagnostics_section
from latentae.bench.equivariance import LatentEquivariance, equivariance_section
from latentae.bench.images import ImageSet
from latentae.bench.latents import LatentStatistics
from latentae.bench.protocol import describe_machine, describe_protocol, versions
from latentae.bench.quality import Measurement, Quality
from latentae.bench.report import Section, require_report, write_report
from latentae.bench.results import SCHEMA, write_results
from latentae.bench.samples import Samples
from latentae.bench.speed import measure_speed, reference_cost
from latentae.codec import LatentCodec
from latentae.console import Progress, say
from latentae.data.sources import Source, open_source, refuse_output_in_input
from latentae.errors import RequestError
from latentae.files import sha256_json
from latentae.nn.pixels import to_uint8
from latentae.store.decode import noise_generator
from latentae.store.worker import check_max_bad, key_generator, refuse_too_many_bad

SMALLEST_SIZE = 32  # what the perceptual networks and the SSIM window still take


def bench(
    src: str | Path | Source,
    models: Sequence[Model | tuple[str, Model]],
    *,
    out: str | Path | None = None,
    size: int = 256,
    limit: int | None = None,
    metrics: Sequence[str] | None = None,
    sample: bool = False,
    seed: int = 0,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = torch.float32,
    max_bad: float = 0.01,
    workers: int = 4,
    speed: bool = True,
    speed_batch_size: int | None = None,
    report_images: int = 24,
    random_weights: bool = False,
    decode_steps: Sequence[int] = (),
    equivariance: int = 0,
    baselines: Sequence[dict[str, Any]] = (),
    extra_sections: Sequence[Section] = (),
) -> dict[str, Any]:
    """Measure autoencoders on the images of a folder.

    Args:
        src: a folder of images, an image file, or a source.
        models: what `latentae.load` opens, an autoencoder, or a codec; with a name of its own as ``(name, model)``.
        out: folder for ``results.json``, ``report.html`` and ``samples/``; None writes nothing.
        size: side of the square crop in pixels.
        limit: measure only the first images, in the order of their names.
        metrics: names of `latentae.bench.quality.METRICS`, or ``lpips`` for both nets; those that need no weights
            are always measured. By default all whose weight files are here; the others are recorded as skipped, with
            the reason.
        sample: encode to a sample of the posterior instead of its mode.
        seed: with the name of an image, the seed of its sample and of decoders that draw noise.
        device, dtype: where and in which precision models run, by default a GPU if there is one and float32; codecs
            are taken as they are.
        max_bad: how many images may be broken, as a share of all (float) or as a number (int).
        workers: threads that read and decode.
        speed: measure throughput and memory, in batches of ``speed_batch_size``: by default ``batch_size`` on a GPU
            and 1 elsewhere.
        report_images: how many images the report shows.
        random_weights: allow presets with random weights.
        decode_steps: numbers of steps of decoders that sample, each measured as a model of its own; by default the
            models' own numbers.
        equivariance: on how many images to measure how latents follow rotations and scalings, which needs about 7
            times the work for each; it is in ``latents``, with R-rFID where rFID is measured.
        baselines: rows ``{"name", "psnr"}`` for the table, see `latentae.bench.baselines`.
        extra_sections: sections for the report.

    Returns:
        The content of ``results.json``: ``models[i]`` has ``name``, ``metrics``, ``intervals`` (95 %, bootstrap over
        images), ``skipped``, ``warnings``, ``latents``, ``speed`` and ``per_image`` rows; beside them ``protocol`` with
        its hash, ``versions``, ``machine`` and ``images``.

    Raises:
        RequestError: a model, option or metric that cannot be had; nothing was measured.
        DataError: more images than ``max_bad`` are broken; the others were measured and written to ``out``.
    """
    if size < SMALLEST_SIZE or batch_size < 1 or (limit is not None and limit < 1) or equivariance < 0:
        raise RequestError(
            f"bench got size {size}, batch_size {batch_size}, limit {limit} and equivariance {equivariance}: the size "
            f"must be at least {SMALLEST_SIZE}, the next two at least 1, the last at least 0."
        )
    check_max_bad(max_bad)
    folder = None if out is None else Path(out)
    if folder:
        refuse_output_in_input(src, folder)
        require_report()
    source = open_source(src) if isinstance(src, str | Path) else src
    images = ImageSet(source, source.items()[:limit], size, batch_size, workers)
    quality = Quality(metrics, size)
    for metric, reason in quality.skipped.items():
        say(f"{metric} is not measured: {reason}")
    contestants = open_contestants(
        models, device=device, dtype=dtype, random_weights=random_weights, decode_steps=decode_steps
    )
    samples = Samples(folder, images, len(contestants), report_images)

    measured: list[dict[str, Any]] = []
    reference: dict[str, Any] | None = None
    while contestants:
        contestant = contestants.pop(0)  # and with it goes its memory
        name, codec = contestant.name, contestant.codec()
        speed_batch = speed_batch_size or (batch_size if codec.device.type == "cuda" else 1)
        try:
            figures = _measure(
                name,
                codec,
                images,
                quality,
                samples,
                len(measured),
                sample=sample,
                seed=seed,
                equivariance=equivariance,
            )
            timing = measure_speed(codec, size, speed_batch) if speed and figures["images"] else None
        except torch.OutOfMemoryError as error:
            raise RequestError(f"{name} runs out of GPU memory: use less than batch_size={batch_size}.") from error
        for warning in figures["warnings"]:
            say(f"{name}: {warning}")
        measured.append({"name": name, **describe(codec, size, seed), **figures, "speed": timing})
        if codec.samples and reference is None:  # steps have a price
            reference = reference_cost(codec, size, speed_batch if timing else None)

    protocol = describe_protocol(images, sample=sample, seed=seed, dtype=_common(measured, "dtype"))
    results = {
        "schema": SCHEMA,
        "protocol": protocol,
        "protocol_sha256": sha256_json(protocol),
        "versions": versions(),
        "machine": describe_machine(),
        "metric_weights_sha256": quality.weights,
        "images": {
            "source": str(src) if isinstance(src, str | Path) else type(src).__name__,
            "measured": len(images.good),
            "enlarged": images.enlarged,
            "quarantined": [
                {"key": key, "reason": error.reason, "explanation": error.explanation}
                for key, error in sorted(images.bad.items())
            ],
        },
        "models": measured,
        "reference_cost": reference,
        "baselines": list(baselines),
        "samples": samples.rows,
    }
    if folder:
        write_results(results, folder)
        sections = [*extra_sections, diagnostics_section(measured)]
        sections += [equivariance_section(measured)] if equivariance else []
        write_report(results, folder / "report.html", sections)
    remedy = f"All others were measured: see {folder / 'results.json'}." if folder else "All others were measured."
    refuse_too_many_bad([error.reason for error in images.bad.values()], len(images.items), max_bad, remedy)
    if images.bad:
        say(f"{len(images.bad)} of {len(images.items)} images are bad and were left out, {min(images.bad)} first.")
    return results


def _measure(
    name: str,
    codec: LatentCodec,
    images: ImageSet,
    quality: Quality,
    samples: Samples,
    index: int,
    *,
    sample: bool,
    seed: int,
    equivariance: int,
) -> dict[str, Any]:
    """All figures of one model that come from the images."""
    pair_device = torch.device("cpu") if codec.device.type == "mps" else codec.device  # MPS has no float64
    measurement = Measurement(quality, first=index == 0, device=pair_device)
    statistics, diagnostics = LatentStatistics(), LatentDiagnostics()
    follows = LatentEquivariance(codec, equivariance, quality)
    with Progress(name, len(images.good)) as progress:
        for keys, originals in images.batches():
            latents = codec.encode(originals, sample=sample, generator=_generators(seed, keys))
            noise = [noise_generator(seed, key) for key in keys]
            pixels = codec.decode(latents, generator=noise)  # (B, 3, size, size)
            finite = pixels.isfinite().flatten(1).all(1).to(pair_device)
            reconstruction = to_uint8(pixels).to(pair_device)
            measurement.add(keys, reconstruction, originals.to(pair_device), finite)
            z = codec.denormalise(latents.tensor)
            statistics.add(latents.posterior.sample(_generators(seed, keys)))
            diagnostics.add(z, latents.posterior)
            follows.add(originals)
            samples.save(index, keys, originals, reconstruction, z)
            progress.advance(len(keys))
    figures = statistics.results() | diagnostics.results() | (follows.results() if equivariance else {})
    return {**measurement.results(), "latents": figures}


def _generators(seed: int, keys: list[str]) -> Any:
    """One for each image, so that neither the batch nor the device changes what is drawn."""
    return [key_generator(seed, key) for key in keys]


def _common(models: list[dict[str, Any]], key: str) -> str:
    values = {model[key] for model in models}
    return values.pop() if len(values) == 1 else "differs: see each model"
