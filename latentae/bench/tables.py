"""The tables of the report: texts in cells, made from ``results.json`` alone."""

from typing import Any

from latentae.bench.plots import is_reference
from latentae.bench.quality import HIGHER_IS_BETTER, ROWS
from latentae.bench.results import (
    LABELS,
    format_metric,
    measured_metrics,
    row_name,
    rows_of,
    shape_label,
    steps_label,
    unit_of,
)
from latentae.console import three_figures

COST_COLUMNS = 5


def results_table(results: dict[str, Any]) -> dict[str, Any]:
    """Header and rows of cells ``{"text", "note", "best"}``: models in their order, baselines after them."""
    metrics = measured_metrics(results)
    with_rate = any(model.get("rate") for model in results["models"])
    columns = [("Model", ""), ("Latents", "floats per pixel")]
    columns += [("Bits per pixel ↓", "PSNR with as many")] if with_rate else []
    columns += [(f"{LABELS[name]} {'↑' if HIGHER_IS_BETTER[name] else '↓'}", "95 % interval") for name in metrics]
    columns += [(half, f"{unit_of(results)}/s") for half in ("Encode", "Decode")]
    columns += [("Memory", "peak"), ("Parameters", ""), ("GMAC", "")]
    best = {name: _best(results["models"], name) for name in metrics}
    rows = []
    for model in results["models"]:
        cells = [_latents(model), *([_rate(model)] if with_rate else [])]
        for name in metrics:
            value, interval = model["metrics"].get(name), model.get("intervals", {}).get(name)
            note = f"{format_metric(name, interval[0])} – {format_metric(name, interval[1])}" if interval else ""
            is_best = value is not None and value == best[name] and not is_reference(model) and not model.get("failed")
            cells.append(_cell(format_metric(name, value), note, is_best))
        rows.append({"name": row_name(model), "note": _what_it_is(model), "cells": cells + _cost(model)})
    for row in results.get("baselines", []):
        cells = [_cell("–")] * (2 if with_rate else 1)
        cells += [_cell(format_metric(name, row.get(name))) for name in metrics]
        rows.append({"name": row["name"], "note": "baseline, no network", "cells": cells + [_cell("–")] * COST_COLUMNS})
    return {"columns": columns, "rows": rows}


def latent_statistics(results: dict[str, Any]) -> list[list[str]]:
    """Rows of moments and scaling factors, of the models that have latents."""
    rows = []
    for model in results["models"]:
        latents = model["latents"]
        if "std" not in latents:
            continue
        suggested = latents["suggested_scaling_factor"]
        rows.append(
            [
                model["name"],
                " × ".join(map(str, latents["shape"])),
                f"{latents['overall_mean']:.3f}",
                f"{latents['overall_std']:.3f}",
                f"{min(latents['std']):.3f} – {max(latents['std']):.3f}",
                "–" if suggested is None else f"{suggested:.5g}",
                f"{model['normalisation']['scaling_factor']:.5g}",
            ]
        )
    return rows


def worst_images(models: list[dict[str, Any]], count: int = 10) -> list[tuple[str, str]]:
    """The names of the images with the lowest PSNR of all that were measured, for each model."""
    found = []
    for model in models:
        rows = [row for row in rows_of(model) if row.get("psnr") is not None]
        rows = sorted(rows, key=lambda row: row["psnr"])[:count]
        found.append((model["name"], ", ".join(f"{row['key']} ({row['psnr']:.2f})" for row in rows)))
    return found


def conditions(model: dict[str, Any]) -> str:
    """What a reader must know of one model's figures: its weights, and how it was timed and counted."""
    if is_reference(model):
        return f"{model['class']} files, for reference"
    if not model["parameters"]:  # a folder of reconstructions
        return f"images as given, files {model.get('files_sha256', '–')[:16]}"
    parts = [f"weights {model['weights_sha256'][:16]}"]
    if speed := model.get("speed"):
        threads = f" with {speed['threads']} threads" if speed.get("threads") else ""
        parts.append(
            f"timed at {speed['size']} px in batches of {speed['batch_size']}, {speed['dtype']} on {speed['device']}"
            f"{threads}, load average {speed['load_average']:.1f}, median of {speed['encode']['repeats']} and "
            f"{speed['decode']['repeats']} runs with quartiles; memory {speed['memory_is']}"
        )
    reason = f": {model['gmac']['reason']}" if model["gmac"].get("reason") else ""
    one = "clip" if ROWS["clips"] in model else "image"
    parts.append(f"GMAC of one {one}, encode + decode{reason}")
    return "; ".join([*parts, "parameters in millions, encoder + decoder"])


def _latents(model: dict[str, Any]) -> dict[str, Any]:
    if model.get("spatial_ratio") is None:
        return _cell("–")
    return _cell(shape_label(model), f"{model['floats_per_pixel']:.4g}")


def _rate(model: dict[str, Any]) -> dict[str, Any]:
    rate = model.get("rate") or {}
    if rate.get("bits_per_pixel") is None:
        return _cell("–")
    return _cell(three_figures(rate["bits_per_pixel"]), f"{format_metric('psnr', rate.get('psnr'))} dB")


def _what_it_is(model: dict[str, Any]) -> str:
    if is_reference(model):
        return f"{model['class']}, a reference"
    if not model["parameters"]:
        return "images as given"
    steps = f", {steps_label(model)}, seed {model['decoding']['seed']}" if model.get("decoding") else ""
    return f"{model['class']}, {model['dtype']}{steps}"


def _cost(model: dict[str, Any]) -> list[dict[str, Any]]:
    speed, parameters, gmac = model.get("speed"), model.get("parameters") or {}, model.get("gmac") or {}
    cells = []
    for half in ("encode", "decode"):
        if not speed:
            cells.append(_cell("–"))
            continue
        low, high = speed[half]["quartiles"]
        cells.append(
            _cell(three_figures(speed[half]["images_per_second"]), f"{three_figures(low)} – {three_figures(high)}")
        )
    peaks = [speed[half]["peak_memory_bytes"] for half in ("encode", "decode")] if speed else []
    cells.append(_cell(f"{max(peaks) / 2**30:.2f} GiB" if peaks and None not in peaks else "–"))
    halves = [three_figures(parameters[half] / 1e6) for half in ("encoder", "decoder") if half in parameters]
    total = f"{three_figures(parameters['total'] / 1e6)} M" if "total" in parameters else "–"
    cells.append(_cell(total, " + ".join(halves)))
    work = [gmac[half] for half in ("encode", "decode") if half in gmac]
    cells.append(_cell(three_figures(sum(work)) if work else "–", " + ".join(map(three_figures, work))))
    return cells


def _cell(text: str, note: str = "", best: bool = False) -> dict[str, Any]:
    return {"text": text, "note": note, "best": best}


def _best(models: list[dict[str, Any]], metric: str) -> float | None:
    """The best value of the contestants, if there is more than one of one protocol; codecs are no contestants.

    Nor is the best who was measured on a part of the images.
    """
    if len({model.get("protocol_sha256") for model in models}) > 1:  # merged by force
        return None
    contestants = [m for m in models if not is_reference(m) and m["metrics"].get(metric) is not None]
    values = [model["metrics"][metric] for model in contestants if not model.get("failed")]
    if len(contestants) < 2 or not values:
        return None
    return max(values) if HIGHER_IS_BETTER[metric] else min(values)
