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

from latentae.bench.altered import ALLOWED_LOSS
from latentae.bench.plots import (
    FRAME,
    MARKS,
    Plot,
    cost_quality,
    is_reference,
    legend,
    noise_robustness,
    rate_distortion,
)
from latentae.bench.quality import HIGHER_IS_BETTER, METRICS
from latentae.bench.results import (
    COST_HEADER,
    DIGITS,
    LABELS,
    cost_conditions,
    cost_rows,
    extent,
    format_metric,
    rated_images,
    rows_of,
    unit_of,
)
from latentae.bench.tables import conditions, latent_statistics, results_table, worst_images
from latentae.errors import MissingExtra
from latentae.files import atomic_write

PROTOCOL_LABELS = {"images_sha256": "hash of the images", "dtype": "number format", **LABELS}


@dataclass(frozen=True)
class Section:
    """A part that a caller adds to the report: a title, then whichever of text, table, plots and images it has.

    ``rows`` are table rows with ``header`` above them; ``images`` are pairs of a caption and a uint8 array (H, W, 3).
    """

    title: str
    text: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()
    images: Sequence[tuple[str, np.ndarray]] = field(default=(), repr=False)
    plots: Sequence[Plot] = ()


def write_report(results: dict[str, Any], path: str | Path, extra_sections: Sequence[Section] = ()) -> Path:
    """Write the page.

    Args:
        results: what `latentae.bench.run.bench` returns.
        path: the file to write; the images that the page shows are read from ``samples/`` beside it.
        extra_sections: sections between the images and the cost.

    Raises:
        MissingExtra: jinja2 is not installed.
    """
    environment = require_report()
    models = results["models"]
    contestants = [model for model in models if not is_reference(model)]
    networks = [model for model in contestants if model["parameters"]]  # the others are folders of reconstructions
    samples = _samples(results, Path(path).parent)
    page = environment.get_template("report.html").render(
        results=results,
        unit=unit_of(results),
        extent=extent(results["protocol"]),
        shown=len({sample["key"] for sample in results["samples"]}),
        conditions=", ".join(dict.fromkeys([m["device"] for m in networks] + [m["dtype"] for m in networks])),
        table=results_table(results),
        plots={
            "rate": rate_distortion(models),
            "rate_images": rated_images(models),
            "allowed_loss": ALLOWED_LOSS,
            "noise": noise_robustness(models),
            "cost": cost_quality(models),
        },
        cost={
            "header": COST_HEADER,
            "rows": cost_rows({**results, "models": networks}),
            "conditions": cost_conditions(results),
        },
        statistics=latent_statistics(results),
        protocols=_protocols(results),
        conditions_of=[(model["name"], conditions(model)) for model in models],
        notes=_notes(results),
        samples=samples,
        worst=worst_images(contestants),
        machines=list(dict.fromkeys(_machine(part["machine"]) for part in results.get("merged") or [results])),
        viewer=_viewer(results, samples),
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
    environment.globals |= {"marks": MARKS, "frame": FRAME, "legend": legend}
    environment.filters["embed"] = lambda pixels: _data_uri(Image.fromarray(pixels))
    return environment


def _protocols(results: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """By its hash, every protocol that the results were measured by, in words; there are several only by force."""
    return {
        part["protocol_sha256"]: [(PROTOCOL_LABELS.get(k, k), _plain(value)) for k, value in part["protocol"].items()]
        for part in results.get("merged") or [results]
    }


def _machine(machine: dict[str, Any]) -> str:
    return ", ".join([machine["system"], f"{machine['threads']} threads", *filter(None, [machine.get("gpu")])])


def _notes(results: dict[str, Any]) -> list[tuple[str, str]]:
    """What a reader must know to read the table right: pairs of a subject and a sentence."""
    models = results["models"]
    notes = _not_measured(models)
    if len(_protocols(results)) > 1:
        notes.insert(0, ("Different protocols", "These figures do not compare; none is marked as the best."))
    machines = {_machine(part["machine"]) for part in results.get("merged", [])}
    if len(machines) > 1:
        notes.insert(0, ("Different machines", f"Times and memory do not compare: {'; '.join(sorted(machines))}."))
    for model in models:
        notes += [(model["name"], warning) for warning in model.get("warnings", [])]
        notes += [(f"{model['name']}: {image['key']} left out", image["reason"]) for image in model.get("failed", [])]
    if results["images"]["enlarged"]:
        notes.append((f"Small {unit_of(results)}", f"{results['images']['enlarged']} were enlarged to the crop."))
    notes += [(f"Left out: {bad['key']}", bad["explanation"]) for bad in results["images"]["quarantined"]]
    return notes


def _not_measured(models: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Which metrics are missing for one reason, and of which models unless of all that are no codecs."""
    lacking: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for model in models:
        for metric, reason in model.get("skipped", {}).items():
            metrics, names = lacking.setdefault(reason, ({}, {}))
            metrics[LABELS.get(metric, metric)] = names[model["name"]] = None
    contestants = {model["name"] for model in models if not is_reference(model)}
    notes = []
    for reason, (metrics, names) in lacking.items():
        of = "" if contestants <= names.keys() else f" of {', '.join(names)}"
        notes.append((f"{', '.join(metrics)} not measured{of}", reason))
    return notes


def _samples(results: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The rows of ``results["samples"]`` with images as data URIs and with their figures, as numbers and as text."""
    rows = []
    of_image = [{row["key"]: row for row in rows_of(model)} for model in results["models"]]
    frames = results["protocol"].get("frames")
    for sample in results["samples"]:
        measured = [model_rows.get(sample["key"]) for model_rows in of_image]
        figures = [
            " · ".join(
                f"{LABELS[name]} {format_metric(name, row[name])}" for name in METRICS if row.get(name) is not None
            )
            if row
            else "not measured"
            for row in measured
        ]
        rows.append(
            {
                "key": sample["key"] + (f", frame {sample['frame'] + 1} of {frames}" if "frame" in sample else ""),
                "input": _embed_file(folder / sample["input"]),
                "models": [
                    {
                        "name": model["name"],
                        "reconstruction": _embed_file(folder / entry["reconstruction"]),
                        "latents": _embed_file(folder / entry["latents"]) if model["latents"] else "",
                    }
                    for model, entry in zip(results["models"], sample["models"])
                ],
                "figures": figures,
                "values": measured,
            }
        )
    return rows


def _viewer(results: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """What the script on the page reads; the pictures it finds on the page."""
    metrics = [name for name in METRICS if any(row and name in row for s in samples for row in s["values"])]
    return {
        "models": [model["name"] for model in results["models"]],
        "metrics": [
            {"name": n, "label": LABELS[n], "digits": DIGITS[n], "higher_is_better": HIGHER_IS_BETTER[n]}
            for n in metrics
        ],
        "samples": [{"key": s["key"], "figures": s["figures"], "values": s["values"]} for s in samples],
    }


def _embed_file(path: Path) -> str:
    """A data URI, or nothing of a picture that was not saved."""
    if not path.exists():
        return ""
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
