"""``report.html``: the results as one page that needs nothing beside it, no network, no server.

The table and the protocol are plain HTML. The viewer (slider, error map, latents, zoom) is a script on the page;
without JavaScript the images still stand there in pairs.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentae.bench.quality import HIGHER_IS_BETTER, METRICS
from latentae.bench.results import (
    COST_HEADER,
    LABELS,
    cost_conditions,
    cost_rows,
    format_metric,
    measured_metrics,
    shape_label,
    steps_label,
)
from latentae.console import three_figures
from latentae.errors import MissingExtra
from latentae.files import atomic_write

PROTOCOL_LABELS = {"images_sha256": "hash of the images", "dtype": "precision", **LABELS}


@dataclass(frozen=True)
class Section:
    """A part that a caller adds to the report: a title, then whichever of text, table, drawing and images it has.

    ``rows`` are table rows with ``header`` above them; ``images`` are pairs of a caption and a uint8 array (H, W, 3);
    ``drawing`` is SVG, put in as it is: whoever draws it escapes names.
    """

    title: str
    text: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()
    images: Sequence[tuple[str, np.ndarray]] = field(default=(), repr=False)
    drawing: str = field(default="", repr=False)


def write_report(results: dict[str, Any], path: str | Path, extra_sections: Sequence[Section] = ()) -> Path:
    """Write the page.

    Args:
        results: what `latentae.bench.run.bench` returns.
        path: the file to write; the images that the page shows are read from ``samples/`` beside it.
        extra_sections: sections between the table and the images.

    Raises:
        MissingExtra: jinja2 is not installed.
    """
    environment = require_report()
    samples = _samples(results, Path(path).parent)
    page = environment.get_template("report.html").render(
        results=results,
        table=_table(results),
        cost={"header": COST_HEADER, "rows": cost_rows(results), "conditions": cost_conditions(results)},
        statistics=_latent_statistics(results),
        protocol=[(PROTOCOL_LABELS.get(key, key), _plain(value)) for key, value in results["protocol"].items()],
        notes=_notes(results),
        samples=samples,
        viewer={
            "models": [model["name"] for model in results["models"]],
            "samples": [{"key": s["key"], "figures": s["figures"], "worst": s["worst"]} for s in samples],
        },
        sections=extra_sections,
    )
    with atomic_write(path) as stream:
        stream.write(page.encode())
    return Path(path)


def require_report() -> Any:
    """The environment of the template.

    Raises:
        MissingExtra: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtra("The report", "bench") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("latentae.bench"),
        autoescape=True,  # names of files and models are other people's text
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["embed"] = lambda pixels: _data_uri(Image.fromarray(pixels))
    return environment


def _table(results: dict[str, Any]) -> dict[str, Any]:
    """Header and rows of cells ``{"text", "note", "best"}``, models first, baselines after them."""
    metrics = measured_metrics(results)
    columns = [("Model", ""), ("Latents", "floats per pixel")]
    columns += [(f"{LABELS[name]} {'↑' if HIGHER_IS_BETTER[name] else '↓'}", "95 % interval") for name in metrics]
    columns += [("Encode", "images/s"), ("Decode", "images/s"), ("Memory", "peak"), ("Parameters", ""), ("GMAC", "")]
    best = {name: _best(results["models"], name) for name in metrics}
    rows = []
    for model in results["models"]:
        cells = [_cell(shape_label(model), f"{model['floats_per_pixel']:.4g}")]
        for name in metrics:
            value, interval = model["metrics"].get(name), model["intervals"].get(name)
            note = f"{format_metric(name, interval[0])} – {format_metric(name, interval[1])}" if interval else ""
            cells.append(_cell(format_metric(name, value), note, value is not None and value == best[name]))
        rows.append({"name": model["name"], "note": _what_it_is(model), "cells": cells + _cost(model)})
    for row in results["baselines"]:
        cells = [_cell("–"), *(_cell(format_metric(name, row.get(name))) for name in metrics), *[_cell("–")] * 5]
        rows.append({"name": row["name"], "note": "baseline, no network", "cells": cells})
    return {"columns": columns, "rows": rows}


def _what_it_is(model: dict[str, Any]) -> str:
    steps = f", {steps_label(model)}, seed {model['decoding']['seed']}" if model.get("decoding") else ""
    return f"{model['class']}, {model['dtype']}{steps}"


def _cost(model: dict[str, Any]) -> list[dict[str, Any]]:
    speed, parameters, gmac = model["speed"], model["parameters"], model["gmac"]
    cells = []
    for half in ("encode", "decode"):
        if speed is None:
            cells.append(_cell("–"))
            continue
        low, high = speed[half]["quartiles"]
        cells.append(
            _cell(three_figures(speed[half]["images_per_second"]), f"{three_figures(low)} – {three_figures(high)}")
        )
    peaks = [speed[half]["peak_memory_bytes"] for half in ("encode", "decode")] if speed else []
    cells.append(_cell(f"{max(peaks) / 2**30:.2f} GiB" if peaks and None not in peaks else "–"))
    halves = [three_figures(parameters[half] / 1e6) for half in ("encoder", "decoder") if half in parameters]
    cells.append(_cell(f"{three_figures(parameters['total'] / 1e6)} M", " + ".join(halves)))
    work = [gmac[half] for half in ("encode", "decode") if half in gmac]
    cells.append(_cell(three_figures(sum(work)) if work else "–", " + ".join(map(three_figures, work))))
    return cells


def _cell(text: str, note: str = "", best: bool = False) -> dict[str, Any]:
    return {"text": text, "note": note, "best": best}


def _best(models: list[dict[str, Any]], metric: str) -> float | None:
    """The best value, if there is more than one to choose from."""
    values = [model["metrics"][metric] for model in models if model["metrics"].get(metric) is not None]
    if len(values) < 2:
        return None
    return max(values) if HIGHER_IS_BETTER[metric] else min(values)


def _latent_statistics(results: dict[str, Any]) -> list[list[str]]:
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


def _notes(results: dict[str, Any]) -> list[tuple[str, str]]:
    """What a reader must know to read the table right: pairs of a subject and a sentence."""
    notes = []
    models = results["models"]
    common = dict(models[0]["skipped"]) if models else {}
    for name, reason in common.items():
        if all(model["skipped"].get(name) == reason for model in models):
            notes.append((f"{LABELS[name]} not measured", reason))
    for model in models:
        for name, reason in model["skipped"].items():
            if (f"{LABELS[name]} not measured", reason) not in notes:
                notes.append((f"{model['name']}: {LABELS[name]} not measured", reason))
        notes += [(model["name"], warning) for warning in model["warnings"]]
    if results["images"]["enlarged"]:
        notes.append(("Small images", f"{results['images']['enlarged']} were enlarged to the crop."))
    notes += [(f"Left out: {bad['key']}", bad["explanation"]) for bad in results["images"]["quarantined"]]
    return notes


def _samples(results: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The rows of ``results["samples"]`` with images as data URIs and with their figures as short texts."""
    rows = []
    of_image = [{row["key"]: row for row in model["per_image"]} for model in results["models"]]
    for sample in results["samples"]:
        measured = [model_rows.get(sample["key"], {}) for model_rows in of_image]
        figures = [
            " · ".join(
                f"{LABELS[name]} {format_metric(name, row[name])}" for name in METRICS if row.get(name) is not None
            )
            for row in measured
        ]
        worst = min((row["psnr"] for row in measured if row.get("psnr") is not None), default=None)
        rows.append(
            {
                "key": sample["key"],
                "input": _embed_file(folder / sample["input"]),
                "models": [
                    {"name": model["name"], **{kind: _embed_file(folder / file) for kind, file in entry.items()}}
                    for model, entry in zip(results["models"], sample["models"])
                ],
                "figures": figures,
                "worst": worst,
            }
        )
    return rows


def _embed_file(path: Path) -> str:
    with Image.open(path) as image:
        return _data_uri(image)


def _data_uri(image: Image.Image) -> str:
    """Lossless WebP as text: smaller than PNG, and every browser of the last years opens it."""
    stream = io.BytesIO()
    image.save(stream, "WEBP", lossless=True, quality=50)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key.replace('_', ' ')}: {_plain(inner)}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
