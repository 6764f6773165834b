"""Every family as the ``vae`` of every pipeline of diffusers that takes one, with small denoisers of random weights.

    python tools/pipeline_matrix.py [--pipelines NAME,NAME] [--json FILE] [--markdown FILE]

A cell builds the pipeline with an autoencoder of the family, runs two steps for two sizes, asks that a seed gives its
picture again and another seed another, saves it, opens it and runs it again. The builders are those of tests/matrix.
"""

import argparse
import importlib.util
import json
import platform
import sys
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import diffusers
import torch

import latentae
from latentae.console import format_table

BUILDERS = Path(__file__).parents[1] / "tests" / "matrix" / "pipelines.py"
HEADER = """# Which autoencoder runs in which pipeline

Written by `tools/pipeline_matrix.py` with {versions}; the same cells are tests (`tests/matrix`).

**API drop-in** is what this table shows: the autoencoder runs as the `vae` of the pipeline, the pipeline's own seed
fixes the picture, sizes are right (square and not, where the caller chooses one), and the saved pipeline, opened again,
gives the same picture. **Latent-compatible** is another thing, which no table of code can show: a model that shares
another's latent space, so that a *trained* denoiser keeps working. Published weights are, and fine-tunes of their
decoder alone. A new latent space under a trained denoiser gives noise; the denoisers here are small and of random
weights.

`AutoencoderKL` and `AutoencoderDC` are folders of diffusers' own classes as `latentae.load` opens them: the latter as
`DCAE`, which runs where stock `AutoencoderDC` does not.
"""


def load_builders() -> Any:
    spec = importlib.util.spec_from_file_location("pipeline_matrix_builders", BUILDERS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(matrix: Any, row: Any, family: str) -> dict[str, Any]:
    """One cell: whether it works, and what it showed or what its user is told."""
    obstacle = matrix.obstacle(row, family)
    cell: dict[str, Any] = {"pipeline": row.name, "family": family}
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            facts = matrix.run_cell(row, family, folder)
    except Exception as error:  # what a user would see
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        expected = obstacle is not None and (obstacle.match or "") in said
        cell |= {"works": False, "as_stated": expected, "why": obstacle.sentence if obstacle else said, "said": said}
    else:
        cell |= {"works": facts.works, "as_stated": facts.works and obstacle is None, "spread": facts.spread}
        cell |= {"reload_difference": facts.reloaded, "sizes": [list(came[-2:]) for _, came in facts.sizes]}
    cell["seconds"] = round(time.perf_counter() - start, 2)
    return cell


def table(cells: list[dict[str, Any]], rows: list[Any], families: list[str]) -> tuple[list[list[str]], list[str]]:
    """A line for each pipeline, and the reasons that its footnotes are."""
    reasons: list[str] = []
    lines = []
    for row in rows:
        line = [row.name]
        for family in families:
            (cell,) = [cell for cell in cells if (cell["pipeline"], cell["family"]) == (row.name, family)]
            if cell["works"]:
                line.append("yes")
                continue
            why = cell.get("why", "wrong result")
            reasons += [why] if why not in reasons else []
            line.append(f"no ({reasons.index(why) + 1})")
        lines.append([*line, row.note])
    return lines, reasons


def markdown(cells: list[dict[str, Any]], rows: list[Any], families: list[str], versions: dict[str, str]) -> str:
    lines, reasons = table(cells, rows, families)
    head = ["pipeline", *[f"`{family}`" for family in families], "to know"]
    text = [HEADER.format(versions=", ".join(f"{name} {version}" for name, version in versions.items()))]
    text += [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]
    text += [
        "",
        "Why not, which is also what the user of ours is told (what is said word by word is in `pipelines.json`):",
    ]
    text += ["", *[f"{number}. {reason}." for number, reason in enumerate(reasons, 1)]]
    return "\n".join(text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipelines", metavar="NAMES", help="only these, separated by commas")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--markdown", metavar="FILE")
    args = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    matrix = load_builders()
    wanted = args.pipelines.split(",") if args.pipelines else [row.name for row in matrix.ROWS]
    if unknown := set(wanted) - {row.name for row in matrix.ROWS}:
        parser.error(
            f"no pipeline {', '.join(sorted(unknown))}; there are {', '.join(row.name for row in matrix.ROWS)}"
        )
    rows = [row for row in matrix.ROWS if row.name in wanted]
    families = [*matrix.FAMILIES, *matrix.STOCK]
    cells = [run(matrix, row, family) for row in rows for family in families]
    versions = {"latentae": latentae.__version__, "diffusers": diffusers.__version__, "torch": torch.__version__}
    versions |= {"transformers": metadata.version("transformers"), "Python": platform.python_version()}

    lines, reasons = table(cells, rows, families)
    print(format_table(["pipeline", *families], [line[:-1] for line in lines]))
    print("\n".join(f"({number}) {reason}" for number, reason in enumerate(reasons, 1)))
    astray = [cell for cell in cells if not (cell["works"] or cell["as_stated"])]
    for cell in astray:
        print(f"{cell['pipeline']} with {cell['family']}: {cell.get('said', 'a wrong result')}")
    if args.json:
        Path(args.json).write_text(json.dumps({"versions": versions, "cells": cells}, indent=1) + "\n")
    if args.markdown:
        Path(args.markdown).write_text(markdown(cells, rows, families, versions))
    works = sum(cell["works"] for cell in cells)
    print(f"{works} of {len(cells)} pairings run, {len(cells) - works - len(astray)} cannot, {len(astray)} are astray")
    return 1 if astray else 0


if __name__ == "__main__":
    sys.exit(main())
