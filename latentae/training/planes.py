"""Planes in the training of a denoiser: which layout a clip's latents have, and which planes are given."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentae.errors import RequestError
from latentae.nn.planes import PlaneLayout
from latentae.objectives.draws import of_this_rank


def layout_of(latent_shape: tuple[int, ...], class_name: str, config: Mapping[str, Any], where: str) -> PlaneLayout:
    """The layout of the planes of clips.

    Args:
        latent_shape: of the volume of latents, (C, t, h, w).
        class_name, config: of the autoencoder.
        where: the place of the clips, for errors.

    Raises:
        RequestError: latents that are no planes, of single frames, or of clips longer than a window.
    """
    if class_name != "FourPlane" or not config["spatial_planes"]:
        raise RequestError(
            f"The latents of {where} are volumes of a {class_name} without planes, and no denoiser here takes volumes: "
            "give an autoencoder of planes (fourplane-… or triplane-…), or one of images."
        )
    _, t, h, w = latent_shape
    longest = (config["window_frames"] - 1) // config["temporal_compression"] + 1
    if not 1 < t <= longest:
        raise RequestError(
            f"The latents of {where} are {t} frames long, and a denoiser of planes takes clips of 2 to {longest}, "
            f"whose windows of {config['window_frames']} frames have one set of planes: choose the number of frames."
        )
    return PlaneLayout(t, h, w, config["spatial_planes"], config["plane_channels"])


@dataclass(frozen=True)
class GivenPlanes:
    """Which spatial planes are given, so that they stay clean, while the others are learnt.

    Args:
        first: share of the training samples with xy1, the first frame: for the prediction of frames.
        both: share of those with xy1 and xy2, the first and the last frame: for interpolation.

    Raises:
        RequestError: shares that cannot be.
    """

    first: float = 0.0
    both: float = 0.0

    def __post_init__(self) -> None:
        if min(self.first, self.both) < 0 or not self.first + self.both <= 1:
            raise RequestError(
                f"model.given: first {self.first} and both {self.both} are shares of the samples; they must not be "
                "negative and may add up to 1 at most."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Those with a share."""
        return tuple(name for name in ("first", "both") if getattr(self, name))

    def check(self, layout: PlaneLayout | None, time_weights: str | None) -> None:
        """Refuse latents whose spatial planes are not known from the given frames alone.

        Raises:
            RequestError: no planes, planes that are means over time, or no second one.
        """
        if not self.names:
            return
        if layout is None or time_weights != "endpoints":
            found = "these latents are no planes" if layout is None else f"this one's are of {time_weights}"
            raise RequestError(
                "model.given needs an autoencoder with time_weights endpoints, whose spatial planes are known from the "
                f"first and the last frame alone; {found}: take such an autoencoder, or leave model.given out."
            )
        if self.both and layout.planes == 1:
            raise RequestError(
                "model.given.both needs a plane of the last frame, and this autoencoder has one spatial plane: leave "
                "it out, or take spatial_planes 2."
            )

    def draw(self, samples: Tensor, layout: PlaneLayout) -> Tensor:
        """The tokens that are given, (B, N), for an empty tensor of the samples, (B,)."""
        chance = of_this_rank(torch.rand, samples)
        count = (chance < self.first + self.both).int() + (chance < self.both).int()  # of planes
        return layout.types.to(samples.device) < count[:, None]
