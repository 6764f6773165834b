"""Transforms of the pair (latents, target) of a training step: the same decoder, another thing to decode.

Papers that shape a latent space without a new network differ in this pair only: EQ-VAE, scale equivariance, structured
latents, noisy latents. A recipe lists them under ``model.latent_transforms``, for any autoencoder; they act in that
order, between encoder and decoder, after the posterior has gone to its KL term and before quantisation. What they draw
is drawn once per batch from the step's seed, alike on all ranks, and objective and adversary see the same pair.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor

from latentae.errors import RequestError
from latentae.nn.equivariance import Interpolation, Size, ratio_of, scaled_lengths, scaled_size, transform
from latentae.nn.padding import padding_mode
from latentae.nn.planes import PlaneLayout
from latentae.objectives.draws import of_this_rank, per_image


class LatentTransform(ABC):
    """One change of the pair; a subclass overrides what it needs.

    Attributes:
        earliest: the least diffusion time (B,) at which its images may be decoded; None where any is right.
    """

    earliest: Tensor | None = None

    def check(self, autoencoder: Any) -> None:  # noqa: B027  (a transform may have nothing to refuse)
        """Refuse an autoencoder or arguments that cannot be, with a `RequestError`, before the training begins."""

    def prepare(self, pixels: Tensor, ratio: int) -> Tensor:
        """Begin a step: the pixels to encode and to reconstruct, of (B, 3, H, W) or (B, 3, T, H, W).

        Args:
            ratio: pixels per latent along a side.
        """
        return pixels

    @abstractmethod
    def __call__(self, latents: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The latents to decode, with gradient, and what they must decode to."""


class Equivariance(LatentTransform):
    """EQ-VAE (Kouzelis et al., ICML 2025, arXiv 2502.09509): a transformed latent decodes to the transformed image.

    An EQ step scales latents and target by one factor, or rotates them by 90, 180 or 270 degrees, or both, and is never
    the identity. Other steps are plain, which preserves what a pretrained autoencoder knows. The transform is of the
    batch; a side of the latents is drawn evenly from the whole numbers that the scales allow.

    Paper and code differ: the paper scales bicubically, the code bilinearly without antialiasing, which leaves 0.50 of
    the standard deviation of white noise at a half and at a quarter of the size, where antialiasing leaves 0.40 and
    0.20. Only the code has low-resolution steps, an eighth of all, and its ``p_prior`` is the share of EQ steps. The
    explicit loss ‖τE(x) - E(τx)‖² has no option here: the paper shows that it collapses (its table 7: rFID from 0.90 to
    117.9, with stopped gradient 109.3).

    Args:
        eq_prob: share of the steps that transform latents and target.
        lowres_prob: share of the steps that scale the image itself, before it is encoded; they train low resolution.
        scales: smallest and largest factor of an EQ or low-resolution step; null does not scale.
        anisotropic: draw height and width each by itself.
        rotations: rotate in EQ steps.
        interpolation: ``bicubic`` with antialiasing or ``bilinear`` without.
    """

    def __init__(
        self,
        eq_prob: float = 0.5,
        lowres_prob: float = 0.0,
        scales: tuple[float, float] | None = (0.25, 1.0),
        anisotropic: bool = False,
        rotations: bool = True,
        interpolation: Interpolation = "bicubic",
    ):
        self.eq_prob = eq_prob
        self.lowres_prob = lowres_prob
        self.scales = scales
        self.anisotropic = anisotropic
        self.rotations = rotations
        self.interpolation = interpolation
        self.shortest = 1  # side of the latents
        self.kind: Literal["eq", "lowres", "plain"] = "plain"  # of this step, with the two that follow
        self.size: Size | None = None  # of the latents
        self.quarter_turns = 0

    def check(self, autoencoder: Any) -> None:
        name = type(self).__name__
        if min(self.eq_prob, self.lowres_prob) < 0 or self.eq_prob + self.lowres_prob > 1:
            raise RequestError(
                f"{name}: eq_prob {self.eq_prob} and lowres_prob {self.lowres_prob} are shares of all steps; they must "
                "not be negative and may add up to 1 at most."
            )
        refuse_planes(self, autoencoder)
        if self.scales and not 0 < self.scales[0] <= self.scales[1] <= 1:
            raise RequestError(f"{name}: scales must be a smallest and a largest factor in (0, 1], got {self.scales}.")
        if self.scales is None and (self.lowres_prob or not self.rotations):
            raise RequestError(f"{name} that does not scale must rotate, and needs lowres_prob 0: set scales.")
        if padding_mode(autoencoder) == "reflect":  # which a side of one has nothing for
            self.shortest = 2

    def prepare(self, pixels: Tensor, ratio: int) -> Tensor:
        height, width = pixels.shape[-2:]
        self._draw((height // ratio, width // ratio))
        if self.kind != "lowres" or self.size is None:
            return pixels
        rows, columns = self.size
        return transform(pixels, (rows * ratio, columns * ratio), interpolation=self.interpolation)

    def _draw(self, grid: Size) -> None:
        chance = float(torch.rand((), dtype=torch.float64))
        self.kind = "eq" if chance < self.eq_prob else "lowres" if chance < self.eq_prob + self.lowres_prob else "plain"
        self.size = self._draw_size(grid, *self.scales) if self.scales else None
        self.quarter_turns = int(torch.randint(1, 4, ())) if self.rotations else 0

    def _draw_size(self, grid: Size, low: float, high: float) -> Size:
        sides = grid if self.anisotropic else (max(grid),)
        choices = [[n for n in scaled_lengths(side, low, high) if n >= self.shortest] for side in sides]
        if not all(choices):
            raise RequestError(
                f"{type(self).__name__} finds no size between {low} and {high} of latents of {grid[0]}x{grid[1]}: "
                "take a larger data.size, or a wider range of scales."
            )
        drawn = [choice[int(torch.randint(len(choice), ()))] for choice in choices]
        return (drawn[0], drawn[1]) if self.anisotropic else scaled_size(grid, drawn[0])

    def __call__(self, latents: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        try:
            ratio = ratio_of(latents, target)
        except ValueError as error:
            raise RequestError(
                f"{type(self).__name__} transforms latents that lie on a grid over the image, but {error}: leave it "
                "out of model.latent_transforms for this autoencoder."
            ) from error
        if self.kind != "eq":
            return latents, target
        size = self.size and (self.size[0] * ratio, self.size[1] * ratio)
        return (
            transform(latents, self.size, self.quarter_turns, self.interpolation),
            transform(target, size, self.quarter_turns, self.interpolation),
        )


class ScaleOnly(Equivariance):
    """Scale equivariance (Skorokhodov et al., ICML 2025, arXiv 2502.14831): downsampled latents decode to the
    downsampled image, by a factor of 2 to 4, bilinearly, without rotations.

    The paper adds this loss to the plain one in every step; here a step has one of the two, which is the same sum in
    expectation at about half the cost. A weight of a beside the plain loss is ``prob = a / (1 + a)``.

    Args:
        prob: share of the steps that downsample.
        scales: smallest and largest factor.
    """

    def __init__(
        self,
        prob: float = 0.5,
        scales: tuple[float, float] = (0.25, 0.5),
        interpolation: Interpolation = "bilinear",
    ):
        super().__init__(eq_prob=prob, scales=scales, rotations=False, interpolation=interpolation)


class LatentNoise(LatentTransform):
    """Noise on the latents that the decoder must see through; the target stays.

    ============= ==================================== ======================================================
    ``kind``      latents z become, for ε ~ N(0, I)    published as
    ============= ==================================== ======================================================
    fixed         z + std ε                            Unified Latents, with std 0.08
    uniform       z + t std ε, t ~ U(0, 1)             RAE, as diffusers' AutoencoderRAE has it
    interpolated  (1 - t) z + t std ε, t ~ U(0, 1)     l-DeTok (Yang et al., 2025, arXiv 2507.15856)
    ============= ==================================== ======================================================

    t is drawn for each image. Noise of planes is that of their tokens, constant like themselves along the axis that a
    plane lacks: independent noise on their volume would be averaged away. ``std`` is in units of the raw latents;
    without a KL term or a norm an encoder outgrows any noise. Diffusion decoders have `NoiseSynchronization`, which
    also tells the decoder t.

    Args:
        std: the scale of the noise.
        kind: a row of the table.
        prob: share of the images that get any.
    """

    def __init__(
        self,
        std: float,
        kind: Literal["fixed", "uniform", "interpolated"] = "fixed",
        prob: float = 1.0,
    ):
        self.std = std
        self.kind = kind
        self.prob = prob
        self.planes: tuple[int, int] | None = None  # how many spatial ones and their channels
        self.window = 1  # the latent frames that have planes of their own

    def check(self, autoencoder: Any) -> None:
        if self.std <= 0 or not 0 < self.prob <= 1:
            raise RequestError(
                f"LatentNoise needs a std above 0 and a prob in (0, 1], got {self.std} and {self.prob}; to train "
                "without noise, leave it out of model.latent_transforms."
            )
        if planes_of(autoencoder):
            config = autoencoder.config
            self.planes = (config["spatial_planes"], config["plane_channels"])
            self.window = (config["window_frames"] - 1) // config["temporal_compression"] + 1

    def __call__(self, latents: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        per_image = latents.flatten(1)[:, 0].view(-1, *[1] * (latents.ndim - 1))  # (B, 1, …, 1)
        noise = self.std * self._noise(latents)
        t = torch.ones_like(per_image) if self.kind == "fixed" else of_this_rank(torch.rand, per_image)
        kept = 1 - t if self.kind == "interpolated" else 1
        hit = of_this_rank(torch.rand, per_image) < self.prob
        return torch.where(hit, kept * latents + t * noise, latents), target

    def _noise(self, latents: Tensor) -> Tensor:
        if self.planes is None:
            return of_this_rank(torch.randn, latents)
        volume = latents if latents.ndim == 5 else latents.unsqueeze(2)
        noise = []
        for window in volume.split(self.window, dim=2):
            layout = PlaneLayout(window.shape[2], window.shape[3], window.shape[4], *self.planes)
            tokens = of_this_rank(torch.randn, window.new_empty(len(window), layout.num_tokens, layout.channels))
            noise.append(layout.pack(tokens, "volume"))
        return torch.cat(noise, dim=2).view_as(latents)


class LatentMask(LatentTransform):
    """Masking: random positions of the latents are set to zero in all channels; the target stays.

    l-DeTok (Yang et al., 2025, arXiv 2507.15856) leaves image patches out before a transformer encodes them, and its
    decoder sees a learnt token in their place. A convolution cannot leave patches out, so here it is the latents that
    are masked. The share of an image's positions is drawn as there, max(0, U(-0.1, ``most``)): some images stay whole.

    Args:
        most: the largest share.
    """

    def __init__(self, most: float = 0.7):
        self.most = most

    def check(self, autoencoder: Any) -> None:
        if not 0 < self.most <= 1:
            raise RequestError(f"LatentMask needs a largest share in (0, 1], got {self.most}.")
        refuse_planes(self, autoencoder)

    def __call__(self, latents: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        share = (of_this_rank(torch.rand, per_image(latents)) * (self.most + 0.1) - 0.1).clamp(min=0)
        chance = of_this_rank(torch.rand, torch.empty_like(latents[:, :1], dtype=share.dtype))  # (B, 1, h, w)
        kept = chance >= share.view(-1, *[1] * (latents.ndim - 1))
        return latents * kept, target


class NoiseSynchronization(LatentTransform):
    """DiTo's noise synchronisation (arXiv 2501.18593): noisy latents decode the noisier part of the way.

    A share of the images gets latents ``(1 - τ) z + τ ε`` with τ ~ U(0, 1) and ε ~ N(0, I), on the same path as the
    pixels, and its diffusion times lie between τ and 1. So a diffusion model on these latents is asked for less detail
    at high noise; the paper's gFID of DiT-XL falls from 7.57 to 6.29. Latents must be of about unit variance, as layer
    norm makes them.

    Args:
        prob: share of the images.
    """

    def __init__(self, prob: float = 0.1):
        self.prob = prob

    def check(self, autoencoder: Any) -> None:
        if not 0 < self.prob <= 1:
            raise RequestError(f"NoiseSynchronization needs a prob in (0, 1], got {self.prob}.")
        if not getattr(autoencoder, "samples", False):
            raise RequestError(
                f"NoiseSynchronization is for diffusion decoders, which {type(autoencoder).__name__} has not: leave it "
                "out of model.latent_transforms, or take LatentNoise with kind interpolated."
            )

    def __call__(self, latents: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        drawn, chance = (of_this_rank(torch.rand, per_image(latents)) for _ in range(2))
        self.earliest = torch.where(chance < self.prob, drawn, 0.0)
        tau = self.earliest.view(-1, *[1] * (latents.ndim - 1)).to(latents.dtype)  # (B, 1, 1, 1)
        return (1 - tau) * latents + tau * of_this_rank(torch.randn, latents), target


class ChannelPrefix(LatentTransform):
    """Structured latents (DC-AE 1.5, arXiv 2508.00413): the decoder learns from the first channels alone.

    For each batch a number c of channels is drawn, and the others are set to zero, which for a decoder without shortcut
    equals cutting its first convolution to c channels. Any of these prefixes then decodes.

    Args:
        channels: the numbers to draw from; notes on the paper give 16, 20, 24, … 128 for 128 channels.
        always_full: also decode all channels in every step, at about twice the cost: the loss is the mean of both.
    """

    def __init__(self, channels: list[int], always_full: bool = False):
        self.channels = channels
        self.always_full = always_full

    def check(self, autoencoder: Any) -> None:
        accepts = getattr(autoencoder, "_accepts_channels", None)
        if accepts is None or not accepts(1):
            raise RequestError(
                f"ChannelPrefix needs a decoder that takes the first channels alone, which this "
                f"{type(autoencoder).__name__} does not: take a preset such as dc-ae-f64c128-1.5, or set "
                "model.autoencoder.decoder_in_shortcut and encoder_out_shortcut to false."
            )
        total = autoencoder.latent_channels
        if not self.channels or not all(0 < count <= total for count in self.channels):
            raise RequestError(f"ChannelPrefix: channels must lie between 1 and {total}, got {self.channels}.")

    def __call__(self, latents: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Latents with channels set to zero, and the target; (2B, …) with the full ones after them."""
        count = self.channels[int(torch.randint(len(self.channels), ()))]
        kept = torch.arange(latents.shape[1], device=latents.device) < count
        prefix = latents * kept.view(-1, *[1] * (latents.ndim - 2))  # (C, 1, 1) broadcasts over the batch
        if not self.always_full:
            return prefix, target
        return torch.cat([prefix, latents]), torch.cat([target, target])


def planes_of(autoencoder: Any) -> int:
    """How many spatial planes the latents of an autoencoder have; 0 where they are a grid or a volume."""
    return getattr(autoencoder, "config", {}).get("spatial_planes", 0)


def refuse_planes(transform: LatentTransform, autoencoder: Any) -> None:
    """Refuse an autoencoder of planes for what treats the latents as one grid over the image.

    Raises:
        RequestError: its latents are planes.
    """
    if planes_of(autoencoder):
        raise RequestError(
            f"{type(transform).__name__} changes latents position by position of one grid over the image, which the "
            f"planes of this {type(autoencoder).__name__} are not: leave it out of model.latent_transforms, or train "
            "with spatial_planes 0."
        )


def check_transforms(transforms: list[LatentTransform], autoencoder: Any) -> None:
    """Refuse a list that cannot be: each by itself, two that scale, a prefix that something else would fill again."""
    for item in transforms:
        item.check(autoencoder)
    scaling = [type(item).__name__ for item in transforms if isinstance(item, Equivariance)]
    if len(scaling) > 1:
        raise RequestError(f"model.latent_transforms has {' and '.join(scaling)}: only one may scale the latents.")
    if any(isinstance(item, ChannelPrefix) for item in transforms[:-1]):
        raise RequestError("model.latent_transforms: ChannelPrefix must come last, after what changes the channels.")
