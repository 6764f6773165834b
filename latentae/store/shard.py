"""One shard on disk: its latents, a row for every input, and last of all the marker that makes it count.

    shards/00042.safetensors   latents (N, C, h, w) or moments (N, 2C, h, w); latents_flip or moments_flip, of the
                               mirrored images; labels (N,) where the source has any; of videos (N, C, t, h, w)
    shards/00042.parquet       one row per input, encoded or not
    shards/00042.json          the commit marker: counts, hashes, channel sums

A shard without a marker does not exist, whatever else lies there. All three files are functions of the inputs, the
model and the batch size, so publishing a shard twice, even from two processes at once, changes nothing.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import safetensors.torch
import torch
from torch import Tensor

from latentae.data.sources import Item
from latentae.errors import DataError, ResumableError
from latentae.files import atomic_write, fsync_folder, read_json, write_json
from latentae.store.plan import Shard
from latentae.store.tables import Types, read_table, table_bytes

ROW_COLUMNS = {
    "key": "string",
    "uri": "string",
    "status": "string",  # ok or bad
    "reason": "string",  # a short code, of bad inputs
    "message": "string",
    "sha256": "string",  # of the input's bytes
    "bytes": "int64",
    "height": "int32",  # of the image as it is shown, after EXIF rotation
    "width": "int32",
    "crop_top": "int32",  # the part of the image that was encoded, in its own pixels
    "crop_left": "int32",
    "crop_height": "int32",
    "crop_width": "int32",
    "label": "int64",
    "row": "int32",  # where its latents stand in the shard
}
CLIP_ROW_COLUMNS = {
    **ROW_COLUMNS,
    "frames": "int32",  # of the clip that was encoded, before padding
    "fps": "double",
}


MARKER_KEYS = {"fingerprint", "inputs", "encoded", "bad", "batch_size", "latent_shape", "data", "rows"}


@dataclass
class Sample:
    """One input on its way into a shard. In the end it has either ``latents`` or a ``reason`` why not.

    pixels: uint8 (3, H, W), or (3, T, H, W) of a clip; latents: what is stored, (C, h, w), or (2C, h, w) for moments,
    with t before h where the autoencoder is one of videos; ``flipped`` the same of the mirrored pixels, where a store
    holds these. ``frames`` and ``fps`` are those of a clip.
    """

    item: Item
    sha256: str | None = None
    bytes: int | None = None
    height: int | None = None
    width: int | None = None
    crop: tuple[int, int, int, int] | None = None
    frames: int | None = None
    fps: float | None = None
    pixels: Tensor | None = None
    latents: Tensor | None = None
    flipped: Tensor | None = None
    reason: str | None = None
    message: str | None = None

    def fail(self, reason: str, message: str) -> None:
        self.reason, self.message, self.pixels, self.latents, self.flipped = reason, message, None, None, None


def shard_files(store: Path, shard: Shard) -> tuple[Path, Path, Path]:
    """Paths of the data, the rows and the marker of ``shard``."""
    folder = store / "shards"
    return folder / f"{shard.name}.safetensors", folder / f"{shard.name}.parquet", folder / f"{shard.name}.json"


def marker_fingerprint(fingerprint: str, shard: Shard) -> str:
    """What ties a marker to the configuration of its store, and to the inputs of its shard."""
    return hashlib.sha256(f"{fingerprint} {shard.fingerprint}".encode()).hexdigest()


def read_marker(store: Path, shard: Shard, fingerprint: str) -> dict[str, Any] | None:
    """The commit marker of ``shard``, or None if there is none for this store."""
    try:
        marker = read_json(shard_files(store, shard)[2])
        if not marker.keys() >= MARKER_KEYS:
            return None
        return marker if marker["fingerprint"] == marker_fingerprint(fingerprint, shard) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def committed_marker(store: Path, shard: Shard, fingerprint: str) -> dict[str, Any] | None:
    """The marker of a shard that is done: it has one, and files of the lengths that the marker says."""
    marker = read_marker(store, shard, fingerprint)
    if marker is None:
        return None
    data, rows, _ = shard_files(store, shard)
    files = ((data, marker["data"]), (rows, marker["rows"]))
    whole = all(path.is_file() and path.stat().st_size == part["bytes"] for path, part in files if part is not None)
    return marker if whole else None


def publish(
    store: Path,
    shard: Shard,
    samples: list[Sample],
    *,
    tensor: str,
    carried: Mapping[str, pyarrow.DataType],
    fingerprint: str,
    batch_size: int | None,
) -> dict[str, Any]:
    """Write a shard whose ``samples`` stand in the order of its items, and return its marker.

    Whatever happens on the way, a marker only ever stands for files that are on disk.

    Args:
        tensor: what is stored, ``latents`` or ``moments``.
        carried: names and types of the columns that the source carries along.
        fingerprint: of the store.
    """
    data_path, rows_path, marker_path = shard_files(store, shard)
    encoded = [sample for sample in samples if sample.latents is not None]
    stored = torch.stack([sample.latents for sample in encoded if sample.latents is not None]) if encoded else None
    data = None if stored is None else _serialise(encoded, stored, tensor)
    columns = row_columns(shard, carried)
    rows = table_bytes(columns, _rows(samples, columns, carried))
    marker = {
        "shard": shard.index,
        "fingerprint": marker_fingerprint(fingerprint, shard),
        "inputs": len(samples),
        "encoded": len(encoded),
        "bad": len(samples) - len(encoded),
        "batch_size": batch_size,
        "latent_shape": None if stored is None else list(stored.shape[1:]),
        "data": None if data is None else _identity(data),
        "rows": _identity(rows),
        **({} if stored is None else channel_sums(stored, tensor)),
    }
    if committed_marker(store, shard, fingerprint) == marker:
        return marker
    marker_path.unlink(missing_ok=True)  # another version of this shard stops counting before its files change
    fsync_folder(marker_path.parent)
    written = {}
    if data is None:
        data_path.unlink(missing_ok=True)
    else:
        written[data_path] = _write(data_path, data)
    written[rows_path] = _write(rows_path, rows)
    for path, node in written.items():  # of this version still, and not those of a machine that gives other bytes
        if not path.exists() or (path.stat().st_ino != node and _identity(path.read_bytes()) not in marker.values()):
            marker_path.unlink(missing_ok=True)  # if the other was done before us
            raise ResumableError(f"Another process writes {shard.name} of {store}: run the command again.")
    write_json(marker_path, marker)
    return marker


def _identity(content: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def _write(path: Path, content: bytes) -> int:
    """Returns the number of the new file."""
    with atomic_write(path) as stream:
        stream.write(content)
        return os.fstat(stream.fileno()).st_ino


def _serialise(encoded: list[Sample], stored: Tensor, tensor: str) -> bytes:
    tensors = {tensor: stored}
    if encoded[0].flipped is not None:
        tensors[f"{tensor}_flip"] = torch.stack([sample.flipped for sample in encoded if sample.flipped is not None])
    labels = [sample.item.label for sample in encoded]
    if any(label is not None for label in labels):
        tensors["labels"] = torch.tensor([-1 if label is None else label for label in labels])
    return safetensors.torch.save(tensors)


def channel_sums(stored: Tensor, tensor: str) -> dict[str, list[float]]:
    """Per channel, in float64, the sums of the latents and of their squares, which add up over shards.

    Moments count with their means, and the sum of their variances is given beside. The sums are taken image by
    image with one thread, so that they depend on nothing but the values.
    """
    images = stored.double().flatten(2).numpy()  # (N, C or 2C, positions)
    if tensor != "moments":
        return {"sum": _sum(images), "sum_of_squares": _sum(images**2)}
    mean, log_variance = np.split(images, 2, axis=1)
    return {"sum": _sum(mean), "sum_of_squares": _sum(mean**2), "sum_of_variances": _sum(np.exp(log_variance))}


def _sum(images: np.ndarray) -> list[float]:
    return images.sum(axis=2).sum(axis=0).tolist()


def row_columns(shard: Shard, carried: Mapping[str, pyarrow.DataType]) -> Types:
    """What is noted of each input, by name and type."""
    return {**(CLIP_ROW_COLUMNS if len(shard.shape) == 3 else ROW_COLUMNS), **carried}


def _rows(samples: list[Sample], columns: Types, carried: Iterable[str]) -> dict[str, list[Any]]:
    rows = []
    encoded = 0
    for sample in samples:
        item, good = sample.item, sample.latents is not None
        top, left, height, width = sample.crop or (None,) * 4
        row = {
            "key": item.key,
            "uri": item.uri,
            "status": "ok" if good else "bad",
            "reason": None if good else sample.reason,
            "message": None if good else sample.message,
            "sha256": sample.sha256,
            "bytes": sample.bytes,
            "height": sample.height,
            "width": sample.width,
            "crop_top": top,
            "crop_left": left,
            "crop_height": height,
            "crop_width": width,
            "label": item.label,
            "row": encoded if good else None,
            "frames": sample.frames,
            "fps": sample.fps,
            **{name: item.columns.get(name) for name in carried},
        }
        rows.append(row)
        encoded += good
    return {name: [row[name] for row in rows] for name in columns}


def read_rows(store: Path, shard: Shard, columns: list[str] | None = None) -> dict[str, list[Any]]:
    """The row file of a committed shard, by column."""
    return read_table(shard_files(store, shard)[1], columns)


def read_samples(
    store: Path, shard: Shard, marker: Mapping[str, Any], items: Iterable[Item], tensor: str
) -> list[Sample]:
    """A committed shard as `publish` got it, to be published again with some of its samples replaced.

    Raises:
        DataError: its files are not those of ``marker``. What is damaged must not get a new hash, nor the rows of one
            version the latents of another.
    """
    data_path, rows_path, marker_path = shard_files(store, shard)
    rows = read_table(BytesIO(_committed_bytes(rows_path, marker["rows"], marker_path)))
    tensors = {}
    if marker["data"] is not None:
        tensors = safetensors.torch.load(_committed_bytes(data_path, marker["data"], marker_path))
    stored, flipped = tensors.get(tensor), tensors.get(f"{tensor}_flip")
    samples = []
    for item, row in zip(items, (dict(zip(rows, values)) for values in zip(*rows.values()))):
        crop = (row["crop_top"], row["crop_left"], row["crop_height"], row["crop_width"])
        place = row["row"]
        samples.append(
            Sample(
                item=item,
                sha256=row["sha256"],
                bytes=row["bytes"],
                height=row["height"],
                width=row["width"],
                crop=None if crop[0] is None else crop,
                frames=row.get("frames"),
                fps=row.get("fps"),
                latents=None if place is None or stored is None else stored[place],
                flipped=None if place is None or flipped is None else flipped[place],
                reason=row["reason"],
                message=row["message"],
            )
        )
    return samples


def _committed_bytes(path: Path, committed: Mapping[str, Any], marker_path: Path) -> bytes:
    content = path.read_bytes() if path.exists() else b""
    if _identity(content) != committed:
        raise DataError(f"{path} is not what was written: delete {marker_path} and run the same command again.")
    return content
