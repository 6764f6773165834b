"""The builders of pipelines, which ``tools/pipeline_matrix.py`` shares."""

import importlib.util
import sys
from pathlib import Path

import pytest

NAME = "pipeline_matrix_builders"


def builders():
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(NAME, Path(__file__).with_name("pipelines.py"))
        sys.modules[NAME] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[NAME]


def pytest_generate_tests(metafunc):
    """The cells of the matrix that can work, and those that cannot; the less informative ones are slow."""
    if not {"cell", "blocked"} & set(metafunc.fixturenames):
        return
    matrix = builders()
    name = "cell" if "cell" in metafunc.fixturenames else "blocked"
    cells = [(row, family) for row in matrix.ROWS for family in (*matrix.FAMILIES, *matrix.STOCK)]
    wanted = [cell for cell in cells if (matrix.obstacle(*cell) is not None) == (name == "blocked")]
    metafunc.parametrize(
        name,
        [
            pytest.param(cell, id=f"{cell[0].name}-{cell[1]}", marks=[pytest.mark.slow] if is_slow(*cell) else [])
            for cell in wanted
        ],
    )


def is_slow(row, family):
    """Stock classes are a reference; what all families share is told by one of images and one of videos, and decoders
    that sample have their generator to show."""
    if family == "AutoencoderDC":
        return row.name != "QwenImage"
    if family in ("LiteVAE", "SWYCC", "AutoencoderKL"):
        return row.name not in ("StableDiffusion", "Flux")
    if family == "DiTo":
        return row.name not in ("StableDiffusion", "StableDiffusionXL", "Flux", "DiT")
    return family == "FourPlane" and row.name not in ("StableDiffusion", "QwenImage", "Wan", "LTX", "CogVideoX")


@pytest.fixture(scope="session")
def matrix():
    return builders()
