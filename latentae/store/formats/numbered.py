"""Layouts of one numbered file for each entry: fast-DiT, EDM2, and REPA, which has pictures beside EDM2's files."""

import io
import json
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from latentae.data.decode import BadImage, decode_image
from latentae.data.sources import Item, open_source
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
    size = entries.store.config["preprocess"]["size"]
    features, labels = f"imagenet{size}_features", f"imagenet{size}_labels"
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
    pictures = Pictures(entries.store, entries.images)
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
                folder.write(f"images/{place}/img{number:08d}.png", partial(pictures.png, item["key"]))
            labels.append((name, item["label"]))
            keys.add(item, f"{prefix}{name}")
    known = labels if all(label >= 0 for _, label in labels) else None
    folder.write(f"{prefix}dataset.json", json.dumps({"labels": known}).encode())


class Pictures:
    """The pictures of a store's entries, cropped as they were encoded.

    Args:
        source: where they are, under the keys of the store; None for where they were when they were encoded.

    Raises:
        RequestError: they are not all there, or were not cropped to squares.
    """

    def __init__(self, store: LatentStore, source: Any):
        preprocess = store.config["preprocess"]
        if "adm" not in preprocess["crop"]:
            raise RequestError(
                f"{store.path} holds images with the crop {preprocess['crop']!r}; expected ADM's centre crop: encode "
                "with --size for it."
            )
        if source is None:
            raise RequestError("REPA's loader wants the pictures beside the latents: say with --images where they are.")
        self.size = preprocess["size"]
        self.source = open_source(source) if not hasattr(source, "items") else source
        self.items: dict[str, Item] = {item.key: item for item in self.source.items()}
        if missing := [key for key in store.keys if key not in self.items]:
            raise RequestError(
                f"{source} lacks {len(missing)} of the {len(store)} images of {store.path}, such as {missing[0]!r}: "
                "give what was encoded."
            )

    def png(self, key: str) -> bytes:
        """One picture, as it went into the encoder.

        Raises:
            DataError: it cannot be decoded any more.
        """
        try:
            image = decode_image(self.source.read(self.items[key]))
        except BadImage as error:
            raise DataError(f"{key} was encoded and cannot be decoded now: {error.explanation}") from error
        stream = io.BytesIO()
        Image.fromarray(adm_center_crop(image, self.size)).save(stream, "PNG", compress_level=4)
        return stream.getvalue()
