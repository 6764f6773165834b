"""What exactly was measured. Two results with the same protocol hash may stand in one table; others may not."""

import importlib.metadata
import platform
from datetime import datetime, timezone
from typing import Any

import torch

from latentae.bench.images import ImageSet
from latentae.bench.quality import SAMPLED, Quality
from latentae.data.decode import DecodePolicy
from latentae.version import __version__

PACKAGES = ("torch", "torchvision", "diffusers", "numpy", "pillow", "torchmetrics", "torch-fidelity", "lpips")


def describe_protocol(images: ImageSet, quality: Quality, *, sample: bool, seed: int, dtype: str) -> dict[str, Any]:
    """Everything that a figure depends on besides the model, as JSON."""
    choices, reference = quality.preset.describe(), quality.reference
    return {
        "preset": quality.preset.name,
        "of": quality.preset.source,
        "images": len(images.good),
        "images_sha256": images.sha256,
        "size": images.size,
        "decode": DecodePolicy().describe(),
        "crop": choices["crop"],
        "range": choices["range"],
        "encode": f"sample of the posterior, seeded by {seed} and the image's name"
        if sample
        else "mode of the posterior",
        "dtype": dtype,
        "quantisation": choices["quantisation"],
        "psnr": choices["psnr"],
        "ssim": choices["ssim"],
        "ms_ssim": "RGB, range 255, five scales by 2x2 means with Wang's exponents, mean over channels and images",
        "gmsd": "luma, range 255, halved, Prewitt, constant 170, mean over images",
        "haarpsi": "YIQ, range 255, halved, C 30, alpha 4.2, mean over images",
        "lpips_alex": choices["lpips_alex"],
        "lpips_vgg": choices["lpips_vgg"],
        "dists": choices["dists"],
        "rfid": choices["rfid"],
        "fid": f"the same network and images; reference: {reference.describe()}" if reference else "not measured",
        **{name: choices[name] for name in SAMPLED},
        **({"remark": choices["remark"]} if "remark" in choices else {}),
    }


def versions() -> dict[str, str | None]:
    """Versions of everything that computes a figure; None for what is not installed."""
    found: dict[str, str | None] = {"latentae": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def describe_machine() -> dict[str, Any]:
    """Where and when it ran; no part of the protocol."""
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
