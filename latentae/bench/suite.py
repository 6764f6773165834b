"""``bench --suite``: a list of public autoencoders with what their papers claim, run where their weights are.

A list is a JSON file; `public` is the one in this package. Each entry is measured by its paper's protocol and at its
paper's size, so that a claim and a figure of ours may stand side by side; what was not run says so.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from latentae.bench.presets import find_preset
from latentae.bench.processes import is_first_process
from latentae.bench.quality import METRICS
from latentae.bench.results import LABELS, format_metric
from latentae.bench.run import bench
from latentae.console import format_table, say
from latentae.errors import RequestError
from latentae.files import write_json

NOT_RUN = "not run"


@dataclass(frozen=True)
class Entry:
    """A public autoencoder, and what its paper claims of it.

    Attributes:
        model: hub id or path. protocol, size, dataset, images: of the claims. source: where they are printed.
        claims: figures by metric.
        tolerances: by metric, how far ours may be from the claim: such an entry is an anchor of the whole list.
    """

    name: str
    model: str
    protocol: str
    size: int
    dataset: str
    images: int
    source: str
    claims: dict[str, float]
    tolerances: dict[str, float] = field(default_factory=dict)


def load_suite(name: str) -> list[Entry]:
    """The entries of a list: its name in this package, or a JSON file of that form.

    Raises:
        RequestError: there is none, or it is not of that form.
    """
    file: Any = resources.files("latentae.bench") / "suites" / f"{name}.json"
    if Path(name).suffix == ".json":
        file = Path(name)
    if not file.is_file():
        raise RequestError(f"There is no suite {name!r}: 'public', or a JSON file of its form.")
    try:
        entries = [Entry(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))["entries"]]
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{name} is no list of autoencoders and their claims ({error}).") from error
    for entry in entries:
        find_preset(entry.protocol)
        if unknown := {*entry.claims, *entry.tolerances} - {*METRICS}:
            raise RequestError(f"{name}: {entry.name} claims {', '.join(sorted(unknown))}, which no metric here is.")
    return entries


def run_suite(name: str, src: str | Path | None, *, out: str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Measure the entries whose weights are on this machine; nothing is downloaded.

    Args:
        name: of the list, see `load_suite`.
        src: the images of the claims; None runs nothing and only lists the claims.
        out: folder for ``suite.json`` and a folder of results for each protocol and size; the same request continues.
        options: of `bench`, but for what an entry says itself.

    Returns:
        ``{"suite", "entries"}``: each entry with ``status``, ``figures`` (None where it was not run) and, of an anchor,
        ``anchor``.
    """
    entries = load_suite(name)
    folder = None if out is None else Path(out)
    rows = {entry.name: _row(entry) for entry in entries}
    groups: dict[tuple[str, int], list[Entry]] = {}
    for entry in entries:
        if src is None:
            rows[entry.name]["status"] = f"{NOT_RUN}: no images were given"
        elif not is_here(entry.model):
            rows[entry.name]["status"] = f"{NOT_RUN}: {entry.model} is not on this machine"
        else:
            groups.setdefault((entry.protocol, entry.size), []).append(entry)
    for (protocol, size), members in groups.items():
        assert src is not None
        say(f"{len(members)} by the protocol {protocol} at {size} px")
        results = bench(
            src,
            [(entry.name, entry.model) for entry in members],
            out=folder / f"{protocol}-{size}" if folder else None,
            size=size,
            protocol=protocol,
            **options,
        )
        for entry, model in zip(members, results["models"], strict=True):
            rows[entry.name] |= _figures(entry, model, results)
    suite = {"suite": name, "entries": [*rows.values()]}
    if folder and is_first_process():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "suite.json", suite)
    return suite


def is_here(model: str) -> bool:
    """Whether a model is a path or was downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    from latentae.families.presets import PRESETS

    if Path(model).exists() or (model in PRESETS and PRESETS[model].is_tiny):
        return True
    return "/" in model and isinstance(try_to_load_from_cache(model, "config.json"), str)


def _row(entry: Entry) -> dict[str, Any]:
    return {**vars(entry), "status": NOT_RUN, "figures": None, "anchor": NOT_RUN if entry.tolerances else None}


def _figures(entry: Entry, model: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    figures, images = model["metrics"], model["images"]
    row: dict[str, Any] = {
        "status": f"run on {images:,} images",
        "figures": figures,
        "skipped": model["skipped"],
        "protocol_sha256": results["protocol_sha256"],
    }
    if images != entry.images:
        row["status"] += f", the claim is of {entry.images:,} of {entry.dataset}: not comparable"
    if entry.tolerances:
        row["anchor"] = _anchor(entry, figures, images)
    return row


def _anchor(entry: Entry, figures: dict[str, Any], images: int) -> str:
    """Whether this machine gives what the paper gives, which all other figures of the list rest on."""
    if images != entry.images:
        return f"{NOT_RUN} on {entry.images:,} images"
    if missing := [LABELS[name] for name in entry.tolerances if figures.get(name) is None]:
        return f"without {', '.join(missing)}"
    away = [
        f"{LABELS[name]} {format_metric(name, figures[name])} instead of {format_metric(name, entry.claims[name])}"
        for name, tolerance in entry.tolerances.items()
        if abs(figures[name] - entry.claims[name]) > tolerance
    ]
    return f"missed: {', '.join(away)}" if away else "met"


def summarise_suite(suite: dict[str, Any]) -> str:
    """Claims and our figures side by side, as a plain table."""
    entries: Sequence[dict[str, Any]] = suite["entries"]
    names = [name for name in METRICS if any(name in entry["claims"] for entry in entries)]
    header = ["model", "protocol", "px", *(f"{LABELS[name]}, claim | ours" for name in names)]
    rows = []
    for entry in entries:
        ours = entry["figures"] or {}
        cells = [f"{format_metric(n, entry['claims'].get(n))} | {format_metric(n, ours.get(n))}" for n in names]
        rows.append([entry["name"], entry["protocol"], str(entry["size"]), *cells])
    foot = [f"{entry['name']}: {entry['status']}; claims: {entry['source']}" for entry in entries]
    foot += [f"anchor {entry['name']}: {entry['anchor']}" for entry in entries if entry["anchor"]]
    return "\n".join([format_table(header, rows), "", *foot])
