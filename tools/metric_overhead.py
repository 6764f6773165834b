"""What the metrics of a benchmark cost beside the model.

    python tools/metric_overhead.py [--model sd-vae] [--images 4] [--size 256] [--batch 1] [--json FILE]

Every batch goes through the model and back, then through each metric that needs no weights; seconds are sums over the
batches, of CPU time with one thread and of wall time with more or on a GPU, the first batch left out as a warm-up. The
share is that of the metrics in the whole, for PSNR and SSIM and for all of them; both costs grow with the number of
images alone, so few images stand for a thousand. The model is a preset of ours or sd-vae, with random weights.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compare_speed import build

from latentae.bench.quality import WITHOUT_WEIGHTS
from latentae.codec import LatentCodec
from latentae.console import format_table
from latentae.data.samples import dead_leaves
from latentae.data.transforms import to_tensor
from latentae.nn.pixels import to_uint8


def timed(seconds: dict[str, float], name: str, function: Callable[[], Any], device: torch.device) -> Any:
    on_cpu = device.type == "cpu"
    clock = time.process_time if on_cpu and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    result = function()
    if not on_cpu:
        torch.cuda.synchronize()
    seconds[name] += clock() - start
    return result


def measure(model: str, images: int, size: int, batch: int, device: str, dtype: str) -> dict[str, Any]:
    """Seconds per image of the model and of each metric, and the metrics' share in the whole."""
    codec = LatentCodec(build(model, torch.float32), device=device, dtype=getattr(torch, dtype))
    metrics = {name: metric() for name, metric in WITHOUT_WEIGHTS.items() if metric.smallest <= size}
    seconds = dict.fromkeys(["model", *metrics], 0.0)
    numbers = [range(start, min(start + batch, images)) for start in range(0, images, batch)]
    for position, chosen in enumerate([numbers[0], *numbers]):
        originals = torch.stack([to_tensor(dead_leaves(index, size)) for index in chosen])
        decoded = timed(seconds, "model", lambda pixels=originals: codec.decode(codec.encode(pixels)), codec.device)
        pair = to_uint8(decoded), originals.to(codec.device)
        for name, metric in metrics.items():
            timed(seconds, name, lambda m=metric, p=pair: m.values(*p).tolist(), codec.device)
        if position == 0:
            seconds = dict.fromkeys(seconds, 0.0)
    shares = {}
    for label, names in (("psnr and ssim", ["psnr", "ssim"]), ("all", list(metrics))):
        spent = sum(seconds[name] for name in names)
        shares[label] = spent / (spent + seconds["model"])
    return {"seconds_per_image": {name: value / images for name, value in seconds.items()}, "shares": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd-vae")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = measure(args.model, args.images, args.size, args.batch, args.device, args.dtype)
    setting = {name: value for name, value in vars(args).items() if name != "json"} | {"torch": torch.__version__}
    print(f"{setting}, load {os.getloadavg()[0]:.1f}")
    rows = [[name, f"{1e3 * value:.1f}"] for name, value in found["seconds_per_image"].items()]
    print(format_table(["", "ms / image"], rows))
    print("share of the metrics: " + ", ".join(f"{name} {share:.1%}" for name, share in found["shares"].items()))
    if args.json:
        Path(args.json).write_text(json.dumps({**setting, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
