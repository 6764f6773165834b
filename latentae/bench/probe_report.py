"""What probes found, as a table, a section of a report and a sheet of samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from latentae.bench.report import Section
from latentae.bench.results import shape_label
from latentae.console import format_table, three_figures

SHOWN = 8
LABEL = 14  # pixels of height
TENTHS = [f"{i / 10:.1f}" for i in range(10)]
MEANING = (
    "Experimental. Distance: sliced Wasserstein distance of 7 x 7 patches of a Haar pyramid to held-out images, in "
    "standard deviations of each band; lower is better. That of reconstructions is the codec's own part, that of "
    "samples to reconstructions the denoiser's, and that of as many training images what chance alone leaves. Bits "
    "per pixel: what the denoiser needs to send latents with as much noise as costs 0.1 dB, with its standard error "
    "over images; a Gaussian that knows the covariance of the channels at each spatial frequency needs as much as "
    "stands beside it. Loss: of the velocity on held-out latents, which is no verdict, since its floor depends on "
    "what the latents hold."
)


def probe_header(models: Sequence[dict[str, Any]]) -> list[str]:
    """Columns of `probe_rows`; gFID stands there if any model has it."""
    header = ["model", "latents", "distance of samples", "to reconstructions", "of reconstructions"]
    header += [f"gFID of {count:,}"] if (count := _gfid_count(models)) else []
    return [*header, "bits / pixel", "of a Gaussian", "noise", "loss", "GFLOP / image", "ms / image"]


def probe_rows(models: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row for each model with a ``probe``, and what training images score."""
    rows, with_gfid = [], bool(_gfid_count(models))
    for model in (model for model in models if model.get("probe")):
        summary, run = model["probe"]["summary"], model["probe"]["runs"][0]
        rate, cost, distances = run["rate"], run["cost"], run["sliced_wasserstein"]
        bits = _of_seeds(summary["bits_per_pixel"])
        if summary["bits_per_pixel"]["spread"] is None and rate["bits_per_pixel"] is not None:
            bits += f" (s. e. {three_figures(rate['standard_error'])})"
        gflop = [cost["denoise_gflop"], cost["decode_gflop"]]
        milliseconds = [1e3 * summary[f"{half}_seconds"]["mean"] for half in ("denoise", "decode")]
        row = [model["name"], shape_label(model), _of_seeds(summary["sliced_wasserstein"])]
        row += [_of_seeds(summary["to_reconstructions"]), three_figures(distances["reconstructions"]["mean"])]
        row += [_of_seeds(summary["gfid"])] if with_gfid else []
        row += [bits, _figure(rate.get("spectral_gaussian_bits_per_pixel")), _figure(rate["noise"])]
        row += [_of_seeds(summary["loss"]), " + ".join(map(_figure, gflop)), " + ".join(map(_figure, milliseconds))]
        rows.append(row)
    floors = {three_figures(_floor(model)) for model in models if model.get("probe")}
    for floor in sorted(floors):  # one, unless results of several image sets were merged
        rows.append(["training images, for reference", "–", floor, *["–"] * (len(probe_header(models)) - 3)])
    return rows


def loss_rows(models: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The loss by tenths of time, as a mean over seeds."""
    rows = []
    for model in (model for model in models if model.get("probe")):
        losses = np.mean([run["loss_by_time"] for run in model["probe"]["runs"]], axis=0)
        rows.append([model["name"], *(f"{loss:.3f}" for loss in losses)])
    return rows


def probe_conditions(models: Sequence[dict[str, Any]]) -> list[str]:
    """Lines that say what the figures are of, and what is missing."""
    probed = [model for model in models if model.get("probe")]
    lines = []
    for model in probed:
        settings, run = model["probe"]["settings"], model["probe"]["runs"][0]
        training, images = run["training"], run["images"]
        seeds = settings["seeds"]
        lines.append(
            f"{model['name']}: {training['parameters'] / 1e6:.1f} M parameters, {settings['steps']:,} steps of "
            f"{training['images_per_step']} images of {training['tokens_per_image']} tokens "
            f"({three_figures(training['gflop_per_step'])} GFLOP a step), {images['train']:,} images to train on, "
            f"{images['held_out']} held out, {images['samples']} samples in {settings['sampling_steps']} Euler steps, "
            f"{seeds} seed{'s' * (seeds != 1)}"
            + (f"; {run['dead_channels']} dead channels" if run["dead_channels"] else "")
            + (f"; no rate: {run['rate']['reason']}" if run["rate"]["bits_per_pixel"] is None else "")
        )
    lines += dict.fromkeys(
        f"gFID not measured: {reason}"
        for model in probed
        if (reason := model["probe"]["runs"][0]["frechet"].get("skipped"))
    )
    if any(model["probe"]["settings"]["seeds"] > 1 for model in probed):
        lines.append("±: standard deviation over seeds.")
    return lines


def summarise_probes(models: Sequence[dict[str, Any]]) -> str:
    """The tables for the terminal, with what they are of at their foot."""
    return "\n".join(
        [
            format_table(probe_header(models), probe_rows(models)),
            "",
            format_table(["loss from time", *TENTHS], loss_rows(models)),
            "",
            *probe_conditions(models),
            "Experimental; figures of other settings, sizes or images do not compare.",
        ]
    )


def probe_section(models: Sequence[dict[str, Any]], folder: Path | None = None) -> Section:
    """The part of a report that shows them; sheets of samples are read from ``folder``."""
    sheets = []
    for index, model in enumerate(models):
        path = sheet_path(folder, index) if folder else None
        if model.get("probe") and path and path.exists():
            with Image.open(path) as image:
                sheets.append((f"{model['name']}: held-out images, and what was generated", np.asarray(image)))
    return Section(
        "How easy the latents are to model",
        " ".join([MEANING, *(line if line.endswith(".") else line + "." for line in probe_conditions(models))]),
        probe_header(models),
        probe_rows(models),
        images=sheets,
    )


def sheet_path(folder: Path, index: int) -> Path:
    """Where the samples of one model of a benchmark lie."""
    return folder / "samples" / f"probe-model-{index}.png"


def samples_sheet(rows: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """The first images of each set, uint8 (N, 3, H, W), in a row under its name."""
    height, width = rows[0][1].shape[-2:]
    columns = min(SHOWN, max(len(images) for _, images in rows))
    sheet = Image.new("RGB", (columns * (width + 1) - 1, len(rows) * (height + LABEL) - 1), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (name, images) in enumerate(rows):
        top = number * (height + LABEL)
        draw.text((2, top + 1), name, fill="black")
        for column, image in enumerate(images[:columns]):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy())
            sheet.paste(tile, (column * (width + 1), top + LABEL - 1))
    return sheet


def _floor(model: dict[str, Any]) -> float:
    return model["probe"]["runs"][0]["sliced_wasserstein"]["train"]["mean"]


def _gfid_count(models: Sequence[dict[str, Any]]) -> int:
    """Of how many samples gFID is, 0 where nobody has it."""
    runs = [model["probe"]["runs"][0] for model in models if model.get("probe")]
    return max((run["images"]["samples"] for run in runs if "samples" in run["frechet"]), default=0)


def _figure(value: float | None) -> str:
    return "–" if value is None else three_figures(value)


def _of_seeds(summary: dict[str, float | None]) -> str:
    spread = summary["spread"]
    return _figure(summary["mean"]) + ("" if spread is None else f" ± {spread:.2g}")
