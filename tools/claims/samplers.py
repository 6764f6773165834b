"""The decoders that the claim diffusion-decoder compares, what each minimises, and the student of one step."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from claims.pictures import from_blocks, principal_components, psnr_by_kind, to_blocks
from latentae.families.diffusion import DiffusionAutoencoder
from latentae.families.dito import DiTo
from latentae.families.swycc import SWYCC
from latentae.nn.pixels import to_float, to_uint8
from latentae.objectives import L2, Adversary, Denoising, FlowMatching, Initial, PatchGAN, Step
from latentae.training.distillation import StepDistillation
from latentae.training.optimization import last_layer

REGRESSION, NOISE, UNSHARP, GAN = "L2", "L2 + white noise", "L2 + unsharp mask", "L2 + GAN"
DITO, SWYCC_ARM, RESIDUAL = "DiTo", "SWYCC", "SWYCC, residual"
TRAINED = (REGRESSION, GAN, DITO, SWYCC_ARM, RESIDUAL)
SAMPLERS = {DITO: "v", SWYCC_ARM: "x0", RESIDUAL: "x0 of the residual"}  # and what they predict

FACTOR, LATENT_CHANNELS = 8, 4
UNET = dict(decoder_widths=(32, 64), decoder_layers=1, patch_size=2, latent_regularizer="none", path="linear")
INITIAL = dict(widths=(16, 16, 32, 64), layers=1)  # of SWYCC's initial decoder
LEAST_TIME = 0.2  # where 1 / t² stops growing in the weight of x0 predictions
INITIAL_WEIGHT = 10.0  # of the initial image's squared error, beside flow matching
GAN_WEIGHT = 0.5  # times the ratio of gradients, as GLPTo
TEACHER_STEPS = 8


class PrincipalComponents(nn.Conv2d):
    """The frozen encoder of all arms: pixels to components of their blocks, of variance 1: (B, 4, H/8, W/8)."""

    def __init__(self, training: Tensor):
        super().__init__(3, LATENT_CHANNELS, FACTOR, stride=FACTOR)
        mean, basis = principal_components(training, FACTOR, LATENT_CHANNELS)
        codes = (to_blocks(to_float(training), FACTOR) - mean) @ basis
        axes = basis / codes.std(0)  # (3 * 8 * 8, 4)
        self.weight.data.copy_(axes.T.unflatten(1, (3, FACTOR, FACTOR)))
        self.bias.data.copy_(-mean @ axes)  # type: ignore[union-attr]
        self.requires_grad_(False)
        self.mean, self.axes_back = mean, basis * codes.std(0)
        self.spread = (to_blocks(to_float(training), FACTOR) - mean - codes @ basis.T).square().mean().sqrt().item()

    def invert(self, z: Tensor) -> Tensor:
        """The pixels (B, 3, 8h, 8w) whose blocks have these components, (B, 4, h, w), and no others."""
        batch, _, height, width = z.shape
        blocks = z.permute(0, 2, 3, 1).flatten(0, 2) @ self.axes_back.T + self.mean  # (B * h * w, 3 * 8 * 8)
        return from_blocks(blocks, (batch, 3, height * FACTOR, width * FACTOR), FACTOR)


class ResidualSWYCC(SWYCC):
    """SWYCC whose denoiser makes what its initial decoder misses, in units of ``residual_std``."""

    residual_std = 1.0

    def sample(self, z: Tensor, noise: Tensor, steps: int, base: Tensor | None = None) -> Tensor:
        base = self.first_image(z) if base is None else base
        return base + self.residual_std * super().sample(z, noise, steps, base)


class Adversarial(nn.Module):
    """The L2 decoder and its adversary, which learn in one optimiser."""

    def __init__(self, autoencoder: DiffusionAutoencoder, seed: int):
        super().__init__()
        self.autoencoder = autoencoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.adversary = Adversary(PatchGAN(channels=32, layers=2, norm="none"), GAN_WEIGHT, adaptive=True)


def build(name: str, encoder: PrincipalComponents, seed: int) -> nn.Module:
    """The module of an arm; with one seed, all U-Nets of one shape begin alike."""
    shared: dict[str, Any] = {**UNET, "latent_channels": LATENT_CHANNELS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder: DiffusionAutoencoder
        if name in (SWYCC_ARM, RESIDUAL):
            autoencoder = (ResidualSWYCC if name == RESIDUAL else SWYCC)(**INITIAL, **shared, prediction="x0")
        else:
            prediction = "v" if name == DITO else "pixels"
            autoencoder = DiTo(encoder_widths=(8,) * 4, norm_num_groups=8, prediction=prediction, **shared)
    autoencoder.encoder = encoder
    if isinstance(autoencoder, ResidualSWYCC):
        autoencoder.residual_std = encoder.spread
    return Adversarial(autoencoder, seed) if name == GAN else autoencoder


def loss_of(module: Any, pixels: Tensor, draw_seed: int) -> Tensor:
    """What an arm minimises on a batch (B, 3, H, W), with the random draws of ``draw_seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw_seed)
        if isinstance(module, Adversarial):
            return adversarial_loss(module, pixels)
        z = latents_of(module, pixels)
        if not module.samples:
            return F.mse_loss(module.decode(z).sample, pixels)
        return diffusion_loss(module, z, pixels)


def diffusion_loss(module: DiffusionAutoencoder, z: Tensor, pixels: Tensor) -> Tensor:
    """Flow matching, and the squared error of the initial image if there is one."""
    target = pixels
    if isinstance(module, ResidualSWYCC):
        with torch.no_grad():
            target = (pixels - module.initial_decoder(z)) / module.residual_std
    one = Denoising()(module, z, target)
    least_time = LEAST_TIME if module.config["prediction"] == "x0" else 1e-3
    loss = FlowMatching(least_time=least_time)(Step(target, one.clean, times=one.times))
    return loss if one.base is None else loss + INITIAL_WEIGHT * Initial(L2())(Step(pixels, one.clean, base=one.base))


def adversarial_loss(module: Adversarial, pixels: Tensor) -> Tensor:
    """The squared error, the adversarial loss in balance with it, and what the discriminator minimises."""
    adversary = module.adversary
    made = module.autoencoder.decode(latents_of(module.autoencoder, pixels)).sample
    error, adversarial = F.mse_loss(made, pixels), adversary.generator_loss(made)
    factor = adversary.balance(error, adversarial, last_layer(module.autoencoder.decoder))["adaptive_factor"]
    opposing, parts = adversary.discriminator_loss(pixels, made)
    adversary.end_step(parts)
    return error + adversary.weight * factor * adversarial + opposing


def latents_of(module: Any, pixels: Tensor) -> Tensor:
    return module.encode(pixels).latent_dist.mode()


def decode(module: Any, pixels: Tensor, seed: int, steps: int) -> Tensor:
    """Reconstructions, rounded as files would hold them; a seed gives every picture noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        module.decode(latents_of(module, part), generator=generator, num_inference_steps=steps).sample
        for part in pixels.split(64)
    ]
    return rounded(torch.cat(parts))


def rounded(pixels: Tensor) -> Tensor:
    return to_float(to_uint8(pixels))


class Student(nn.Module):
    """A copy of a trained sampler, whose denoiser learns to do in one step what the sampler does in several."""

    def __init__(self, teacher: DiffusionAutoencoder):
        super().__init__()
        self.autoencoder = copy.deepcopy(teacher).requires_grad_(False)
        self.autoencoder.decoder.requires_grad_(True)
        self.teacher = (copy.deepcopy(teacher),)  # a tuple hides it
        self.distillation = StepDistillation(self.teacher[0], TEACHER_STEPS)
        self.distillation.check(self.autoencoder)

    def loss(self, pixels: Tensor, draw_seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw_seed)
            one = self.distillation(self.autoencoder, latents_of(self.autoencoder, pixels), pixels)
        return F.mse_loss(one.clean, one.target)

    def agreement(self, pictures: dict[str, Tensor]) -> dict[str, float]:
        """PSNR of one step against the teacher's steps from the same noise, and against the originals."""
        (teacher,) = self.teacher
        made = {kind: decode(self.autoencoder, to_float(x), 0, 1) for kind, x in pictures.items()}
        wanted = {kind: to_uint8(decode(teacher, to_float(x), 0, TEACHER_STEPS)) for kind, x in pictures.items()}
        return {
            "agreement": psnr_by_kind(made, wanted)["psnr"],
            "psnr": psnr_by_kind(made, pictures)["psnr"],
            "teacher_psnr": psnr_by_kind({kind: to_float(x) for kind, x in wanted.items()}, pictures)["psnr"],
        }
