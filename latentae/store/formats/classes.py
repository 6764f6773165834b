"""Layouts of a folder for each class, which torchvision's DatasetFolder reads: MAR and DC-AE."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from latentae.errors import RequestError
from latentae.store.formats.entries import Entries
from latentae.store.formats.output import OutputFolder, npy_bytes, safe_path


def write_mar(entries: Entries, folder: OutputFolder) -> dict[str, Any]:
    """Write ``CLASS/NAME.JPEG.npz`` for each entry: means and log-variances (2C, h, w) of the image and its mirror
    image."""
    for name, item in _by_class(entries):
        stream = io.BytesIO()
        np.savez(stream, moments=item["moments"].float().numpy(), moments_flip=item["moments_flip"].float().numpy())
        folder.write(f"{name}.npz", stream.getvalue())
    return {"differs": "MAR multiplies draws by 0.2325, one over the standard deviation of its own autoencoder's."}


def write_dcae(entries: Entries, folder: OutputFolder) -> dict[str, Any]:
    """Write ``CLASS/NAME.JPEG.npy``, normalised latents (C, h, w), for each entry."""
    for name, item in _by_class(entries):
        folder.write(f"{name}.npy", npy_bytes(entries.store.normalise(entries.latents(item)).numpy()))
    return {}


def _by_class(entries: Entries) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each item with a path below the folder of its class, whose place among the folders in their order is its label.

    First-level folders of the keys stay where they are the classes in that order, as those of ImageNet are; else the
    folders are the labels' numbers.

    Raises:
        RequestError: labels without an entry, after which all others would be counted anew.
    """
    labels = entries.store.labels
    used = sorted(set(labels))
    if used != list(range(len(used))):
        missing = next(label for label in range(used[-1]) if label not in set(used))
        raise RequestError(
            f"{entries.store.path} has labels up to {used[-1]} but none is {missing}; this loader counts folders, so "
            "the labels after it would change: encode entries of every class."
        )
    own = _are_classes(entries.store.keys, labels)
    digits = max(5, len(str(used[-1])))
    for item in entries:
        path = safe_path(item["key"])
        yield path if own else f"{item['label']:0{digits}d}/{path}", item


def _are_classes(keys: list[str], labels: list[int]) -> bool:
    """Whether the first folders of keys, in sorted order, are the labels."""
    folders: dict[int, str] = {}
    for key, label in zip(keys, labels):
        first, slash, _ = key.partition("/")
        if not slash or first != safe_path(first) or folders.setdefault(label, first) != first:
            return False
    names = [folders[label] for label in sorted(folders)]
    return names == sorted(set(names))
