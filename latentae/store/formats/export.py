"""A store of latents in the layout of another project's loader: what each layout needs, and the record of an export."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from latentae.errors import DataError, RequestError
from latentae.files import TEMPORARY_SUFFIX, read_json, write_json
from latentae.store.formats.classes import write_dcae, write_mar
from latentae.store.formats.entries import Entries
from latentae.store.formats.lightningdit import write_lightningdit
from latentae.store.formats.numbered import write_edm2, write_fastdit, write_repa
from latentae.store.formats.output import OutputFolder
from latentae.store.formats.parquet import write_card, write_parquet
from latentae.store.formats.webdataset import write_webdataset
from latentae.store.reader import LatentStore
from latentae.version import __version__

RECORD = "export.json"
BEGUN = "export.begun.json"


@dataclass(frozen=True)
class Format:
    """One layout: who reads it, what it needs of a store, what it holds, and how it is written.

    ``holds`` is ``latents`` (a draw where the store has moments), ``normalised`` latents, ``moments``, or what the
    store has (``stored``).
    """

    reader: str
    holds: str
    write: Callable[[Entries, OutputFolder], dict[str, Any]]
    labels: bool = False
    flips: bool = False
    images: bool = True


FORMATS = {
    "lightningdit": Format("LightningDiT's ImgLatentDataset", "latents", write_lightningdit, labels=True, flips=True),
    "fastdit": Format("fast-DiT's CustomDataset", "normalised", write_fastdit, labels=True),
    "repa": Format("REPA's CustomDataset", "moments", write_repa, labels=True),
    "edm2": Format("EDM2's ImageFolderDataset", "moments", write_edm2),
    "mar": Format("MAR's CachedFolder", "moments", write_mar, labels=True, flips=True),
    "dcae": Format("DC-AE's LatentImageNetDataProvider", "normalised", write_dcae, labels=True),
    "webdataset": Format("WebDataset", "stored", write_webdataset, images=False),
    "parquet": Format("datasets.load_dataset", "stored", write_parquet, images=False),
}


@dataclass(frozen=True)
class ExportSummary:
    """What an export holds; ``missing`` inputs of the store's plan have no latents (bad, or not encoded yet), and
    ``note`` says where the project's own files would differ."""

    folder: str
    format: str
    entries: int
    missing: int
    seconds: float
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def export_store(
    store: LatentStore | str | Path,
    dst: str | Path,
    format: str,
    *,
    images: str | Path | None = None,
    seed: int = 0,
    partial: bool = False,
) -> ExportSummary:
    """Write the encoded inputs of ``store`` below ``dst`` so that another project's loader opens them unmodified.

    Killed and called again, it goes on; ``export.json``, the record of what was written and what is applied to it,
    comes last, and every file is whole or absent. Formats that cannot carry names get ``keys.parquet``.

    Args:
        format: ``lightningdit``, ``fastdit``, ``repa``, ``edm2``, ``mar``, ``dcae``, ``webdataset`` or ``parquet``.
        images: where the pictures are that were encoded, which REPA wants beside their latents; by default where they
            were then.
        seed: with the key of an entry, of its draw, where the store has moments and the format wants a sample.
        partial: take a store that is still being encoded, as far as it has got.

    Raises:
        RequestError: no such format, a store that lacks what the loader needs, or a folder with other things in it.
        DataError: a shard of the store is not what was written.
    """
    if format not in FORMATS:
        raise RequestError(f"format={format!r}; expected one of {', '.join(FORMATS)}.")
    store = store if isinstance(store, LatentStore) else LatentStore(store)
    chosen, folder = FORMATS[format], Path(dst)
    entries = _check(store, chosen, format, partial=partial, seed=seed, images=images)
    record = _record(entries, chosen, format)
    started = time.monotonic()
    if not _begin(folder, record):
        if problems := store.verify():
            raise DataError(f"{len(problems)} files of the store are damaged; the first: {problems[0]}")
        with OutputFolder(folder) as output:
            if format == "parquet":
                write_card(record, output)
            more = chosen.write(entries, output)
        write_json(folder / RECORD, {**record, **more})
    (folder / BEGUN).unlink(missing_ok=True)
    missing, note = store.plan.inputs - len(store), read_json(folder / RECORD).get("differs")
    return ExportSummary(str(folder), format, len(store), missing, time.monotonic() - started, note)


def _check(store: LatentStore, chosen: Format, format: str, *, partial: bool, seed: int, images: Any) -> Entries:
    """The entries of a store that has all that the loader needs."""
    if not len(store):
        raise RequestError(f"{store.path} has no encoded inputs yet: nothing to export.")
    if not store.complete and not partial:
        raise RequestError(
            f"{store.path} is not complete: run its encode command to the end, or export what is there with --partial."
        )
    if images is not None and format != "repa":
        raise RequestError(f"--images is for the format repa; {format} holds no pictures.")
    entries = Entries(store, seed=seed, images=images)
    if chosen.holds == "moments" and not entries.are_moments:
        raise RequestError(
            f"{store.path} holds no moments, which {chosen.reader} needs: encode again with --kind moments."
        )
    if chosen.flips and not store.holds_flips:
        raise RequestError(
            f"{store.path} holds no latents of mirrored images, which {chosen.reader} needs (mirrored latents are not "
            "the same): encode again with --flip."
        )
    if chosen.images and (store.holds_clips or entries.shape is None or len(entries.shape) != 3):
        what = "latents of several shapes" if entries.shape is None else "latents of videos"
        raise RequestError(
            f"{store.path} holds {what} and {chosen.reader} takes images of one size: use another format."
        )
    if chosen.labels and (without := [key for key, label in zip(store.keys, store.labels) if label < 0]):
        raise RequestError(
            f"{len(without)} of {len(store)} entries of {store.path} have no label, such as {without[0]!r}, and "
            f"{chosen.reader} needs one of each: put each class into a folder of its own, and encode again."
        )
    return entries


def _record(entries: Entries, chosen: Format, format: str) -> dict[str, Any]:
    """What an export is, in JSON: the same record means the same bytes."""
    store, config = entries.store, entries.store.config
    drawn = entries.are_moments and chosen.holds in ("latents", "normalised")
    return {
        "format": format,
        "reader": chosen.reader,
        "latentae_version": __version__,
        "entries": len(store),
        "complete": store.complete,
        "store": store.fingerprint,
        "model": {
            "name": config["model"]["name"] and Path(config["model"]["name"]).name,
            "class": config["model"]["class"],
            "weights_sha256": config["model"]["weights_sha256"],
        },
        "kind": "sample" if drawn else store.kind,
        "seed": entries.seed if drawn else config["seed"],
        "tensors": entries.tensors,
        "shape": entries.shape and list(entries.shape),
        "normalisation": config["normalisation"],
        "applied": "the normalisation" if chosen.holds == "normalised" else "nothing: latents are raw",
        "pixel_range": config["pixel_range"],
        "preprocess": config["preprocess"],
    }


def _begin(folder: Path, record: dict[str, Any]) -> bool:
    """Make the folder one of this very export; says whether that is done already.

    Raises:
        RequestError: there is something else in it.
    """
    for name in (RECORD, BEGUN):
        if (folder / name).is_file():
            found = read_json(folder / name)
            changed = [key for key in record if found.get(key) != record[key]]
            if changed:
                before, now = found.get(changed[0]), record[changed[0]]
                raise RequestError(
                    f"{folder} is another export, which differs in {', '.join(changed)} ({changed[0]}: {before!r} "
                    f"there, {now!r} now): choose another folder."
                )
            return name == RECORD
    if folder.is_dir() and (others := [p.name for p in folder.iterdir() if p.suffix != TEMPORARY_SUFFIX]):
        raise RequestError(f"{folder} is not empty (it has {others[0]}) and no export: choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / BEGUN, record)
    return False
