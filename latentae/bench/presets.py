"""The protocols by which the papers measure: each is a set of choices, and nothing asks for a protocol by its name.

The choices are those of the published evaluation code, or of what its paper and README say where there is none; a
protocol that had to be guessed in part says so.
"""

from dataclasses import dataclass
from typing import Any

import torch

from latentae.bench.crops import CROPS
from latentae.errors import RequestError
from latentae.metrics.features import SAMPLE_SIZE
from latentae.weights import WEIGHT_FILES

READINGS = {
    "uint8": "the uint8 pair",
    "clamped": "floats clamped to [-1, 1], never rounded",
    "raw": "floats as they were decoded, neither clamped nor rounded",
}
QUANTISATIONS = {
    "round": "both images uint8; the reconstruction clamped, then rounded half up",
    "truncate": "both images uint8; the reconstruction clamped, then truncated",
    "truncate-both": "both images uint8, clamped and truncated on the way from [-1, 1], which takes 1 from 63 of the "
    "256 levels of the original too",
}
SSIMS = {
    "gaussian": "11-tap Gaussian of sigma 1.5, valid region (as scikit-image)",
    "padded": "11-tap Gaussian of sigma 1.5 over the reflected border (as torchmetrics), range 255",
    "padded-signed": "11-tap Gaussian of sigma 1.5 over the reflected border (as torchmetrics), on [-1, 1], range 2",
    "padded-own-range": "11-tap Gaussian of sigma 1.5 over the reflected border (as torchmetrics), on [-1, 1], with "
    "the range of each pair",
    "uniform": "flat 7 x 7 window, sample covariance, valid region (scikit-image's defaults)",
}
RESIZES = {
    "tensorflow": "TensorFlow 1 bilinear to 299, (x - 128) / 128 (as torch-fidelity)",
    "half-pixel": "bilinear to 299 with half-pixel centres, x / 127.5 - 1 (as pytorch-fid)",
}

SAMPLE = f"at most {SAMPLE_SIZE:,} images, drawn by name"


@dataclass(frozen=True)
class Preset:
    """How a benchmark measures.

    Attributes:
        source: whose protocol it is.
        reports: the metrics that it reports; those with weights are measured only if named here or by the user.
        crop: of `CROPS`.
        encode: ``mode`` or ``sample`` of the posterior.
        quantisation: of `QUANTISATIONS`: how floats become the uint8 pair.
        psnr, lpips, rfid: of `READINGS`: what these metrics read.
        ssim, ssim_reads: of `SSIMS` and `READINGS`.
        resize: of `RESIZES`: how images go into the Inception network.
        inception_dtype: the network's precision.
        remark: what is approximate, or not measured here.
    """

    name: str
    source: str
    reports: tuple[str, ...]
    crop: str = "adm"
    encode: str = "mode"
    quantisation: str = "round"
    psnr: str = "uint8"
    ssim: str = "gaussian"
    ssim_reads: str = "uint8"
    lpips: str = "uint8"
    rfid: str = "uint8"
    resize: str = "tensorflow"
    inception_dtype: str = "float32"
    remark: str = ""

    def inception(self) -> dict[str, Any]:
        """The options of `FrechetInceptionDistance` where they differ from its defaults."""
        options: dict[str, Any] = {}
        if self.resize != "tensorflow":
            options["resize"] = self.resize
        if self.inception_dtype != "float32":
            options["precision"] = getattr(torch, self.inception_dtype)
        return options

    def describe(self) -> dict[str, str]:
        """Every choice in words, for the foot of the table and ``results.json``."""
        inception = WEIGHT_FILES["inception"].name
        described = {
            "crop": CROPS[self.crop][1],
            "range": "[-1, 1]",
            "quantisation": QUANTISATIONS[self.quantisation],
            "psnr": f"RGB, {READINGS[self.psnr]}, mean over images",
            "ssim": f"RGB, {SSIMS[self.ssim]}, {READINGS[self.ssim_reads]}, mean over images",
            **{
                f"lpips_{net}": f"lpips package, version 0.1 heads, {WEIGHT_FILES[file].name}, {READINGS[self.lpips]}, "
                "mean over images"
                for net, file in (("alex", "alexnet"), ("vgg", "vgg16"))
            },
            "rfid": f"{inception}, {RESIZES[self.resize]}, {READINGS[self.rfid]}, 2048 features in "
            f"{self.inception_dtype}, float64 sums; reference: the same cropped images",
            "dists": f"{WEIGHT_FILES['vgg16'].name}, weighing of torchmetrics, at the images' own size, uint8 pair",
            "kid": f"unbiased, kernel (x·y / d + 1)³, of the features of {SAMPLE}; no image meets its reconstruction",
            "precision": f"third nearest neighbours (Kynkäänniemi et al. 2019) among the features of {SAMPLE}",
            "recall": "as precision",
        }
        return {
            name: text if name not in MEASURES or name in self.reports else f"not of this protocol; {text}"
            for name, text in described.items()
        } | ({"remark": self.remark} if self.remark else {})


MEASURES = ("psnr", "ssim", "lpips_alex", "lpips_vgg", "dists", "rfid", "kid", "precision", "recall")
VAVAE: dict[str, Any] = dict(
    reports=("psnr", "ssim", "lpips_vgg", "rfid"),
    crop="tensor",
    encode="sample",
    lpips="raw",
    resize="half-pixel",
)

PRESETS = {
    preset.name: preset
    for preset in (
        Preset("latentae", "this package", MEASURES),
        Preset(
            "adm",
            "ADM's evaluator, which VAR and LlamaGen use for rFID too",
            ("fid",),
            remark="measures FID against statistics of --fid-reference, usually of the training set: not comparable "
            "with rFID. The original runs the network in TensorFlow; sFID and its precision "
            "and recall against reference images are not measured.",
        ),
        Preset(
            "ldm",
            "latent diffusion and taming transformers",
            ("psnr", "ssim", "lpips_vgg", "rfid", "fid"),
            crop="linear",
            remark="the papers list rFID both against the images themselves and, as --fid-reference gives, against the "
            "training set; their PSIM is not LPIPS.",
        ),
        Preset(
            "dc-ae",
            "efficientvit's evaluation of DC-AE",
            ("psnr", "ssim", "lpips_alex", "rfid"),
            ssim="padded",
            resize="half-pixel",
        ),
        Preset("vavae", "LightningDiT's evaluation of VA-VAE", ssim="padded-signed", ssim_reads="clamped", **VAVAE),
        Preset("eqvae", "EQ-VAE's evaluation", ssim="padded-own-range", ssim_reads="raw", **VAVAE),
        Preset(
            "litevae",
            "LiteVAE's paper",
            ("psnr", "ssim", "lpips_vgg", "rfid"),
            crop="bicubic",
            remark="approximate: the paper comes without evaluation code.",
        ),
        Preset(
            "seed-voken",
            "SEED-Voken (Open-MAGVIT2, IBQ), and FlowMo after it",
            ("psnr", "ssim", "lpips_alex", "lpips_vgg", "rfid"),
            crop="linear",
            quantisation="truncate-both",
            ssim="uniform",
            lpips="clamped",
            rfid="clamped",
            resize="half-pixel",
        ),
        Preset(
            "titok",
            "1d-tokenizer's evaluation of TiTok",
            ("rfid",),
            crop="bicubic",
            quantisation="truncate",
            inception_dtype="float64",
            remark="the Inception score, which it reports too, is not measured.",
        ),
        Preset(
            "dito",
            "DiTo's evaluation",
            ("psnr", "rfid"),
            crop="lanczos",
            quantisation="truncate-both",
            psnr="clamped",
            remark="the paper's rFID is of 5,000 images: compare it only with that of as many.",
        ),
    )
}


def find_preset(name: str) -> Preset:
    """The protocol of that name.

    Raises:
        RequestError: there is none.
    """
    if name not in PRESETS:
        raise RequestError(f"There is no protocol {name!r}: choose from {', '.join(PRESETS)}.")
    return PRESETS[name]
