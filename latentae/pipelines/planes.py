"""Sampling clips of a class, or of none, from a transformer over the planes of their latents.

The planes of a given first frame, or of the first and the last, are computed from these frames alone and stay as they
are, while the other planes are drawn: the prediction of frames, and interpolation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from latentae.codec import LatentCodec
from latentae.denoisers import PlaneTransformer
from latentae.errors import RequestError
from latentae.families.fourplane import FourPlane
from latentae.nn.planes import PlaneLayout
from latentae.pipelines.base import FlowPipeline, Generators, StepCallback, check_count


@dataclass
class PlanePipelineOutput(BaseOutput):  # type: ignore[misc]
    """Clips that were drawn.

    Args:
        frames: as ``output_type`` says: a list of frames for each clip, an array or a tensor.
    """

    frames: Any


class PlaneFlowPipeline(FlowPipeline):
    """Clips of classes, the prediction of frames and interpolation, by flow matching on planes.

    Args:
        transformer: predicts ``noise - clean`` of normalised tokens.
        vae: the autoencoder of these planes.
        scheduler: FlowMatchEulerDiscreteScheduler, or another that takes predictions of a flow.
        latents_mean, latents_std: of each channel of the volume of latents, ((K + 2)·C,); tokens are
            ``(z - mean) / std`` with raw ``z``, plane by plane. None for those in the autoencoder's configuration.
        id2label: names of the classes; one class may have several, with commas between.
        given: what the transformer has seen given in training: ``first`` for the plane of the first frame, ``both``
            for those of the first and the last.

    Raises:
        RequestError: components that do not fit each other.
    """

    model_cpu_offload_seq: Any = "transformer->vae"
    _what = "clips"

    def __init__(
        self,
        transformer: PlaneTransformer,
        vae: ModelMixin,
        scheduler: Any,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        given: list[str] | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(latents_mean=latents_mean, latents_std=latents_std, given=given or [])
        self._set_names(id2label)
        self._check_components()
        self.video_processor = VideoProcessor(do_resize=False, do_convert_rgb=True)

    @property
    def layout(self) -> PlaneLayout:
        """Of the planes of a clip."""
        return PlaneLayout(*self.transformer.config.layout)

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(N, C) of the tokens of a clip."""
        return self.layout.num_tokens, self.layout.channels

    @property
    def clip_shape(self) -> tuple[int, int, int]:
        """Frames, height and width of the clips."""
        ratio = self.vae.spatial_compression_ratio
        frames = (self.layout.t - 1) * self.vae.temporal_compression_ratio + 1
        return frames, self.layout.h * ratio, self.layout.w * ratio

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        image: PipelineImageInput | None = None,
        last_image: PipelineImageInput | None = None,
        num_videos: int = 1,
        num_frames: int | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int = 50,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> PlanePipelineOutput | tuple[Any]:
        """Draw clips.

        Args:
            class_labels: one or several, by number or name; None for clips of no class.
            image: the first frame of all clips, or one for each of the labels: PIL, arrays (H, W, 3) or tensors
                (3, H, W) of floats in [0, 1] or uint8, one or a list, or a batch of them.
            last_image: the last frame, for interpolation, in the same number.
            num_videos: for each of the labels and images, one after the other.
            num_frames: of a clip, of which the transformer knows one number; to be sure of it.
            guidance_scale: g of classifier-free guidance (arXiv 2207.12598), ``v_none + g * (v_class - v_none)``; at 1
                there is none, and half the cost. By default 4.0 with classes and 1 without.
            num_inference_steps: evenly spaced in time, unless the scheduler has another idea.
            generator: one for all clips, or a list with one for each. A clip's own seed gives the same clip at any
                place in any batch.
            latents: the noise to start from, (B, N, C), instead of the generator's.
            output_type: ``pil``, a list of frames for each clip, ``np`` (B, T, H, W, 3) or ``pt`` (B, T, 3, H, W), both
                in [0, 1], or ``latent``: normalised tokens (B, N, C), as the transformer knows them.
            return_dict: give a PlanePipelineOutput instead of a tuple.
            callback_on_step_end: called with the pipeline, the step, its timestep and the tensors named in
                ``callback_on_step_end_tensor_inputs``; may change them, or stop by ``pipeline._interrupt = True``.

        Raises:
            RequestError: an argument cannot be met, such as an image of another size.
        """
        check_count("num_videos", num_videos)
        guidance_scale = self._guidance(guidance_scale, class_labels)
        self._check_call(class_labels, guidance_scale, num_inference_steps, output_type)
        self._check_frames(num_frames, image, last_image)
        images = [self._pixels(name, value) for name, value in (("image", image), ("last_image", last_image))]
        frames = [pixels for pixels in images if pixels is not None]
        labels = self._labels(class_labels)
        if frames and class_labels is None:
            labels = labels * max(map(len, frames))
        known = given = None
        if frames:
            known = self._tokens(frames, len(labels)).repeat_interleave(num_videos, dim=0)
            given = self.layout.types.to(known.device) < len(frames)
        latents = self._draw(
            [label for label in labels for _ in range(num_videos)],
            guidance_scale,
            num_inference_steps,
            generator,
            latents,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            known,
            given,
        )
        clips: Any = latents
        if output_type != "latent":
            clips = self.video_processor.postprocess_video(self._decode(latents), output_type=output_type)
        self.maybe_free_model_hooks()
        return PlanePipelineOutput(frames=clips) if return_dict else (clips,)

    def _tokens(self, frames: list[Tensor], count: int) -> Tensor:
        """Normalised tokens (count, N, C) with the planes of given frames, each (B, 3, H, W), and zeros elsewhere."""
        codec = LatentCodec(self.vae)
        mean, std = self._statistics(codec.device)
        tokens = torch.zeros(count, *self.latent_shape, device=codec.device)
        for k, pixels in enumerate(frames):
            if len(pixels) not in (1, count):
                raise RequestError(f"There are {len(pixels)} images for {count} clips: give one for each, or one.")
            plane = self.vae.encode_frames(pixels.to(codec.device, codec.dtype), f"xy{k + 1}").float()
            place = self.layout.types == k
            tokens[:, place] = ((plane.flatten(2).transpose(1, 2) - mean[place]) / std[place]).expand(count, -1, -1)
        return tokens.to(self._execution_device)

    def _decode(self, tokens: Tensor) -> Tensor:
        """Normalised tokens to pixels (B, 3, T, H, W), about [-1, 1]."""
        mean, std = self._statistics(tokens.device)
        return LatentCodec(self.vae).decode_raw(self.layout.pack(tokens * std + mean, "volume"))

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each token, (N, C)."""
        mean, std = self.config.latents_mean, self.config.latents_std
        if mean is None:
            zeros = torch.zeros(1, self.layout.volume_channels, 1, 1, 1)
            mean, ends = (LatentCodec(self.vae).denormalise(zeros + value).flatten() for value in (0, 1))
            std = ends - mean
        values = (torch.as_tensor(value, dtype=torch.float32, device=device) for value in (mean, std))
        mean, std = (self.layout.of_tokens(value) for value in values)
        return mean, std

    def _pixels(self, name: str, image: Any) -> Tensor | None:
        """Given frames, (B, 3, H, W) in [-1, 1]."""
        if image is None:
            return None
        images = [_in_unit_range(one) for one in (image if isinstance(image, list) else [image])]
        try:
            pixels = self.video_processor.preprocess(images if isinstance(image, list) else images[0]).float()
        except ValueError as error:
            raise RequestError(f"{name} is no image, and no list of images: {error}") from error
        _, height, width = self.clip_shape
        if tuple(pixels.shape[1:]) != (3, height, width):
            found = " x ".join(map(str, reversed(pixels.shape[-2:])))
            raise RequestError(
                f"{name} has {found} pixels in {pixels.shape[1]} channels, and the clips are {width} x {height} in 3: "
                "crop or resize it."
            )
        return pixels

    def _check_frames(self, num_frames: int | None, image: Any, last_image: Any) -> None:
        if num_frames not in (None, self.clip_shape[0]):
            raise RequestError(f"The model draws clips of {self.clip_shape[0]} frames, not {num_frames}.")
        if last_image is not None and image is None:
            raise RequestError("last_image is for interpolation, which needs the first frame as well: give image.")
        kind = None if image is None else "first" if last_image is None else "both"
        if kind is None:
            return
        if (weights := self.vae.config.time_weights) != "endpoints":
            raise RequestError(
                f"image needs an autoencoder with time_weights endpoints, and this one's spatial planes are means over "
                f"time ({weights}), which nobody knows from a frame alone: leave image out."
            )
        if kind not in self.config.given:
            frames = "first frame" if kind == "first" else "first and last frame"
            raise RequestError(
                f"The transformer has not been trained with the {frames} given: train it with model.given.{kind}, such "
                "as 0.3."
            )

    def _check_components(self) -> None:
        if not isinstance(self.transformer, PlaneTransformer):
            kind = type(self.transformer).__name__
            raise RequestError(f"A {kind} draws images: open this with latentae.ClassConditionalFlowPipeline.")
        layout = self.layout
        if not isinstance(self.vae, FourPlane) or not self.vae.config.spatial_planes:
            name = type(self.vae).__name__
            raise RequestError(f"The transformer draws planes, which this {name} does not decode: give a FourPlane.")
        planes, channels = self.vae.config.spatial_planes, self.vae.config.plane_channels
        if (planes, channels) != (layout.planes, layout.channels):
            raise RequestError(
                f"The transformer draws {layout.planes} spatial planes of {layout.channels} channels, the autoencoder "
                f"decodes {planes} of {channels}: use the autoencoder whose latents it was trained on."
            )
        statistics = (self.config.latents_mean, self.config.latents_std)
        expected = layout.volume_channels
        if statistics != (None, None) and any(values is None or len(values) != expected for values in statistics):
            raise RequestError(f"latents_mean and latents_std need a number for each of the {expected} channels.")


def _in_unit_range(image: Any) -> Any:
    """An array or tensor of uint8 as floats in [0, 1]; anything else as it is."""
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        return (image / 255).astype(np.float32)
    if isinstance(image, Tensor) and image.dtype == torch.uint8:
        return image / 255
    return image


PlaneFlowPipeline.__module__ = "latentae"  # as of the families, whatever file it is in
