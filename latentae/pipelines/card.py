"""The model card of an exported pipeline: what it draws, from which latents, and how to run it."""

from pathlib import Path
from typing import Any

from latentae.loading.card import MARK
from latentae.loading.diffusion import LatentDiffusion
from latentae.version import __version__

CARD = """\
---
library_name: diffusers
tags: [latent-diffusion, flow-matching, latentae]
---
{mark}

# {name}

A {transformer} that predicts the velocity of the linear path from latents to noise, and the autoencoder of
these latents.

| | |
|---|---|
{rows}

## Run it

```python
{opening}
{call}
```
{note}
Exported by latentae {version}.
"""


def write_pipeline_card(
    diffusion: LatentDiffusion, autoencoder: Any, folder: Path, opens_as: str, needs_latentae: bool
) -> None:
    """Write ``README.md``, unless there is one that somebody has made their own."""
    path = folder / "README.md"
    if path.is_file() and MARK not in path.read_text(encoding="utf-8"):
        return
    about = diffusion.describe()
    rows = {
        "classes": about["classes"],
        "latents": about["latents"],
        "denoiser": f"{about['parameters'] / 1e6:.2f} M parameters",
        "autoencoder": type(autoencoder).__name__,
    }
    if diffusion.autoencoder_sha256:
        rows["weights of the autoencoder in training"] = f"sha256 `{diffusion.autoencoder_sha256}`"
    path.write_text(
        CARD.format(
            mark=MARK,
            name=folder.name or opens_as,
            transformer=about["class"],
            rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
            opening=_opening(opens_as, needs_latentae),
            call=_call(opens_as, diffusion),
            note=_note(opens_as),
            version=__version__,
        ),
        encoding="utf-8",
    )


def _opening(opens_as: str, needs_latentae: bool) -> str:
    if opens_as == "DiTPipeline":
        imports = "from diffusers import DiTPipeline"
        if needs_latentae:
            imports = "import latentae  # whose class the autoencoder is\n" + imports
        return f'{imports}\npipe = DiTPipeline.from_pretrained("FOLDER")'
    return f'import latentae\npipe = latentae.{opens_as}.from_pretrained("FOLDER")'


def _call(opens_as: str, diffusion: LatentDiffusion) -> str:
    classes = diffusion.denoiser.num_classes
    if opens_as == "DiTPipeline":
        guidance = "guidance_scale=1.0" if classes == 1 else "guidance_scale=4.0"
        return f"image = pipe(class_labels=[0], {guidance}, num_inference_steps=50).images[0]"
    of_class = "" if classes == 1 else "class_labels=0, guidance_scale=4.0"
    if diffusion.layout is None:
        return f"image = pipe({of_class}).images[0]"
    calls = [f"frames = pipe({of_class}).frames[0]  # a clip, as a list of PIL images"]
    if "first" in diffusion.given:
        calls.append("frames = pipe(image=frames[0]).frames[0]  # what follows on a first frame")
    if "both" in diffusion.given:
        calls.append("frames = pipe(image=frames[0], last_image=frames[-1]).frames[0]  # what lies between")
    return "\n".join(calls)


def _note(opens_as: str) -> str:
    if opens_as != "DiTPipeline":
        return ""
    return (
        "\nDiTPipeline has 1000 classes; those that the denoiser does not know draw images of no class. Its schedulers "
        "round\ntimes to thousandths, so images differ slightly from those of the pipeline of latentae.\n"
    )
