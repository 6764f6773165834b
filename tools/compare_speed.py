"""Speed and peak memory of our families against stock diffusers, in one process.

    python tools/compare_speed.py dcae [--presets dc-ae-f32c32-in-1.0 dc-ae-f32c32-sana-1.0] [--size 512] [--runs 5]
    python tools/compare_speed.py litevae [--presets litevae-b-f8c4 litevae-s-f8c4] [--sizes 256 512] [--batches 1 4]

dcae: encode and decode of our DC-AE against ``AutoencoderDC`` with the same weights; the largest difference of their
outputs stands beside the ratios. litevae: our encoders against that of the Stable Diffusion VAE (``AutoencoderKL`` with
its quant_conv), another network, so the difference is that to our own encoder in float64: equal outputs or no claim.

Runs alternate (stock, ours, stock, ours, ...), the figure is the median of the pairwise ratios, of CPU seconds with
one thread and of wall seconds with more. Peak memory is that of a model in a process of its own; for litevae what one
encode adds to the resident set, since a fifth of the parameters is no merit of the arithmetic.
"""

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from torch import Tensor

import latentae
from latentae.console import format_table
from latentae.families.presets import find_preset

SD_VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=4,
    sample_size=512,  # by which it cuts tiles
)


def build(which: str, dtype: torch.dtype) -> Any:
    """A preset of ours, the stock class of a DC-AE preset (``stock:PRESET``), or the Stable Diffusion VAE."""
    model: Any
    if which == "sd-vae":
        model = AutoencoderKL(**SD_VAE).eval()
    elif which.startswith("stock:"):
        model = AutoencoderDC(**find_preset(which.removeprefix("stock:")).config).eval()
    else:
        model = latentae.create(which)
    return torch.nn.Module.to(model, dtype=dtype)


def with_random_norms(ours: torch.nn.Module) -> torch.nn.Module:
    """Norms included, since zero norms would skip nothing but look equal."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in ours.named_parameters():
        if "norm" in name:
            parameter.data.normal_(0.3 if name.endswith("weight") else 0, 0.1, generator=generator)
    return ours


def random_pixels(batch: int, size: int, dtype: torch.dtype) -> Tensor:
    return (torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(dtype)


def encode(model: Any, pixels: Tensor) -> Tensor:
    """Latents; the mode, where there is a distribution."""
    output = model.encode(pixels)
    return output.latent if hasattr(output, "latent") else output.latent_dist.mode()


def decode(model: Any, latents: Tensor) -> Tensor:
    return model.decode(latents).sample


def alternate(ways: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of each way, run after run in turn."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, function in ways.items():
            start = clock()
            function()
            seconds[name].append(clock() - start)
    return seconds


def pairwise(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast))


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def compare_dcae(presets: Sequence[str], size: int, runs: int, dtype: torch.dtype) -> list[dict]:
    rows = []
    for preset in presets:
        ours, stock = with_random_norms(build(preset, dtype)), build(f"stock:{preset}", dtype)
        stock.load_state_dict(ours.state_dict())
        pixels = random_pixels(1, size, dtype)
        latents = encode(stock, pixels)
        for task, function, given in (("encode", encode, pixels), ("decode", decode, latents)):
            ways = {name: lambda m=m, f=function, x=given: f(m, x) for name, m in (("stock", stock), ("ours", ours))}
            difference = relative_difference(ways["ours"](), ways["stock"]())  # also the warm-up
            seconds = alternate(ways, runs)
            rows.append(
                {
                    "preset": preset,
                    "task": task,
                    "stock_seconds": statistics.median(seconds["stock"]),
                    "ours_seconds": statistics.median(seconds["ours"]),
                    "speedup": pairwise(seconds["stock"], seconds["ours"]),
                    "relative_difference": difference,
                    "stock_peak_gib": peak_memory(f"stock:{preset}", task, 1, size, dtype)["peak"] / 2**30,
                    "ours_peak_gib": peak_memory(preset, task, 1, size, dtype)["peak"] / 2**30,
                }
            )
    return rows


def compare_litevae(
    presets: Sequence[str], sizes: Sequence[int], batches: Sequence[int], runs: int, dtype: torch.dtype
) -> list[dict]:
    models = {"sd-vae": build("sd-vae", dtype), **{name: with_random_norms(build(name, dtype)) for name in presets}}
    exact = {name: torch.nn.Module.to(copy.deepcopy(models[name]), dtype=torch.float64) for name in presets}
    rows = []
    for size in sizes:
        for batch in batches:
            pixels = random_pixels(batch, size, dtype)
            ways = {name: lambda m=m, x=pixels: encode(m, x) for name, m in models.items()}
            for function in ways.values():
                function()  # warm-up
            seconds = alternate(ways, runs)
            added = {name: peak_memory(name, "encode", batch, size, dtype)["added"] / 2**20 for name in models}
            for name in presets:
                one = pixels[:1]
                rows.append(
                    {
                        "preset": name,
                        "size": size,
                        "batch": batch,
                        "sd_vae_seconds": statistics.median(seconds["sd-vae"]),
                        "ours_seconds": statistics.median(seconds[name]),
                        "speedup": pairwise(seconds["sd-vae"], seconds[name]),
                        "sd_vae_added_mib": added["sd-vae"],
                        "ours_added_mib": added[name],
                        "memory_ratio": added["sd-vae"] / added[name],
                        "relative_difference": relative_difference(
                            encode(models[name], one).double(), encode(exact[name], one.double())
                        ),
                    }
                )
    return rows


def summarise_litevae(rows: list[dict]) -> str:
    texts = []
    for preset in dict.fromkeys(row["preset"] for row in rows):
        cells = [row for row in rows if row["preset"] == preset]
        speedups = [row["speedup"] for row in cells]
        largest = max(row["batch"] for row in cells)
        memory = min(row["memory_ratio"] for row in cells if row["batch"] == largest)
        texts.append(
            f"{preset} {statistics.geometric_mean(speedups):.2f}x (least {min(speedups):.2f}x), "
            f"{memory:.2f}x less memory at batch {largest}"
        )
    return "speedup of encoders, geometric mean: " + "; ".join(texts)


def peak_memory(which: str, task: str, batch: int, size: int, dtype: torch.dtype) -> dict[str, int]:
    """Peak resident memory of one call in a fresh process, in bytes, and how much of it the call added."""
    peak_of = [which, task, str(batch), str(size), str(dtype).removeprefix("torch.")]
    command = [sys.executable, __file__, "dcae", "--threads", str(torch.get_num_threads()), "--peak-of", *peak_of]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(which: str, task: str, batch: int, size: int, dtype: torch.dtype) -> None:
    model = build(which, dtype)
    if task == "encode":
        given = random_pixels(batch, size, dtype)
    else:
        ratio = model.spatial_compression_ratio
        given = torch.zeros(batch, model.config.latent_channels, size // ratio, size // ratio, dtype=dtype)
    before = resident("VmRSS")
    model.encode(given) if task == "encode" else model.decode(given)
    peak = resident("VmHWM")
    print(json.dumps({"peak": peak, "added": peak - before}))


def resident(entry: str) -> int:
    """Resident memory now (VmRSS) or at most (VmHWM) in bytes; elsewhere than on Linux always the latter."""
    status = Path("/proc/self/status")  # ru_maxrss would count the parent's memory from before exec
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(entry))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=["dcae", "litevae"])
    parser.add_argument("--presets", nargs="+", help="which of the family's to measure")
    parser.add_argument("--size", type=int, default=512, help="side of the image, for dcae (default: 512)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="for litevae (default: 256 512)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="for litevae (default: 1 4)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch; by default all for dcae and one for litevae")
    parser.add_argument("--bf16", action="store_true", help="both sides in bfloat16")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--peak-of", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    torch.set_grad_enabled(False)
    torch.set_num_threads(args.threads or (1 if args.family == "litevae" else torch.get_num_threads()))
    if args.peak_of:
        which, task, batch, size, dtype_name = args.peak_of
        return print_peak(which, task, int(batch), int(size), getattr(torch, dtype_name))
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    setting = {"threads": torch.get_num_threads(), "runs": args.runs, "dtype": str(dtype), "torch": torch.__version__}
    if args.family == "dcae":
        setting["size"] = args.size
        presets = args.presets or ["dc-ae-f32c32-in-1.0", "dc-ae-f32c32-sana-1.0"]
        rows = compare_dcae(presets, args.size, args.runs, dtype)
        summary = "speedup: " + ", ".join(f"{r['preset']} {r['task']} {r['speedup']:.2f}x" for r in rows)
    else:
        presets = args.presets or ["litevae-b-f8c4", "litevae-s-f8c4"]
        rows = compare_litevae(presets, args.sizes, args.batches, args.runs, dtype)
        summary = summarise_litevae(rows)
    print(f"medians of alternating runs: {setting}")
    print(format_table(list(rows[0]), [list(row.values()) for row in rows]))
    print(summary)
    if args.json:
        result = {**setting, "summary": summary, "rows": rows}
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
