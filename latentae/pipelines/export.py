"""Folders of pipelines from a denoiser that was trained here and the autoencoder of its latents."""

import copy
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import nn

from latentae.codec import LatentCodec
from latentae.denoisers import Denoiser
from latentae.errors import RequestError
from latentae.families.base import Autoencoder
from latentae.files import read_json, write_json
from latentae.loading import export
from latentae.loading.diffusion import LatentDiffusion
from latentae.loading.export import STOCK_CLASS, full_disks
from latentae.nn.padding import padding_mode
from latentae.pipelines.card import write_pipeline_card
from latentae.pipelines.flow import ClassConditionalFlowPipeline
from latentae.pipelines.planes import PlaneFlowPipeline

STOCK_CLASSES = 1000  # of DiTPipeline, whose label for "none" is this number
INSTEAD = "make the pipeline of latentae (--pipeline flow)"


def flow_pipeline(diffusion: LatentDiffusion, autoencoder: Any) -> ClassConditionalFlowPipeline | PlaneFlowPipeline:
    """The pipeline that samples any latent diffusion of ours: of planes clips, else images.

    Raises:
        RequestError: the autoencoder has latents of other channels, or other planes.
    """
    denoiser = diffusion.denoiser
    if diffusion.layout is not None:
        return PlaneFlowPipeline(
            transformer=denoiser.transformer,
            vae=autoencoder,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            latents_mean=diffusion.mean.tolist(),
            latents_std=diffusion.std.tolist(),
            id2label=diffusion.labels,
            given=list(diffusion.given),
        )
    return ClassConditionalFlowPipeline(
        transformer=denoiser.transformer,
        vae=autoencoder,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        class_embedder=denoiser.class_embedder,
        latents_mean=diffusion.mean.tolist(),
        latents_std=diffusion.std.tolist(),
        latent_size=list(denoiser.latent_shape[1:]),
        id2label=diffusion.labels,
    )


def dit_pipeline(diffusion: LatentDiffusion, autoencoder: Any) -> DiTPipeline:
    """Stock ``DiTPipeline`` that samples the same, by DPM-Solver++ of second order.

    It has 1000 classes and calls "none" 1000, so tables of fewer classes are filled up with "none"; and it has one
    scale for all of the latents, which goes into the configuration of the autoencoder.

    Args:
        autoencoder: changed in its ``scaling_factor``.

    Raises:
        RequestError: `DiTPipeline` cannot express this.
    """
    scale = check_dit(diffusion, autoencoder)
    autoencoder.register_to_config(scaling_factor=scale)
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    return DiTPipeline(
        transformer=_with_stock_classes(diffusion.denoiser),
        vae=autoencoder,
        scheduler=scheduler,
        id2label=_stock_names(diffusion),
    )


def check_dit(diffusion: LatentDiffusion, autoencoder: Any) -> float:
    """The scaling factor with which `DiTPipeline` can sample this.

    Raises:
        RequestError: it cannot, with the reason.
    """
    denoiser, cls = diffusion.denoiser, type(autoencoder).__name__
    if not isinstance(denoiser.transformer, DiTTransformer2DModel):
        kind = type(denoiser.transformer).__name__
        raise RequestError(f"DiTPipeline runs DiTTransformer2DModel, and the denoiser is a {kind}: {INSTEAD}.")
    if denoiser.num_classes > STOCK_CLASSES:
        raise RequestError(f"DiTPipeline knows at most 1000 classes, these are {denoiser.num_classes}: {INSTEAD}.")
    if diffusion.mean.abs().max() > 0 or diffusion.std.max() > diffusion.std.min():
        raise RequestError(
            "DiTPipeline scales all latents by one number and shifts none, and this denoiser's have a mean and a "
            f"standard deviation for each channel: {INSTEAD}, or train with one scale (model.normalisation model)."
        )
    codec = LatentCodec(autoencoder)
    if codec.is_video or "scaling_factor" not in autoencoder.config:
        raise RequestError(f"DiTPipeline decodes images by one scaling_factor, which {cls} does not have: {INSTEAD}.")
    if codec.latent_channels != denoiser.latent_shape[0]:
        raise RequestError(
            f"The denoiser draws latents of {denoiser.latent_shape[0]} channels, {cls} decodes "
            f"{codec.latent_channels}: use the autoencoder whose latents it was trained on."
        )
    if padding_mode(autoencoder) != "zeros":
        raise RequestError(f"DiTPipeline cannot restore the autoencoder's reflect padding: {INSTEAD}.")
    return 1 / diffusion.std[0].item()


def export_pipeline(
    diffusion: LatentDiffusion, autoencoder: nn.Module, folder: str | Path, kind: str = "flow"
) -> tuple[str, bool]:
    """Write the folder of a pipeline with a model card: ``kind`` flow for ours, dit for stock `DiTPipeline`.

    Returns:
        The class that opens the folder, and whether ``import latentae`` must come before.

    Raises:
        RequestError: the stock pipeline cannot express it, or the autoencoder does not fit.
    """
    folder = Path(folder)
    vae: Any = autoencoder.folded() if isinstance(autoencoder, Autoencoder) else autoencoder
    if kind == "dit":
        check_dit(diffusion, autoencoder)
        vae = _stock(autoencoder, folder / "vae")
        pipeline: Any = dit_pipeline(diffusion, vae)
    else:
        pipeline = flow_pipeline(diffusion, vae)
    with full_disks(folder):
        pipeline.save_pretrained(folder)
    if kind == "dit" and diffusion.labels:  # which DiTPipeline reads and does not write
        index = folder / "model_index.json"
        write_json(index, {**read_json(index), "id2label": _stock_names(diffusion)})
    needs_latentae = kind == "flow" or isinstance(vae, Autoencoder)
    write_pipeline_card(diffusion, vae, folder, type(pipeline).__name__, needs_latentae)
    return type(pipeline).__name__, needs_latentae


def _stock(autoencoder: Any, folder: Path) -> Any:
    """A copy of the autoencoder, of the stock class where there is one, by way of its folder."""
    opens_as = export(autoencoder, folder)
    (folder / "README.md").unlink()  # the pipeline's is one floor above
    if opens_as in STOCK_CLASS.values():
        return getattr(diffusers, opens_as).from_pretrained(folder).eval()
    return type(autoencoder).from_pretrained(folder).eval()


def _with_stock_classes(denoiser: Denoiser) -> Any:
    """The transformer with tables of 1000 classes and one row for "none", which also fills up what is not used."""
    if denoiser.num_classes == STOCK_CLASSES:
        return denoiser.transformer
    none, known = int(denoiser.null_labels(1)), denoiser.num_classes
    config = {**denoiser.transformer.config, "num_embeds_ada_norm": STOCK_CLASSES}
    weights = copy.copy(denoiser.transformer.state_dict())
    for name, table in weights.items():
        if name.endswith("class_embedder.embedding_table.weight"):
            weights[name] = torch.cat([table[:known], table[none].expand(STOCK_CLASSES + 1 - known, -1)])
    with torch.random.fork_rng():  # that draws weights to be replaced
        transformer = DiTTransformer2DModel.from_config(config)
    transformer.load_state_dict(weights, assign=True)
    return transformer.eval()


def _stock_names(diffusion: LatentDiffusion) -> dict[int, str] | None:
    return {int(key): name for key, name in diffusion.labels.items()} if diffusion.labels else None
