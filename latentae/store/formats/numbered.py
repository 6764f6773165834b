"""Layouts of one numbered file for each entry: fast-DiT, EDM2, and REPA, which has pictures beside EDM2's files."""

import io
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute as pc
from PIL import Image

from latentae.data.decode import BadImage, DecodePolicy, decode_image
from latentae.data.sources import Item, open_source
from latentae.data.sources.reading import UriReader
from latentae.data.transforms import adm_center_crop
from latentae.errors import DataError, RequestError
from latentae.store.formats.entries import Entries
from latentae.store.formats.output import OutputFolder, key_table, npy_bytes
from latentae.store.reader import LatentStore

FOLDER_SIZE = 1000


def write_fastdit(entries: Entries, folder: OutputFolder) -> dict[str, Any]:
    """Write a file of normalised latents (1, C, h, w) and one of the label (1,) for each entry, under the same name in
    two folders, because its loader pairs them by the order of their names."""
    digits = max(7, len(str(len(entries) - 1)))
    features, labels = (f"imagenet{entries.pixel_size}_{what}" for what in ("features", "labels"))
    with key_table(folder) as keys:
        for number, item in enumerate(entries):
            name = f"{number:0{digits}d}.npy"
            latents = entries.store.normalise(entries.latents(item))[None].numpy()
            folder.write(f"{features}/{name}", npy_bytes(latents))
            folder.write(f"{labels}/{name}", npy_bytes(np.array([item["label"]], np.int64)))
            keys.add(item, f"{features}/{name}")
    return {}


def write_edm2(entries: Entries, folder: OutputFolder) -> dict[str, Any]:
    """Write means and standard deviations (2C, h, w) of each entry, and ``dataset.json`` with the labels."""
    _write_mean_and_std(entries, folder, "")
    statistics = entries.store.statistics()
    std = statistics.std if statistics.sample_std is None else statistics.sample_std
    return {
        "encoder": {"raw_mean": statistics.mean.tolist(), "raw_std": std.tolist()},
        "differs": "EDM2's own tool feeds pixels in [0, 1] to the autoencoder and its decoder expects that; these "
        "latents are of pixels in [-1, 1]. Give its StabilityVAEEncoder the raw_mean and raw_std of export.json, and "
        "decode with the autoencoder itself.",
    }


def write_repa(entries: Entries, folder: OutputFolder) -> dict[str, Any]:
    """Write EDM2's files into ``vae-sd`` and the pictures that were encoded into ``images``, as many of both."""
    pictures = Pictures(entries, entries.images)
    _write_mean_and_std(entries, folder, "vae-sd/", pictures)
    return {"differs": "REPA multiplies draws of four channels by 0.18215, whatever the model's scale is."}


def _write_mean_and_std(
    entries: Entries, folder: OutputFolder, prefix: str, pictures: "Pictures | None" = None
) -> None:
    labels: list[tuple[str, int]] = []
    with key_table(folder) as keys:
        for number, item in enumerate(entries):
            place = f"{number // FOLDER_SIZE:05d}"
            name = f"{place}/img-mean-std-{number:08d}.npy"
            folder.write(f"{prefix}{name}", npy_bytes(entries.mean_and_std(item)))
            if pictures is not None:
                folder.write(f"images/{place}/img{number:08d}.png", partial(pictures.png, next(pictures.items)))
            labels.append((name, item["label"]))
            keys.add(item, f"{prefix}{name}")
    known = labels if all(label >= 0 for _, label in labels) else None
    folder.write(f"{prefix}dataset.json", json.dumps({"labels": known}).encode())


class Pictures:
    """The pictures of a store's entries, cropped as they were encoded.

    Args:
        source: where they are, under the keys of the store; None for where they were when they were encoded.

    Raises:
        RequestError: they are not all there, or were not cropped as ADM does.
    """

    def __init__(self, entries: Entries, source: Any):
        store, preprocess = entries.store, entries.store.config["preprocess"]
        if not preprocess["crop"].startswith("adm"):
            raise RequestError(
                f"{store.path} holds images with the crop {preprocess['crop']!r}; expected ADM's centre crop: encode "
                "with --size for it."
            )
        self.size = entries.pixel_size
        self.policy = DecodePolicy(preprocess["decode"]["max_pixels"], tuple(preprocess["decode"]["background"]))
        self.read = UriReader().read if source is None else open_source(source).read
        self.items = _planned(store) if source is None else _found(store, source)

    def png(self, item: Item) -> bytes:
        """One picture, as it went into the encoder.

        Raises:
            DataError: it cannot be read any more.
        """
        try:
            image = decode_image(self.read(item), self.policy)
        except BadImage as error:
            raise DataError(
                f"The picture of {item.key} cannot be read any more ({error.explanation.rstrip('.')}): say by --images "
                "where it is."
            ) from error
        stream = io.BytesIO()
        Image.fromarray(adm_center_crop(image, self.size)).save(stream, "PNG", compress_level=4)
        return stream.getvalue()


def _planned(store: LatentStore) -> Iterator[Item]:
    """The inputs of a store's entries, where they were."""
    inputs = (item for shard in store.plan.shards for item in store.plan.items(shard))
    for key in store.keys:
        yield next(item for item in inputs if item.key == key)  # entries stand in the order of the plan


def _found(store: LatentStore, source: str) -> Iterator[Item]:
    """The inputs of a store's entries, in another place."""
    table = open_source(source).items()
    keys = store.keys
    places = pc.index_in(pyarrow.array(keys, table.keys.type), table.keys)
    if places.null_count:
        raise RequestError(
            f"{source} lacks {places.null_count} of the {len(keys)} images of {store.path}, such as "
            f"{keys[places.is_null().index(True).as_py()]!r}: give what was encoded."
        )
    return (table[place.as_py()] for place in places)
