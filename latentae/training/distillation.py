"""Distilling one half of an autoencoder: the other is the teacher's, so that denoisers of its latents stay right.

- An encoder: ``model.autoencoder: {preset: litevae-..., decoder_of: TEACHER}`` builds the student, which learns the
  latents of the frozen teacher by `LatentDistillation`.
- A diffusion decoder: ``{preset: dito-..., encoder_of: TEACHER}`` learns to decode the latents of any AutoencoderKL.
- One step: `StepDistillation` lets a diffusion decoder do in one step what its teacher does in several.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from latentae.codec import LatentCodec
from latentae.errors import RequestError
from latentae.loading import load
from latentae.nn.precision import widen
from latentae.objectives import Denoised, Denoising, PureNoise, Step, Term
from latentae.objectives.draws import of_this_rank, per_image

NORMALISATION = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


class LatentDistillation(Term):
    """The squared distance between the posterior and that of a frozen teacher, in the teacher's normalised latents.

    It is the squared 2-Wasserstein distance between the two Gaussians, averaged over latent elements: with means m and
    standard deviations s, ``((m - m')² + (s - s')²) * scale²``, where the teacher's scaling factor makes the variance
    of its latents about 1. So 0.01 is an error of 1 % of the latents' variance, whatever the teacher. A deterministic
    autoencoder has s = 0. Unlike a KL divergence or a distance of log variances, it does not explode where the teacher
    is almost certain, as published VAEs are.

    The teacher sees the pixels that were encoded. It stays frozen, in eval mode and in the precision that is asked
    for, and is no submodule: it is never in a checkpoint. Pixel terms beside this one act through the student's own
    decoder; without any, a step does not decode.

    Args:
        teacher: an image autoencoder, or what `latentae.load` opens: a folder, a hub id, a run, a checkpoint.
        precision: of the teacher's arithmetic; it costs a forward pass of its encoder in each step.

    Raises:
        MissingWeights: there is no such teacher.
        RequestError: it is for video, or its latents have another shape than those of the autoencoder in training.
    """

    needs_reconstruction = False
    takes_clips = False

    def __init__(
        self,
        teacher: str | nn.Module,
        weight: float = 1.0,
        precision: Literal["float32", "bfloat16", "float16"] = "float32",
    ):
        super().__init__(weight)
        model = teacher if isinstance(teacher, nn.Module) else load(teacher)
        self.teacher = LatentCodec(model.requires_grad_(False), dtype=getattr(torch, precision))  # no nn.Module
        if self.teacher.is_video:
            raise RequestError(f"LatentDistillation needs an image autoencoder; {type(model).__name__} is for video.")

    def measure(self, step: Step) -> Tensor:
        pixels = step.target if step.encoded is None else step.encoded
        if self.teacher.device != pixels.device:
            self.teacher.autoencoder.to(pixels.device)
        with torch.no_grad():
            wanted, wanted_spread = _gaussian(self.teacher.posterior(pixels))
            scale = self.teacher.normalise(torch.ones_like(wanted)) - self.teacher.normalise(torch.zeros_like(wanted))
        mean, spread = _gaussian(step.posterior)
        if mean.shape != wanted.shape:
            raise RequestError(
                f"The teacher of LatentDistillation gives latents of shape {tuple(wanted.shape)}, the autoencoder in "
                f"training {tuple(mean.shape)}: compression and latent channels must agree."
            )
        distance = (mean - wanted).square() + (spread - wanted_spread).square()
        return (distance * scale.square()).mean()


class StepDistillation(Denoising):
    """The estimate from pure noise learns the sample that a frozen teacher makes of the same noise and latents.

    The target of all terms, and what an adversary sees as real, is the teacher's sample. The student begins with the
    teacher's weights (``model.autoencoder.pretrained: TEACHER``), its encoder stays as it is, and what is saved decodes
    in one step. At the time of pure noise `FlowMatching` is the squared error of the image, weighed as v or x0; its
    sigmoid weight is zero there.

    Args:
        teacher: a diffusion autoencoder, or what `latentae.load` opens: a folder, a hub id, a run, a checkpoint.
        steps: of the teacher; facts on SSDD give 7.
        precision: of the teacher's arithmetic.

    Raises:
        MissingWeights: there is no such teacher.
        RequestError: it has no diffusion decoder or another encoder, or the student's encoder would train.
    """

    def __init__(
        self,
        teacher: str | nn.Module,
        steps: int = 8,
        precision: Literal["float32", "bfloat16", "float16"] = "float32",
    ):
        super().__init__(PureNoise(), val_steps=1)
        if steps < 1:
            raise RequestError(f"StepDistillation needs at least one step of the teacher, not {steps}.")
        model: Any = teacher if isinstance(teacher, nn.Module) else load(teacher)
        if not getattr(model, "samples", False):
            raise RequestError(
                f"The teacher of StepDistillation needs a diffusion decoder, which this {type(model).__name__} has "
                "not: give a run or a folder of a DiTo or a SWYCC."
            )
        self.teacher: Any = LatentCodec(model.requires_grad_(False), dtype=getattr(torch, precision)).autoencoder
        self.steps = steps

    def check(self, autoencoder: Any) -> None:
        super().check(autoencoder)
        trained = [name for name, parameter in autoencoder.named_parameters() if parameter.requires_grad]
        if any(name.startswith(("encoder.", "quant_conv.")) for name in trained):
            raise RequestError(
                "StepDistillation keeps the latents as they are, so the encoder must not train: set model.trainable to "
                "[decoder]."
            )
        theirs, own = (
            f"f{model.spatial_compression_ratio}c{model.latent_channels}" for model in (self.teacher, autoencoder)
        )
        if theirs != own:
            raise RequestError(
                f"The teacher of StepDistillation decodes {theirs} latents, the autoencoder in training {own}: start "
                "from the teacher, as model.autoencoder.pretrained."
            )
        if not _equal_encoders(autoencoder, self.teacher):
            raise RequestError(
                "The teacher of StepDistillation decodes the latents of another encoder than that of the autoencoder "
                "in training: give model.autoencoder.pretrained and model.denoising.teacher the same run."
            )
        autoencoder.register_to_config(num_inference_steps=1)

    def __call__(self, autoencoder: Any, latents: Tensor, target: Tensor, earliest: Tensor | None = None) -> Denoised:
        teacher = self.teacher.to(latents.device)
        noise = of_this_rank(torch.randn, widen(target))
        with torch.no_grad():
            sample = widen(teacher.sample(latents.to(teacher.dtype), noise, self.steps))
        times = self.times.draw(per_image(target))
        condition = autoencoder.condition(latents)
        return Denoised(sample, autoencoder.denoise(noise, times, condition), times, condition.base)


def _equal_encoders(autoencoder: nn.Module, teacher: nn.Module) -> bool:
    """Whether both encode alike, in the precision of the teacher."""
    own, theirs = (
        {name: value for name, value in model.state_dict().items() if name.startswith(("encoder.", "quant_conv."))}
        for model in (autoencoder, teacher)
    )
    return own.keys() == theirs.keys() and all(
        own[name].shape == value.shape and torch.equal(own[name].to(value), value) for name, value in theirs.items()
    )


def _gaussian(posterior: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a posterior, (B, C, h, w), in float32 or float64."""
    mean = widen(posterior.mode())
    return mean, widen(posterior.std) if hasattr(posterior, "std") else torch.zeros_like(mean)


def with_decoder_arguments(arguments: dict[str, Any], teacher: Any, name: str) -> dict[str, Any]:
    """The arguments of a LiteVAE, with those that give it the teacher's decoder and the shape and scale of its latents.

    Args:
        teacher: an ``AutoencoderKL``, an ``AutoencoderTiny`` or a LiteVAE.
        name: what the teacher is called in errors.

    Raises:
        RequestError: LiteVAE cannot have this decoder, or ``arguments`` ask for another.
    """
    given = _decoder_arguments(teacher, name)
    for key, value in arguments.items():
        if key in given and value != given[key]:
            raise RequestError(
                f"model.autoencoder.{key} is {value}, but {given[key]} in decoder_of {name}: leave it out."
            )
    return {**arguments, **given}


def _decoder_arguments(teacher: Any, name: str) -> dict[str, Any]:
    config = teacher.config
    kind = type(teacher).__name__
    if kind == "LiteVAE":
        encoder = ("extractor", "aggregator", "layers_per_block", "dropout")
        arguments = {key: config[key] for key in type(teacher)._init_arguments() if not key.startswith(encoder)}
    elif kind == "AutoencoderKL":
        blocks = sorted(set(config["up_block_types"]))
        if blocks != ["UpDecoderBlock2D"] or config["act_fn"] != "silu":
            raise RequestError(
                f"model.autoencoder.decoder_of {name} has a decoder of {', '.join(blocks)} with {config['act_fn']}; "
                "LiteVAE can have one of UpDecoderBlock2D with silu."
            )
        arguments = {
            "in_channels": config["out_channels"],
            "latent_channels": config["latent_channels"],
            "levels": len(config["block_out_channels"]) - 1,
            "decoder_block_out_channels": config["block_out_channels"],
            "decoder_layers_per_block": config["layers_per_block"],
            "norm_num_groups": config["norm_num_groups"],
            "mid_block_add_attention": config["mid_block_add_attention"],
            "use_post_quant_conv": config["use_post_quant_conv"],
            "force_upcast": config["force_upcast"],
        }
    elif kind == "AutoencoderTiny":
        shape = (config["act_fn"], config["upsample_fn"], config["upsampling_scaling_factor"])
        if shape != ("relu", "nearest", 2):
            raise RequestError(
                f"model.autoencoder.decoder_of {name} has a decoder with {shape[0]} and {shape[1]} upsampling by "
                f"{shape[2]}; LiteVAE can have one with relu and nearest upsampling by 2."
            )
        if len(set(config["decoder_block_out_channels"])) > 1:  # diffusers' own decoder would fail on it too
            raise RequestError(
                f"model.autoencoder.decoder_of {name} has decoder widths {list(config['decoder_block_out_channels'])}; "
                "an AutoencoderTiny can only decode with equal ones."
            )
        arguments = {
            "in_channels": config["out_channels"],
            "latent_channels": config["latent_channels"],
            "levels": len(config["decoder_block_out_channels"]) - 1,
            "decoder_norm": "tiny",
            "decoder_block_out_channels": config["decoder_block_out_channels"][::-1],
            "decoder_layers_per_block": config["num_decoder_blocks"][::-1],
        }
    else:
        raise RequestError(
            f"model.autoencoder.decoder_of {name} is of the class {kind}; LiteVAE can have the decoder of an "
            "AutoencoderKL, an AutoencoderTiny or another LiteVAE."
        )
    normalisation = {key: config[key] for key in NORMALISATION if config.get(key) is not None}
    return {**arguments, **normalisation}


def with_encoder_arguments(arguments: dict[str, Any], teacher: Any, name: str) -> dict[str, Any]:
    """The arguments of a DiTo, with those that give it the teacher's encoder and the shape and scale of its latents.

    Args:
        teacher: an ``AutoencoderKL``.
        name: what the teacher is called in errors.

    Raises:
        RequestError: DiTo cannot have this encoder, or ``arguments`` ask for another.
    """
    config = teacher.config
    kind = type(teacher).__name__
    if kind != "AutoencoderKL":
        raise RequestError(
            f"model.autoencoder.encoder_of {name} is of the class {kind}; DiTo can have the encoder of an "
            "AutoencoderKL."
        )
    blocks = sorted(set(config["down_block_types"]))
    if blocks != ["DownEncoderBlock2D"] or config["act_fn"] != "silu" or config["in_channels"] != 3:
        raise RequestError(
            f"model.autoencoder.encoder_of {name} has an encoder of {', '.join(blocks)} with {config['act_fn']} for "
            f"{config['in_channels']} channels; DiTo can have one of DownEncoderBlock2D with silu for 3."
        )
    channels = config["latent_channels"]
    mean, std = config.get("latents_mean"), config.get("latents_std")
    given = {
        "latent_channels": channels,
        "encoder_widths": config["block_out_channels"],
        "encoder_layers": config["layers_per_block"],
        "norm_num_groups": config["norm_num_groups"],
        "mid_block_add_attention": config["mid_block_add_attention"],
        "use_quant_conv": config["use_quant_conv"],
        "force_upcast": config["force_upcast"],
        "latent_regularizer": "kl",
        "condition_mean": mean or (config.get("shift_factor") or 0.0,) * channels,
        "condition_std": std or (1 / config["scaling_factor"],) * channels,
        **{key: config[key] for key in NORMALISATION if config.get(key) is not None},
    }
    for key, value in arguments.items():
        if key in given and value != given[key]:
            raise RequestError(
                f"model.autoencoder.{key} is {value}, but {given[key]} in encoder_of {name}: leave it out."
            )
    return {**arguments, **given}


def take_encoder(autoencoder: nn.Module, teacher: Any) -> None:
    """Copy the weights of the teacher's encoder, and of the convolution after it if it has one."""
    _take(autoencoder, teacher, ("encoder.", "quant_conv."))


def take_decoder(autoencoder: nn.Module, teacher: Any) -> None:
    """Copy the weights of the teacher's decoder, and of the convolution before it if it has one."""
    _take(autoencoder, teacher, ("decoder.", "post_quant_conv."))


def _take(autoencoder: nn.Module, teacher: Any, parts: tuple[str, ...]) -> None:
    weights = {key: value for key, value in teacher.state_dict().items() if key.startswith(parts)}
    own = {key for key in autoencoder.state_dict() if key.startswith(parts)}
    assert own == set(weights), own ^ set(weights)
    autoencoder.load_state_dict(weights, strict=False)
