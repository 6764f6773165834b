"""Several ``results.json`` as one: models that were measured apart, by one protocol on the same images."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentae.bench.diagnostics import codebook_section, diagnostics_section
from latentae.bench.equivariance import equivariance_section
from latentae.bench.probe_report import probe_section
from latentae.bench.quality import METRICS
from latentae.bench.report import require_report, write_report
from latentae.bench.results import read_results, write_results
from latentae.errors import RequestError

OTHER_BENCHMARK = "not measured in the benchmark of this model"


def merge_results(paths: Sequence[str | Path], *, out: str | Path | None = None, force: bool = False) -> dict[str, Any]:
    """One table and one report of several benchmarks.

    Args:
        paths: results.json files, or their folders.
        out: folder for ``results.json``, ``report.html`` and ``samples/``; None writes nothing.
        force: put together what was measured by different protocols; the names of models then say by which.

    Returns:
        Results as `latentae.bench.run.bench` gives them; ``merged`` says what they were made of.

    Raises:
        RequestError: fewer than two results, one that cannot be read, or different protocols, images or metric weights.
    """
    if len(paths) < 2:
        raise RequestError(f"--merge takes two or more results.json files, got {len(paths)}.")
    folder = None if out is None else Path(out)
    files = [Path(path) / "results.json" if Path(path).is_dir() else Path(path) for path in paths]
    for file in files:
        if not file.is_file():
            raise RequestError(f"--merge: there is no file {file}.")
    if folder and any(folder.resolve() == file.parent.resolve() for file in files):
        raise RequestError(f"--merge would write over {folder}, which it reads: choose another --out.")
    resolved = [file.resolve() for file in files]
    if twice := next((file for file in files if resolved.count(file.resolve()) > 1), None):
        raise RequestError(f"--merge got {twice} twice: name each results.json once.")
    parts = [read_results(file) for file in files]
    differences = {file: _differences(parts[0], part) for file, part in zip(files, parts)}
    if not force and (different := next((file for file in files if differences[file]), None)):
        raise RequestError(
            f"{files[0]} and {different} are not comparable, they differ in {', '.join(differences[different])}: "
            "figures of different protocols do not belong in one table; --force puts them there and says so."
        )
    results = {
        **parts[0],
        "models": _models(files, parts, marked=any(differences.values())),
        "metric_weights_sha256": {k: v for part in reversed(parts) for k, v in part["metric_weights_sha256"].items()},
        "reference_cost": next((part["reference_cost"] for part in parts if part.get("reference_cost")), None),
        "baselines": _unique([row for part in parts for row in part["baselines"]]),
        "merged": [
            {"source": str(file), **{k: part[k] for k in ("protocol", "protocol_sha256", "versions", "machine")}}
            for file, part in zip(files, parts)
        ],
    }
    if folder:
        require_report()
        (folder / "samples").mkdir(parents=True, exist_ok=True)
    results["samples"] = _samples(files, parts, folder)
    if folder:
        models = results["models"]
        sections = [diagnostics_section(models), codebook_section(models)]
        with_equivariance = [model for model in models if "equivariance" in model["latents"]]
        sections += [equivariance_section(with_equivariance)] if with_equivariance else []
        sections += [probe_section(models)] if any(model.get("probe") for model in models) else []
        write_results(results, folder)
        write_report(results, folder / "report.html", [section for section in sections if section.rows])
    return results


def _differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What keeps two results from one table, in words."""
    names = [name for name in {**one["protocol"], **other["protocol"]} if _of(one, name) != _of(other, name)]
    if "preset" in names:
        return [f"the protocol ({_of(one, 'preset')} and {_of(other, 'preset')})"]
    weights, others = one["metric_weights_sha256"], other["metric_weights_sha256"]
    names += [f"the weights of {name}" for name in weights if others.get(name, weights[name]) != weights[name]]
    words = {"images": "their images", "images_sha256": "their images"}
    return list(dict.fromkeys(words.get(name, name.replace("_sha256", "")) for name in names))


def _of(results: dict[str, Any], name: str) -> Any:
    return results["protocol"].get(name)


def _models(files: Sequence[Path], parts: Sequence[dict[str, Any]], marked: bool) -> list[dict[str, Any]]:
    metrics = {name for part in parts for model in part["models"] for name in model["metrics"]}
    models: list[dict[str, Any]] = []
    for file, part in zip(files, parts):
        for model in part["models"]:
            name = model["name"]
            if marked:
                name += f" [{part['protocol']['preset']}, {part['protocol_sha256'][:6]}]"
            if any(earlier["name"] == name for earlier in models):
                name += f" ({file.parent.name or file})"
            count = sum(earlier["name"] == name for earlier in models)
            missing = metrics - set(model["metrics"])
            row = {**model, "name": f"{name} {count + 1}" if count else name}
            row["protocol_sha256"] = part["protocol_sha256"]
            known = {**model["metrics"], **dict.fromkeys(missing)}
            row["metrics"] = {metric: known[metric] for metric in METRICS if metric in known}
            row["skipped"] = {**model["skipped"], **dict.fromkeys(missing, OTHER_BENCHMARK)}
            models.append(row)
    return models


def _samples(files: Sequence[Path], parts: Sequence[dict[str, Any]], folder: Path | None) -> list[dict[str, Any]]:
    """The images that all of them show; with a folder, their files are copied there."""
    by_key = [{_shown(row): row for row in part["samples"]} for part in parts]
    shared = [row for row in parts[0]["samples"] if all(_shown(row) in rows for rows in by_key)]
    merged = []
    for place, first in enumerate(shared):
        row: dict[str, Any] = {**first, "input": f"samples/{place:03d}-input.png", "models": []}
        copies = [(files[0].parent / first["input"], row["input"])]
        for file, rows in zip(files, by_key):
            for entry in rows[_shown(first)]["models"]:
                index = len(row["models"])
                names = {kind: f"samples/{place:03d}-model-{index}-{kind}.png" for kind in entry}
                copies += [(file.parent / entry[kind], name) for kind, name in names.items()]
                row["models"].append(names)
        if any(not source.is_file() for source, _ in copies):
            continue  # results.json may travel without its images
        for source, name in copies if folder else []:
            assert folder is not None
            shutil.copyfile(source, folder / name)
        merged.append(row)
    return merged


def _shown(row: dict[str, Any]) -> tuple[str, int | None]:
    """The image, or the clip and its frame."""
    return row["key"], row.get("frame")


def _unique(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for i, row in enumerate(rows) if row not in rows[:i]]
