"""What exactly was measured. Two results with the same protocol hash may stand in one table; others may not."""

import importlib.metadata
import platform
from datetime import datetime, timezone
from typing import Any

import torch

from latentae.bench.images import ImageSet
from latentae.data.decode import DecodePolicy
from latentae.version import __version__
from latentae.weights import WEIGHT_FILES

PACKAGES = ("torch", "torchvision", "diffusers", "numpy", "pillow", "torchmetrics", "torch-fidelity", "lpips")


def describe_protocol(images: ImageSet, *, sample: bool, seed: int, dtype: str) -> dict[str, Any]:
    """Everything that a figure depends on besides the model, as JSON."""
    return {
        "preset": "latentae",
        "images": len(images.good),
        "images_sha256": images.sha256,
        "size": images.size,
        "decode": DecodePolicy().describe(),
        "crop": "ADM centre crop in Pillow: box halvings, then bicubic, then the centre",
        "range": "[-1, 1]",
        "encode": f"sample of the posterior, seeded by {seed} and the image's name"
        if sample
        else "mode of the posterior",
        "dtype": dtype,
        "quantisation": "both images uint8; the reconstruction clamped, then rounded half up",
        "psnr": "RGB, range 255, mean over images",
        "ssim": "RGB, range 255, 11-tap Gaussian of sigma 1.5, valid region, mean over images (as scikit-image)",
        "ms_ssim": "RGB, range 255, five scales by 2x2 means with Wang's exponents, mean over channels and images",
        "gmsd": "luma, range 255, halved, Prewitt, constant 170, mean over images",
        "haarpsi": "YIQ, range 255, halved, C 30, alpha 4.2, mean over images",
        "lpips_alex": f"lpips package, version 0.1 heads, {WEIGHT_FILES['alexnet'].name}, mean over images",
        "lpips_vgg": f"lpips package, version 0.1 heads, {WEIGHT_FILES['vgg16'].name}, mean over images",
        "rfid": (
            f"{WEIGHT_FILES['inception'].name} (torch-fidelity), TensorFlow 1 bilinear to 299, 2048 features in fp32, "
            "float64 sums; reference: the same cropped images"
        ),
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
