"""What pipelines of transformers that predict the velocity of latents share: classes, guidance, the way from noise."""

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from latentae.errors import RequestError
from latentae.nn.flow import times_of

Generators = torch.Generator | list[torch.Generator] | None
StepCallback = Callable[[Any, int, Any, dict[str, Tensor]], dict[str, Tensor]] | None
GUIDANCE_SCALE = 4.0
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class FlowPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Draws normalised latents of classes; a subclass has the components, and makes images or clips of them."""

    config: Any
    transformer: Any
    vae: Any
    scheduler: Any
    class_embedder: Any = None

    _callback_tensor_inputs = ["latents"]
    _what = "images"  # that it draws, in errors
    _interrupt = False

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of what the transformer draws for one image or clip."""
        raise NotImplementedError

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

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Names of classes to their numbers.

        Raises:
            RequestError: no class has that name, or several have.
        """
        return [self._id_of(name) for name in ([label] if isinstance(label, str) else label)]

    def _set_names(self, id2label: Mapping[Any, str] | None) -> None:
        """Names of the classes, whose numbers JSON has turned into texts."""
        names = {int(key): name for key, name in (id2label or {}).items()}
        self.register_to_config(id2label=names or None)
        self._ids_by_name = _ids_by_name(names)

    def _guidance(self, guidance_scale: float | None, class_labels: Any) -> float:
        """What is asked for, or by default 4.0 with classes and 1 without."""
        if guidance_scale is not None:
            return guidance_scale
        return GUIDANCE_SCALE if class_labels is not None and self.num_classes > 1 else 1.0

    def _draw(
        self,
        labels: list[int],
        guidance_scale: float,
        num_inference_steps: int,
        generator: Generators,
        latents: Tensor | None,
        callback_on_step_end: StepCallback,
        callback_on_step_end_tensor_inputs: Sequence[str],
        known: Tensor | None = None,
        given: Tensor | None = None,
    ) -> Tensor:
        """Normalised latents of classes, float32, the arguments being those of a call.

        Args:
            known: tokens in the shape of the latents, of which those that are ``given``, (N,), stay as they are.
        """
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
                latents = _with_known(latents, known, given)
                times = timestep.to(device).expand(2 * len(labels) if guided else len(labels))
                if given is not None:
                    times = times[:, None] * ~given  # (B, N): what is given is clean
                velocity = self._velocity(torch.cat([latents, latents]) if guided else latents, times, condition)
                if guided:
                    of_class, of_none = velocity.chunk(2)
                    velocity = of_none + guidance_scale * (of_class - of_none)
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {name: latents for name in callback_on_step_end_tensor_inputs}
                    latents = (callback_on_step_end(self, step, timestep, tensors) or {}).get("latents", latents)
                progress.update()
        return _with_known(latents, known, given)

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

    def _velocity(self, latents: Tensor, times: Tensor, condition: dict[str, Tensor]) -> Tensor:
        latents = latents.to(self.transformer.dtype)
        return self.transformer(latents, timestep=times, return_dict=False, **condition)[0].float()

    def _labels(self, class_labels: Any) -> list[int]:
        """The classes that are asked for, or once what stands for none."""
        if class_labels is None:
            return [self._none]
        if hasattr(class_labels, "tolist"):  # of torch or numpy
            class_labels = class_labels.tolist()
        if isinstance(class_labels, str) or not isinstance(class_labels, Sequence):
            class_labels = [class_labels]
        ids = [self._id_of(label) for label in class_labels]
        if not ids:
            raise RequestError("class_labels is empty: name at least one class, or leave it out for none.")
        return ids

    def _id_of(self, label: int | str) -> int:
        if isinstance(label, str):
            ids = self._ids_by_name.get(label, [])
            if len(ids) == 1:
                return ids[0]
            raise RequestError(_unknown_name(label, ids, list(self._ids_by_name)))
        if isinstance(label, bool) or not hasattr(label, "__index__") or not 0 <= int(label) < self.num_classes:
            raise RequestError(f"There is no class {label!r}: classes are 0 to {self.num_classes - 1}, or their names.")
        return int(label)

    def _check_call(self, class_labels: Any, guidance_scale: float, steps: int, output_type: str) -> None:
        if not isinstance(guidance_scale, int | float) or not math.isfinite(guidance_scale):
            raise RequestError(f"guidance_scale is a finite number, not {guidance_scale!r}.")
        if guidance_scale != 1 and self.num_classes == 1:
            raise RequestError("The model knows no classes, so nothing guides: leave guidance_scale out.")
        if guidance_scale != 1 and class_labels is None:
            raise RequestError(f"guidance_scale is for {self._what} of a class: name class_labels, or leave it out.")
        check_count("num_inference_steps", steps)
        if output_type not in OUTPUT_TYPES:
            raise RequestError(f"output_type {output_type!r} is unknown; expected {', '.join(OUTPUT_TYPES)}.")

    def _check_tensors(self, count: int, generator: Any, latents: Tensor | None, callback_inputs: Any) -> None:
        if isinstance(generator, list) and len(generator) != count:
            raise RequestError(
                f"There are {len(generator)} generators for {count} {self._what}: give one for each, or one."
            )
        if latents is not None and tuple(latents.shape) != (count, *self.latent_shape):
            raise RequestError(f"latents have shape {tuple(latents.shape)}; expected {(count, *self.latent_shape)}.")
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


def _with_known(latents: Tensor, known: Tensor | None, given: Tensor | None) -> Tensor:
    return latents if known is None or given is None else torch.where(given[:, None], known, latents)


def check_count(name: str, value: Any) -> None:
    """Refuse what is no number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RequestError(f"{name} is a whole number of at least 1, not {value!r}.")


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
