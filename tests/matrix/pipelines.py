"""Pipelines of diffusers with small denoisers of random weights, and the autoencoders that go into them.

Shared by the tests of the matrix and by ``tools/pipeline_matrix.py``. A row is a pipeline, a column a family; a cell
runs the pipeline with an autoencoder of the family, or says in a sentence why it cannot.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor, nn

import latentae

WIDTH, TOKENS = 8, 4  # of prompts
FRAMES = 5
FAMILIES = ("DCAE", "LiteVAE", "DiTo", "SWYCC", "FourPlane")
STOCK = ("AutoencoderKL", "AutoencoderDC")
UNET = dict(
    sample_size=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=WIDTH,
    attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip


# Columns


def autoencoder(family: str, channels: int | None = None, ratio: int | None = None, statistics: bool = False) -> Any:
    """A small autoencoder of a family with random weights.

    Args:
        channels: of the latents; by default those of the tiny preset.
        ratio: 8 where a pipeline has it built in; all but FourPlane's tiny preset have it anyway.
        statistics: per-channel ones, as pipelines of videos and SDXL read them.
    """
    if family in STOCK:
        with tempfile.TemporaryDirectory() as folder:
            stock(family, channels).save_pretrained(folder)
            made = latentae.load(folder)
    else:
        options: dict[str, Any] = {}
        if channels is not None and family == "FourPlane":
            options["plane_channels"] = channels // 4
        elif channels is not None:
            options["latent_channels"] = channels
        if ratio == 8 and family == "FourPlane":
            options["block_out_channels"] = (8, 16, 16, 16)
        preset = {"DCAE": "dc-ae-tiny"}.get(family, f"{family.lower()}-tiny")
        made = latentae.create(preset, **options)
    if statistics:
        count = latent_channels(made)
        made.register_to_config(
            latents_mean=[0.1 * i for i in range(count)], latents_std=[1 + 0.1 * i for i in range(count)]
        )
    return randomise(made)


def stock(family: str, channels: int | None = None) -> Any:
    """One of diffusers' own classes."""
    torch.manual_seed(0)
    if family == "AutoencoderKL":
        return diffusers.AutoencoderKL(
            block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=channels or 4, norm_num_groups=4,
            shift_factor=0.0,
        )  # fmt: skip
    # DC-AE's configuration is that of the stock class
    config = latentae.create("dc-ae-tiny", **({"latent_channels": channels} if channels else {})).config
    return diffusers.AutoencoderDC.from_config({**config, "_class_name": "AutoencoderDC"})


def randomise(model: nn.Module) -> nn.Module:
    """Draw the one-dimensional parameters: zero weights of norms would hide what happens in the blocks."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model.eval()


# Rows


@dataclass(frozen=True)
class Parts:
    """What a pipeline is made of beside the autoencoder, and how it is called."""

    cls: Any
    modules: dict[str, Any]
    call: dict[str, Any]
    absent: tuple[str, ...] = ()
    load: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One pipeline.

    Args:
        make: from the autoencoder and the height and width in pixels to the parts.
        channels, ratio: that the pipeline has built in, if it has.
        statistics: whether it reads latents_mean and latents_std, so that the autoencoder gets some.
        sized: whether its caller chooses the size.
        video: whether the denoiser gives videos.
        note: what a user should know of the pipeline.
    """

    name: str
    make: Callable[[Any, int, int], Parts]
    channels: int | None = None
    ratio: int | None = None
    statistics: bool = False
    sized: bool = True
    video: bool = False
    note: str = ""


def prompt(channels: int = WIDTH, tokens: int = TOKENS) -> Tensor:
    return torch.randn(1, tokens, channels, generator=torch.Generator().manual_seed(1))


def pooled(channels: int = WIDTH) -> Tensor:
    return torch.randn(1, channels, generator=torch.Generator().manual_seed(2))


def photo(height: int, width: int) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(3))


def mask(tokens: int = TOKENS) -> Tensor:
    return torch.ones(1, tokens, dtype=torch.long)


def called(extra: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """Arguments of a call that depend on the size; images are changed by half of the steps."""
    pictures = {key: value(height, width) for key, value in extra.items()}
    return {**pictures, "strength": 0.6} if set(pictures) == {"image"} else pictures


BOTH = dict(prompt_embeds=prompt(), negative_prompt_embeds=-prompt())
POOLED = dict(**BOTH, pooled_prompt_embeds=pooled(), negative_pooled_prompt_embeds=-pooled())
MASKED = dict(**BOTH, prompt_attention_mask=mask(), negative_prompt_attention_mask=mask())
SD_ABSENT = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
T5_ABSENT = ("text_encoder", "tokenizer")


def unet(channels: int, **options: Any) -> Any:
    return diffusers.UNet2DConditionModel(**{**UNET, "in_channels": channels, "out_channels": channels, **options})


def ddim() -> Any:
    return diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)


def flow_scheduler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def stable_diffusion(cls: Any = diffusers.StableDiffusionPipeline, **extra: Any) -> Callable[[Any, int, int], Parts]:
    def make(vae: Any, height: int, width: int) -> Parts:
        modules = dict(unet=unet(latent_channels(vae)), scheduler=ddim())
        call = {**BOTH, **called(extra, height, width)}
        return Parts(cls, modules, call, SD_ABSENT, dict(requires_safety_checker=False))

    return make


def controlnet(vae: Any, height: int, width: int) -> Parts:
    parts = stable_diffusion(diffusers.StableDiffusionControlNetPipeline)(vae, height, width)
    network = diffusers.ControlNetModel(
        in_channels=latent_channels(vae), block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=UNET["down_block_types"], cross_attention_dim=WIDTH, attention_head_dim=4,
        # halves the picture once for each width after the first, as the autoencoder does
        conditioning_embedding_out_channels=(4,) * len(vae.config.block_out_channels),
    )  # fmt: skip
    for block in network.controlnet_down_blocks:  # which are made as zeros
        nn.init.normal_(block.weight)
    call = {**parts.call, "image": photo(height, width)}
    return Parts(parts.cls, {**parts.modules, "controlnet": network}, call, parts.absent, parts.load)


def stable_diffusion_xl(cls: Any, **extra: Any) -> Callable[[Any, int, int], Parts]:
    def make(vae: Any, height: int, width: int) -> Parts:
        network = unet(
            latent_channels(vae), addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + WIDTH,
        )  # fmt: skip
        absent = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "image_encoder", "feature_extractor")
        call = {**POOLED, **called(extra, height, width)}
        return Parts(cls, dict(unet=network, scheduler=ddim()), call, absent, dict(add_watermarker=False))

    return make


def stable_diffusion_3(vae: Any, height: int, width: int) -> Parts:
    channels = latent_channels(vae)
    network = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=channels, num_layers=1, attention_head_dim=4, num_attention_heads=2,
        caption_projection_dim=8, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, out_channels=channels,
        pos_embed_max_size=16,
    )  # fmt: skip
    absent = [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
    return Parts(
        diffusers.StableDiffusion3Pipeline, dict(transformer=network, scheduler=flow_scheduler()), POOLED,
        (*absent, "image_encoder", "feature_extractor"),
    )  # fmt: skip


def flux(vae: Any, height: int, width: int) -> Parts:
    network = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4 * latent_channels(vae), num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    absent = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "image_encoder", "feature_extractor")
    call = dict(prompt_embeds=prompt(), pooled_prompt_embeds=pooled())
    return Parts(diffusers.FluxPipeline, dict(transformer=network, scheduler=flow_scheduler()), call, absent)


def pixart_sigma(vae: Any, height: int, width: int) -> Parts:
    channels = latent_channels(vae)
    network = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=4, num_attention_heads=2, caption_channels=WIDTH,
        in_channels=channels, cross_attention_dim=8, out_channels=2 * channels, attention_bias=True,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, use_additional_conditions=False,
    )  # fmt: skip
    call = dict(**MASKED, negative_prompt=None, use_resolution_binning=False)
    modules = dict(transformer=network, scheduler=ddim())
    return Parts(diffusers.PixArtSigmaPipeline, modules, call, T5_ABSENT)


def dit(vae: Any, height: int, width: int) -> Parts:
    channels = latent_channels(vae)
    network = diffusers.DiTTransformer2DModel(
        sample_size=4, num_layers=1, patch_size=2, attention_head_dim=4, num_attention_heads=2, in_channels=channels,
        out_channels=2 * channels, num_embeds_ada_norm=1000, norm_elementwise_affine=False,
    )  # fmt: skip
    modules = dict(transformer=network, scheduler=ddim())
    return Parts(diffusers.DiTPipeline, modules, dict(class_labels=[3]))


def sana_network(vae: Any, **options: Any) -> Any:
    channels = latent_channels(vae)
    return diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=channels, out_channels=channels, num_layers=1, num_attention_heads=2,
        attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8,
        caption_channels=WIDTH, sample_size=32, **options,
    )  # fmt: skip


def sana(vae: Any, height: int, width: int) -> Parts:
    call = dict(**MASKED, negative_prompt=None, use_resolution_binning=False)
    modules = dict(transformer=sana_network(vae), scheduler=flow_scheduler())
    return Parts(diffusers.SanaPipeline, modules, call, T5_ABSENT)


def sana_sprint(cls: Any = diffusers.SanaSprintPipeline, **extra: Any) -> Callable[[Any, int, int], Parts]:
    def make(vae: Any, height: int, width: int) -> Parts:
        network = sana_network(vae, qk_norm="rms_norm_across_heads", guidance_embeds=True)
        call = dict(
            prompt_embeds=prompt(), prompt_attention_mask=mask(), use_resolution_binning=False,
            **called(extra, height, width),
        )  # fmt: skip
        return Parts(cls, dict(transformer=network, scheduler=diffusers.SCMScheduler()), call, T5_ABSENT)

    return make


def latent_consistency(vae: Any, height: int, width: int) -> Parts:
    network = unet(latent_channels(vae), time_cond_proj_dim=8)
    modules = dict(unet=network, scheduler=diffusers.LCMScheduler())
    load = dict(requires_safety_checker=False)
    return Parts(diffusers.LatentConsistencyModelPipeline, modules, dict(prompt_embeds=prompt()), SD_ABSENT, load)


def lumina(vae: Any, height: int, width: int) -> Parts:
    network = diffusers.LuminaNextDiT2DModel(
        sample_size=4, patch_size=2, in_channels=latent_channels(vae), hidden_size=24, num_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=16, ffn_dim_multiplier=None, norm_eps=1e-5,
        learn_sigma=True, qk_norm=True, cross_attention_dim=WIDTH, scaling_factor=1.0,
    )  # fmt: skip
    for parameter in network.parameters():  # gates of zeros would hide the prompt, and empty ones are not finite
        nn.init.normal_(parameter, std=0.1)
    modules = dict(transformer=network, scheduler=flow_scheduler())
    return Parts(diffusers.LuminaPipeline, modules, dict(**MASKED, negative_prompt=None), T5_ABSENT)


def lumina2(vae: Any, height: int, width: int) -> Parts:
    network = diffusers.Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=latent_channels(vae), hidden_size=8, num_layers=1,
        num_attention_heads=1, num_kv_heads=1, num_refiner_layers=1, multiple_of=16, ffn_dim_multiplier=None,
        norm_eps=1e-5, scaling_factor=1.0, axes_dim_rope=(4, 2, 2), axes_lens=(64, 64, 64), cap_feat_dim=WIDTH,
    )  # fmt: skip
    call = dict(
        **BOTH, negative_prompt=None, prompt_attention_mask=mask().bool(), negative_prompt_attention_mask=mask().bool()
    )
    modules = dict(transformer=network, scheduler=flow_scheduler())
    return Parts(diffusers.Lumina2Pipeline, modules, call, T5_ABSENT)


def qwen_image(vae: Any, height: int, width: int) -> Parts:
    network = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=4 * latent_channels(vae), out_channels=latent_channels(vae), num_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH, guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    call = dict(
        **BOTH, prompt_embeds_mask=mask(), negative_prompt_embeds_mask=mask(), true_cfg_scale=2.0,
    )  # fmt: skip
    modules = dict(transformer=network, scheduler=flow_scheduler())
    return Parts(diffusers.QwenImagePipeline, modules, call, T5_ABSENT)


def animate_diff(vae: Any, height: int, width: int) -> Parts:
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 8), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2
    )
    network = diffusers.UNetMotionModel.from_unet2d(unet(latent_channels(vae)), adapter)
    modules = dict(
        unet=network, motion_adapter=adapter, scheduler=ddim(),
    )  # fmt: skip
    absent = ("text_encoder", "tokenizer", "feature_extractor", "image_encoder")
    return Parts(diffusers.AnimateDiffPipeline, modules, dict(**BOTH, num_frames=2, decode_chunk_size=1), absent)


def stable_video_diffusion(vae: Any, height: int, width: int) -> Parts:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    channels = latent_channels(vae)
    network = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=4, in_channels=2 * channels, out_channels=channels, block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=WIDTH,
        num_attention_heads=2, projection_class_embeddings_input_dim=12, addition_time_embed_dim=4,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=8, projection_dim=WIDTH, num_hidden_layers=1, num_attention_heads=2, image_size=224,
        intermediate_size=8, patch_size=112,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous")
    modules = dict(
        unet=network, scheduler=scheduler, image_encoder=CLIPVisionModelWithProjection(vision),
        feature_extractor=CLIPImageProcessor(),
    )  # fmt: skip
    picture = Image.fromarray((photo(height, width)[0].permute(1, 2, 0).numpy() * 255).astype("uint8"))
    call = dict(image=picture, num_frames=2, decode_chunk_size=1)
    return Parts(diffusers.StableVideoDiffusionPipeline, modules, call)


def wan(vae: Any, height: int, width: int) -> Parts:
    channels = latent_channels(vae)
    network = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=channels, out_channels=channels,
        text_dim=WIDTH, freq_dim=16, ffn_dim=16, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    modules = dict(transformer=network, scheduler=flow_scheduler())
    return Parts(diffusers.WanPipeline, modules, dict(**BOTH, num_frames=FRAMES), (*T5_ABSENT, "transformer_2"))


def ltx(vae: Any, height: int, width: int) -> Parts:
    channels = latent_channels(vae)
    network = diffusers.LTXVideoTransformer3DModel(
        in_channels=channels, out_channels=channels, patch_size=1, patch_size_t=1, num_attention_heads=2,
        attention_head_dim=8, cross_attention_dim=16, num_layers=1, caption_channels=WIDTH,
    )  # fmt: skip
    modules = dict(transformer=network, scheduler=flow_scheduler())
    return Parts(diffusers.LTXPipeline, modules, dict(**MASKED, num_frames=FRAMES), T5_ABSENT)


def cogvideox(vae: Any, height: int, width: int) -> Parts:
    channels = latent_channels(vae)
    ratio = 2 ** (len(vae.config.block_out_channels) - 1)
    temporal = getattr(vae.config, "temporal_compression_ratio", 1)
    network = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=channels, out_channels=channels, time_embed_dim=2,
        text_embed_dim=WIDTH, num_layers=1, sample_width=width // ratio, sample_height=height // ratio,
        sample_frames=FRAMES, patch_size=2, temporal_compression_ratio=temporal, max_text_seq_length=TOKENS,
    )  # fmt: skip
    modules = dict(transformer=network, scheduler=diffusers.CogVideoXDDIMScheduler())
    call = dict(**BOTH, num_frames=FRAMES, max_sequence_length=TOKENS)
    return Parts(diffusers.CogVideoXPipeline, modules, call, T5_ABSENT)


def mochi(vae: Any, height: int, width: int) -> Parts:
    network = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=1, pooled_projection_dim=16,
        in_channels=latent_channels(vae), qk_norm="rms_norm", text_embed_dim=WIDTH, time_embed_dim=4,
        activation_fn="swiglu", max_sequence_length=TOKENS,
    )  # fmt: skip
    call = dict(
        **BOTH, prompt_attention_mask=mask().bool(), negative_prompt_attention_mask=mask().bool(), num_frames=7,
        negative_prompt=None,
    )  # fmt: skip
    modules = dict(transformer=network, scheduler=flow_scheduler())
    return Parts(diffusers.MochiPipeline, modules, call, T5_ABSENT)


def latent_channels(vae: Any) -> int:
    return int(vae.config.latent_channels)


EIGHT = "8 pixels a latent are built into the pipeline"
WINDOWS = "num_frames of one window of FourPlane, or of whole ones, of which fewer frames come out"
SDXL_NOTE = "takes latents_mean and latents_std to have 4 channels; without them, any number"
ROWS = [
    Row("StableDiffusion", stable_diffusion()),
    Row("StableDiffusionImg2Img", stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline, image=photo), sized=False),
    Row(
        "StableDiffusionInpaint",
        stable_diffusion(
            diffusers.StableDiffusionInpaintPipeline,
            image=photo,
            mask_image=lambda height, width: (photo(height, width)[:, :1] > 0.5).float(),
        ),
        channels=4,
        note="4 channels are built into the pipeline",
    ),
    Row("StableDiffusionControlNet", controlnet),
    Row(
        "StableDiffusionXL",
        stable_diffusion_xl(diffusers.StableDiffusionXLPipeline),
        channels=4,
        statistics=True,
        note=SDXL_NOTE,
    ),
    Row(
        "StableDiffusionXLImg2Img",
        stable_diffusion_xl(diffusers.StableDiffusionXLImg2ImgPipeline, image=photo),
        channels=4,
        statistics=True,
        sized=False,
        note=SDXL_NOTE,
    ),
    Row("StableDiffusion3", stable_diffusion_3, note="needs a shift_factor that is a number"),
    Row("Flux", flux, note="needs a shift_factor that is a number"),
    Row("PixArtSigma", pixart_sigma),
    Row("DiT", dit, sized=False),
    Row("Sana", sana),
    Row("SanaSprint", sana_sprint()),
    Row("SanaSprintImg2Img", sana_sprint(diffusers.SanaSprintImg2ImgPipeline, image=photo)),
    Row("LatentConsistencyModel", latent_consistency),
    Row("Lumina", lumina, ratio=8, note=EIGHT),
    Row("Lumina2", lumina2, ratio=8, note=EIGHT),
    Row("QwenImage", qwen_image, statistics=True, note="reads latents_mean and latents_std, and nothing else"),
    Row("AnimateDiff", animate_diff, video=True),
    Row("StableVideoDiffusion", stable_video_diffusion, video=True),
    Row(
        "Wan", wan, statistics=True, video=True, note=f"reads latents_mean and latents_std, and nothing else; {WINDOWS}"
    ),
    Row("LTX", ltx, statistics=True, video=True, note=WINDOWS),
    Row("CogVideoX", cogvideox, video=True, note=f"reads scaling_factor alone; {WINDOWS}"),
    Row("Mochi", mochi, video=True, note="8 x 8 x 6 and 12 channels are built into the pipeline"),
]


# Cells

VIDEO = "FourPlane"


@dataclass(frozen=True)
class Obstacle:
    """Why a pairing cannot work, and a part of the sentence that its user gets from us."""

    sentence: str
    match: str | None = None


def obstacle(row: Row, family: str) -> Obstacle | None:
    if family == "AutoencoderKL" and row.name in STOCK_LACKS:
        return Obstacle(f"AutoencoderKL has no {STOCK_LACKS[row.name]}")
    if row.name == "Mochi" and family == VIDEO:
        return Obstacle("statistics of 12 channels and 6 frames a latent are built into the pipeline", "12 channels")
    if row.name in ("Wan", "LTX", "CogVideoX", "Mochi") and family != VIDEO:
        return Obstacle("videos, and this is an autoencoder of images", "autoencoder of images")
    return None


STOCK_LACKS = {
    "Sana": "encoder_block_out_channels",
    "SanaSprint": "encoder_block_out_channels",
    "SanaSprintImg2Img": "encoder_block_out_channels",
    "QwenImage": "temperal_downsample",
    "Wan": "scale_factor_temporal and no axis of time",
    "LTX": "axis of time",
    "CogVideoX": "axis of time",
    "Mochi": "axis of time",
}


@dataclass(frozen=True)
class Facts:
    """What a cell showed.

    ``sizes`` are pairs of the pixels that were asked for and that came; ``same`` is whether a seed gives its picture
    again, ``differs`` whether another seed gives another; ``reloaded`` is the largest difference after saving and
    opening, of values in [0, 1].
    """

    sizes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    finite: bool
    spread: float
    same: bool
    differs: bool
    reloaded: float
    classes: tuple[str, str]

    @property
    def works(self) -> bool:
        right = all(asked == came for asked, came in self.sizes) and self.classes[0] == self.classes[1]
        return right and self.finite and self.spread > 1e-3 and self.same and self.differs and self.reloaded <= 1e-4


def vae_of(row: Row, family: str) -> Any:
    return autoencoder(family, row.channels, row.ratio, row.statistics)


def build(row: Row, vae: Any, height: int = 32, width: int = 64) -> tuple[Any, Parts]:
    """The pipeline with this autoencoder, and its parts."""
    torch.manual_seed(0)
    parts = row.make(vae, height, width)
    for part in parts.modules.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipeline = parts.cls(vae=vae, **parts.modules, **dict.fromkeys(parts.absent), **parts.load)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, parts


def pictures(row: Row, pipeline: Any, call: dict[str, Any], height: int, width: int, seed: int = 0) -> Tensor:
    """Two steps: (B, 3, H, W), or of videos (B, T, 3, H, W), in [0, 1]."""
    size = dict(height=height, width=width) if row.sized else {}
    generator = torch.Generator().manual_seed(seed)
    form = "np" if row.name == "DiT" else "pt"  # which has no other
    output = pipeline(**call, **size, num_inference_steps=2, generator=generator, output_type=form)
    made = torch.as_tensor(output.frames if hasattr(output, "frames") else output.images)
    return made.permute(0, 3, 1, 2) if form == "np" else made


def run_cell(row: Row, family: str, folder: str) -> Facts:
    """Run a pipeline with an autoencoder of a family, save it to a folder, open it and run it again."""
    vae = vae_of(row, family)
    pipeline, parts = build(row, vae)
    first = pictures(row, pipeline, parts.call, 32, 64)
    torch.rand(7)  # the global state has no say
    same = torch.equal(pictures(row, pipeline, parts.call, 32, 64), first)
    other = pictures(row, pipeline, parts.call, 32, 64, seed=1)
    square = pictures(row, pipeline, row.make(vae, 32, 32).call, 32, 32)
    pipeline.save_pretrained(folder)
    again = parts.cls.from_pretrained(folder, **dict.fromkeys(parts.absent), **parts.load)
    again.set_progress_bar_config(disable=True)
    reloaded = pictures(row, again, parts.call, 32, 64)
    return Facts(
        sizes=((expected(row, vae, 32, 64), tuple(first.shape)), (expected(row, vae, 32, 32), tuple(square.shape))),
        finite=bool(first.isfinite().all()),
        spread=float(first.std()),
        same=same,
        differs=not torch.equal(other, first),
        reloaded=float((reloaded - first).abs().max()),
        classes=(type(vae).__name__, type(again.vae).__name__),
    )


def expected(row: Row, vae: Any, height: int, width: int) -> tuple[int, ...]:
    """The shape that a caller may count on."""
    if row.name == "DiT":  # whose size is that of its transformer
        height = width = 4 * 2 ** (len(vae.config.block_out_channels) - 1)
    frames = () if not row.video else (2,) if row.name in ("AnimateDiff", "StableVideoDiffusion") else (FRAMES,)
    return (1, *frames, 3, height, width)
