"""Diffusion decoders as the ``vae`` of stock pipelines, with small denoisers of random weights.

Most of these pipelines pass no generator to ``decode``, and none a number of steps: still their own generator fixes the
image, and a saved pipeline gives it again.
"""

import diffusers
import pytest
import torch

import latentae
from latentae.families.presets import create

WIDTH, TOKENS = 8, 4


def prompt(channels: int = WIDTH, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randn(1, tokens, channels, generator=torch.Generator().manual_seed(1))


def pooled(channels: int = WIDTH) -> torch.Tensor:
    return torch.randn(1, channels, generator=torch.Generator().manual_seed(2))


def unet(channels, **options):
    return diffusers.UNet2DConditionModel(
        sample_size=4, in_channels=channels, out_channels=channels, block_out_channels=(8, 8), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=4, **options,
    )  # fmt: skip


def stable_diffusion(channels):
    return diffusers.StableDiffusionPipeline, dict(
        unet=unet(channels), scheduler=diffusers.DDIMScheduler(),
        absent=("text_encoder", "tokenizer", "safety_checker", "feature_extractor"),
        call=dict(prompt_embeds=prompt(), negative_prompt_embeds=-prompt()), load=dict(requires_safety_checker=False),
    )  # fmt: skip


def stable_diffusion_xl(channels):
    network = unet(
        channels, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + WIDTH,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline, dict(
        unet=network, scheduler=diffusers.DDIMScheduler(),
        absent=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
        call=dict(
            prompt_embeds=prompt(), negative_prompt_embeds=-prompt(), pooled_prompt_embeds=pooled(),
            negative_pooled_prompt_embeds=-pooled(),
        ),
        load=dict(add_watermarker=False),
    )  # fmt: skip


def stable_diffusion_3(channels):
    network = diffusers.SD3Transformer2DModel(
        sample_size=4, patch_size=1, in_channels=channels, num_layers=1, attention_head_dim=4, num_attention_heads=2,
        caption_projection_dim=8, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, out_channels=channels,
    )  # fmt: skip
    encoders = [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
    return diffusers.StableDiffusion3Pipeline, dict(
        transformer=network, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), absent=encoders,
        call=dict(
            prompt_embeds=prompt(), negative_prompt_embeds=-prompt(), pooled_prompt_embeds=pooled(),
            negative_pooled_prompt_embeds=-pooled(),
        ),
    )  # fmt: skip


def flux(channels):
    network = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4 * channels, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return diffusers.FluxPipeline, dict(
        transformer=network, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        absent=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
        call=dict(prompt_embeds=prompt(), pooled_prompt_embeds=pooled()),
    )  # fmt: skip


def sana(channels):
    network = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=channels, out_channels=channels, num_layers=1, num_attention_heads=2,
        attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8,
        caption_channels=WIDTH, sample_size=32,
    )  # fmt: skip
    mask = torch.ones(1, TOKENS, dtype=torch.long)
    return diffusers.SanaPipeline, dict(
        transformer=network, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        absent=("text_encoder", "tokenizer"),
        call=dict(
            prompt_embeds=prompt(), negative_prompt_embeds=-prompt(), prompt_attention_mask=mask,
            negative_prompt_attention_mask=mask, negative_prompt=None, use_resolution_binning=False,
        ),
    )  # fmt: skip


def dit(channels):
    network = diffusers.DiTTransformer2DModel(
        sample_size=4, num_layers=1, patch_size=2, attention_head_dim=4, num_attention_heads=2, in_channels=channels,
        out_channels=2 * channels, num_embeds_ada_norm=1000, norm_elementwise_affine=False,
    )  # fmt: skip
    return diffusers.DiTPipeline, dict(
        transformer=network, scheduler=diffusers.DDIMScheduler(), absent=(), call=dict(class_labels=[3]), sized=False
    )


PIPELINES = [stable_diffusion, stable_diffusion_xl, stable_diffusion_3, flux, sana, dit]
CASES = [pytest.param(make, "dito-tiny", id=f"{make.__name__}-dito") for make in PIPELINES] + [
    pytest.param(make, "swycc-tiny", id=f"{make.__name__}-swycc", marks=[] if make is flux else [pytest.mark.slow])
    for make in PIPELINES
]


def picture(pipeline, call, sized, seed=0):
    pipeline.set_progress_bar_config(disable=True)
    size = dict(height=32, width=64) if sized else {}
    generator = torch.Generator().manual_seed(seed)
    output = "pt" if sized else "np"
    images = pipeline(**call, **size, num_inference_steps=2, generator=generator, output_type=output).images
    return torch.as_tensor(images) if sized else torch.as_tensor(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("make", "name"), CASES)
def test_the_generator_of_a_pipeline_fixes_the_image_and_saving_keeps_it(make, name, randomise, tmp_path):
    vae = randomise(create(name))
    cls, parts = make(vae.latent_channels)
    absent = {part: None for part in parts.pop("absent")}
    load, call, sized = parts.pop("load", {}), parts.pop("call"), parts.pop("sized", True)
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline = cls(vae=vae, **parts, **absent, **load)
    first = picture(pipeline, call, sized)
    assert first.shape == ((1, 3, 32, 64) if sized else (1, 3, 32, 32))
    assert first.isfinite().all()
    assert first.std() > 0.01
    torch.rand(7)  # the global state has no say
    assert torch.equal(picture(pipeline, call, sized), first)
    assert not torch.equal(picture(pipeline, call, sized, seed=1), first)

    pipeline.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path, **absent, **load)
    assert type(again.vae) is type(vae)
    torch.testing.assert_close(picture(again, call, sized), first, atol=1e-4, rtol=1e-3)
    assert isinstance(latentae.load(tmp_path), type(vae))
