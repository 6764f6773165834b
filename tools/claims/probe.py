"""Which latents are easy to model: the second half of EQ-VAE's claim, and a DC-AE of a higher ratio beside it.

Four codecs with equally many floats per pixel (see `probe_codecs`), three of each, fine-tuned with seeds 0 to 2:

- plain: KL f8c4, fine-tuned as it was trained;
- EQ: the same start, fine-tuned with EQ for as many steps (arXiv 2502.09509);
- scale only: the same start, fine-tuned with downsampled latents (arXiv 2502.14831);
- DC-AE f16: f16c16, trained and fine-tuned plainly for as many steps.

`latentae.bench.probe` trains one denoiser on the latents of each, with the seed of the codec: the same transformer on
whitened latents, equal steps, equally many tokens in each, on dead leaves at 64 px that no codec was trained on. What
counts are decoded samples: the sliced Wasserstein distance of their Haar-pyramid patches to held-out images. A codec
that blurs is far from the images however well its latents are modelled, and samples that are noisy may be nearer than
its reconstructions. So beside that distance stands the one to the codec's own reconstructions of the held-out images,
by which latents alone are judged: in units of the images' details, as the probe has it, which forgives a codec that has
few, and in units of the reconstructions' own details. References: reconstructions; other real images; and, decoded,
white noise and samples of a Gaussian that knows the latents' spectrum. A distance by which samples are no nearer than
these says nothing about what the denoiser has learned, and that is judged as well.

The rate under the diffusion prior, in bits per pixel at the noise that costs 0.1 dB, ranks codecs as their samples do
if it has the sign of the difference for every pair whose samples differ for certain.

How much is trained was picked on the start of eqvae, other leaves, and two cells of an earlier version of the probe,
whose learning rate did not fall: after 1000 steps the rate was not below that of the spectral Gaussian.

Found on the cpu tier (`tools/results/probe.json`): not shown, and not refuted. EQ's samples are nearer to its own
reconstructions than plain fine-tuning's, by 5 % (interval -0.1 to 9.7), in its own units not at all; they are farther
from the images by 4 %, as its reconstructions are. Scale only gives blurrier images and worse samples in any unit. The
rate falls (EQ by 3 %, scale only by 15 %) with what is lost of the image, and ranks nothing. Only in 7 of 12 cells are
samples nearer to the reconstructions than those of the spectral Gaussian: at 18 dB and 0.19 bits per pixel these
latents hold little more than a spectrum, so this experiment can hardly tell them apart. Next: codecs above PCA's PSNR,
photos or shapes with structure, and the gpu tier.

Each codec and seed is a cell that is kept in ``probe-models`` beside the figure and not run again, unless its weights
or the settings change. The same command in another process takes other cells, and all end with the same report.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import latentae
from claims.frame import paired_difference
from claims.pictures import leaves_of
from claims.probe_codecs import DEEP, DEEP_FOLDER, EQ, MODELS, PLAIN, SCALE, SEEDS, WEIGHTS, folder_of, train_missing
from latentae.bench.latent_space import LatentSpace, named
from latentae.bench.probe import Prober, ProbeSettings
from latentae.codec import LatentCodec
from latentae.console import format_table, say
from latentae.errors import RequestError
from latentae.files import write_json
from latentae.metrics.diffusion_rate import SpectralGaussian
from latentae.metrics.image import psnr
from latentae.metrics.sliced_wasserstein import SlicedWasserstein
from latentae.metrics.spectrum import cosine_matrix

CODECS = (PLAIN, EQ, SCALE, DEEP)
SIZE = 64
TRAIN_SEED, HELD_OUT_SEED = 10_006, 10_007  # of dead leaves that no codec saw
TRAIN_IMAGES, HELD_OUT_IMAGES = 8000, 512
TIERS = {
    "cpu": ProbeSettings(steps=2000, samples=512),  # about two and a half hours of one core, or one of three
    "gpu": ProbeSettings(steps=20000, tokens_per_step=16384, samples=2048),
}

TO_IMAGES, TO_OWN, RATE = "samples to images", "samples to own reconstructions", "bits per pixel"
OWN_UNITS = f"{TO_OWN}, own units"
MAIN = (TO_IMAGES, TO_OWN, OWN_UNITS, RATE)

# Written before the first run. Share by which the distance is below that of plain fine-tuning, mean over seeds, with
# the whole interval above zero; a negative share is a loss that is allowed, and the whole interval must be above it.
LEAST = {
    ("EQ's samples are nearer to held-out images than plain fine-tuning's", TO_IMAGES, EQ): 0.05,
    ("EQ's samples are nearer to own reconstructions than plain fine-tuning's to theirs", TO_OWN, EQ): 0.05,
    ("scale-only samples are nearer to held-out images than plain fine-tuning's", TO_IMAGES, SCALE): 0.05,
    ("scale-only samples are nearer to own reconstructions than plain fine-tuning's to theirs", TO_OWN, SCALE): 0.05,
    ("DC-AE f16's samples are no farther from held-out images than plain f8's", TO_IMAGES, DEEP): -0.05,
    ("DC-AE f16's samples are no farther from own reconstructions than plain f8's from theirs", TO_OWN, DEEP): -0.05,
}


def run(tier: str, quick: bool, steps: int | None, figure: Path | None) -> dict[str, Any]:
    """Probe all cells that are not there; prints the table and draws the figure. See `claims.py` for the arguments."""
    if tier == "gpu" and not torch.cuda.is_available():
        raise RequestError("The tier gpu of the claim probe needs a CUDA device: leave --tier out.")
    if figure is None:
        raise RequestError("The claim probe keeps its models and cells beside its figure: give --json or --figure.")
    results = figure.parent
    folder = results / MODELS
    folder.mkdir(exist_ok=True)
    settings = ProbeSettings(steps=2, samples=16) if quick else replace(TIERS[tier], steps=steps or TIERS[tier].steps)
    counts = (64, 16) if quick else (TRAIN_IMAGES, HELD_OUT_IMAGES)
    with locked(folder / "training.lock"):
        train_missing(results, quick)
    say("drawing dead leaves")
    pictures = leaves_of(TRAIN_SEED, counts[0], SIZE), leaves_of(HELD_OUT_SEED, counts[1], SIZE)
    places = [(codec, seed) for seed in SEEDS for codec in CODECS]
    cells: dict[str, dict[int, dict[str, Any]]] = {codec: {} for codec in CODECS}
    for waits in (False, True):  # first what nobody else is at, then what others have not finished
        for codec, seed in places:
            if seed not in cells[codec]:
                with locked(folder / f"{cell_name(tier, codec, seed)}.lock", waits) as mine:
                    if mine:
                        cells[codec][seed] = cell(results, tier, codec, seed, settings, pictures)
    table = summarise(cells)
    comparisons = compare(cells)
    verdicts = thresholds(cells, comparisons)
    print_tables(table, comparisons)
    draw(figure, cells)
    return {
        "claim": "Latents that follow transformations are easier to model (EQ-VAE, arXiv 2502.09509, second half).",
        "setting": {
            **settings.describe(),
            "images": f"dead leaves of {SIZE} px",
            "train": [TRAIN_SEED, counts[0]],
            "held_out": [HELD_OUT_SEED, counts[1]],
            "seeds": SEEDS,
        },
        "training_of_the_f16": json.loads((folder / f"{DEEP_FOLDER}.json").read_text()),
        "codecs": table,
        "comparisons": comparisons,
        "cells": {codec: {str(seed): one for seed, one in by_seed.items()} for codec, by_seed in cells.items()},
        "thresholds": verdicts,
        "shown": all(verdict["shown"] for verdict in verdicts),
    }


def cell_name(tier: str, codec: str, seed: int) -> str:
    """Of its file; those of one tier leave those of the other."""
    return f"{'gpu-' if tier == 'gpu' else ''}{codec.replace(' ', '-').lower()}-{seed}"


@contextlib.contextmanager
def locked(path: Path, waits: bool = True) -> Iterator[bool]:
    """Hold a lock among processes, which the end of one frees; False if another has it and this one does not wait."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def cell(
    results: Path, tier: str, codec: str, seed: int, settings: ProbeSettings, pictures: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """The figures of one codec and seed, from its file if that is of the same weights and settings."""
    folder = folder_of(results, codec, seed)
    identity = {
        "weights": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
        "settings": settings.describe(),
        "images": [len(images) for images in pictures],
    }
    kept = results / MODELS / f"{cell_name(tier, codec, seed)}.json"
    if kept.exists():
        found = json.loads(kept.read_text())
        if found["identity"] == identity:
            return found
    started = time.monotonic()
    opened = LatentCodec(latentae.load(folder), device="cuda" if tier == "gpu" else "cpu")
    space = LatentSpace(opened, named(pictures[0], "train"), named(pictures[1], "held-out"))
    found = {
        "identity": identity,
        "figures": figures_of(space, seed, settings, f"{codec} {seed}"),
        "minutes": (time.monotonic() - started) / 60,
    }
    write_json(kept, found)
    return found


def figures_of(space: LatentSpace, seed: int, settings: ProbeSettings, name: str) -> dict[str, Any]:
    """What is compared, by name, and under ``probe`` all that the probe found."""
    prober = Prober(space, settings, name)
    found, samples = prober.run(seed)
    to_own = SlicedWasserstein(space.reconstructions)
    own = to_own(samples)
    decoded = {
        "white noise": draw_white(space, settings.samples, seed),
        "spectral Gaussian": draw_gaussian(space, settings.samples, seed),
    }
    trivial = {key: space.decode(z, [f"{key} {i}" for i in range(len(z))]) for key, z in decoded.items()}
    distances = found["sliced_wasserstein"]
    rate = found["rate"]
    figures = {
        TO_IMAGES: distances["samples"]["mean"],
        TO_OWN: distances["samples_to_reconstructions"]["mean"],
        OWN_UNITS: own["mean"],
        RATE: rate["bits_per_pixel"],
        "loss": found["loss"],
        "psnr": psnr(space.reconstructions, space.held_out_images).mean().item(),
        "noise for 0.1 dB": rate["noise"],
        "bits per pixel of a spectral Gaussian": rate.get("spectral_gaussian_bits_per_pixel"),
        "reconstructions to images": distances["reconstructions"]["mean"],
        "real to images": distances["train"]["mean"],
        "images per step": found["training"]["images_per_step"],
        "GFLOP of one image": found["cost"]["denoise_gflop"] + found["cost"]["decode_gflop"],
        "seconds of one image": found["cost"]["denoise_seconds"] + found["cost"]["decode_seconds"],
    }
    for name, by_scale in ((TO_IMAGES, distances["samples"]), (OWN_UNITS, own)):
        figures |= {f"{name}, {scale}": value for scale, value in by_scale.items() if scale != "mean"}
    for key, images in trivial.items():
        to_reconstructions = prober.distance(images, space.reconstructions)["mean"]
        figures |= {f"{key} to images": prober.distance(images)["mean"], f"{key} to own": to_reconstructions}
        figures[f"{key} to own, own units"] = to_own(images)["mean"]
    return {**figures, "probe": found}


def draw_white(space: LatentSpace, count: int, seed: int) -> Tensor:
    return torch.randn(count, *space.shape, generator=torch.Generator().manual_seed(seed))


def draw_gaussian(space: LatentSpace, count: int, seed: int) -> Tensor:
    """Latents with the covariance of the channels at each spatial frequency, and the mean map, (N, C, h, w)."""
    model = SpectralGaussian(space.train)
    _, height, width = space.shape
    white = draw_white(space, count, seed).double().flatten(2).permute(2, 0, 1)  # (h * w, N, C)
    found = (white * model.variances.sqrt()[:, None]) @ model.directions.transpose(1, 2)
    spectrum = found.permute(1, 2, 0).unflatten(2, (height, width))
    maps = cosine_matrix(height).to(spectrum).T @ spectrum @ cosine_matrix(width).to(spectrum)
    return (maps + model.mean).float()


def series(cells: dict[str, dict[int, dict[str, Any]]], codec: str, figure: str) -> list[float]:
    """A figure of a codec seed by seed; not a number where there is none."""
    values = [cells[codec][seed]["figures"].get(figure) for seed in SEEDS]
    return [math.nan if value is None else value for value in values]


def summarise(cells: dict[str, dict[int, dict[str, Any]]]) -> dict[str, dict[str, float | None]]:
    """Means over seeds of all figures."""
    names = [name for name in cells[PLAIN][SEEDS[0]]["figures"] if name != "probe"]
    means = {codec: {name: fmean(series(cells, codec, name)) for name in names} for codec in CODECS}
    return {codec: {n: v if math.isfinite(v) else None for n, v in row.items()} for codec, row in means.items()}


def compare(cells: dict[str, dict[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Every pair of codecs in every figure: the share by which the first is lower than the second, seed by seed."""
    names = list(MAIN)
    names += [n for n in cells[PLAIN][SEEDS[0]]["figures"] if n.startswith((f"{TO_IMAGES},", f"{OWN_UNITS},"))]
    rows = []
    for name in names:
        for second, first in combinations(CODECS, 2):
            pairs = zip(series(cells, first, name), series(cells, second, name), strict=True)
            shares = [1 - a / b for a, b in pairs]
            found = paired_difference(shares, [0.0] * len(shares))
            row: dict[str, Any] = {"figure": name, "first": first, "second": second, "lower_by": None}
            if found:
                row |= {"lower_by": found.mean, "interval": [found.low, found.high], "by_seed": shares}
            row["separates"] = found is not None and (found.low > 0 or found.high < 0)
            rows.append(row)
    return rows


def thresholds(cells: dict[str, Any], comparisons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_pair = {(row["figure"], row["first"], row["second"]): row for row in comparisons}
    verdicts = []
    for (sentence, figure, codec), least in LEAST.items():
        row = by_pair[figure, codec, PLAIN]
        shown, found = False, "not measured"
        if row["lower_by"] is not None:
            low, high = row["interval"]
            shown = row["lower_by"] >= least and low > min(least, 0)
            found = f"{-row['lower_by']:+.1%} [{-high:+.1%}, {-low:+.1%}], wanted {-least:+.0%}"
        verdicts.append({"sentence": sentence, "least": least, "found": found, "shown": shown})
    for name, suffix in ((TO_IMAGES, "images"), (TO_OWN, "own")):
        verdicts.append(learned_verdict(cells, name, suffix))
    return [*verdicts, rate_verdict(by_pair, TO_IMAGES), rate_verdict(by_pair, TO_OWN)]


def learned_verdict(cells: dict[str, Any], name: str, suffix: str) -> dict[str, Any]:
    """Whether samples are nearer than both trivial latents, decoded, for every codec and seed."""
    wins = 0
    for codec in CODECS:
        trivial = (series(cells, codec, f"{key} to {suffix}") for key in ("white noise", "spectral Gaussian"))
        wins += sum(mine < min(theirs) for mine, *theirs in zip(series(cells, codec, name), *trivial, strict=True))
    count = len(CODECS) * len(SEEDS)
    return {
        "sentence": f"{name} are nearer than decoded white noise and Gaussian latents",
        "found": f"{wins} of {count} cells",
        "shown": wins == count,
    }


def rate_verdict(by_pair: dict[tuple[str, str, str], dict[str, Any]], figure: str) -> dict[str, Any]:
    """Whether the rate has the sign of the samples' difference for all pairs whose samples differ for certain."""
    pairs = [(a, b) for name, a, b in by_pair if name == figure and by_pair[figure, a, b]["separates"]]
    agreeing = 0
    for first, second in pairs:
        rate, samples = by_pair[RATE, first, second], by_pair[figure, first, second]
        agreeing += bool(rate["separates"] and rate["lower_by"] * samples["lower_by"] > 0)
    return {
        "sentence": f"the rate ranks the codecs as {figure} do",
        "found": f"{agreeing} of {len(pairs)} pairs that differ",
        "shown": bool(pairs) and agreeing == len(pairs),
    }


def print_tables(table: dict[str, dict[str, float | None]], comparisons: list[dict[str, Any]]) -> None:
    names = list(next(iter(table.values())))
    print(
        format_table(["means over seeds", *table], [[name, *(row[name] for row in table.values())] for name in names])
    )
    print()
    rows = []
    for row in comparisons:
        if row["lower_by"] is not None and row["figure"] in MAIN:
            low, high = (f"{100 * value:+.1f}" for value in row["interval"])
            verdict = "" if row["separates"] else "does not separate"
            share = f"{100 * row['lower_by']:+.1f}"
            rows.append([row["figure"], f"{row['first']} below {row['second']}", share, f"{low} to {high}", verdict])
    print(format_table(["paired over seeds", "pair", "by %", "95 % interval", ""], rows))


def draw(path: Path, cells: dict[str, dict[int, dict[str, Any]]]) -> None:
    """A PNG: each codec's distances, one mark a seed, with its reconstructions; and the rate beside the distance."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    marks: dict[str, dict[str, str]] = {}
    for name, suffix in ((TO_IMAGES, "images"), (TO_OWN, "own")):
        marks[name] = {"samples": name}
        marks[name] |= {f"{key}, decoded": f"{key} to {suffix}" for key in ("white noise", "spectral Gaussian")}
    marks[TO_IMAGES]["reconstructions"] = "reconstructions to images"
    for axis, (title, figures) in zip(axes, marks.items()):
        for number, (label, name) in enumerate(figures.items()):
            x = [i + 0.15 * (number - 1.5) for i in range(len(CODECS)) for _ in SEEDS]
            y = [value for codec in CODECS for value in series(cells, codec, name)]
            axis.plot(x, y, "o", markersize=4, label=label)
        axis.set_xticks(range(len(CODECS)), CODECS)
        axis.set_title(f"distance, {title}")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    for number, codec in enumerate(CODECS):
        axes[2].plot(series(cells, codec, RATE), series(cells, codec, TO_IMAGES), "o", color=f"C{number}", label=codec)
    axes[2].locator_params(axis="x", nbins=5)
    axes[2].set_xlabel(RATE)
    axes[2].set_ylabel(TO_IMAGES)
    axes[2].legend(fontsize=8)
    axes[2].grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
