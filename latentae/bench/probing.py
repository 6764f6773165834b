"""`latentae probe`: the same small diffusion model on the latents of several codecs, and what it generates."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentae.bench.contestants import Contestant, Model, describe, open_contestants
from latentae.bench.images import ImageSet
from latentae.bench.latent_space import LatentSpace, named_of, split_images
from latentae.bench.probe import ProbeSettings, probe_space
from latentae.bench.probe_report import samples_sheet, sheet_path
from latentae.bench.protocol import describe_machine, versions
from latentae.codec import LatentCodec
from latentae.console import say
from latentae.data.samples import dead_leaves
from latentae.data.sources import Item, ItemTable, Source, open_source, refuse_output_in_input
from latentae.errors import DataError, RequestError
from latentae.files import atomic_write, write_json
from latentae.metrics.sliced_wasserstein import LEAST_BAND
from latentae.store.worker import check_max_bad, refuse_too_many_bad

SCHEMA = 1
SAMPLES = "samples"  # the name of pictures that need no folder
DRAWN = 2500
MOST_TRAINED = 5000


class DeadLeaves:
    """A source of drawn pictures, for which no folder is needed."""

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size

    def items(self) -> ItemTable:
        return ItemTable.of(Item(f"{i:06d}.png", f"dead-leaves:{i}", 0) for i in range(self.count))

    def read(self, item: Item) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(dead_leaves(int(item.key[:6]), self.size)).save(stream, "PNG", compress_level=1)
        return stream.getvalue()


def probe_models(
    data: str | Path | Source,
    models: Sequence[Model | tuple[str, Model]],
    *,
    out: str | Path | None = None,
    size: int = 64,
    limit: int | None = MOST_TRAINED,
    settings: ProbeSettings | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = torch.float32,
    max_bad: float = 0.01,
    workers: int = 4,
    random_weights: bool = False,
) -> dict[str, Any]:
    """Probe several image autoencoders with the same images, denoiser, steps and seeds.

    Args:
        data: a folder or another source of images, or ``samples`` for drawn pictures.
        models: as `latentae.bench.run.bench` takes them, without classical codecs and folders of reconstructions.
        out: folder for ``probe.json`` and ``probe.png``; None writes nothing.
        size: side of the square crops in pixels.
        limit: the most images to train on; a fifth of all, at most 512, are held out.
        device, dtype: where codecs and denoiser run, and the precision of the codecs; the denoiser's is float32.
        max_bad: how many images may be broken, as a share of all (float) or as a number (int).

    Returns:
        The content of ``probe.json``: ``models[i]`` has ``name``, what it is, and ``probe`` with ``settings``,
        ``runs`` (see `latentae.bench.probe.Prober.run`) and ``summary`` over seeds.

    Raises:
        RequestError: a model or option that cannot be had, or too few images.
        DataError: latents with NaN, or more images than ``max_bad`` are broken.
    """
    settings = settings or ProbeSettings()
    for option, value, least in (("size", size, 2 * LEAST_BAND), ("limit", limit, 1)):
        if value is not None and value < least:
            raise RequestError(f"{option}={value}: it must be at least {least} for a probe.")
    check_max_bad(max_bad)
    folder = None if out is None else Path(out)
    if data == SAMPLES:
        source: Source = DeadLeaves(DRAWN if limit is None else min(DRAWN, limit * 5 // 4), size)
    else:
        if folder and isinstance(data, str | Path):
            refuse_output_in_input(data, folder)
        source = open_source(data) if isinstance(data, str | Path) else data
    contestants = open_contestants(models, device=device, dtype=dtype, random_weights=random_weights)
    for contestant in contestants:
        refuse_what_cannot_be_probed(contestant)
    images = ImageSet(source, source.items(), size, 16, workers)
    halves = split_images(images, limit)
    found: list[dict[str, Any]] = []
    sheets: list[tuple[str, Tensor]] = []
    for _ in range(len(contestants)):
        contestant = contestants.pop(0)  # and with it goes its memory
        codec: Any = contestant.codec()
        entry, space, samples = probe_images(contestant.name, codec, halves, settings)
        found.append({"name": contestant.name, **describe(codec, size, 0), "probe": entry})
        sheets += [] if sheets else [("held-out images", space.held_out_images)]
        sheets.append((contestant.name, samples))
    train, held_out = halves
    bad = {**train.bad, **held_out.bad}
    results = {
        "schema": SCHEMA,
        "experimental": True,
        "settings": settings.describe(),
        "images": {
            "source": str(data) if isinstance(data, str | Path) else type(data).__name__,
            "size": size,
            **{
                name: {"count": len(part.good), "sha256": part.sha256, "enlarged": len(part.facts.enlarged)}
                for name, part in (("train", train), ("held_out", held_out))
            },
            "quarantined": [{"key": key, "reason": error.reason} for key, error in sorted(bad.items())],
        },
        "versions": versions(),
        "machine": describe_machine(),
        "models": found,
    }
    if enlarged := len(train.facts.enlarged) + len(held_out.facts.enlarged):
        say(f"{enlarged} images were smaller than {size} px and were enlarged.")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "probe.json", results)
        save_sheet(folder / "probe.png", sheets)
    if bad:
        say(f"{len(bad)} images are bad and were left out, {min(bad)} first.")
    looked_at = len(train.items) + len(held_out.items)
    refuse_too_many_bad([error.reason for error in bad.values()], looked_at, max_bad, "The others were probed.")
    return results


def probe_images(
    name: str, codec: LatentCodec, halves: tuple[ImageSet, ImageSet], settings: ProbeSettings
) -> tuple[dict[str, Any], LatentSpace, Tensor]:
    """One codec on the images to train on and those held out.

    Returns:
        What `latentae.bench.probe.probe_space` found, the latent space, and generated images, uint8 (N, 3, H, W).
    """
    say(f"{name}: encoding {len(halves[0].good):,} images to train on and {len(halves[1].good)} held out")
    space = LatentSpace(codec, *map(named_of, halves))
    entry, samples = probe_space(space, settings, name)
    return entry, space, samples


def probe_benchmarked(
    index: int, name: str, codec: LatentCodec, images: ImageSet, settings: ProbeSettings, folder: Path | None
) -> dict[str, Any]:
    """One model of a benchmark on its images: what was found, or why it was ``skipped``.

    With a folder, a sheet of samples is written there for the report.
    """
    try:
        found, space, samples = probe_images(name, codec, split_images(images, MOST_TRAINED), settings)
    except (RequestError, DataError) as error:
        say(f"{name} not probed: {error}")
        return {"skipped": str(error)}
    if folder:
        save_sheet(sheet_path(folder, index), [("held-out images", space.held_out_images), (name, samples)])
    return found


def refuse_what_cannot_be_probed(contestant: Contestant) -> None:
    """Before anything is trained.

    Raises:
        RequestError: it is no autoencoder, or one of videos.
    """
    if not isinstance(contestant.model, LatentCodec | torch.nn.Module):
        raise RequestError(f"{contestant.name} has no latents, and so nothing to probe: name an autoencoder.")
    model = contestant.model
    if (model if isinstance(model, LatentCodec) else LatentCodec(model)).is_video:
        raise RequestError(
            f"{contestant.name} is a video autoencoder, and the probe is of image latents: leave it out."
        )


def save_sheet(path: Path, rows: Sequence[tuple[str, Tensor]]) -> None:
    """Write `samples_sheet` as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        samples_sheet(rows).save(stream, "PNG")
