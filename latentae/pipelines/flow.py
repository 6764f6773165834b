"""Sampling images of a class, or of none, from a transformer that predicts the velocity of latents.

The stock pipeline for classes, ``DiTPipeline``, knows one transformer, 1000 classes and one scale of the latents; this
one has the classes and the normalisation by channels of the transformer's training, and decodes by any autoencoder.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from latentae.codec import LatentCodec
from latentae.denoisers import ClassEmbedder
from latentae.errors import RequestError
from latentae.nn.flow import times_of
from latentae.nn.padding import padding_mode, set_padding_mode

Generators = torch.Generator | list[torch.Generator] | None
GUIDANCE_SCALE = 4.0
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class ClassConditionalFlowPipeline(DiffusionPipeline):  # type: ignore[misc]
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

    config: Any
    transformer: Any
    vae: Any
    scheduler: Any
    class_embedder: Any

    model_cpu_offload_seq: Any = "class_embedder->transformer->vae"
    _optional_components = ["class_embedder"]
    _callback_tensor_inputs = ["latents"]

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
        names = {int(key): name for key, name in (id2label or {}).items()}  # JSON has turned the numbers into texts
        self.register_to_config(
            latents_mean=latents_mean, latents_std=latents_std, latent_size=latent_size, id2label=names or None
        )
        self._check_components()
        self._ids_by_name = _ids_by_name(names)
        if padding_mode(vae) != "zeros":
            set_padding_mode(vae, padding_mode(vae))  # which diffusers' loading does not restore
        self.image_processor = VaeImageProcessor()
        self._interrupt = False

    @property
    def num_classes(self) -> int:
        """How many classes the transformer knows; 1 for one without classes."""
        if self.class_embedder is not None:
            return self.class_embedder.config["num_classes"]
        return self.transformer.config.num_embeds_ada_norm

    @property
    def _none(self) -> int:
        """The label of no class: after the last; of unconditional data, the only one that was trained."""
        return self.num_classes if self.num_classes > 1 else 0

    @property
    def labels(self) -> dict[str, int]:
        """Classes by their names, those that are the name of one class alone."""
        return {name: ids[0] for name, ids in sorted(self._ids_by_name.items()) if len(ids) == 1}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents."""
        size = self.transformer.config.sample_size
        height, width = self.config.latent_size or (size, size)
        return self.transformer.config.in_channels, height, width

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Names of classes to their numbers.

        Raises:
            RequestError: no class has that name, or several have.
        """
        return [self._id_of(name) for name in ([label] if isinstance(label, str) else label)]

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
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Tensor]], dict[str, Tensor]] | None = None,
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
        labels = self._labels(class_labels, num_images)
        if guidance_scale is None:
            guidance_scale = GUIDANCE_SCALE if class_labels is not None and self.num_classes > 1 else 1.0
        self._check_call(class_labels, guidance_scale, num_inference_steps, output_type)
        self._check_tensors(len(labels), generator, latents, callback_on_step_end_tensor_inputs)
        self._check_scheduler()
        device = self._execution_device
        if latents is None:
            latents = randn_tensor((len(labels), *self.latent_shape), generator, device=device, dtype=torch.float32)
        latents = latents.to(device, torch.float32)  # the steps add up in fp32 whatever the transformer's precision
        guided = guidance_scale != 1
        condition = self._condition(labels + [self._none] * len(labels) if guided else labels)

        self._set_timesteps(num_inference_steps)
        self._interrupt = False
        with self.progress_bar(total=len(self.scheduler.timesteps)) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                if self._interrupt:
                    break
                velocity = self._velocity(torch.cat([latents, latents]) if guided else latents, timestep, condition)
                if guided:
                    of_class, of_none = velocity.chunk(2)
                    velocity = of_none + guidance_scale * (of_class - of_none)
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {name: latents for name in callback_on_step_end_tensor_inputs}
                    latents = (callback_on_step_end(self, step, timestep, tensors) or {}).get("latents", latents)
                progress.update()

        images: Any = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(self._decode(latents, generator), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _condition(self, labels: list[int]) -> dict[str, Tensor]:
        """What the transformer is told of the classes."""
        ids = torch.tensor(labels, device=self._execution_device)
        if self.class_embedder is None:
            return {"class_labels": ids}
        return {"encoder_hidden_states": self.class_embedder(ids).to(self.transformer.dtype)}

    def _set_timesteps(self, steps: int) -> None:
        """Even steps of all of the way, where the scheduler takes them: by itself Euler's ends in a tiny one."""
        device, scheduler = self._execution_device, self.scheduler
        if (
            "FlowMatch" in type(scheduler).__name__
            and "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
        ):
            scheduler.set_timesteps(sigmas=times_of(steps)[:-1], device=device)
        else:
            scheduler.set_timesteps(steps, device=device)

    def _velocity(self, latents: Tensor, timestep: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return self.transformer(
            latents.to(self.transformer.dtype),
            timestep=timestep.to(latents.device).expand(len(latents)),
            return_dict=False,
            **condition,
        )[0].float()

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

    def _labels(self, class_labels: Any, num_images: int) -> list[int]:
        """The class of each image, or what stands for none."""
        if isinstance(num_images, bool) or not isinstance(num_images, int) or num_images < 1:
            raise RequestError(f"num_images is a whole number of at least 1, not {num_images!r}.")
        if class_labels is None:
            return [self._none] * num_images
        if hasattr(class_labels, "tolist"):  # of torch or numpy
            class_labels = class_labels.tolist()
        if isinstance(class_labels, str) or not isinstance(class_labels, Sequence):
            class_labels = [class_labels]
        ids = [self._id_of(label) for label in class_labels]
        if not ids:
            raise RequestError("class_labels is empty: name at least one class, or leave it out for images of none.")
        return [label for label in ids for _ in range(num_images)]

    def _id_of(self, label: int | str) -> int:
        if isinstance(label, str):
            ids = self._ids_by_name.get(label, [])
            if len(ids) == 1:
                return ids[0]
            raise RequestError(_unknown_name(label, ids, list(self._ids_by_name)))
        if isinstance(label, bool) or not hasattr(label, "__index__") or not 0 <= int(label) < self.num_classes:
            raise RequestError(f"There is no class {label!r}: classes are 0 to {self.num_classes - 1}, or their names.")
        return int(label)

    def _check_components(self) -> None:
        kind, channels = type(self.transformer).__name__, self.transformer.config.in_channels
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

    def _check_call(self, class_labels: Any, guidance_scale: float, steps: int, output_type: str) -> None:
        if guidance_scale != 1 and self.num_classes == 1:
            raise RequestError("The model knows no classes, so nothing guides: leave guidance_scale out.")
        if guidance_scale != 1 and class_labels is None:
            raise RequestError("guidance_scale is for images of a class: name class_labels, or leave it out.")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise RequestError(f"num_inference_steps is a whole number of at least 1, not {steps!r}.")
        if output_type not in OUTPUT_TYPES:
            raise RequestError(f"output_type {output_type!r} is unknown; expected {', '.join(OUTPUT_TYPES)}.")

    def _check_tensors(self, count: int, generator: Any, latents: Tensor | None, callback_inputs: Any) -> None:
        if isinstance(generator, list) and len(generator) != count:
            raise RequestError(f"There are {len(generator)} generators for {count} images: give one for each, or one.")
        if latents is not None and tuple(latents.shape) != (count, *self.latent_shape):
            raise RequestError(
                f"latents have shape {tuple(latents.shape)}; expected {(count, *self.latent_shape)}, for each image."
            )
        if unknown := set(callback_inputs) - set(self._callback_tensor_inputs):
            raise RequestError(f"A callback can have {self._callback_tensor_inputs}, not {sorted(unknown)}.")

    def _check_scheduler(self) -> None:
        name, config = type(self.scheduler).__name__, self.scheduler.config
        if "FlowMatch" not in name and not (
            config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
        ):
            raise RequestError(
                f"{name} as it is configured is not for flows: use FlowMatchEulerDiscreteScheduler, or give it "
                "use_flow_sigmas=True and prediction_type='flow_prediction'."
            )
        if config.get("use_dynamic_shifting"):
            raise RequestError("use_dynamic_shifting asks for an image size that changes: set a fixed shift instead.")


ClassConditionalFlowPipeline.__module__ = "latentae"  # as of the families, whatever file it is in


def _ids_by_name(names: Mapping[int, str]) -> dict[str, list[int]]:
    """Classes by their whole name, and by each of several that commas part, as ImageNet's."""
    found: dict[str, list[int]] = defaultdict(list)
    for key, name in names.items():
        for part in {name, *(part.strip() for part in name.split(","))}:
            found[part].append(key)
    return dict(found)


def _unknown_name(label: str, ids: list[int], known: list[str]) -> str:
    if ids:
        return f"{label!r} is the name of classes {' and '.join(map(str, ids))}: give the number."
    if not known:
        return f"There is no class {label!r}: the pipeline has no names, give a number."
    near = get_close_matches(label, known, n=1)
    some = ", ".join(sorted(known)[:5]) + (", …" if len(known) > 5 else "")
    return f"There is no class {label!r}; " + (f"did you mean {near[0]!r}?" if near else f"known are {some}.")
