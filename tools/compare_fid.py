"""Our rFID against torch-fidelity's on the same two folders: the values, and the time from files to figure.

    python tools/compare_fid.py [--images 24] [--size 256] [--batch 8] [--runs 3] [--threads 1] [--json FILE]

Pictures are generated ones, their "reconstructions" come from JPEG at quality 10. The network has random weights in the
published file's format, unless --weights names a file: the arithmetic is the same. Runs alternate; seconds are medians
of CPU time, all threads of the process together, of one whole measurement, loading of the network included. Neither
side starts processes for reading. Both are also held against the distance from the features themselves, which with
fewer images than features needs no square root of a singular matrix.
"""

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch_fidelity
from PIL import Image
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from latentae.bench.images import ImageSet
from latentae.console import format_table
from latentae.data.samples import dead_leaves
from latentae.data.sources import open_source
from latentae.metrics.frechet import FrechetInceptionDistance


class _WithoutWeights(FeatureExtractorInceptionV3):
    def load_state_dict(self, *arguments: Any, **options: Any) -> None:
        return None


def write_random_inception(path: Path) -> None:
    """Random weights in the format of the published file; variance is kept from layer to layer."""
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.device("meta"):
        keys = _WithoutWeights("inception", ["2048"], feature_extractor_weights_path=empty).state_dict()
    generator = torch.Generator().manual_seed(0)

    def random(name: str, tensor: Tensor) -> Tensor:
        if name.endswith("num_batches_tracked"):
            return torch.zeros((), dtype=torch.int64)
        if tensor.ndim < 2:
            return torch.full(tensor.shape, float(name.endswith(("running_var", "bn.weight"))))
        return torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5

    torch.save({name: random(name, tensor) for name, tensor in keys.items()}, path)


def write_pictures(folder: Path, images: int, size: int) -> tuple[Path, Path]:
    """Two folders of PNG files of the same names."""
    originals, reconstructions = folder / "originals", folder / "reconstructions"
    for side in (originals, reconstructions):
        side.mkdir()
    for index in range(images):
        picture = Image.fromarray(dead_leaves(index, size))
        picture.save(originals / f"{index:05d}.png")
        compressed = io.BytesIO()
        picture.save(compressed, "JPEG", quality=10)
        Image.open(compressed).save(reconstructions / f"{index:05d}.png")
    return originals, reconstructions


def ours(originals: Path, reconstructions: Path, weights: Path, size: int, batch: int) -> float:
    metric = FrechetInceptionDistance(weights)
    for folder, is_original in ((originals, True), (reconstructions, False)):
        source = open_source(folder)
        for found in ImageSet(source, source.items(), size, batch, workers=1).batches():
            metric.update(found.pixels, original=is_original)
    return metric.compute().item()


def exact(originals: Path, reconstructions: Path, weights: Path, size: int, batch: int) -> float:
    """From centred features X and Y: the trace of the root is the sum of the singular values of X Y^T / (N - 1)."""
    metric, sides = FrechetInceptionDistance(weights), []
    for folder in (originals, reconstructions):
        source = open_source(folder)
        found = ImageSet(source, source.items(), size, batch, workers=1).batches()
        sides.append(torch.cat([metric.features(member.pixels) for member in found]))
    x, y = (side - side.mean(0) for side in sides)
    difference = sides[0].mean(0) - sides[1].mean(0)
    traces = x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum()
    return float(difference @ difference + traces / (len(x) - 1))


def theirs(originals: Path, reconstructions: Path, weights: Path, batch: int) -> float:
    return torch_fidelity.calculate_metrics(
        input1=str(reconstructions),
        input2=str(originals),
        fid=True,
        cuda=False,
        batch_size=batch,
        save_cpu_ram=True,  # no processes for reading
        feature_extractor_weights_path=str(weights),
        cache=False,
        verbose=False,
    )["frechet_inception_distance"]


def compare(folder: Path, images: int, size: int, batch: int, runs: int, weights: Path | None) -> dict[str, Any]:
    """Values, their relative difference, seconds of each, and the median over runs of their ratio."""
    if weights is None:
        write_random_inception(weights := folder / "inception.pth")
    pictures = write_pictures(folder, images, size)
    ways = {
        "torch-fidelity": lambda: theirs(*pictures, weights, batch),
        "latentae": lambda: ours(*pictures, weights, size, batch),
    }
    values: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, way in ways.items():
            start = time.process_time()
            values[name] = way()
            seconds[name].append(time.process_time() - start)
    ratios = [slow / fast for slow, fast in zip(seconds["torch-fidelity"], seconds["latentae"])]
    reference = exact(*pictures, weights, size, batch)
    return {
        "values": values,
        "from_features": reference,
        "relative_to_features": {name: value / reference - 1 for name, value in values.items()},
        "relative_difference": abs(values["latentae"] / values["torch-fidelity"] - 1),
        "cpu_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "speedup": statistics.median(ratios),
        "speedups": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch; set OMP_NUM_THREADS too (default: 1)")
    parser.add_argument("--weights", type=Path, help="Inception's file (default: random weights)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), args.images, args.size, args.batch, args.runs, args.weights)
    setting = {name: getattr(args, name) for name in ("images", "size", "batch", "runs", "threads")}
    setting["weights"] = "random" if args.weights is None else args.weights.name
    versions = {name: metadata.version(name) for name in ("torch", "torch-fidelity")}
    rows = [
        [
            name,
            f"{value:.8g}",
            f"{found['relative_to_features'][name]:.1e}",
            f"{found['cpu_seconds'][name]:.1f}",
        ]
        for name, value in found["values"].items()
    ]
    print(f"medians of alternating runs: {setting}, {versions}, load {os.getloadavg()[0]:.1f}")
    print(format_table(["", "Fréchet distance", "off the features'", "CPU seconds"], rows))
    print(f"relative difference {found['relative_difference']:.1e}, speedup {found['speedup']:.2f}x")
    if args.json:
        Path(args.json).write_text(json.dumps({**setting, "versions": versions, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
