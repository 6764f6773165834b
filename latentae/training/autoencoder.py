"""One LightningModule trains every family: objective, adversary, averaging and phases are arguments of a recipe.

A step makes one forward pass; the terms and both sides of the adversary look at the same reconstruction.
"""

import json
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from latentae.codec import fitting_frames, is_video, posterior_of, spatial_ratio, temporal_ratio
from latentae.console import say
from latentae.errors import RequestError
from latentae.families.fourplane import FourPlane
from latentae.metrics.image import LPIPSMetric, psnr, ssim
from latentae.metrics.video import difference_psnr, flicker, over_frames
from latentae.nn.pixels import to_float, to_uint8
from latentae.objectives import (
    Adversary,
    Denoising,
    FlowMatching,
    LatentTransform,
    Objective,
    Step,
    Term,
    check_transforms,
)
from latentae.training.base import TrainingModule
from latentae.training.latents import compile_networks, draw_latents
from latentae.training.optimization import OptimizerFactory, Schedule, adamw, last_layer, select_trainable
from latentae.training.start import build_autoencoder, ema_updates_of
from latentae.training.validation import find_lpips


class AutoencoderModule(TrainingModule):
    """An autoencoder in training.

    ``global_step`` counts optimizer steps of the autoencoder. A checkpoint is a plain Lightning checkpoint that opens
    with ``torch.load(weights_only=True)`` and holds

    - ``latentae``: ``{"class_name", "config", "format": 1}``, from which the autoencoder is built;
    - ``latentae_ema``: its averaged weights as a whole state dict; absent without averaging;
    - ``state_dict``: the raw weights under ``autoencoder.``, the discriminator's under ``adversary.discriminator.``;
    - ``latentae_progress``: ``samples_seen`` of all ranks, ``skipped_steps``, ``ema_updates``.

    Args:
        autoencoder: ``{preset: NAME, **changed arguments}`` for random weights or ``{pretrained: FOLDER or hub id}``,
            either with ``init_from: CHECKPOINT`` to take over the weights of an earlier stage; or a model.
        objective: terms by name; the names are those of the logged values.
        adversary: a discriminator and its schedule; None trains without.
        trainable: dotted name prefixes of what trains, such as ``decoder.conv_out``; None trains all.
        ema: decay of the averaged weights, which are validated and loaded; None for no averaging.
        latent_transforms: changes of what is decoded and of what it must decode to, in this order, such as EQ-VAE's.
        denoising: of a diffusion decoder: how times are drawn, or a distillation; evenly drawn times by default.
        optimizer: class and arguments, for the trained parameters; norms and biases are undecayed.
        schedule: learning rate by step, for both optimizers; constant by default.
        gradient_clip: largest norm of the gradient, of each network apart; None for no limit.
        accumulate: batches per optimizer step.
        gradient_checkpointing: compute the autoencoder's activations anew in the backward pass: memory for time.
        compile: run encoder, decoder, objective and a discriminator without spectral normalisation, whose power
            iteration changes buffers in place, through ``torch.compile``.
        term_gradients_every: steps between measurements of every term's gradient norm at the decoder's last layer,
            logged as ``train/gradient_of_NAME``: a multiple of ``trainer.log_every_n_steps``; None for never.
        max_skipped_steps: a loss or gradient that is not finite skips its step; so many in a row end the run.
        seed: of the initial weights and of every random draw.
    """

    model_kind = "autoencoder"
    adversary: Adversary | None

    def __init__(
        self,
        autoencoder: dict[str, Any] | nn.Module,
        objective: dict[str, Term],
        adversary: Adversary | None = None,
        trainable: list[str] | None = None,
        ema: float | None = 0.999,
        latent_transforms: list[LatentTransform] | None = None,
        denoising: Denoising | None = None,
        optimizer: OptimizerFactory = adamw,
        schedule: Schedule | None = None,
        gradient_clip: float | None = 1.0,
        accumulate: int = 1,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        term_gradients_every: int | None = None,
        max_skipped_steps: int = 10,
        seed: int = 0,
    ):
        super().__init__(ema, optimizer, schedule, gradient_clip, accumulate, max_skipped_steps, seed)
        built: Any = autoencoder if isinstance(autoencoder, nn.Module) else build_autoencoder(autoencoder, seed)
        self.autoencoder = built
        self.inherited_ema_updates = 0 if isinstance(autoencoder, nn.Module) else ema_updates_of(autoencoder)
        self.latent_transforms = latent_transforms or []
        check_transforms(self.latent_transforms, built)
        if gradient_checkpointing:
            if not getattr(built, "_supports_gradient_checkpointing", False):
                raise RequestError(f"model.gradient_checkpointing: {type(built).__name__} has none; leave it out.")
            built.enable_gradient_checkpointing()
        self.objective = Objective(objective)
        self.adversary = adversary
        self.compiled = compile
        self.term_gradients_every = term_gradients_every

        select_trainable(self.autoencoder, trainable)
        self.denoising = denoising or (Denoising() if getattr(built, "samples", False) else None)
        if self.denoising:
            self.denoising.check(built)
            if denoising is None and not any(isinstance(term, FlowMatching) for term in objective.values()):
                say(
                    f"This {type(built).__name__} has a diffusion decoder and the objective no FlowMatching term, the "
                    "diffusion loss: all terms look at its estimate of the image at evenly drawn times."
                )
        self.perceptual_metrics: dict[str, LPIPSMetric] | None = None  # None until a validation has looked for weights

    # One training step

    def training_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """Learn from ``batch["pixels"]``, uint8 (B, 3, H, W) or (B, 3, T, H, W)."""
        self.begin_batch()
        pixels = to_float(batch["pixels"]).to(self.dtype)
        for transform in self.latent_transforms:
            pixels = transform.prepare(pixels, spatial_ratio(self.autoencoder))

        encoded = pixels
        posterior = posterior_of(self.autoencoder.encode(pixels))
        latents = draw_latents(posterior, self.trainer.global_rank, self.trainer.world_size)
        for transform in self.latent_transforms:
            latents, pixels = transform(latents, pixels)
        earliest = [transform.earliest for transform in self.latent_transforms if transform.earliest is not None]
        step, decoded = self.decode(Step(pixels, latents.new_empty(0), posterior, latents, encoded), *earliest)
        pixels, reconstruction = step.target, step.reconstruction

        loss, values = self.objective(step)
        self.collect_by_time(step)
        if decoded.get("commit_loss") is not None:  # of a codebook, which learns from nothing else
            values["commitment"] = decoded.commit_loss.mean()
            loss = loss + values["commitment"]
        if hasattr(self.quantizer, "usage"):
            values |= self.quantizer.usage()
        adversary = self.adversary
        if adversary and (weight := adversary.weight_at(self.global_step)):
            values["adversarial"] = adversary.generator_loss(reconstruction)
            if adversary.adaptive:
                values |= adversary.balance(loss, values["adversarial"], last_layer(self.autoencoder.decoder))
            loss = loss + weight * values.get("adaptive_factor", 1.0) * values["adversarial"]
        if self.term_gradients_every and (self.global_step + 1) % self.term_gradients_every == 0:
            values |= self.term_gradients(step, values)
        self.manual_backward(loss / self.accumulate)

        if adversary and adversary.trains_at(self.global_step):
            opposing, parts = adversary.discriminator_loss(pixels, reconstruction, self.global_step)
            self.manual_backward(opposing / self.accumulate)
            values |= parts

        self.end_batch({"loss": loss, **values}, len(batch["pixels"]))

    @property
    def model(self) -> nn.Module:
        return self.autoencoder

    @property
    def networks(self) -> dict[str, nn.Module]:
        networks: dict[str, nn.Module] = {"gradient_norm": self.generator}
        if self.adversary:
            networks["discriminator_gradient_norm"] = self.adversary.discriminator
        return networks

    def networks_of_step(self, values: dict[str, Tensor]) -> dict[str, nn.Module]:
        return self.networks if "discriminator" in values else {"gradient_norm": self.generator}

    def optimizer_of(self, name: str) -> OptimizerFactory:
        if self.adversary and name != "gradient_norm":
            return self.adversary.optimizer or self.optimizer
        return self.optimizer

    def after_step(self, values: dict[str, Tensor]) -> None:
        if self.adversary:
            self.adversary.end_step(values)

    # Details of a step

    def decode(self, step: Step, earliest: Tensor | None = None) -> tuple[Step, Any]:
        """The step with its reconstruction, and the decoder's output; a diffusion decoder's is one estimate."""
        decoded: Any = DecoderOutput(sample=step.reconstruction)
        assert step.latents is not None
        if self.denoising:
            one = self.denoising(self.autoencoder, step.latents, step.target, earliest)
            step = replace(step, target=one.target, reconstruction=one.clean, times=one.times, base=one.base)
        elif self.decodes:
            decoded = self.autoencoder.decode(step.latents)
            step = replace(step, reconstruction=decoded.sample)
        return step, decoded

    def collect_by_time(self, step: Step) -> None:
        """Keep the diffusion loss of each image by its time, for the log."""
        for term in self.objective.values():
            if isinstance(term, FlowMatching) and step.times is not None:
                with torch.no_grad():
                    self.loss_by_time.add(step.times, term.by_image(step))

    @property
    def decodes(self) -> bool:
        """Whether anything looks at reconstructions: a term, the adversary, or a codebook."""
        return bool(self.objective.needs_reconstruction or self.adversary or self.quantizer is not None)

    @property
    def quantizer(self) -> Any:
        """The quantiser of a discrete autoencoder, ours or a VQModel."""
        return getattr(self.autoencoder, "quantize", None)

    @property
    def generator(self) -> nn.Module:
        """What trains against the objective: the autoencoder, and what the terms learn beside it."""
        return nn.ModuleList([self.autoencoder, self.objective])

    def term_gradients(self, step: Step, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The norm of every weighted term's gradient at the decoder's last trained layer, from this rank's batch."""
        weights = self.objective.weights_in(step)
        parts = {name: weights[name] * term(step) for name, term in self.objective.items()}
        if self.adversary and "adversarial" in values:
            factor = self.adversary.weight_at(self.global_step) * values.get("adaptive_factor", 1.0)
            parts["adversarial"] = factor * values["adversarial"]
        layer = [p for p in self.autoencoder.decoder.parameters() if p.requires_grad and p.ndim > 1][-1]
        norms = {}
        for name, value in parts.items():
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value, layer, retain_graph=True, allow_unused=True)
                norms[f"gradient_of_{name}"] = value.new_zeros(()) if gradient is None else gradient.norm()
        return norms

    # Validation, with averaged weights if there are any

    def validation_step(self, batch: dict[str, Any], batch_index: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Reconstruct ``batch["pixels"]`` from the mode; logs every term, and PSNR, SSIM and LPIPS of uint8 pixels.

        Of clips these are means over frames, and there are ``difference_psnr`` and ``flicker`` of `metrics.video`.
        A diffusion decoder's terms are those of draws that are the same in every validation, the rest is of samples
        from the canvas of noise. LPIPS (``lpips_alex``) needs AlexNet's weights on this machine. The names end in
        ``@SIZE`` if there is more than one size.
        """
        original = batch["pixels"]
        pixels = to_float(original).to(self.dtype)
        posterior = posterior_of(self.autoencoder.encode(pixels))
        latents = posterior.mode()
        if self.denoising:
            with torch.random.fork_rng():
                torch.manual_seed(batch_index)
                step, _ = self.decode(Step(pixels, latents.new_empty(0), posterior, latents))
            reconstruction = self.autoencoder.decode(latents, num_inference_steps=self.val_steps).sample
        else:
            reconstruction = self.autoencoder.decode(latents).sample
            step = Step(pixels, reconstruction, posterior, latents)
        _, values = self.objective(step)
        rounded = to_uint8(reconstruction)
        measures: dict[str, Any] = {"psnr": psnr, "ssim": ssim}
        measures |= {name: metric.values for name, metric in (self.perceptual_metrics or {}).items()}
        for name, measure in measures.items():
            of_clips = original.ndim == 5
            found = over_frames(measure, rounded, original) if of_clips else measure(rounded, original)
            values[name] = found.mean()
        if original.ndim == 5 and original.shape[2] > 1:
            values["difference_psnr"] = difference_psnr(rounded, original).mean()
            values["flicker"] = flicker(rounded, original).mean()
        at_size = f"@{original.shape[-1]}" if len(self.trainer.num_val_batches) > 1 else ""
        logged = {f"val/{name}{at_size}": value.float() for name, value in values.items()}
        self.log_dict(logged, batch_size=len(original), sync_dist=True, add_dataloader_idx=False)
        if dataloader_idx == 0:
            self.log("step", float(self.global_step), batch_size=len(original), add_dataloader_idx=False)
        return {"pixels": original, "reconstruction": rounded, "latents": latents}

    @property
    def val_steps(self) -> int | None:
        """Of samples in validation: few while training goes on, the configured number (None) at its end."""
        assert self.denoising is not None
        return None if self.trainer.state.fn == "validate" else self.denoising.val_steps

    # Start and resume

    def on_fit_start(self) -> None:
        super().on_fit_start()
        trainer: Any = self.trainer
        self.check_frames(getattr(trainer.datamodule, "frames", None))
        size, ratio = getattr(trainer.datamodule, "size", 0), spatial_ratio(self.autoencoder)
        if size % ratio:
            near = f"{size - size % ratio} or {size - size % ratio + ratio}" if size > ratio else ratio
            raise RequestError(f"data.size {size} is not a multiple of the autoencoder's {ratio}: use {near}.")
        if self.latent_transforms and not self.decodes:
            raise RequestError(
                "model.latent_transforms change what is decoded, and no term of this objective looks at a "
                "reconstruction: leave them out, or add a term on pixels."
            )
        if self.term_gradients_every and not any(p.requires_grad for p in self.autoencoder.decoder.parameters()):
            raise RequestError(
                "model.term_gradients_every measures at the decoder's last layer that trains, and of the decoder "
                "model.trainable trains nothing: leave it out."
            )
        if self.compiled and self.adversary and self.adversary.r1:
            raise RequestError(
                "model.compile cannot differentiate twice, as model.adversary.r1 asks: set compile to false or r1 to 0."
            )
        if self.compiled:
            halves = [self.autoencoder.encoder, self.autoencoder.decoder, self.objective]
            if hasattr(self.autoencoder, "initial_decoder"):
                halves.append(self.autoencoder.initial_decoder)
            if self.adversary and not any(is_parametrized(m) for m in self.adversary.discriminator.modules()):
                halves.append(self.adversary.discriminator)
            compile_networks(*halves)

    def check_frames(self, frames: int | None) -> None:
        """Refuse clips for an autoencoder of images, and numbers of frames that an autoencoder of videos cannot have.

        Raises:
            RequestError: naming the numbers that are near.
        """
        name = type(self.autoencoder).__name__
        if not is_video(self.autoencoder):
            if frames is not None:
                raise RequestError(f"data.frames {frames} asks for clips, and {name} is for images: leave it out.")
            return
        if frames is None and not isinstance(self.autoencoder, FourPlane):
            raise RequestError(f"{name} is for videos: say with data.frames how many frames to take of each clip.")
        if frames is not None and fitting_frames(self.autoencoder, frames) != frames:
            below = next(n for n in range(frames, 0, -1) if fitting_frames(self.autoencoder, n) == n)
            raise RequestError(
                f"data.frames {frames} does not fit the autoencoder, whose temporal compression is "
                f"{temporal_ratio(self.autoencoder)}: use {below} or {fitting_frames(self.autoencoder, frames)}."
            )

    def on_validation_start(self) -> None:
        super().on_validation_start()
        if self.perceptual_metrics is None:
            self.perceptual_metrics = find_lpips()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        config = json.loads(self.autoencoder.to_json_string())
        class_name = type(self.autoencoder).__name__
        checkpoint["latentae"] = {"class_name": class_name, "config": config, "format": 1}
