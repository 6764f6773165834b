"""Encode and decode speed of our families against the stock class with the same weights, in one process.

    python tools/compare_speed.py dcae [--presets dc-ae-f32c32-in-1.0 dc-ae-f32c32-sana-1.0] [--size 512] [--runs 5]

Runs alternate (stock, ours, stock, ours, ...), the figure is the median of the pairwise ratios; peak memory is that of
each model in a process of its own. Largest differences of the outputs stand beside the ratios: equal outputs or no
claim.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderDC
from torch import Tensor

import latentae
from latentae.console import format_table
from latentae.families.presets import find_preset


def build(preset: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Stock and ours with the same random weights, norms included (zero norms would skip nothing but look equal)."""
    ours = latentae.create(preset)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in ours.named_parameters():
        if "norm" in name:
            parameter.data.normal_(0.3 if name.endswith("weight") else 0, 0.1, generator=generator)
    stock = AutoencoderDC(**find_preset(preset).config).eval()
    stock.load_state_dict(ours.state_dict())
    return stock, ours


def seconds(function: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(preset: str, size: int, runs: int) -> list[dict]:
    stock, ours = build(preset)
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = stock.encode(pixels).latent
    tasks = {
        "encode": (lambda model: model.encode(pixels).latent),
        "decode": (lambda model: model.decode(latents).sample),
    }
    rows = []
    for name, task in tasks.items():
        expected, actual = task(stock), task(ours)  # also the warm-up
        difference = ((expected - actual).abs().max() / expected.abs().max()).item()
        times = [(seconds(lambda: task(stock)), seconds(lambda: task(ours))) for _ in range(runs)]  # noqa: B023
        rows.append(
            {
                "preset": preset,
                "task": name,
                "stock_seconds": statistics.median(a for a, _ in times),
                "ours_seconds": statistics.median(b for _, b in times),
                "speedup": statistics.median(a / b for a, b in times),
                "relative_difference": difference,
                "stock_peak_gib": peak_memory(preset, "stock", name, size),
                "ours_peak_gib": peak_memory(preset, "ours", name, size),
            }
        )
    return rows


def peak_memory(preset: str, which: str, task: str, size: int) -> float:
    """Peak resident memory of one call in a fresh process, in GiB."""
    command = [sys.executable, __file__, "dcae", "--peak-of", preset, which, task, str(size)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(preset: str, which: str, task: str, size: int) -> None:
    model = latentae.create(preset) if which == "ours" else AutoencoderDC(**find_preset(preset).config).eval()
    if task == "encode":
        model.encode(torch.zeros(1, 3, size, size))
    else:
        ratio = model.spatial_compression_ratio
        model.decode(torch.zeros(1, model.config.latent_channels, size // ratio, size // ratio))
    status = Path("/proc/self/status")  # ru_maxrss would count the parent's memory from before exec
    if status.exists():
        kib = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    else:
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(kib / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=["dcae"])
    parser.add_argument("--presets", nargs="+", default=["dc-ae-f32c32-in-1.0", "dc-ae-f32c32-sana-1.0"])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--peak-of", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if args.peak_of:
        preset, which, task, size = args.peak_of
        return print_peak(preset, which, task, int(size))
    torch.set_num_threads(args.threads)
    rows = [row for preset in args.presets for row in compare(preset, args.size, args.runs)]
    setting = {"size": args.size, "threads": args.threads, "runs": args.runs, "torch": torch.__version__}
    print(f"batch 1, fp32, medians of alternating runs: {setting}")
    print(format_table(list(rows[0]), [list(row.values()) for row in rows]))
    print("speedup: " + ", ".join(f"{r['preset']} {r['task']} {r['speedup']:.2f}x" for r in rows))
    if args.json:
        Path(args.json).write_text(json.dumps({**setting, "rows": rows}, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
