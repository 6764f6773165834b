"""Networks that model latents: diffusers' transformers, and one of planes, as velocity fields in named sizes."""

from latentae.denoisers.denoiser import ClassEmbedder, Denoiser, build_denoiser
from latentae.denoisers.planes import PlaneTransformer
from latentae.denoisers.presets import create_denoiser, denoiser_presets
from latentae.denoisers.sampling import sample, velocity_errors

__all__ = [
    "ClassEmbedder",
    "Denoiser",
    "PlaneTransformer",
    "build_denoiser",
    "create_denoiser",
    "denoiser_presets",
    "sample",
    "velocity_errors",
]
