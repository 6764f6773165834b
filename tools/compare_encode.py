"""Encoding end to end against what bounds it, and against a loop written the way LightningDiT extracts its features.

    python tools/compare_encode.py [--only model loading memory processes] [--runs 3] [--json FILE]

model      where the model is the bound: ``encode_dataset`` of images of 256 px by a network of the size of SD-VAE's
           encoder, against that network alone on pixels that are in memory already. Same batch size, same threads.
loading    where loading is the bound: JPEGs of 12 megapixels into a small network, against a DataLoader with as many
           worker processes as ours has threads, ADM's crop in them, and latents written by safetensors every 10,000.
memory     the resident set while 100,000 small images are encoded: at a tenth of them and at the end.
processes  two processes on two cores against one on one, each with one thread for the model: inputs per second once
           all are at work.

Runs alternate; figures are medians. What is encoded is made on the spot: dead leaves, random weights.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from compare_speed import SD_VAE, alternate, pairwise
from diffusers import AutoencoderKL
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import latentae
from latentae.codec import LatentCodec
from latentae.console import format_table, say
from latentae.data.samples import dead_leaves
from latentae.store.encode import encode_dataset

THREADS = 2
LATENTS_PER_FILE = 10_000


def write_jpegs(folder: Path, count: int, height: int, width: int) -> Path:
    """``count`` JPEGs, some of them one picture under several names."""
    folder.mkdir(parents=True)
    for number in range(count):
        side = 256 * -(-max(height, width) // 256)
        picture = Image.fromarray(dead_leaves(number % 8, 512)).resize((side, side)).crop((0, 0, width, height))
        picture.save(folder / f"{number:06d}.jpg", quality=92)
    return folder


def encode(source: Any, folder: Path, codec: Any, name: str, **options: Any) -> Any:
    """Our command, into a new store."""
    return encode_dataset(source, folder / f"{name}-{time.monotonic_ns()}", codec, **{"max_bad": 0, **options})


def compare_model(folder: Path, runs: int) -> dict[str, Any]:
    """Images per second end to end over those of the bare model."""
    batch, count = 4, 24
    source = write_jpegs(folder / "small", count, 256, 256)
    codec = LatentCodec(AutoencoderKL(**SD_VAE))
    pixels = torch.rand(batch, 3, 256, 256) * 2 - 1

    @torch.no_grad()
    def bare() -> None:
        for _ in range(count // batch):
            codec.posterior(pixels).mode()

    def ours() -> None:
        encode(source, folder, codec, "model", batch_size=batch, workers=2)

    ours()
    seconds = alternate({"bare": bare, "ours": ours}, runs)
    ratio = pairwise(seconds["bare"], seconds["ours"])
    return {
        "ours": count / statistics.median(seconds["ours"]),
        "baseline": count / statistics.median(seconds["bare"]),
        "ratio": ratio,
        "wanted": 0.95,
    }


class Crops(Dataset[tuple[torch.Tensor, int]]):
    """Images as such scripts load them: Pillow, ADM's crop, float tensors in [-1, 1]."""

    def __init__(self, files: list[Path], size: int):
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        picture = Image.open(self.files[index]).convert("RGB")
        pixels = torch.from_numpy(self.crop(picture)).permute(2, 0, 1).contiguous().float() / 255
        return pixels * 2 - 1, 0

    def crop(self, picture: Image.Image) -> np.ndarray:
        while min(picture.size) >= 2 * self.size:
            picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
        scale = self.size / min(picture.size)
        picture = picture.resize(
            (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC
        )
        left, top = (picture.width - self.size) // 2, (picture.height - self.size) // 2
        return np.array(picture.crop((left, top, left + self.size, top + self.size)))


def extract(files: list[Path], out: Path, codec: LatentCodec, batch: int, workers: int) -> None:
    """A loop over a DataLoader that keeps latents in lists and writes them in large files."""
    out.mkdir()
    loader = DataLoader(Crops(files, 256), batch, num_workers=workers, drop_last=False)
    latents, labels, written = [], [], 0

    def write() -> None:
        tensors = {"latents": torch.cat(latents), "labels": torch.cat(labels)}
        safetensors.torch.save_file(tensors, out / f"{written:03d}.safetensors")

    for pixels, label in loader:
        with torch.no_grad():
            latents.append(codec.posterior(pixels).mode().cpu())
        labels.append(label)
        if sum(map(len, latents)) >= LATENTS_PER_FILE:
            write()
            latents, labels, written = [], [], written + 1
    if latents:
        write()


def compare_loading(folder: Path, runs: int) -> dict[str, Any]:
    """Images per second end to end over those of the loop."""
    count, batch, workers = 96, 16, THREADS
    source = write_jpegs(folder / "large", count, 3000, 4000)
    files = sorted(source.glob("*.jpg"))
    codec = LatentCodec(latentae.create("dc-ae-tiny"))

    def loop() -> None:
        extract(files, folder / f"loop-{time.monotonic_ns()}", codec, batch, workers)

    def ours() -> None:
        encode(source, folder, codec, "loading", batch_size=batch, workers=workers)

    ours(), loop()
    seconds = alternate({"loop": loop, "ours": ours}, runs)
    return {
        "ours": count / statistics.median(seconds["ours"]),
        "baseline": count / statistics.median(seconds["loop"]),
        "ratio": pairwise(seconds["loop"], seconds["ours"]),
        "wanted": 1.0,
    }


def write_tar(path: Path, count: int) -> Path:
    """Small images in a tar."""
    contents = []
    for number in range(256):
        stream = BytesIO()
        Image.fromarray(dead_leaves(number, 32)).save(stream, "png")
        contents.append(stream.getvalue())
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            member = tarfile.TarInfo(f"{number:08d}.png")
            member.size = len(contents[number % 256])
            tar.addfile(member, BytesIO(contents[number % 256]))
    return path


def resident_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def measure_memory(folder: Path, count: int) -> dict[str, Any]:
    """Growth of the resident set after a tenth of the inputs, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seen = pool.apply(_encode_and_watch, (write_tar(folder / "many.tar", count), folder / "many", count))
    early, late = seen
    return {"ours": late, "baseline": early, "ratio": late / early, "wanted": 1.1, "inputs": count}


def _encode_and_watch(source: Path, store: Path, count: int) -> tuple[float, float]:
    from latentae.store.job import ShardWorker

    torch.set_num_threads(THREADS)
    seen: list[float] = []
    real = ShardWorker._publish

    def watch(worker: Any, work: Any, *others: Any) -> Any:
        seen.append(resident_mib())
        return real(worker, work, *others)

    ShardWorker._publish = watch  # type: ignore[method-assign]
    codec = LatentCodec(latentae.create("dc-ae-tiny"))
    encode_dataset(source, store, codec, size=32, batch_size=64, workers=2, max_bad=0)
    return seen[len(seen) // 10], max(seen[-len(seen) // 10 :])


def compare_processes(folder: Path, runs: int) -> dict[str, Any]:
    """Inputs per second of two processes over one, from the moment on when all are at work."""
    count, batch = 384, 4
    source = write_jpegs(folder / "shared", count, 256, 256)
    model = folder / "model"
    latentae.create("dc-ae-f8c16-small").save_pretrained(model)
    cores = sorted(os.sched_getaffinity(0))[:2]

    before = os.sched_getaffinity(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rates: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(runs):
            for processes in rates:
                os.sched_setaffinity(0, cores[:processes])
                rates[processes].append(_steady_rate(source, folder, str(model), processes, batch))
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)
    ratios = [two / one for one, two in zip(rates[1], rates[2])]
    return {
        "ours": statistics.median(rates[2]),
        "baseline": statistics.median(rates[1]),
        "ratio": statistics.median(ratios),
        "wanted": 1.8,
    }


def _steady_rate(source: Path, folder: Path, model: str, processes: int, batch: int) -> float:
    from latentae.console import Progress

    times: list[tuple[float, int]] = []
    real = Progress.advance

    def advance(self: Any, count: int = 1, **figures: Any) -> None:
        if self.description == "encode":
            times.append((time.perf_counter(), count))
        real(self, count, **figures)

    Progress.advance = advance  # type: ignore[method-assign]
    try:
        encode(source, folder, model, "processes", batch_size=batch, workers=1, shard_size=16, processes=processes)
    finally:
        Progress.advance = real  # type: ignore[method-assign]
    total = sum(count for _, count in times)
    done, inside = 0, []
    for moment, count in times:  # neither while processes start nor while the last of them is alone
        done += count
        if 0.15 * total <= done <= 0.85 * total:
            inside.append((moment, done))
    return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["model", "loading", "memory", "processes"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--inputs", type=int, default=100_000, help="of the memory test")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        for part in args.only:
            folder = Path(name) / part
            folder.mkdir()
            say(f"{part} …")
            if part == "model":
                results[part] = compare_model(folder, args.runs)
            elif part == "loading":
                results[part] = compare_loading(folder, args.runs)
            elif part == "memory":
                results[part] = measure_memory(folder, args.inputs)
            else:
                results[part] = compare_processes(folder, args.runs)
    units = {"model": "images/s", "loading": "images/s", "memory": "MiB", "processes": "images/s"}
    rows = [
        [part, units[part], found["baseline"], found["ours"], found["ratio"], found["wanted"]]
        for part, found in results.items()
    ]
    print(format_table(["part", "unit", "baseline", "ours", "ratio", "wanted"], rows))
    print(", ".join(f"{part} {found['ratio']:.2f} (wanted {found['wanted']})" for part, found in results.items()))
    if args.json:
        settings = {"threads": THREADS, "runs": args.runs, "torch": torch.__version__, "cpus": os.cpu_count()}
        args.json.write_text(json.dumps({"settings": settings, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
