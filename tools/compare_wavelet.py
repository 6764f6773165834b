"""Speed of our wavelet transform against PyWavelets, ptwt and a grouped convolution.

    python tools/compare_wavelet.py [--size 512] [--batch 8] [--levels 3] [--runs 25] [--threads 1] [--json FILE]

Haar, fp32, "forward" over all levels, and "forward and backward" with a fixed gradient for every band. Runs alternate,
the figures are medians of CPU time; a row is one way, with its ratio to PyWavelets (forward) or to the grouped
convolution (forward and backward) and its largest difference to PyWavelets in float64. ptwt is optional.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import pywt
import torch
import torch.nn.functional as F
from torch import Tensor

from latentae.console import format_table
from latentae.nn.wavelet import wavedec2

OURS, COMPILED, PYWT, PTWT, GROUPED = "ours", "ours, compiled", "pywt", "ptwt", "grouped convolution"
MODE = "symmetric"  # LiteVAE's; Haar needs no border at even sizes
BLOCKS = torch.tensor([[1.0, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]).view(4, 1, 2, 2) / 2


def grouped(x: Tensor, levels: int) -> list[Any]:
    """The usual way in torch: one depthwise 2x2 convolution of stride two for each level."""
    channels = x.shape[1]
    weight = BLOCKS.repeat(channels, 1, 1, 1)
    details: list[Any] = []
    for _ in range(levels):
        x, *bands = F.conv2d(x, weight, stride=2, groups=channels).unflatten(1, (channels, 4)).unbind(2)
        details.append(tuple(bands))
    return [x, *reversed(details)]


def flatten(coefficients: Any) -> list[Any]:
    low, *details = coefficients
    return [low, *(band for level in details for band in level)]


def forward_ways(levels: int) -> dict[str, Callable[[Tensor], Any]]:
    def ours(x: Tensor) -> list[Any]:
        return wavedec2(x, "haar", MODE, levels)

    ways: dict[str, Callable[[Tensor], Any]] = {
        PYWT: lambda x: pywt.wavedec2(x.numpy(), "haar", MODE, levels),
        GROUPED: lambda x: grouped(x, levels),
        OURS: ours,
        COMPILED: torch.compile(ours, fullgraph=True),
    }
    if util.find_spec("ptwt"):
        import ptwt

        ways[PTWT] = lambda x: ptwt.wavedec2(x, "haar", mode=MODE, level=levels)
    return ways


def backward_ways(ways: dict[str, Callable[[Tensor], Any]], x: Tensor) -> dict[str, Callable[[Tensor], Any]]:
    """Those of ``ways`` that have a gradient, each followed by it."""
    gradients = [torch.randn_like(band) for band in flatten(ways[OURS](x))]

    def with_gradient(way: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def run(x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            return torch.autograd.grad(flatten(way(x)), x, gradients)[0]

        return run

    return {name: with_gradient(way) for name, way in ways.items() if name != PYWT}


def median_seconds(ways: dict[str, Callable[[Tensor], Any]], x: Tensor, runs: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(-2, runs):  # two to warm up
        for name, way in ways.items():
            start = time.process_time()
            way(x)
            if run >= 0:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def difference(actual: Any, expected: Any) -> float:
    return max(float(np.abs(np.asarray(a.detach()) - b).max()) for a, b in zip(actual, expected, strict=True))


def compare(size: int, batch: int, levels: int, runs: int) -> list[dict[str, Any]]:
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    ways = forward_ways(levels)
    exact = flatten(pywt.wavedec2(x.double().numpy(), "haar", MODE, levels))
    rows = []
    backward = backward_ways(ways, x)
    exact_gradient = backward[GROUPED](x)
    for task, of, reference in (("forward", ways, PYWT), ("forward and backward", backward, GROUPED)):
        seconds = median_seconds(of, x, runs)
        for name, way in of.items():
            if task == "forward":
                error = difference([torch.as_tensor(band) for band in flatten(way(x))], exact)
            else:
                error = difference([way(x)], [exact_gradient.numpy()])
            rows.append(
                {
                    "task": task,
                    "way": name,
                    "milliseconds": 1e3 * seconds[name],
                    "against": reference,
                    "speedup": seconds[reference] / seconds[name],
                    "difference": error,
                }
            )
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    """One line: how many times faster ours is than each other way."""
    seconds = {(row["task"], row["way"]): row["milliseconds"] for row in rows}
    parts = []
    for task, rivals in (("forward", (PYWT, PTWT, GROUPED)), ("forward and backward", (GROUPED, PTWT))):
        for rival in rivals:
            if (task, rival) in seconds:
                ratios = [f"{seconds[task, rival] / seconds[task, way]:.1f}x" for way in (OURS, COMPILED)]
                parts.append(f"{task} against {rival} {' / '.join(ratios)}")
    return "speedup, eager / compiled: " + ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--runs", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = compare(args.size, args.batch, args.levels, args.runs)
    shape = (args.batch, 3, args.size, args.size)
    setting = {"shape": shape, "levels": args.levels, "threads": args.threads, "runs": args.runs}
    versions = {name: metadata.version(name) for name in ("torch", "PyWavelets")}
    print(f"Haar, fp32, medians of alternating runs: {setting}, {versions}")
    if not util.find_spec("ptwt"):
        print("ptwt is not installed and is left out: pip install ptwt")
    table = [
        [
            r["task"],
            r["way"],
            f"{r['milliseconds']:.2f}",
            f"{r['speedup']:.2f}x {r['against']}",
            f"{r['difference']:.1e}",
        ]
        for r in rows
    ]
    print(format_table(["task", "way", "ms", "speedup", "difference"], table))
    print(summary(rows))
    if args.json:
        Path(args.json).write_text(json.dumps({**setting, "versions": versions, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
