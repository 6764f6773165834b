"""Sampling images of a class, or of none, from a transformer that predicts the velocity of latents.

The stock pipeline for classes, ``DiTPipeline``, knows one transformer, 1000 classes and one scale of the latents; this
one has the classes and the normalisation by channels of the transformer's training, and decodes by any autoencoder.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from latentae.codec import LatentCodec
from latentae.denoisers import ClassEmbedder, PlaneTransformer
from latentae.errors import RequestError
from latentae.nn.padding import padding_mode, set_padding_mode
from latentae.pipelines.base import FlowPipeline, Generators, StepCallback, check_count


class ClassConditionalFlowPipeline(FlowPipeline):
    """Images of classes by flow matching in the latents of any autoencoder.

    Args:
        transformer: DiTTransformer2DModel, PixArtTransformer2DModel or SanaTransformer2DModel, which predicts
            ``noise - clean`` of normalised latents.
        vae: ours or a stock diffusers autoencoder.
        scheduler: FlowMatchEulerDiscreteScheduler, or another that takes predictions of a flow.
        class_embedder: classes as captions, for transformers that read captions.
        latents_mean, latents_std: of each channel; the transformer's latents are ``(z - mean) / std`` with raw ``z``.
            None for the normalisation in the autoencoder's configuration.
        latent_size: height and width of the latents; None for the transformer's square ``sample_size``.
        id2label: names of the classes; one class may have several, with commas between.

    Raises:
        RequestError: components that do not fit each other.
    """

    model_cpu_offload_seq: Any = "class_embedder->transformer->vae"
    _optional_components = ["class_embedder"]

    def __init__(
        self,
        transformer: ModelMixin,
        vae: ModelMixin,
        scheduler: Any,
        class_embedder: ClassEmbedder | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        latent_size: list[int] | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler, class_embedder=class_embedder)
        self.register_to_config(latents_mean=latents_mean, latents_std=latents_std, latent_size=latent_size)
        self._set_names(id2label)
        self._check_components()
        if padding_mode(vae) != "zeros":
            set_padding_mode(vae, padding_mode(vae))  # which diffusers' loading does not restore
        self.image_processor = VaeImageProcessor()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents."""
        size = self.transformer.config.sample_size
        height, width = self.config.latent_size or (size, size)
        return self.transformer.config.in_channels, height, width

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        num_images: int = 1,
        guidance_scale: float | None = None,
        num_inference_steps: int = 50,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images.

        Args:
            class_labels: one or several, by number or name; None for images of no class.
            num_images: for each of the labels, one after the other.
            guidance_scale: g of classifier-free guidance (arXiv 2207.12598), ``v_none + g * (v_class - v_none)``; at 1
                there is none, and half the cost. By default 4.0 with classes and 1 without.
            num_inference_steps: evenly spaced in time, unless the scheduler has another idea.
            generator: one for all images, or a list with one for each. An image's own seed gives the same image at any
                place in any batch. Decoders that sample go on with the same generators.
            latents: the noise to start from, (B, C, h, w), instead of the generator's.
            output_type: ``pil``, ``np`` (B, H, W, 3) or ``pt`` (B, 3, H, W), both in [0, 1], or ``latent``: normalised
                latents (B, C, h, w), as the transformer knows them.
            return_dict: give an ImagePipelineOutput instead of a tuple.
            callback_on_step_end: called with the pipeline, the step, its timestep and the tensors named in
                ``callback_on_step_end_tensor_inputs``; may change them, or stop by ``pipeline._interrupt = True``.

        Raises:
            RequestError: an argument cannot be met, such as an unknown class.
        """
        check_count("num_images", num_images)
        labels = [label for label in self._labels(class_labels) for _ in range(num_images)]
        guidance_scale = self._guidance(guidance_scale, class_labels)
        self._check_call(class_labels, guidance_scale, num_inference_steps, output_type)
        latents = self._draw(
            labels,
            guidance_scale,
            num_inference_steps,
            generator,
            latents,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        images: Any = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(self._decode(latents, generator), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _decode(self, latents: Tensor, generator: Generators) -> Tensor:
        """Normalised latents to pixels (B, 3, H, W), about [-1, 1]."""
        codec = LatentCodec(self.vae)
        if codec.is_video:
            latents = latents.unsqueeze(2)  # (B, C, 1, h, w)
        if self.config.latents_mean is None:
            pixels = codec.decode(latents, generator=generator)
        else:
            mean, std = (
                torch.tensor(values, device=latents.device).view(-1, *[1] * (latents.ndim - 2))
                for values in (self.config.latents_mean, self.config.latents_std)
            )
            pixels = codec.decode_raw(latents * std + mean, generator=generator)
        return pixels[:, :, 0] if codec.is_video else pixels

    def _check_components(self) -> None:
        kind = type(self.transformer).__name__
        if isinstance(self.transformer, PlaneTransformer):
            raise RequestError(f"A {kind} draws clips: open this with latentae.PlaneFlowPipeline.")
        channels = self.transformer.config.in_channels
        if isinstance(self.transformer, DiTTransformer2DModel) == (self.class_embedder is not None):
            needed = "needs a" if self.class_embedder is None else "has a table of classes and takes no"
            raise RequestError(f"{kind} {needed} class_embedder.")
        if (decoded := LatentCodec(self.vae).latent_channels) != channels:
            raise RequestError(
                f"The transformer draws latents of {channels} channels, {type(self.vae).__name__} decodes {decoded}: "
                "use the autoencoder whose latents it was trained on."
            )
        statistics = (self.config.latents_mean, self.config.latents_std)
        if statistics != (None, None) and any(values is None or len(values) != channels for values in statistics):
            raise RequestError(f"latents_mean and latents_std need a number for each of the {channels} channels.")


ClassConditionalFlowPipeline.__module__ = "latentae"  # as of the families, whatever file it is in
