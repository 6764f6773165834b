"""Latent diffusion: one LightningModule trains a denoiser on the latents of any autoencoder.

Flow matching between normalised latents and noise (SiT, arXiv 2401.08740; the linear path): a step draws a time and
noise for each sample, and learns the velocity there. Denoisers of images are diffusers' own transformers. Of videos it
takes planes: `LatentDiffusion.normalise` turns their volumes into tokens, which a `PlaneTransformer` knows.
"""

from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution, IdentityDistribution
from torch import Tensor, nn

from latentae.codec import LatentCodec
from latentae.console import say
from latentae.denoisers import Denoiser, create_denoiser, sample, velocity_errors
from latentae.errors import RequestError
from latentae.families.fourplane import PlaneGaussian
from latentae.loading import load, weights_hash
from latentae.loading.diffusion import DIFFUSION_KEY, LatentDiffusion, describe_diffusion
from latentae.nn.pixels import to_float, to_uint8
from latentae.nn.planes import PlaneLayout
from latentae.objectives import Times, UniformTimes
from latentae.objectives.draws import of_this_rank, per_image
from latentae.training.base import TrainingModule
from latentae.training.latent_data import class_names, count_classes
from latentae.training.latents import compile_networks, draw_latents, latents_at
from latentae.training.optimization import OptimizerFactory, Schedule, adamw
from latentae.training.planes import GivenPlanes, layout_of

GOLDEN_RATIO = 0.6180339887498949  # whose multiples lie evenly between 0 and 1, however many they are


class LatentDiffusionModule(TrainingModule):
    """A denoiser of latents in training, on what a `LatentData` gives.

    What is in a checkpoint beside what every module writes stands in `latentae.loading.diffusion`.

    Args:
        denoiser: ``{preset: NAME, patch_size: 2, **changed arguments}`` or ``{class_name: CLASS, **arguments}`` of a
            transformer of diffusers; of planes ``planes-…``. Size and channels are those of the latents.
        codec: the autoencoder of the latents, frozen and never in a checkpoint: what `latentae.load` opens. Images and
            clips need it; with a store it is checked to be the store's, and decodes the samples of validations.
        num_classes: labels are 0 to ``num_classes - 1``; 1 trains without classes; by default as many as the samples
            have labels.
        label_dropping: share of samples that are trained without their class, for classifier-free guidance (arXiv
            2207.12598).
        normalisation: ``data`` to mean 0 and standard deviation 1 in each channel, by the store's statistics or as
            measured; ``model`` as the autoencoder's configuration says.
        normalisation_images: on how many images, the first of the training, ``data`` is measured without a store.
        times: how they are drawn in training; evenly by default.
        given: of planes of ``endpoints``, how often the planes of the first and of the last frame are given.
        ema: decay of the averaged weights, which are validated and loaded; None for no averaging.
        optimizer: class and arguments; norms and biases are undecayed.
        schedule: learning rate by step; constant by default.
        gradient_clip: largest norm of the gradient; None for no limit.
        accumulate: batches per optimizer step.
        gradient_checkpointing: compute activations anew in the backward pass: memory for time.
        compile: run the denoiser through ``torch.compile``.
        max_skipped_steps: a loss or gradient that is not finite skips its step; so many in a row end the run.
        seed: of the initial weights and of every random draw.
    """

    model_kind = "denoiser"
    denoiser: Denoiser
    latents_mean: Tensor  # (C,), and so the next
    latents_std: Tensor

    def __init__(
        self,
        denoiser: dict[str, Any],
        codec: str | nn.Module | None = None,
        num_classes: int | None = None,
        label_dropping: float = 0.1,
        normalisation: Literal["data", "model"] = "data",
        normalisation_images: int = 1024,
        times: Times | None = None,
        given: GivenPlanes | None = None,
        ema: float | None = 0.9999,
        optimizer: OptimizerFactory = adamw,
        schedule: Schedule | None = None,
        gradient_clip: float | None = 1.0,
        accumulate: int = 1,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        max_skipped_steps: int = 10,
        seed: int = 0,
    ):
        super().__init__(ema, optimizer, schedule, gradient_clip, accumulate, max_skipped_steps, seed)
        if not 0 <= label_dropping < 1:
            raise RequestError(f"model.label_dropping is a share of samples, from 0 to below 1, not {label_dropping}.")
        if normalisation_images < 1:
            raise RequestError(f"model.normalisation_images is {normalisation_images}; expected at least 1.")
        self.description = denoiser
        self.num_classes = num_classes
        self.label_dropping = label_dropping
        self.normalisation = normalisation
        self.normalisation_images = normalisation_images
        self.times = times or UniformTimes()
        self.given = given or GivenPlanes()
        self.gradient_checkpointing = gradient_checkpointing
        self.compiled = compile
        self.codec: LatentCodec | None = None  # no nn.Module
        self.autoencoder_name: str | None = None
        self.autoencoder_sha256: str | None = None
        self.time_weights: str | None = None  # of its planes
        if codec is not None:
            model: Any = codec if isinstance(codec, nn.Module) else load(codec)
            self.codec = LatentCodec(model.requires_grad_(False))
            self.autoencoder_sha256 = weights_hash(model)
            if isinstance(codec, str):
                self.autoencoder_name = str(Path(codec).resolve()) if Path(codec).exists() else codec
            if self.codec.is_video and not model.config.get("spatial_planes"):
                raise RequestError(
                    f"model.codec is a {type(model).__name__}, for video and without planes: give an autoencoder of "
                    "images, or one of planes (fourplane-… or triplane-…)."
                )

    # What the data says: the shape of the latents, their classes and their normalisation

    def setup(self, stage: str) -> None:
        """Build the denoiser for the latents of the run's data.

        Raises:
            RequestError: images without a codec, a store of another codec, sets of different latents, classes that do
                not match, no statistics, or a denoiser that cannot hold the latents.
        """
        if hasattr(self, "denoiser"):
            return
        trainer: Any = self.trainer
        data = trainer.datamodule
        found = [self._latent_shape(part, data) for part in data.sets]
        shapes = [shape for shape, _ in found]
        if len(set(shapes)) > 1:
            listed = " and ".join(" x ".join(map(str, shape)) for shape in shapes)
            raise RequestError(
                f"data.path and data.val_path have latents of different shapes, {listed}: give val_path the same."
            )
        labelled = [entry for part in data.sets for entry in part.labelled]
        places = " and ".join(path for path in (data.path, data.val_path) if path)
        classes = count_classes(labelled, self.num_classes, places)
        self.class_names = class_names(labelled) if classes > 1 else None
        shape, layout = found[0]
        self.given.check(layout, self.time_weights)
        self.denoiser = create_denoiser(self.description, layout or shape, classes, seed=self.seed)
        if self.gradient_checkpointing:
            self.denoiser.transformer.enable_gradient_checkpointing()
        mean, std = self._normalisation(getattr(data.train_set, "store", None), shape[0])
        self.register_buffer("latents_mean", mean.float())
        self.register_buffer("latents_std", std.float())

    def _latent_shape(self, part: Any, data: Any) -> tuple[tuple[int, ...], PlaneLayout | None]:
        """Of the latents of a set, (C, h, w), or of planes (C, t, h, w) with their layout."""
        store = getattr(part, "store", None)
        if store is None:
            return self._encoded_shape(data.size, data.frames)
        model = store.config["model"]
        name, sha256 = self.autoencoder_name or "the model", self.autoencoder_sha256
        if sha256 is not None and sha256 != model["weights_sha256"]:
            origin = model["name"] or f"a {model['class']}"
            raise RequestError(
                f"{store.path} holds latents of {origin} (weights {model['weights_sha256'][:8]}…), not of "
                f"{name} (weights {sha256[:8]}…) that model.codec names: give the store's, or encode with this one."
            )
        self.autoencoder_sha256 = model["weights_sha256"]
        self.autoencoder_name = self.autoencoder_name or model["name"]
        if not store.complete:
            say(f"{store.path} is still growing: this run trains on the {len(store)} entries that are there.")
        shape, self.time_weights = store.latent_shape, model["config"].get("time_weights")
        return shape, layout_of(shape, model["class"], model["config"], str(store.path)) if len(shape) == 4 else None

    def _encoded_shape(self, size: int, frames: int | None) -> tuple[tuple[int, ...], PlaneLayout | None]:
        if self.codec is None:
            raise RequestError(
                "Images must be encoded: name their autoencoder with --model.codec, or give a store of latents that "
                "'latentae encode' wrote as --data.path."
            )
        model: Any = self.codec.autoencoder
        if self.codec.is_video != (frames is not None):
            kind, what = ("video", "give data.frames") if self.codec.is_video else ("images", "leave data.frames out")
            raise RequestError(f"model.codec is a {type(model).__name__}, for {kind}: {what}, or take another.")
        ratio = self.codec.spatial_ratio
        if size % ratio:
            near = f"{size - size % ratio} or {size - size % ratio + ratio}" if size > ratio else ratio
            raise RequestError(f"data.size {size} is not a multiple of the autoencoder's {ratio}: use {near}.")
        side = size // ratio
        if frames is None:
            return (self.codec.latent_channels, side, side), None
        if (padded := self.codec.padded_frames(frames)) != frames:
            raise RequestError(
                f"data.frames {frames} are not 1 more than a multiple of the autoencoder's {self.codec.temporal_ratio}:"
                f" use {padded}."
            )
        self.time_weights = model.config.time_weights
        shape = self.codec.latent_channels, (frames - 1) // self.codec.temporal_ratio + 1, side, side
        return shape, layout_of(shape, type(model).__name__, model.config, f"clips of {frames} frames")

    def _normalisation(self, store: Any, channels: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (C,) each; NaN where they must be measured first."""
        if self.normalisation == "model":
            values = self.codec.normalisation if store is None and self.codec else store.config["normalisation"]
            return _of_model(values, channels)
        if store is None:
            return torch.full((channels,), torch.nan), torch.full((channels,), torch.nan)
        statistics = store.statistics()
        std = statistics.std if statistics.sample_std is None else statistics.sample_std
        return statistics.mean, _checked(std, str(store.path))

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.latents_mean.isnan().any():
            self._measure()
        if self.compiled:
            compile_networks(self.denoiser)

    @torch.no_grad()
    def _measure(self) -> None:
        """Mean and standard deviation of each channel, over every position of draws from the first images."""
        trainer: Any = self.trainer
        images = min(self.normalisation_images, len(trainer.datamodule.train_set))
        say(f"Measuring the mean and the spread of the latents on the first {images} of the training samples.")
        sums = torch.zeros(3, len(self.latents_mean), dtype=torch.float64, device=self.device)
        for batch in trainer.datamodule.first(images):
            posterior = self.posterior({"pixels": batch["pixels"].to(self.device)})
            mode = posterior.mode().double()
            variance = _variance(posterior, mode)
            for total, values in zip(sums, (torch.ones_like(mode), mode, mode.square() + variance)):
                total += values.transpose(0, 1).flatten(1).sum(1)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        count, total, squares = sums
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        self.latents_mean.copy_(mean)
        self.latents_std.copy_(_checked(std, "the images that were measured"))

    # One training step

    def training_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """Learn from ``batch["latents"]`` (B, C, h, w), ``batch["moments"]`` (B, 2C, h, w) or ``batch["pixels"]``.

        Those of planes are volumes (B, C, t, h, w), and pixels of clips (B, 3, T, H, W).
        """
        self.begin_batch()
        posterior = self.posterior(batch)
        trainer: Any = self.trainer
        clean = self.normalise(draw_latents(posterior, trainer.global_rank, trainer.world_size))
        t = self.times.draw(per_image(clean))
        noise = of_this_rank(torch.randn, clean)
        labels = self.labels(batch)
        if labels is not None and self.label_dropping:
            dropped = of_this_rank(torch.rand, per_image(clean)) < self.label_dropping
            labels = torch.where(dropped, self.denoiser.null_labels(len(labels)), labels)
        given = self.draw_given(clean)
        if given is not None:  # known in sampling as the modes of their planes
            clean = torch.where(given[..., None], self.normalise(posterior.mode()), clean)
        errors = velocity_errors(self.denoiser, clean, t, noise, labels, given)
        self.loss_by_time.add(t, errors)
        loss = errors.mean()
        self.manual_backward(loss / self.accumulate)
        self.end_batch({"loss": loss}, len(clean))

    @property
    def model(self) -> nn.Module:
        return self.denoiser

    @torch.no_grad()
    def posterior(self, batch: dict[str, Any]) -> Any:
        """The distribution of the raw latents of a batch; images are encoded in the codec's own precision."""
        if "moments" in batch and self.layout is not None:
            return PlaneGaussian.of_moments(batch["moments"], self.layout)
        if "moments" in batch:
            return DiagonalGaussianDistribution(batch["moments"])
        if "latents" in batch:
            return IdentityDistribution(batch["latents"])
        codec = self._codec_here()
        with torch.autocast(self.device.type, enabled=False):
            return codec.posterior(to_float(batch["pixels"]))

    def normalise(self, latents: Tensor) -> Tensor:
        """Raw latents to what the denoiser sees."""
        return self.as_diffusion().normalise(latents.to(self.dtype))

    @property
    def layout(self) -> PlaneLayout | None:
        """Of the planes of the latents; None where they are none."""
        return self.as_diffusion().layout

    def draw_given(self, clean: Tensor) -> Tensor | None:
        """Which tokens of a batch (B, N, C) are given, (B, N); None where none ever are."""
        if self.layout is None or not self.given.names:
            return None
        return self.given.draw(per_image(clean), self.layout)

    def labels(self, batch: dict[str, Any]) -> Tensor | None:
        """The classes of a batch, (B,); None where the run has none."""
        return batch["label"] if self.denoiser.num_classes > 1 else None

    def as_diffusion(self) -> LatentDiffusion:
        """The denoiser with its normalisation and the name of its autoencoder."""
        return LatentDiffusion(
            self.denoiser,
            self.latents_mean,
            self.latents_std,
            self.autoencoder_name,
            self.autoencoder_sha256,
            self.class_names,
            self.given.names,
        )

    def _codec_here(self) -> LatentCodec:
        assert self.codec is not None
        if self.codec.device != self.device:
            self.codec.autoencoder.to(self.device)
        return self.codec

    # Validation, with averaged weights if there are any

    def validation_step(self, batch: dict[str, Any], batch_index: int, dataloader_idx: int = 0) -> None:
        """Log the loss of held-out latents, at times that are even over the set, with draws of their own each.

        The draws of a sample depend on its place alone, so the value does on neither ranks nor batches.
        """
        posterior = self.posterior(batch)
        shape = self.denoiser.latent_shape
        draws = [torch.randn(2, *shape, generator=_generator(int(i))) for i in batch["index"]]
        spread, noise = torch.stack(draws).to(posterior.mode()).unbind(1)  # (B, C, h, w) or (B, N, C) each
        clean = self.normalise(latents_at(posterior, spread))
        t = ((batch["index"].to(per_image(clean)) + 0.5) * GOLDEN_RATIO).frac()
        errors = velocity_errors(self.denoiser, clean, t, noise.to(clean), self.labels(batch))
        self.log("val/loss", errors.mean(), batch_size=len(clean), sync_dist=True)
        self.log("step", float(self.global_step), batch_size=len(clean))

    @torch.no_grad()
    def draw_images(self, count: int, steps: int, guidance_scale: float) -> Tensor | None:
        """Decoded samples from the same noise each time, uint8 (count, 3, H, W), or (count, 3, T, H, W) of clips; None
        without a codec.

        The classes are spread evenly over all that there are.
        """
        if self.codec is None:
            return None
        shape = (count, *self.denoiser.latent_shape)
        noise = torch.randn(shape, generator=_generator(self.seed)).to(self.latents_mean)
        labels = None
        if (classes := self.denoiser.num_classes) > 1:
            labels = torch.arange(count, device=self.device) * classes // count
        latents = sample(self.denoiser, noise, labels, steps=steps, guidance_scale=guidance_scale)
        codec, raw = self._codec_here(), self.as_diffusion().denormalise(latents)
        return torch.cat([to_uint8(codec.decode_raw(z)).cpu() for z in raw.split(1)])  # beside a full device

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[DIFFUSION_KEY] = describe_diffusion(self.as_diffusion())


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _variance(posterior: Any, mode: Tensor) -> Tensor:
    """Of a posterior in the shape of its mode; 0 where it has no spread."""
    if isinstance(posterior, PlaneGaussian):
        return posterior.moments.chunk(2, dim=1)[1].double().exp()
    return posterior.std.double().square() if hasattr(posterior, "std") else torch.zeros_like(mode)


def _of_model(values: dict[str, Any], channels: int) -> tuple[Tensor, Tensor]:
    """A model's own normalisation as mean and standard deviation of each channel."""
    scale = values["scaling_factor"]
    if values["latents_mean"] is None or values["latents_std"] is None:
        return torch.full((channels,), values["shift_factor"]), torch.full((channels,), 1 / scale)
    return torch.tensor(values["latents_mean"]), torch.tensor(values["latents_std"]) / scale


def _checked(std: Tensor, where: str) -> Tensor:
    if bad := [i for i, value in enumerate(std.tolist()) if not 0 < value < float("inf")]:
        raise RequestError(
            f"Channel {bad[0]} of the latents of {where} has the standard deviation {std[bad[0]]:g}, by which nothing "
            "can be divided: look at the autoencoder, or train with --model.normalisation model."
        )
    return std
