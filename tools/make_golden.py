"""Regenerate tests/golden/efficientvit.json from the DC-AE authors' own code.

    python tools/make_golden.py CHECKOUT_OF_DC_GEN     (needs omegaconf)

Weights are a formula of their position, so the file holds no weights: only the names and shapes that their code gives
to four reduced models, and samples of what those models compute. Their norm kernel needs a GPU; its arithmetic is
replaced by the plain formula.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "efficientvit.json"
SMALL = "width_list=[16,32,64,64,128,128]"
SANA_ENCODER = (
    "latent_channels=32 encoder.block_type=[ResBlock,ResBlock,ResBlock,EViTS5GLU,EViTS5GLU,EViTS5GLU] "
    f"encoder.{SMALL} encoder.downsample_block_type=Conv "
)
MODELS = {
    "in": "latent_channels=32 encoder.block_type=[ResBlock,ResBlock,ResBlock,EViTGLU,EViTGLU,EViTGLU] "
    f"encoder.{SMALL} encoder.depth_list=[0,1,2,1,1,1] "
    f"decoder.block_type=[ResBlock,ResBlock,ResBlock,EViTGLU,EViTGLU,EViTGLU] decoder.{SMALL} "
    "decoder.depth_list=[0,2,1,1,1,1] decoder.norm=[bn2d,bn2d,bn2d,trms2d,trms2d,trms2d] "
    "decoder.act=[relu,relu,relu,silu,silu,silu]",
    "sana": f"{SANA_ENCODER} encoder.depth_list=[1,1,1,1,1,2] "
    f"decoder.block_type=[ResBlock,ResBlock,ResBlock,EViTS5GLU,EViTS5GLU,EViTS5GLU] decoder.{SMALL} "
    "decoder.depth_list=[1,1,1,2,1,1] decoder.upsample_block_type=InterpolateConv decoder.norm=trms2d decoder.act=silu",
    "1.5": f"latent_channels=32 encoder.block_type=ResBlock encoder.out_shortcut=null encoder.{SMALL} "
    "encoder.depth_list=[0,1,1,1,1,1] encoder.out_block_type=AdaptiveOutputConvLayer decoder.block_type=ResBlock "
    f"decoder.in_shortcut=null decoder.out_act=silu decoder.{SMALL} decoder.depth_list=[0,1,1,1,1,1] "
    "decoder.in_block_type=AdaptiveInputConvLayer",
    "lite": f"{SANA_ENCODER} encoder.depth_list=[1,1,1,1,1,1] decoder.block_type=ResBlock decoder.{SMALL} "
    "decoder.depth_list=[0,1,1,1,1,1] decoder.out_act=silu",
}


def formula_weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Weights for the given names and shapes from a formula of name order and position, of sensible size."""
    weights = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.zeros(shape, dtype=torch.long)
            continue
        position = torch.arange(math.prod(shape), dtype=torch.float64)
        value = torch.frac(torch.sin(position * 12.9898 + i * 78.233).mul(43758.5453) + 50000) - 0.5
        if "running_var" in name:
            value = value + 1
        elif len(shape) == 1:
            is_norm = name.endswith("norm.weight") or "project_out.0.weight" in name
            value = value + 0.5 if is_norm else value * 0.2
        else:
            value = value * 2 * math.sqrt(3 / math.prod(shape[1:]))
        weights[name] = value.reshape(shape).float()
    return weights


def formula_pixels() -> Tensor:
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(96.0), indexing="ij")
    return torch.stack([torch.sin(x / 7 + c) * torch.cos(y / 5 - c) for c in range(3)])[None]


def samples(z: Tensor, pixels: Tensor) -> dict[str, list[float]]:
    return {
        "latents": [round(v, 6) for v in z.flatten()[::13].tolist()],
        "pixels": [round(v, 6) for v in pixels.flatten()[::577].tolist()],
    }


def main(checkout: str) -> None:
    sys.path.insert(0, checkout)
    import dc_gen.models.nn.norm as their_norm
    from omegaconf import OmegaConf

    class PlainRMSNorm(their_norm.REGISTERED_NORM_DICT["trms2d"]):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            y = x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.eps)
            return y * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)

    their_norm.REGISTERED_NORM_DICT["trms2d"] = PlainRMSNorm
    import dc_gen.aecore.models.dc_ae as theirs

    def first(value: Any) -> Tensor:
        return value[0] if isinstance(value, (tuple, list)) else value

    golden = {}
    with torch.no_grad():
        for name, text in MODELS.items():
            config = OmegaConf.merge(OmegaConf.structured(theirs.DCAEConfig), OmegaConf.from_dotlist(text.split()))
            model = theirs.DCAE(OmegaConf.to_object(config)).eval()
            shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
            model.load_state_dict(formula_weights(shapes))
            z = first(model.encode(formula_pixels()))
            golden[name] = {"shapes": shapes, **samples(z, first(model.decode(z)))}
    GOLDEN.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
