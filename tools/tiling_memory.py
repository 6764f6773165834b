"""Peak memory of full-size autoencoders, tiled and untiled, and how far the tiled result is from the untiled one.

    python tools/tiling_memory.py [--models NAME ...] [--sizes 512 1024 2048 4096] [--json FILE]
    python tools/tiling_memory.py --models fourplane-t4f8c8 --sizes 17x256 43x256 --json FILE

Each call runs in a process of its own that may not take more than --limit-gib; a call that would, or that takes longer
than --seconds, is left out and says so. Untiled calls that would need more, by what the smaller size added, are not
tried. Weights are random, norms included. Sizes are sides of a square image, or FRAMESxSIDE of a clip.

Memory is what a call adds to the model and its input: "added" the growth of the resident set (on a GPU: of what torch
allocated) at its peak, and "live" the tensors that exist at the same time, counted operation by operation without
computing anything, which does not depend on the allocator, leaves out what kernels need inside, and is printed for
every size. PSNR is that of the tiled result to the untiled one over the range of the latter, and the difference the
largest one over the largest value. With random weights neither says what a trained model does.

--json FILE keeps the cells that are already in it.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compare_speed import build, decode, encode, resident, with_random_norms
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentae.codec import spatial_ratio
from latentae.console import format_table, say
from latentae.families.base import DEFAULT_TILE, Autoencoder
from latentae.families.presets import PRESETS

MODELS = ("dc-ae-f32c32-sana-1.0", "litevae-b-f8c4", "sd-vae", "fourplane-t4f8c8")
SIZES = ("512", "1024", "2048", "4096")
CLIPS = ("17x256", "43x256", "69x256")  # one window, three and five
CALL = ("model", "half", "size", "tile", "dtype", "device")
GIB = 2**30


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, for as long as they exist; ``peak`` is the most at once.

    Views and results in place are no tensors of their own. Works without computing, on the meta device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._at_most = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self._at_most += storage.nbytes()
        if self._at_most > self.peak:  # with what is gone by now
            self._live = {key: (ref, size) for key, (ref, size) in self._live.items() if not ref.expired()}
            self._at_most = sum(size for _, size in self._live.values())
            self.peak = max(self.peak, self._at_most)
        return result


class FlashAttention(TorchFunctionMode):
    """Attention as one operation, which holds no matrix of all pairs; without a kernel torch would make it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def live_peak(model: Any, half: str, given: Tensor) -> int:
    """Bytes of tensors that exist at the same time while ``encode`` or ``decode`` runs, the input not counted."""
    with torch.no_grad(), LiveTensors() as live, FlashAttention():
        run(model, half, given)
    return live.peak


def run(model: Any, half: str, given: Tensor) -> Tensor:
    return encode(model, given) if half == "encode" else decode(model, given)


def make(name: str, dtype: torch.dtype) -> Any:
    """The model with random weights, norms included, since zero norms would leave branches out."""
    return with_random_norms(build(name, dtype)).eval().requires_grad_(False)


def make_without_weights(name: str, dtype: torch.dtype) -> Any:
    """The model on the meta device."""
    with torch.device("meta"):
        return build(name, dtype).eval().requires_grad_(False)


def enable_tiling(model: Any, tile: int) -> None:
    """Tiles of this side for ours; stock classes have their own."""
    model.enable_tiling(tile, tile) if isinstance(model, Autoencoder) else model.enable_tiling()


def input_shape(model: Any, half: str, size: str) -> tuple[int, ...]:
    """Of pixels, or of their latents, for ``SIDE`` or ``FRAMESxSIDE``."""
    *frames, side = map(int, size.split("x"))
    pixels = (1, 3, *frames, side, side)
    if half == "encode":
        return pixels
    if isinstance(model, Autoencoder):
        return model.latent_shape(pixels)
    return 1, model.config.latent_channels, side // spatial_ratio(model), side // spatial_ratio(model)


def clouds(shape: Sequence[int], seed: int = 0) -> Tensor:
    """Noise whose coarse scales are stronger than the fine ones, as in photos; every frame is the same."""
    generator = torch.Generator().manual_seed(seed)
    height, width = shape[-2:]
    result = torch.zeros(1, shape[1], height, width)
    for scale in (4**i for i in range(int(math.log(min(height, width), 4)) + 1)):
        grid = torch.randn(1, shape[1], -(-height // scale), -(-width // scale), generator=generator)
        result += F.interpolate(grid * min(0.02 * scale, 0.3), (height, width), mode="bilinear")
    result = result.clamp(-1, 1)
    return result if len(shape) == 4 else result.unsqueeze(2).repeat(1, 1, shape[2], 1, 1)


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One call in this process: seconds and bytes, or None where memory was not enough; the result goes to a file."""
    torch.set_grad_enabled(False)
    torch.set_num_threads(task["threads"])
    device, dtype = torch.device(task["device"]), getattr(torch, task["dtype"])
    on_gpu = device.type == "cuda"
    model = make(task["model"], dtype).to(device)
    if task["tiled"]:
        enable_tiling(model, task["tile"])
    given = clouds(input_shape(model, task["half"], task["size"])).to(device, dtype)
    limit, unlimited = int(task["limit_gib"] * GIB), resource.getrlimit(resource.RLIMIT_DATA)
    if on_gpu:
        torch.cuda.set_per_process_memory_fraction(min(limit / torch.cuda.mem_get_info()[1], 1.0))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, unlimited[1]))
        forget_peak()
        before = resident("VmRSS")
    start = time.perf_counter()
    try:
        result = run(model, task["half"], given).cpu()
    except RuntimeError as error:
        # "out of memory" on a GPU, "can't allocate memory" on a CPU, and what oneDNN makes of the latter
        if not any(words in str(error) for words in ("memory", "could not create a primitive")):
            raise
        return {"seconds": None, "before": before, "added": None}
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")
    resource.setrlimit(resource.RLIMIT_DATA, unlimited)
    torch.save(result, task["result"])
    return {"seconds": seconds, "before": before, "added": peak - before}


def forget_peak() -> None:
    """Let VmHWM begin anew, as building a model takes more than the model; where the system does not, it counts."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def measure_apart(task: dict[str, Any], seconds: float | None) -> dict[str, Any] | None:
    """`measure` in a process of its own; None where it took too long."""
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    try:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout)


def compare(tiled: Path, untiled: Path) -> dict[str, float | None]:
    """PSNR over the range of the untiled result, None for equal ones, and the largest difference over its maximum."""
    ours, reference = torch.load(tiled).double(), torch.load(untiled).double()
    difference = ours - reference
    error = difference.square().mean().item()
    extent = (reference.max() - reference.min()).item()
    return {
        "psnr": 10 * math.log10(extent**2 / error) if error else None,
        "difference": (difference.abs().max() / reference.abs().max()).item(),
    }


def cells(name: str, half: str, sizes: Sequence[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each size: both ways, as far as they can be run."""
    dtype = getattr(torch, args.dtype)
    light = make_without_weights(name, dtype)
    last: dict[bool, dict[str, Any]] = {}
    for size in sizes:
        given = torch.empty(input_shape(light, half, size), device="meta", dtype=dtype)
        row: dict[str, Any] = {"model": name, "half": half, "size": size, "dtype": args.dtype, "device": args.device}
        row["tile"] = args.tile if isinstance(light, Autoencoder) else light.tile_sample_min_size
        with tempfile.TemporaryDirectory() as folder:
            results = {tiled: Path(folder, f"{tiled}.pt") for tiled in (True, False)}
            for tiled, file in results.items():
                enable_tiling(light, args.tile) if tiled else light.disable_tiling()
                way: dict[str, Any] = {"live_gib": live_peak(light, half, given) / GIB}
                row["tiled" if tiled else "untiled"] = way
                if args.live_only or (not tiled and _expected(last.get(False), way) > args.limit_gib):
                    continue
                say(f"{name} {half} {size} {'tiled' if tiled else 'untiled'}")
                task = {key: row[key] for key in CALL}
                task |= {"tiled": tiled, "result": str(file), "limit_gib": args.limit_gib, "threads": args.threads}
                found = measure_apart(task, args.seconds)
                if found is None:
                    way["left_out"] = f"takes more than {args.seconds:.0f} s"
                elif found["added"] is None:
                    way["left_out"] = f"takes more than {args.limit_gib:g} GiB"
                else:
                    way |= {"seconds": found["seconds"], "model_gib": found["before"] / GIB}
                    way["added_gib"] = found["added"] / GIB
                    last[tiled] = way
            if all(file.exists() for file in results.values()):
                row |= compare(results[True], results[False])
        yield row


def _expected(before: dict[str, Any] | None, way: dict[str, Any]) -> float:
    """GiB that a call will take, by what the last one added for each byte of tensors."""
    if before is None:
        return 1.5 * way["live_gib"]
    return before["model_gib"] + before["added_gib"] * way["live_gib"] / before["live_gib"]


def merge(file: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the file and, in place of those of the same call, these."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in CALL)

    kept = json.loads(file.read_text())["rows"] if file.is_file() else []
    return list({key(row): row for row in [*kept, *rows]}.values())


def table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["model", "half", "size", "way", "model GiB", "added GiB", "live GiB", "seconds", "PSNR, dB", "difference"]
    lines = []
    for row in rows:
        for name in ("tiled", "untiled"):
            way = row[name]
            figures = [way.get("model_gib"), way.get("added_gib", way.get("left_out")), way["live_gib"]]
            figures += [
                way.get("seconds"),
                *((row.get("psnr"), row.get("difference")) if name == "tiled" else ("", "")),
            ]
            way_of = f"{name} {row['tile']}" if name == "tiled" else name
            lines.append([row["model"], row["half"], row["size"], way_of, *figures])
    return format_table(header, lines)


def summarise(rows: Sequence[dict[str, Any]]) -> str:
    """For each model and half, the largest size that ran tiled, with what it added."""
    texts = []
    for model, half in dict.fromkeys((row["model"], row["half"]) for row in rows):
        ran = [r for r in rows if (r["model"], r["half"]) == (model, half) and "added_gib" in r["tiled"]]
        if ran:
            largest = ran[-1]
            texts.append(f"{model} {half} {largest['size']} {largest['tiled']['added_gib']:.2f} GiB")
    return "tiled, added to the model at the largest size that ran: " + (", ".join(texts) or "none ran")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="presets, or sd-vae")
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help=f"default: {' '.join(SIZES)}; {' '.join(CLIPS)}")
    parser.add_argument("--halves", nargs="+", choices=["encode", "decode"], default=["encode", "decode"])
    parser.add_argument("--tile", type=int, default=DEFAULT_TILE, help="its side, of ours (default: %(default)s)")
    parser.add_argument("--limit-gib", type=float, default=8.0, help="of one process (default: %(default)s)")
    parser.add_argument("--seconds", type=float, help="of one process (default: no limit)")
    parser.add_argument("--live-only", action="store_true", help="count tensors and run nothing")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.task:
        return print(json.dumps(measure(args.task)))
    rows: list[dict[str, Any]] = []
    for name in args.models:
        sizes = args.sizes or (CLIPS if name in PRESETS and PRESETS[name].family == "FourPlane" else SIZES)
        for half in args.halves:
            for row in cells(name, half, sizes, args):
                rows.append(row)
                if args.json:  # at once, since the next size takes longer
                    write(args.json, merge(args.json, [row]), args.threads)
    print(table(rows))
    print(summarise(rows))
    return None


def write(file: Path, rows: list[dict[str, Any]], threads: int) -> None:
    setting = {"torch": torch.__version__, "threads": threads}
    file.write_text(json.dumps({**setting, "summary": summarise(rows), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
