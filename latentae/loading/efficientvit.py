"""Checkpoints of the DC-AE authors, in the format of efficientvit and DC-Gen: their keys under our names, and the
configuration read off the shapes.
"""

import re
from typing import Any

import torch
from torch import Tensor

from latentae.errors import RequestError
from latentae.families.dcae import DCAE
from latentae.families.presets import PRESETS, create, find_preset

# Substrings of their keys and ours, applied in this order.
EFFICIENTVIT_KEYS = [
    ("main.", ""),
    ("op_list.", ""),
    ("context_module", "attn"),
    ("local_module", "conv_out"),
    ("aggreg.0.0", "to_qkv_multiscale.0.proj_in"),
    ("aggreg.0.1", "to_qkv_multiscale.0.proj_out"),
    ("depth_conv.conv", "conv_depth"),
    ("inverted_conv.conv", "conv_inverted"),
    ("point_conv.conv", "conv_point"),
    ("point_conv.norm", "norm"),
    ("conv.conv.", "conv."),
    ("conv1.conv", "conv1"),
    ("conv2.conv", "conv2"),
    ("conv2.norm", "norm"),
    ("proj.norm", "norm_out"),
    ("encoder.project_in.", "encoder.conv_in."),
    ("encoder.project_out.0.conv", "encoder.conv_out"),
    ("encoder.project_out.conv", "encoder.conv_out"),
    ("encoder.stages", "encoder.down_blocks"),
    ("decoder.project_in.conv", "decoder.conv_in"),
    ("decoder.project_in.0.conv", "decoder.conv_in"),
    ("decoder.project_out.0", "decoder.norm_out"),
    ("decoder.project_out.2.", "decoder.conv_out."),
    ("decoder.stages", "decoder.up_blocks"),
]


def convert_efficientvit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an efficientvit or DC-Gen DC-AE under the names of our `DCAE` (and ``AutoencoderDC``).

    Raises:
        RequestError: the keys are not those of such a checkpoint.
    """
    halves = ("encoder.stages.", "decoder.stages.", "encoder.project_out.", "decoder.project_in.")
    if not all(any(key.startswith(half) for key in state) for half in halves):
        raise RequestError("This checkpoint is neither one of 'latentae fit' nor a DC-AE of its authors.")
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        for theirs, ours in EFFICIENTVIT_KEYS:
            key = key.replace(theirs, ours)
        # a plain convolution at full resolution carries one level less than a resampling block
        key = re.sub(r"(encoder\.conv_in|decoder\.conv_out)\.conv\.(?=weight|bias)", r"\1.conv.", key)
        if key.endswith(".qkv.conv.weight"):
            for name, third in zip(("to_q", "to_k", "to_v"), value[:, :, 0, 0].chunk(3)):
                converted[key.replace("qkv.conv", name)] = third.clone()
        elif key.endswith(".proj.conv.weight"):
            converted[key.replace("proj.conv", "to_out")] = value[:, :, 0, 0].clone()
        else:
            converted[key] = value
    return converted


def load_efficientvit(state: dict[str, Any], preset: str | None = None) -> DCAE:
    """A `DCAE` from such a checkpoint, in eval mode; ``preset`` names its configuration, else its shapes tell."""
    weights = convert_efficientvit(state.get("state_dict", state))
    return dcae_from_weights(weights, find_preset(preset).config if preset else None).eval()


def dcae_from_weights(weights: dict[str, Tensor], config: dict[str, Any] | None = None) -> DCAE:
    """A `DCAE` around weights that come without a configuration."""
    weights = _name_outer_convolutions(weights)
    autoencoder = DCAE(**(config or infer_dcae_config(weights)))
    missing, unexpected = autoencoder.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise RequestError(f"This DC-AE checkpoint does not fit: missing {missing[:3]}, unexpected {unexpected[:3]}.")
    return autoencoder


def _name_outer_convolutions(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """``conv_in`` and ``conv_out`` are plain convolutions where a stage at full resolution exists, else blocks."""
    renamed = {}
    for key, value in weights.items():
        half, name = key.split(".")[:2]
        stages = "down_blocks.0." if half == "encoder" else "up_blocks.0."
        outer = (half, name) in {("encoder", "conv_in"), ("decoder", "conv_out")}
        if outer and any(k.startswith(f"{half}.{stages}") for k in weights):
            key = key.replace(".conv.", ".")
        renamed[key] = value
    return renamed


def infer_dcae_config(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Read a DC-AE configuration off its weights.

    Shapes give widths, depths, block types, norms, resampling and attention scales. What leaves no trace follows the
    published families: BatchNorm goes with ReLU; nets of residual blocks alone end in SiLU; and if even their deepest
    encoder stages are residual blocks they have no shortcut around the latent. ``scaling_factor`` is that of the first
    preset with this architecture, or 1.
    """

    def half(name: str, blocks: str) -> dict[str, Any]:
        stages: dict[int, dict[int, set[str]]] = {}
        for key in weights:
            if match := re.match(rf"{name}\.{blocks}\.(\d+)\.(\d+)\.(.+)", key):
                stages.setdefault(int(match[1]), {}).setdefault(int(match[2]), set()).add(match[3])
        count = max(stages) + 1
        kinds, depths, norms, scales, widths = [], [], [], [], []
        for i in range(count):
            inner = stages.get(i, {})
            residual = [j for j, keys in inner.items() if "conv1.weight" in keys]
            attention = [j for j, keys in inner.items() if "attn.to_q.weight" in keys]
            kinds.append("EfficientViTBlock" if attention else "ResBlock")
            depths.append(len(residual) + len(attention))
            prefix = f"{name}.{blocks}.{i}.{(residual + attention or [0])[0]}"
            norms.append("batch_norm" if f"{prefix}.norm.running_mean" in weights else "rms_norm")
            kernel = weights.get(f"{prefix}.attn.to_qkv_multiscale.0.proj_in.weight")
            scales.append(() if kernel is None else (kernel.shape[-1],))
            width = weights.get(f"{prefix}.conv1.weight", weights.get(f"{prefix}.attn.to_out.weight"))
            widths.append(None if width is None else width.shape[0])
        widths[0] = widths[0] or widths[1] // 2  # type: ignore[operator]  # unused where the depth is zero
        return dict(kinds=kinds, depths=depths, norms=norms, scales=scales, widths=widths)

    encoder, decoder = half("encoder", "down_blocks"), half("decoder", "up_blocks")
    latent_channels = weights["encoder.conv_out.weight"].shape[0]
    first_down = next(v for k, v in weights.items() if re.fullmatch(r"encoder\.down_blocks\.\d+\.\d+\.conv\.weight", k))
    first_up = next(v for k, v in weights.items() if re.fullmatch(r"decoder\.up_blocks\.\d+\.0\.conv\.weight", k))
    down_stage = next(i for i, d in enumerate(encoder["depths"]) if d)
    up_stage = next(i for i, d in enumerate(decoder["depths"]) if d)
    head = next((v for k, v in weights.items() if k.endswith("to_qkv_multiscale.0.proj_out.weight")), None)
    attention = "EfficientViTBlock" in encoder["kinds"]
    config = dict(
        latent_channels=latent_channels,
        attention_head_dim=32 if head is None else head.shape[1],
        encoder_block_types=tuple(encoder["kinds"]),
        decoder_block_types=tuple(decoder["kinds"]),
        encoder_block_out_channels=tuple(encoder["widths"]),
        decoder_block_out_channels=tuple(decoder["widths"]),
        encoder_layers_per_block=tuple(encoder["depths"]),
        decoder_layers_per_block=tuple(decoder["depths"]),
        encoder_qkv_multiscales=tuple(encoder["scales"]),
        decoder_qkv_multiscales=tuple(decoder["scales"]),
        downsample_block_type="conv" if first_down.shape[0] == encoder["widths"][down_stage + 1] else "pixel_unshuffle",
        upsample_block_type="interpolate" if first_up.shape[0] == decoder["widths"][up_stage] else "pixel_shuffle",
        decoder_norm_types=tuple(decoder["norms"]),
        decoder_act_fns=tuple("relu" if norm == "batch_norm" else "silu" for norm in decoder["norms"]),
        encoder_out_shortcut=attention,
        decoder_in_shortcut=attention,
        decoder_conv_act_fn="relu" if "EfficientViTBlock" in decoder["kinds"] else "silu",
    )
    return {**config, "scaling_factor": _published_scaling_factor(weights)}


def _published_scaling_factor(weights: dict[str, Tensor]) -> float:
    shapes = {key: value.shape for key, value in weights.items()}
    for name, preset in PRESETS.items():
        if preset.family == "DCAE" and preset.hub_id:
            with torch.device("meta"):
                candidate = create(name).state_dict()
            if {key: value.shape for key, value in candidate.items()} == shapes:
                return preset.config["scaling_factor"]
    return 1.0
