"""Named configurations of every family, published or ours, as data. A new family adds its lines here."""

import importlib
import threading
from dataclasses import dataclass, field
from typing import Any

import torch

from latentae.errors import RequestError
from latentae.families.base import Autoencoder, count_halves

_SEEDING = threading.Lock()  # the global generator is seeded for a moment
DCAE_PAPER = "DC-AE (arXiv 2410.10733)"
SANA_PAPER = "SANA (arXiv 2410.10629)"
DCAE_LITE = "DC-AE-Lite (DC-Gen repository)"
DCAE15_PAPER = "DC-AE 1.5 (arXiv 2508.00413)"
LITEVAE_PAPER = "LiteVAE (arXiv 2405.14477)"
DITO_PAPER = "DiTo (arXiv 2501.18593)"


@dataclass(frozen=True)
class Preset:
    """One named configuration.

    ``hub_id`` names published weights, in diffusers' format where they exist in it; None for configurations of ours.
    """

    name: str
    family: str
    config: dict[str, Any] = field(repr=False)
    source: str
    hub_id: str | None = None

    @property
    def is_tiny(self) -> bool:
        return self.name.endswith("-tiny")


def _stages(shallow: str, deep: str, stages: int) -> tuple[str, ...]:
    return (shallow,) * 3 + (deep,) * (stages - 3)


def _dcae_in(latent_channels: int, widths: tuple[int, ...], scaling_factor: float) -> dict[str, Any]:
    """ImageNet and mixture models: BatchNorm and ReLU in the decoder's shallow stages, single-scale attention."""
    stages = len(widths)
    return dict(
        latent_channels=latent_channels,
        encoder_block_types=_stages("ResBlock", "EfficientViTBlock", stages),
        decoder_block_types=_stages("ResBlock", "EfficientViTBlock", stages),
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(0, 4, 8) + (2,) * (stages - 3),
        decoder_layers_per_block=(0, 5, 10) + (2,) * (stages - 3),
        encoder_qkv_multiscales=((),) * stages,
        decoder_qkv_multiscales=((),) * stages,
        decoder_norm_types=_stages("batch_norm", "rms_norm", stages),
        decoder_act_fns=_stages("relu", "silu", stages),
        scaling_factor=scaling_factor,
    )


def _dcae_structured(widths: tuple[int, ...], scaling_factor: float) -> dict[str, Any]:
    """DC-AE 1.1 and 1.5: residual blocks throughout, no shortcut around the latent."""
    stages = len(widths)
    depths = (0, 5, 10) + (4,) * (stages - 3)
    return dict(
        latent_channels=128,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=depths,
        decoder_layers_per_block=depths,
        encoder_qkv_multiscales=((),) * stages,
        decoder_qkv_multiscales=((),) * stages,
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
        decoder_conv_act_fn="silu",
        scaling_factor=scaling_factor,
    )


def _dcae_small(latent_channels: int, widths: tuple[int, ...], depth: int) -> dict[str, Any]:
    stages = len(widths)
    return dict(
        latent_channels=latent_channels,
        attention_head_dim=16,
        encoder_block_types=("ResBlock",) * (stages - 1) + ("EfficientViTBlock",),
        decoder_block_types=("ResBlock",) * (stages - 1) + ("EfficientViTBlock",),
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(0,) + (depth,) * (stages - 1),
        decoder_layers_per_block=(0,) + (depth,) * (stages - 1),
        encoder_qkv_multiscales=((),) * stages,
        decoder_qkv_multiscales=((),) * stages,
        decoder_conv_act_fn="silu",
    )


# Widths of feature extractors and aggregator, and their factors. M and L are for quality, not for speed.
LITEVAE_SIZES = {
    "s": ((16, (1, 2, 2)), (16, (1, 2, 2))),
    "b": ((32, (1, 2, 3)), (32, (1, 2, 3))),
    "m": ((64, (1, 2, 4)), (32, (1, 2, 3))),
    "l": ((64, (1, 2, 4)), (64, (1, 2, 4))),
}


def _litevae(size: str, levels: int, latent_channels: int) -> dict[str, Any]:
    (extractor, extractor_factors), (aggregator, aggregator_factors) = LITEVAE_SIZES[size]
    return dict(
        latent_channels=latent_channels,
        levels=levels,
        extractor_channels=extractor,
        extractor_multipliers=extractor_factors,
        aggregator_channels=aggregator,
        aggregator_multipliers=aggregator_factors,
        decoder_block_out_channels=(128, 256) + (512,) * (levels - 1),
    )


LITEVAE_TINY = dict(
    latent_channels=4,
    extractor_channels=8,
    extractor_multipliers=(1, 2),
    aggregator_channels=8,
    aggregator_multipliers=(1, 2),
    layers_per_block=1,
    decoder_block_out_channels=(8, 16, 16, 32),
    decoder_layers_per_block=1,
    norm_num_groups=8,
)

# Widths of the denoiser: 162.8, 338.5 and 620.9 million parameters. GLPTo is the paper's baseline of equal networks.
DITO_SIZES = {"b": (128, 256, 512, 512), "l": (192, 384, 768, 768), "xl": (320, 640, 1024, 1024)}
GLPTO = dict(prediction="pixels", num_inference_steps=1)
DITO_TINY = dict(
    encoder_widths=(8, 16, 16, 32),
    encoder_layers=1,
    mid_block_add_attention=False,
    norm_num_groups=8,
    decoder_widths=(16, 32, 32),
    decoder_layers=1,
    patch_size=2,
    num_inference_steps=4,
)
SWYCC_TINY = dict(
    widths=(8, 16, 16, 32),
    layers=1,
    decoder_widths=(16, 32, 32),
    decoder_layers=1,
    patch_size=2,
    num_inference_steps=2,
)

F32 = (128, 256, 512, 512, 1024, 1024)
F64 = (*F32, 2048)
F128 = (*F64, 2048)
SANA_ENCODER = dict(
    latent_channels=32,
    encoder_block_types=_stages("ResBlock", "EfficientViTBlock", 6),
    encoder_block_out_channels=F32,
    encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
    encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
    downsample_block_type="conv",
    scaling_factor=0.41407,
)
SANA = dict(
    **SANA_ENCODER,
    decoder_block_types=_stages("ResBlock", "EfficientViTBlock", 6),
    decoder_block_out_channels=F32,
    decoder_layers_per_block=(3,) * 6,
    decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
    upsample_block_type="interpolate",
)
SANA_LITE = dict(
    **SANA_ENCODER,
    decoder_block_types="ResBlock",
    decoder_block_out_channels=F32,
    decoder_layers_per_block=(0, 3, 5, 4, 4, 4),
    decoder_qkv_multiscales=((),) * 6,
    decoder_conv_act_fn="silu",
)

FOURPLANE_PAPER = "ours, after the four-plane autoencoder (arXiv 2412.04452)"
FOURPLANE_TINY = dict(
    plane_channels=4,
    temporal_compression=2,
    block_out_channels=(8, 16, 16),
    layers_per_block=1,
    norm_num_groups=4,
    window_frames=9,
    window_overlap=2,
)
F4, F16 = (128, 256, 512), (128, 256, 256, 512, 512)  # widths of the Stable Diffusion VAE's kind

_MIT = "mit-han-lab/{}-diffusers"
_PRESETS = [
    Preset("dc-ae-f32c32-in-1.0", "DCAE", _dcae_in(32, F32, 0.3189), DCAE_PAPER, _MIT),
    Preset("dc-ae-f32c32-mix-1.0", "DCAE", _dcae_in(32, F32, 0.4552), DCAE_PAPER, _MIT),
    Preset("dc-ae-f64c128-in-1.0", "DCAE", _dcae_in(128, F64, 0.2889), DCAE_PAPER, _MIT),
    Preset("dc-ae-f64c128-mix-1.0", "DCAE", _dcae_in(128, F64, 0.4538), DCAE_PAPER, _MIT),
    Preset("dc-ae-f128c512-in-1.0", "DCAE", _dcae_in(512, F128, 0.4883), DCAE_PAPER, _MIT),
    Preset("dc-ae-f128c512-mix-1.0", "DCAE", _dcae_in(512, F128, 0.3620), DCAE_PAPER, _MIT),
    Preset("dc-ae-f32c32-sana-1.0", "DCAE", SANA, SANA_PAPER, _MIT),
    Preset("dc-ae-f32c32-sana-1.1", "DCAE", SANA, SANA_PAPER, _MIT),
    Preset("dc-ae-lite-f32c32", "DCAE", SANA_LITE, DCAE_LITE, "dc-ai/{}-diffusers"),
    Preset("dc-ae-f32c128-1.1", "DCAE", _dcae_structured(F32, 1.0), DCAE15_PAPER, "dc-ai/{}"),
    Preset("dc-ae-f32c128-1.5", "DCAE", _dcae_structured(F32, 1.0), DCAE15_PAPER, "dc-ai/{}"),
    Preset("dc-ae-f64c128-1.5", "DCAE", _dcae_structured((*F32, 1024), 0.5935), DCAE15_PAPER, "dc-ai/{}"),
    Preset("dc-ae-f8c16-small", "DCAE", _dcae_small(16, (32, 32, 64, 128), 1), "ours, for the demo"),
    Preset("dc-ae-tiny", "DCAE", _dcae_small(8, (16, 16, 32, 32), 1), "ours, for tests"),
    *[
        Preset(f"litevae-{size}-f8c{channels}", "LiteVAE", _litevae(size, 3, channels), LITEVAE_PAPER)
        for channels in (12, 4)
        for size in LITEVAE_SIZES
    ],
    Preset("litevae-b-f16c16", "LiteVAE", _litevae("b", 4, 16), "ours, after LiteVAE"),
    Preset("litevae-b-f32c32", "LiteVAE", _litevae("b", 5, 32), "ours, after LiteVAE"),
    Preset("litevae-tiny", "LiteVAE", LITEVAE_TINY, "ours, for tests"),
    *[Preset(f"dito-{size}-f8c4", "DiTo", dict(decoder_widths=w), DITO_PAPER) for size, w in DITO_SIZES.items()],
    *[
        Preset(f"glpto-{size}-f8c4", "DiTo", dict(decoder_widths=widths, **GLPTO), DITO_PAPER)
        for size, widths in DITO_SIZES.items()
    ],
    Preset("dito-tiny", "DiTo", DITO_TINY, "ours, for tests"),
    Preset("swycc-f8c4", "SWYCC", {}, "ours, after SWYCC (arXiv 2409.02529)"),
    Preset("swycc-f8c16", "SWYCC", dict(latent_channels=16), "ours, after SWYCC (arXiv 2409.02529)"),
    Preset("swycc-tiny", "SWYCC", SWYCC_TINY, "ours, for tests"),
    Preset("fourplane-t4f8c8", "FourPlane", {}, FOURPLANE_PAPER),
    Preset("fourplane-t2f8c8", "FourPlane", dict(temporal_compression=2), FOURPLANE_PAPER),
    Preset("fourplane-t1f8c8", "FourPlane", dict(temporal_compression=1, window_frames=16), FOURPLANE_PAPER),
    Preset("fourplane-t4f8c8-endpoints", "FourPlane", dict(time_weights="endpoints"), FOURPLANE_PAPER),
    Preset("fourplane-t4f4c8", "FourPlane", dict(block_out_channels=F4), FOURPLANE_PAPER),
    Preset("fourplane-t4f16c16", "FourPlane", dict(block_out_channels=F16, plane_channels=16), FOURPLANE_PAPER),
    Preset("triplane-t4f8c8", "FourPlane", dict(spatial_planes=1), "ours, the baseline of four planes"),
    Preset("volume-t4f8c4", "FourPlane", dict(spatial_planes=0, plane_channels=4), "ours, the control of four planes"),
    Preset("fourplane-tiny", "FourPlane", FOURPLANE_TINY, "ours, for tests"),
    Preset("fourplane-endpoints-tiny", "FourPlane", {**FOURPLANE_TINY, "time_weights": "endpoints"}, "ours, for tests"),
]
PRESETS = {preset.name: preset for preset in _PRESETS}


def presets() -> list[str]:
    """The names of every preset, in the order of the families."""
    return list(PRESETS)


def find_preset(name: str) -> Preset:
    """The preset called ``name``; raises RequestError with the nearest names if there is none."""
    if name not in PRESETS:
        from difflib import get_close_matches

        near = get_close_matches(name, PRESETS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise RequestError(f"There is no preset {name!r}; {hint}'latentae presets' lists all.")
    preset = PRESETS[name]
    hub_id = preset.hub_id.format(name) if preset.hub_id else None
    return Preset(preset.name, preset.family, preset.config, preset.source, hub_id)


def family_class(family: str) -> type[Autoencoder]:
    return getattr(importlib.import_module("latentae"), family)


def create(name: str, *, seed: int = 0, **overrides: Any) -> Autoencoder:
    """A new autoencoder of a preset with random weights, in eval mode.

    Args:
        name: one of `presets()`.
        seed: of the weights; the global random state is left as it was.
        overrides: configuration arguments that differ from the preset's.

    Raises:
        RequestError: no such preset, or no such argument.
    """
    preset = find_preset(name)
    cls = family_class(preset.family)
    if unknown := set(overrides) - cls._init_arguments():
        raise RequestError(f"{preset.family} has no argument {', '.join(sorted(unknown))}.")
    with _SEEDING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(**{**preset.config, **overrides}).eval()


def describe(name: str) -> dict[str, Any]:
    """What a preset is, without allocating its weights: compression, channels, parameters, steps, source, hub id."""
    preset = find_preset(name)
    with torch.device("meta"):
        autoencoder = create(name)
    millions = {half: count / 1e6 for half, count in count_halves(autoencoder).items()}
    return {
        "name": name,
        "family": preset.family,
        "latents": autoencoder.compression,
        "encoder_millions": round(millions["encoder"], 2),
        "decoder_millions": round(millions["decoder"], 2),
        "decode_steps": autoencoder.config["num_inference_steps"] if autoencoder.samples else None,
        "source": preset.source,
        "hub_id": preset.hub_id,
    }
