"""What a model costs: seconds of encode and decode, peak memory, multiply-accumulates and parameters.

Encode and decode are timed apart, on fixed random pixels that are already on the device, after warm-up. Arithmetic is
counted on fake tensors, which have shapes and no values.
"""

import contextlib
import copy
import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from latentae.codec import LatentCodec
from latentae.errors import RequestError
from latentae.families.base import Autoencoder, count_halves

WARM_UP = {"cpu": 1, "cuda": 10}
DTYPES = ("float32", "bfloat16", "float16")
ENOUGH_SECONDS = 20.0  # a slow model is measured fewer times, but at least three


def measure_speed(
    codec: LatentCodec, size: int, batch_size: int = 1, repeats: int = 20, frames: int | None = None
) -> dict[str, Any]:
    """Time ``codec.encode`` and ``codec.decode`` at ``size`` x ``size``, of images, or of clips of so many frames.

    Of a decoder of ours that samples, ``decode`` is the whole image, and ``decode_step`` one run of the denoiser: the
    difference that steps make.

    Returns:
        The conditions, and for ``encode`` and ``decode`` each ``images_per_second`` (or clips) with its quartiles,
        ``seconds_per_batch`` (median), ``repeats`` and ``peak_memory_bytes``: allocated on a CUDA device, resident in
        the whole process on Linux, else None.
    """
    generator = torch.Generator().manual_seed(0)
    steps = codec.num_inference_steps
    pixels = (torch.rand(_shape(batch_size, size, frames), generator=generator) * 2 - 1).to(codec.device)
    latents = codec.encode(pixels)
    timed = {
        "encode": _time(lambda: codec.encode(pixels), codec.device, batch_size, repeats),
        "decode": _time(lambda: codec.decode(latents), codec.device, batch_size, repeats),
    }
    if steps is not None and isinstance(codec.autoencoder, Autoencoder):
        others = 1 if steps > 1 else 2
        fewer = codec.with_inference_steps(others)
        seconds = _time(lambda: fewer.decode(latents), codec.device, batch_size, repeats)["seconds_per_batch"]
        timed["decode_step"] = {
            "seconds_per_batch": max((timed["decode"]["seconds_per_batch"] - seconds) / (steps - others), 0.0)
        }
    return {
        "size": size,
        "batch_size": batch_size,
        "device": device_name(codec.device),
        "dtype": str(codec.autocast or codec.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads() if codec.device.type == "cpu" else None,
        "load_average": os.getloadavg()[0],
        "memory_is": "allocated on the device" if codec.device.type == "cuda" else "resident in the process",
        **timed,
    }


def _shape(batch_size: int, size: int, frames: int | None) -> tuple[int, ...]:
    return (batch_size, 3, size, size) if frames is None else (batch_size, 3, frames, size, size)


@dataclass(frozen=True)
class SpeedGrid:
    """Conditions under which speed is measured beside those of the benchmark: all combinations of these.

    Args:
        sizes: sides of square images; the benchmark's own by default.
        dtypes: of weights and pixels, by their names in torch; the model's own by default.
        compiled: also after ``torch.compile``, whose own time stands apart as ``compile_seconds``.

    Raises:
        RequestError: a dtype that is none.
    """

    sizes: Sequence[int] = ()
    dtypes: Sequence[str] = ()
    compiled: bool = False

    def __post_init__(self) -> None:
        for name in self.dtypes:
            if name not in DTYPES:
                raise RequestError(f"Speed is measured in {', '.join(DTYPES)}, not in {name!r}.")

    def __bool__(self) -> bool:
        return bool(self.sizes or self.dtypes or self.compiled)

    def measure(
        self, codec: LatentCodec, size: int, batch_size: int, repeats: int = 20, frames: int | None = None
    ) -> list[dict[str, Any]]:
        """`measure_speed` under each condition, with ``compiled``; where a condition fails, its ``reason``."""
        rows = []
        for side in self.sizes or (size,):
            for dtype in self.dtypes or (str(codec.dtype).removeprefix("torch."),):
                autoencoder = copy.deepcopy(codec.autoencoder).to(getattr(torch, dtype))
                for compiled in (False, True) if self.compiled else (False,):
                    row: dict[str, Any] = {"size": side, "dtype": dtype, "compiled": compiled}
                    try:
                        other = type(codec)(autoencoder, compile=compiled)
                        if codec.num_inference_steps:
                            other = other.with_inference_steps(codec.num_inference_steps)
                        if compiled:
                            started = time.perf_counter()
                            other.reconstruct(torch.zeros(_shape(batch_size, side, frames)))
                            row["compile_seconds"] = time.perf_counter() - started
                        row |= measure_speed(other, side, batch_size, repeats, frames)
                    except (RuntimeError, NotImplementedError, RequestError) as error:  # out of memory among them
                        row["reason"] = (str(error).splitlines() or [type(error).__name__])[0]
                    rows.append(row)
        return rows


def _time(step: Callable[[], object], device: torch.device, batch_size: int, repeats: int) -> dict[str, Any]:
    for _ in range(WARM_UP.get(device.type, 3)):
        step()
    _reset_peak_memory(device)
    seconds: list[float] = []
    while len(seconds) < 3 or (len(seconds) < repeats and sum(seconds) < ENOUGH_SECONDS):
        seconds.append(_seconds(step, device))
    first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return {
        "images_per_second": batch_size / median,
        "quartiles": [batch_size / third, batch_size / first],
        "seconds_per_batch": median,
        "repeats": len(seconds),
        "peak_memory_bytes": _peak_memory(device),
    }


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    started = time.perf_counter()
    step()
    if device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - started


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        # What the C library holds but nobody uses would hide what a step allocates.
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        # Resets VmHWM, the high-water mark of resident memory. Some containers forbid it: the mark is then that of the
        # whole run, an upper bound.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        return None
    status = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")), None)


def device_name(device: torch.device) -> str:
    """``cpu``, ``mps``, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def count_parameters(autoencoder: nn.Module) -> dict[str, int]:
    """Parameters of the whole model and, where it has such halves, of ``encoder`` and ``decoder``."""
    return {**count_halves(autoencoder), "total": sum(p.numel() for p in autoencoder.parameters())}


def count_gmac(codec: LatentCodec, size: int, frames: int | None = None) -> dict[str, Any]:
    """10^9 multiply-accumulates of ``encode`` and ``decode`` of one ``size`` x ``size`` image, or of one clip.

    Convolutions, matrix products and attention count; norms and element-wise work do not (papers that say GFLOPs
    often mean these MACs). Where a decoder of ours samples, ``decode_step`` is one run of its denoiser, which
    ``decode`` holds as often as there are steps. ``{"reason": ...}`` where a model cannot run on fake tensors.
    """
    steps = codec.num_inference_steps
    codec = type(codec)(codec.autoencoder)  # neither compiled nor under autocast
    by_steps = steps is not None and isinstance(codec.autoencoder, Autoencoder)
    on_meta = codec.device.type == "meta"  # tensors without values already
    try:
        with contextlib.nullcontext() if on_meta else FakeTensorMode(allow_non_fake_inputs=True):
            pixels = torch.empty(_shape(1, size, frames), device="meta" if on_meta else "cpu")
            with FlopCounterMode(display=False) as encode:
                latents = codec.encode(pixels)
            with FlopCounterMode(display=False) as decode:
                codec.decode(latents, num_inference_steps=1 if by_steps else None)
            with FlopCounterMode(display=False) as again:
                if by_steps:
                    codec.decode(latents, num_inference_steps=2)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return {"reason": f"{type(codec.autoencoder).__name__} cannot run on fake tensors: {error}".splitlines()[0]}
    counts = {"encode": encode.get_total_flops() / 2e9, "decode": decode.get_total_flops() / 2e9}
    if by_steps and steps is not None:
        counts["decode_step"] = again.get_total_flops() / 2e9 - counts["decode"]
        counts["decode"] += (steps - 1) * counts["decode_step"]
    return counts


def stable_diffusion_vae(device: str | torch.device = "meta") -> nn.Module:
    """What costs are compared with: AutoencoderKL as Stable Diffusion 1 and 2 have it, with random weights."""
    with torch.device(device):
        autoencoder: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
    return autoencoder


def reference_cost(codec: LatentCodec, size: int, batch_size: int | None) -> dict[str, Any]:
    """The cost of `stable_diffusion_vae` where ``codec`` runs; ``batch_size`` None does not time it."""
    on_meta = stable_diffusion_vae()
    cost = {
        "name": "for comparison: SD-VAE",
        "parameters": count_parameters(on_meta),
        "gmac": count_gmac(LatentCodec(on_meta), size),
        "speed": None,
    }
    if batch_size is not None:
        timed = LatentCodec(
            stable_diffusion_vae("cpu"), device=codec.device, dtype=codec.dtype, autocast=codec.autocast
        )
        cost["speed"] = measure_speed(timed, size, batch_size, repeats=3)
    return cost
