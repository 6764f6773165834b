"""Random reads of a store's latents against a loader that opens the file anew for each.

    python tools/compare_reading.py [--entries 10000] [--shard-size 1000] [--reads 5000] [--runs 7] [--json FILE]

Latents of 4 x 32 x 32 in float32 lie in shards of safetensors, with the page cache warm. The entries are read in one
random order, alternately by `LatentStore` and in LightningDiT's manner: open the safetensors file of the entry, take
its slice of the latents and of the labels, close. Figures are reads a second: medians over the runs, with one thread.
The ratio is that of ``store[i]``, which gives key, label and size too; ``store.stored(i)`` gives the tensor alone.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from diffusers import AutoencoderKL
from PIL import Image

from latentae.console import format_table
from latentae.store.encode import encode_dataset
from latentae.store.reader import LatentStore

SIDE = 32


def make_store(folder: Path, entries: int, shard_size: int) -> LatentStore:
    """A store of latents 4 x 32 x 32 of noise, from an autoencoder that does not compress."""
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        norm_num_groups=1,
        mid_block_add_attention=False,
    )
    photos = folder / "photos"
    for label in range(10):
        (photos / str(label)).mkdir(parents=True)
    for number in range(entries):
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(pixels).save(photos / str(number % 10) / f"{number:06d}.ppm")
    encode_dataset(photos, folder / "store", model, size=SIDE, shard_size=shard_size, batch_size=64, device="cpu")
    return LatentStore(folder / "store")


class Reopened:
    """The entries in the order of the shards, from a file that is opened for each."""

    def __init__(self, store: LatentStore):
        self.places: list[tuple[Path, int]] = []
        for path in sorted((store.path / "shards").glob("*.safetensors")):
            with safetensors.safe_open(path, framework="pt") as file:
                self.places += [(path, row) for row in range(file.get_slice("labels").get_shape()[0])]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        path, row = self.places[index]
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            latents, labels = file.get_slice("latents"), file.get_slice("labels")
            return latents[row : row + 1].squeeze(0), labels[row : row + 1].squeeze(0)


def rate(read: Callable[[int], Any], order: list[int]) -> float:
    start = time.perf_counter()
    for index in order:
        read(index)
    return len(order) / (time.perf_counter() - start)


def measure(entries: int, shard_size: int, reads: int, runs: int) -> dict[str, Any]:
    """Reads a second by each way, run by run, and their medians and ratios."""
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder), entries, shard_size)
        reopened = Reopened(store)
        order = np.random.default_rng(0).permutation(len(store))[:reads].tolist()
        assert all(torch.equal(store[i]["latents"], reopened[i][0]) for i in order)  # also warms both
        assert all(store[i]["label"] == reopened[i][1] for i in order)
        ways = {"store[i]": store.__getitem__, "store.stored(i)": store.stored, "reopened": reopened.__getitem__}
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(runs):
            for name, read in ways.items():
                rates[name].append(rate(read, order))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {name: medians[name] / medians["reopened"] for name in ways}
    return {"rates": rates, "medians": medians, "ratios": ratios, "ratio": ratios["store[i]"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--shard-size", type=int, default=1000)
    parser.add_argument("--reads", type=int, default=5000, help="in each run")
    parser.add_argument("--runs", type=int, default=7, help="of each way, alternating")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(args.entries, args.shard_size, args.reads, args.runs)
    setting = {name: value for name, value in vars(args).items() if name != "json"}
    setting |= {"torch": torch.__version__, "safetensors": safetensors.__version__}
    print(f"{setting}, load {os.getloadavg()[0]:.1f}")
    rows = []
    for name, median in found["medians"].items():
        figures = (median, min(found["rates"][name]), max(found["rates"][name]))
        rows.append([name, *(f"{figure:,.0f}" for figure in figures), f"{found['ratios'][name]:.2f}"])
    print(format_table(["", "reads/s", "least", "most", "over reopened"], rows))
    print(f"random reads from a LatentStore are {found['ratio']:.2f} x those that reopen the file")
    if args.json:
        Path(args.json).write_text(json.dumps({**setting, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
