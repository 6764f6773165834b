"""What training minimises: terms of a weighted sum, and the adversary with its discriminators."""

from latentae.objectives.adversarial import Adversary
from latentae.objectives.alignment import Alignment
from latentae.objectives.discriminators import BlurPatchGAN, Discriminator, PatchGAN, PatchGAN3D, UNetGAN
from latentae.objectives.flow import (
    CosineTimes,
    Denoised,
    Denoising,
    FlowMatching,
    Initial,
    LogitNormalTimes,
    LossByTime,
    PureNoise,
    Times,
    UniformTimes,
)
from latentae.objectives.frequency import FocalFrequency, GaussianDetail, HaarDetail
from latentae.objectives.latent_transforms import (
    ChannelPrefix,
    Equivariance,
    LatentMask,
    LatentNoise,
    LatentTransform,
    NoiseSynchronization,
    ScaleOnly,
    check_transforms,
)
from latentae.objectives.perceptual import LPIPS, MSSSIM
from latentae.objectives.reconstruction import L1, L2, Charbonnier
from latentae.objectives.regularization import KL
from latentae.objectives.terms import Objective, Step, Term

__all__ = [
    "KL",
    "L1",
    "L2",
    "LPIPS",
    "MSSSIM",
    "Adversary",
    "Alignment",
    "BlurPatchGAN",
    "ChannelPrefix",
    "Charbonnier",
    "CosineTimes",
    "Denoised",
    "Denoising",
    "Discriminator",
    "Equivariance",
    "FlowMatching",
    "FocalFrequency",
    "GaussianDetail",
    "HaarDetail",
    "Initial",
    "LatentMask",
    "LatentNoise",
    "LatentTransform",
    "LogitNormalTimes",
    "LossByTime",
    "NoiseSynchronization",
    "Objective",
    "PatchGAN",
    "PatchGAN3D",
    "PureNoise",
    "ScaleOnly",
    "Step",
    "Term",
    "Times",
    "UNetGAN",
    "UniformTimes",
    "check_transforms",
]
