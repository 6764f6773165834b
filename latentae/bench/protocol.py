"""What exactly was measured. Two results with the same protocol hash may stand in one table; others may not."""

import importlib.metadata
import platform
from datetime import datetime, timezone
from typing import Any

import torch

from latentae.bench.images import ImageSet
from latentae.bench.quality import OF_IMAGES, SAMPLED, Quality
from latentae.data.decode import DecodePolicy
from latentae.metrics.video import CLIP_FRAMES
from latentae.version import __version__
from latentae.weights import WEIGHT_FILES

PACKAGES = ("torch", "torchvision", "av", "diffusers", "numpy", "pillow", "torchmetrics", "torch-fidelity", "lpips")


def describe_protocol(images: ImageSet, quality: Quality, *, sample: bool, seed: int, dtype: str) -> dict[str, Any]:
    """Everything that a figure depends on besides the model, as JSON."""
    choices, reference = quality.preset.describe(), quality.reference
    described = {
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
    return described if images.choice is None else _of_clips(described, images)


def _of_clips(described: dict[str, Any], images: ImageSet) -> dict[str, Any]:
    """The same of clips: which frames they are, and what becomes of figures of images."""
    assert images.choice is not None
    over_frames = "mean over the frames of a clip, then over clips"
    texts = {
        name: text.replace("mean over images", over_frames).replace("the image's name", "the clip's name")
        if isinstance(text, str)
        else text
        for name, text in described.items()
        if name not in OF_IMAGES
    }
    texts["psnr"] += "; frames that equal their originals stay out"
    return {
        **texts,
        **images.choice.describe(),
        "start": "the first frame of each clip",
        "frame": "number k is on show at the time k stride / fps, half a frame interval early; without fps every "
        "stride-th frame",
        "difference_psnr": "PSNR of the differences of successive frames, RGB, the uint8 pair, range 255, mean over "
        "clips",
        "flicker": "standard deviation over time of the mean error of a frame, grey levels of 255, mean over clips",
        "rfvd": f"{WEIGHT_FILES['i3d'].name}, its own resize to 224, windows of {CLIP_FRAMES} frames from the first on "
        "without overlap, the uint8 pair, 400 features, float64 sums; reference: the same cropped clips",
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
