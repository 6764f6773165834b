"""The model card of an exported folder: what the autoencoder is, and how to open it."""

import inspect
import sys
from pathlib import Path
from typing import Any

from latentae.families.base import Autoencoder, count_halves
from latentae.families.presets import PRESETS
from latentae.nn.padding import padding_mode
from latentae.version import __version__

OF_USE = (  # what a preset does not settle
    *("scaling_factor", "shift_factor", "latents_mean", "latents_std"),
    *("num_inference_steps", "time_shift_rho", "decode_seed"),
)
MARK = "<!-- Written by latentae export, which writes it anew unless this line is gone. -->"

CARD = """\
---
library_name: diffusers
tags: [autoencoder, latent-diffusion, latentae]
---
{mark}

# {name}

{about}
## Open it

```python
import torch
{opening}
posterior = autoencoder.encode(torch.zeros(1, 3, 256, 256))  # pixels in [-1, 1]
```

`autoencoder` is an ordinary diffusers model, to be passed as the `vae` of a pipeline. A denoiser must be trained on the
latents of this autoencoder, or of one that shares its latent space.

Exported by latentae {version}.
"""

STOCK = """\
from diffusers import {name}
autoencoder = {name}.from_pretrained("FOLDER")"""
WITH_CODE = """\
from diffusers import AutoModel
autoencoder = AutoModel.from_pretrained("FOLDER", trust_remote_code=True)  # read {code} first
# with latentae installed: autoencoder = latentae.load("FOLDER")"""
WITH_PADDING = """\
import latentae
autoencoder = latentae.load("FOLDER")  # restores the reflect padding; stock diffusers pads with zeros: wrong borders"""
WITH_PACKAGE = """\
import latentae
autoencoder = latentae.load("FOLDER")"""


def write_card(autoencoder: Any, folder: Path, opens_as: str, code: str | None) -> None:
    """Write ``README.md``, unless there is one that somebody has made their own.

    Args:
        opens_as: the stock class that opens the folder, or the family's name.
        code: name of the file with the family's code, if it lies beside the weights.
    """
    path = folder / "README.md"
    if path.is_file() and MARK not in path.read_text(encoding="utf-8"):
        return
    ours = isinstance(autoencoder, Autoencoder)
    stock = opens_as != type(autoencoder).__name__ or not ours
    opening = STOCK if stock else WITH_CODE if code else WITH_PACKAGE
    if padding_mode(autoencoder) != "zeros":
        opening = WITH_PADDING
    about = _about(autoencoder) if ours else ""
    name = f"{opens_as} f{autoencoder.spatial_compression_ratio}c{autoencoder.latent_channels}" if ours else opens_as
    text = CARD.format(
        mark=MARK, name=name, about=about, opening=opening.format(name=opens_as, code=code), version=__version__
    )
    path.write_text(text, encoding="utf-8")


def _about(autoencoder: Autoencoder) -> str:
    """The family as its module describes it, and the facts of the configuration."""
    description = sys.modules[type(autoencoder).__init__.__module__].__doc__ or ""
    ratio, channels = autoencoder.spatial_compression_ratio, autoencoder.latent_channels
    rows = {
        "latents": f"f{ratio}c{channels}: (B, {channels}, H/{ratio}, W/{ratio})",
        **{half: f"{count / 1e6:.2f} M parameters" for half, count in count_halves(autoencoder).items()},
    }
    if autoencoder.samples:
        rows["decoding"] = _sampling(autoencoder.config)
    if preset := _preset_of(autoencoder):
        rows = {"configuration": f"`{preset}`, {PRESETS[preset].source}", **rows}
    table = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    return "\n".join([description.partition("\n\n")[0], "", *table, ""])


def _sampling(config: Any) -> str:
    """What a user of a decoder that samples must know."""
    steps, seed = config["num_inference_steps"], config["decode_seed"]
    return (
        f"samples in {steps} step{'s' * (steps > 1)} of the denoiser (`num_inference_steps`), which predicts "
        f"{config['prediction']} on the {config['path']} path; without a generator from one canvas of noise, "
        f"seed {seed}, so that the same latents give the same image"
    )


def _preset_of(autoencoder: Autoencoder) -> str | None:
    """The first preset with this configuration, whatever the scale of the latents and the steps of sampling."""
    arguments = inspect.signature(type(autoencoder).__init__).parameters
    for preset in PRESETS.values():
        if preset.family == type(autoencoder).__name__ and all(
            _plain(autoencoder.config.get(name, argument.default)) == _plain(preset.config.get(name, argument.default))
            for name, argument in arguments.items()
            if name not in ("self", *OF_USE)
        ):
            return preset.name
    return None


def _plain(value: Any) -> Any:
    """Tuples as lists, as they come back from a file."""
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
