"""`bench`: one pass over the images or clips for each model, and from it every figure.

The way of an image: decode, ADM centre crop, encode, decode, clamp, round half up to uint8; all metrics see that one
uint8 pair. A clip is an image with an axis more.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from latentae.bench.checkpoints import Checkpoints
from latentae.bench.contestants import Contestant, Model, describe, open_contestants
from latentae.bench.crops import CROPS
from latentae.bench.diagnostics import codebook_section, diagnostics_section
from latentae.bench.equivariance import equivariance_section
from latentae.bench.fetching import fetch_weights as fetch
from latentae.bench.images import ImageFacts, ImageSet
from latentae.bench.interpolation import interpolation_section
from latentae.bench.latent_space import split_images
from latentae.bench.measuring import Pass, measure, save_samples
from latentae.bench.presets import find_preset
from latentae.bench.probe import ProbeSettings
from latentae.bench.probe_report import probe_section
from latentae.bench.probing import probe_benchmarked
from latentae.bench.processes import Processes
from latentae.bench.protocol import describe_machine, describe_protocol, versions
from latentae.bench.quality import OF_IMAGES, Quality, expand_metric_names
from latentae.bench.report import Section, require_report, write_report
from latentae.bench.results import SCHEMA, rows_of, write_results
from latentae.bench.samples import Samples
from latentae.bench.speed import SpeedGrid, measure_speed, reference_cost
from latentae.codec import LatentCodec
from latentae.console import say
from latentae.data.clips import ClipSource, open_inputs
from latentae.data.sources import Source, refuse_output_in_input
from latentae.data.video import FrameChoice
from latentae.errors import RequestError
from latentae.files import sha256_json
from latentae.store.worker import check_max_bad, refuse_too_many_bad
from latentae.weights import weights_from

SMALLEST_SIZE = 32  # what the perceptual networks and the SSIM window still take


def bench(
    src: str | Path | Source | ClipSource,
    models: Sequence[Model | tuple[str, Model]],
    *,
    out: str | Path | None = None,
    size: int = 256,
    frames: int | FrameChoice | None = None,
    limit: int | None = None,
    metrics: Sequence[str] | None = None,
    protocol: str = "latentae",
    fid_reference: str | Path | None = None,
    weights: str | Path | None = None,
    fetch_weights: bool = False,
    sample: bool | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = torch.float32,
    max_bad: float = 0.01,
    workers: int = 4,
    speed: bool = True,
    speed_batch_size: int | None = None,
    speed_grid: SpeedGrid | None = None,
    report_images: int = 24,
    random_weights: bool = False,
    decode_steps: Sequence[int] = (),
    equivariance: int = 0,
    interpolation: int = 0,
    rate_images: int | None = None,
    probe: ProbeSettings | None = None,
    baselines: Sequence[dict[str, Any]] = (),
    extra_sections: Sequence[Section] = (),
) -> dict[str, Any]:
    """Measure autoencoders on the images of a folder, or on its clips.

    Args:
        src: a folder of images, an image file, or a source; with ``frames`` of clips.
        models: what `latentae.load` opens, an autoencoder, or a codec; with a name of its own as ``(name, model)``.
            ``jpeg:75``, ``webp:80`` and ``avif:60`` are classical codecs of that quality, as reference points, and of
            clips ``h264:23``. Autoencoders of images take clips frame by frame.
        out: folder for ``results.json``, ``report.html`` and ``samples/``; None writes nothing.
        size: side of the square crop in pixels.
        frames: how many of each clip, from its first on, or also which; None for images. Where it is given, folders of
            images and animations are clips too, and a clip that is shorter is a broken one.
        limit: measure only the first images, in the order of their names.
        metrics: names of `latentae.bench.quality.METRICS`, or ``lpips`` for both nets; those that need no weights
            are always measured. By default all whose weight files are here; the others are recorded as skipped, with
            the reason.
        protocol: one of `latentae.bench.presets.PRESETS`: how papers crop, round and compare.
        fid_reference: npz file of the mean and the covariance of a reference set's features, for the metric ``fid``.
        weights: folder in which the metrics' weight files are looked for first, see `latentae.weights`.
        fetch_weights: download what the metrics need and is nowhere, into the first folder that is searched.
        sample: encode to a sample of the posterior instead of its mode; by default as the protocol says.
        seed: with the name of an image, the seed of its sample and of decoders that draw noise.
        batch_size: images at a time, by default 8; or clips, by default 1.
        device, dtype: where and in which precision models run, by default a GPU if there is one and float32; codecs
            are taken as they are.
        max_bad: how many images may be broken, as a share of all (float) or as a number (int); of a folder of
            reconstructions, those that are missing or broken count too.
        workers: threads that read and decode.
        speed: measure throughput and memory, in batches of ``speed_batch_size``: by default ``batch_size`` on a GPU
            and 1 elsewhere.
        speed_grid: sizes, dtypes and whether compiled, to measure speed under these too.
        report_images: how many images the report shows.
        random_weights: allow presets with random weights.
        decode_steps: numbers of steps of decoders that sample, each measured as a model of its own; by default the
            models' own numbers.
        equivariance: on how many images to measure how latents follow rotations and scalings, which needs about 7
            times the work for each; it is in ``latents``, with R-rFID where rFID is measured.
        interpolation: on how many images to measure iFID, which needs rFID's weights and one decoding more for each;
            it is in ``latents``.
        rate_images: on how many images, the first ones, to measure the bits of latents and files, and how robust
            latents are, which decodes each nine times more; 32 on a GPU and 8 elsewhere by default.
        probe: also train a small diffusion model on four fifths of the images for each model, see
            `latentae.bench.probe`; None does not. Of several processes the first does it.
        baselines: rows ``{"name", "psnr"}`` for the table, see `latentae.bench.baselines`.
        extra_sections: sections for the report.

    Returns:
        The content of ``results.json``: ``models[i]`` has ``name``, ``metrics``, ``intervals`` (95 %, bootstrap over
        images), ``skipped``, ``warnings``, ``latents``, ``rate``, ``noise_robustness``, ``speed``, ``probe`` and
        ``per_image`` or ``per_clip`` rows; beside them ``protocol`` with its hash, ``versions``, ``machine`` and
        ``images``, which clips are too.

    Raises:
        RequestError: a model, option or metric that cannot be had; nothing was measured.
        DataError: more images than ``max_bad`` are broken; the others were measured and written to ``out``.
    """
    lowest = {"size": SMALLEST_SIZE, "batch_size": 1, "limit": 1, "equivariance": 0, "interpolation": 0}
    given = {"size": size, "batch_size": batch_size, "limit": limit, "equivariance": equivariance}
    given |= {"interpolation": interpolation, "rate_images": rate_images, "report_images": report_images}
    choice = FrameChoice(frames) if isinstance(frames, int) else frames
    for option, value in given.items():
        if value is not None and value < lowest.get(option, 0):
            raise RequestError(f"{option}={value}: it must be at least {lowest.get(option, 0)}.")
    check_max_bad(max_bad)
    folder = None if out is None else Path(out)
    if folder:
        refuse_output_in_input(src, folder)
        require_report()
    source = open_inputs(src, clips=choice is not None) if isinstance(src, str | Path) else src
    preset = find_preset(protocol)
    if isinstance(source, ClipSource):
        only_of_images = {"fid_reference": fid_reference, "equivariance": equivariance, "interpolation": interpolation}
        _check_clips(choice, protocol, {**only_of_images, "probe": probe})
    elif choice:
        raise RequestError("frames are of clips, and the source holds images: leave frames out, or give a ClipSource.")
    batch_size = batch_size or (1 if choice else 8)
    sample = preset.encode == "sample" if sample is None else sample
    images = ImageSet(source, source.items()[:limit], size, batch_size, workers, CROPS[preset.crop][0], choice)
    with weights_from(weights):
        if fetch_weights:
            wanted = [name for name in preset.reports if name not in OF_IMAGES] + ["rfvd"] if choice else preset.reports
            fetch(expand_metric_names(wanted if metrics is None else metrics, clips=choice is not None))
        quality = Quality(metrics, size, preset, fid_reference, images.frames)
    contestants = open_contestants(
        models,
        device=device,
        dtype=dtype,
        random_weights=random_weights,
        decode_steps=decode_steps,
        clips=choice is not None,
    )
    if probe:
        split_images(images)  # refuses too few
    samples = Samples(folder, images, len(contestants), report_images)
    with Processes() as processes:
        if processes.is_first:
            reasons = dict.fromkeys(quality.skipped.values())
            for reason in reasons:  # one missing file is one line
                lacking = ", ".join(metric for metric, why in quality.skipped.items() if why == reason)
                say(f"{lacking} not measured: {reason}")
        plan = {
            "images": sha256_json([[item.key, item.size] for item in images.items]),
            "models": [[contestant.name, contestant.identity()] for contestant in contestants] if folder else None,
            "protocol": {
                **describe_protocol(images, quality, sample=sample, seed=seed, dtype=str(dtype)),
                "images": None,
            },
            "metrics": [
                *(*quality.per_image, *quality.of_time, *quality.distances, *quality.sampled),
                quality.weights,
            ],
            "options": {
                "batch_size": batch_size,
                "equivariance": equivariance,
                "interpolation": interpolation,
                "rate_images": rate_images,
                "report_images": report_images,
                "probe": probe.describe() if probe else None,
            },
            "processes": processes.count,
            "versions": versions(),
        }
        checkpoints = Checkpoints(folder, plan, processes)
        measured = checkpoints.finished
        if measured:
            images.facts = ImageFacts.from_json(measured[-1]["images"])
            samples.choose_worst(rows_of(measured[0]["model"]))
        rated = _rated_images(rate_images, contestants)
        for index in range(len(contestants)):
            contestant = contestants.pop(0)  # and with it goes its memory
            if index < len(measured):
                continue
            name, codec = contestant.name, contestant.codec()
            try:
                fresh = Pass(
                    index,
                    codec,
                    images.facts,
                    quality,
                    seed=seed,
                    rated=rated,
                    equivariance=equivariance,
                    interpolation=interpolation,
                )
                current, whole = measure(
                    name,
                    codec,
                    images,
                    fresh,
                    samples,
                    checkpoints,
                    processes,
                    sample=sample,
                    seed=seed,
                    quantisation=preset.quantisation,
                )
                quality = current.quality
                entry: dict[str, Any] = {}
                if whole:
                    figures = whole.results(size)
                    speed_batch = speed_batch_size or (batch_size if codec.device.type == "cuda" else 1)
                    timing, grid = None, list[dict[str, Any]]()
                    if speed and figures["images"] and isinstance(codec, LatentCodec):
                        timing = measure_speed(codec, size, speed_batch, frames=images.frames)
                        if speed_grid:
                            grid = speed_grid.measure(codec, size, speed_batch, frames=images.frames)
                    probed: dict[str, Any] = {}
                    if probe and figures["images"] and isinstance(codec, LatentCodec):
                        images.facts = whole.facts
                        probed = probe_benchmarked(index, name, codec, images, probe, folder)
                        figures["skipped"] |= {"probe": probed["skipped"]} if "skipped" in probed else {}
                    priced = any(finished["reference_cost"] for finished in measured)
                    entry = {
                        "model": {
                            "name": name,
                            **describe(codec, size, seed, images.frames),
                            **figures,
                            "speed": timing,
                            "speed_grid": grid,
                            "probe": probed if "runs" in probed else None,
                        },
                        "images": whole.facts.to_json(),
                        "reference_cost": reference_cost(codec, size, speed_batch if timing else None)
                        # steps have a price
                        if isinstance(codec, LatentCodec) and codec.samples and not (priced or choice)
                        else None,
                    }
                    for warning in figures["warnings"]:
                        say(f"{name}: {warning}")
                    if index == 0:
                        save_samples(
                            codec,
                            images,
                            samples,
                            index,
                            samples.choose_worst(rows_of(figures)),
                            sample=sample,
                            seed=seed,
                            quantisation=preset.quantisation,
                        )
                    checkpoints.finish(entry)
            except torch.OutOfMemoryError as error:
                less = f"batch_size={batch_size}" if batch_size > 1 or not images.frames else f"frames={images.frames}"
                raise RequestError(f"{name} runs out of GPU memory: use less than {less}.") from error
            measured.append(processes.share(entry))
            if index == 0:
                samples.choose_worst(rows_of(measured[0]["model"]))
            images.facts = ImageFacts.from_json(measured[-1]["images"])
        results = _results(src, images, quality, [entry["model"] for entry in measured], sample, seed)
        results["reference_cost"] = next((e["reference_cost"] for e in measured if e["reference_cost"]), None)
        results["baselines"] = list(baselines)
        results["samples"] = samples.rows(len(measured), images.bad)
        if folder and processes.is_first:
            write_results(results, folder)
            sections = [*extra_sections, diagnostics_section(results["models"])]
            sections += [section for section in [codebook_section(results["models"])] if section.rows]
            sections += [equivariance_section(results["models"])] if equivariance else []
            sections += [interpolation_section(results["models"])] if interpolation else []
            sections += [probe_section(results["models"], folder)] if probe else []
            write_report(results, folder / "report.html", sections)
            checkpoints.clear()
    remedy = f"All others were measured: see {folder / 'results.json'}." if folder else "All others were measured."
    bad = [error.reason for error in images.bad.values()]
    _refuse_too_many_missing(results, bad, len(images.items), max_bad, remedy)
    if images.bad and processes.is_first:
        what = f"{len(images.bad)} of {len(images.items)} {images.unit} are bad and were left out"
        say(f"{what}, {min(images.bad)} first.")
    return results


def _results(
    src: str | Path | Source | ClipSource,
    images: ImageSet,
    quality: Quality,
    models: list[dict[str, Any]],
    sample: bool,
    seed: int,
) -> dict[str, Any]:
    protocol = describe_protocol(images, quality, sample=sample, seed=seed, dtype=_common(models, "dtype"))
    return {
        "schema": SCHEMA,
        "protocol": protocol,
        "protocol_sha256": sha256_json(protocol),
        "versions": versions(),
        "machine": describe_machine(),
        "metric_weights_sha256": quality.weights,
        "images": {
            "source": str(src) if isinstance(src, str | Path) else type(src).__name__,
            **({"unit": images.unit} if images.choice else {}),
            "measured": len(images.good),
            "enlarged": len(images.facts.enlarged),
            "quarantined": [
                {"key": key, "reason": error.reason, "explanation": error.explanation}
                for key, error in sorted(images.bad.items())
            ],
        },
        "models": models,
    }


def _check_clips(choice: FrameChoice | None, protocol: str, only_of_images: dict[str, Any]) -> None:
    """Refuse what cannot be had of clips."""
    if choice is None or choice.frames is None:
        raise RequestError("These are clips: say how many frames of each are measured, such as --frames 17.")
    if protocol != "latentae":
        raise RequestError(f"protocol={protocol}: the papers' protocols are of images; leave it out for clips.")
    for option, value in only_of_images.items():
        if value:
            raise RequestError(f"{option} is measured on images, not on clips: leave it out.")


def _common(models: list[dict[str, Any]], key: str) -> str:
    """What all models have in common, classical codecs aside."""
    values = {model[key] for model in models if model["weights_sha256"]} or {model[key] for model in models}
    return values.pop() if len(values) == 1 else "differs: see each model"


def _rated_images(wanted: int | None, contestants: Sequence[Contestant]) -> int:
    """The same for all, so that their rates compare."""
    if wanted is not None:
        return wanted
    return 32 if any(contestant.device.type == "cuda" for contestant in contestants) else 8


def _refuse_too_many_missing(results: dict[str, Any], bad: list[str], inputs: int, max_bad: float, remedy: str) -> None:
    """Images that cannot be read count as bad, and for a folder those whose reconstruction is missing or broken."""
    lacking = [
        [f"without a reconstruction in {model['name']} that can be measured"] * len(model["failed"])
        for model in results["models"]
        if "files_sha256" in model
    ]
    for reasons in ([], *lacking):
        refuse_too_many_bad([*bad, *reasons], inputs, max_bad, remedy)
