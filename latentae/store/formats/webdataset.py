"""WebDataset: tars whose members share a name up to its first dot, one sample after the other."""

import io
import json
import math
import tarfile
from typing import Any

from latentae.store.formats.entries import Entries, columns_of
from latentae.store.formats.output import OutputFolder, npy_bytes, safe_path

MOST_ENTRIES = 10_000


def write_webdataset(entries: Entries, folder: OutputFolder) -> dict[str, Any]:
    """Write ``00000.tar`` and on: of each entry ``.latents.npy`` or ``.moments.npy``, with those of the mirror image
    where the store has them, ``.json`` with all that is known of it, and ``.cls`` if it has a label.

    Its readers cut names at the first dot after the last slash and skip those that begin with two underscores, so these
    letters of a key become ``%2E`` and ``%5F``; the key itself stands in the ``.json``.
    """
    for number, block in enumerate(entries.blocks(entries.per_file(MOST_ENTRIES))):
        name = f"{number:05d}.tar"
        if not folder.has(name):
            with folder.open(name) as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for item in block:
                    _add_sample(tar, entries, item)
    return {}


def _add_sample(tar: tarfile.TarFile, entries: Entries, item: dict[str, Any]) -> None:
    key = member_key(item["key"])
    for name, array in entries.arrays(item).items():
        _add(tar, f"{key}.{name}.npy", npy_bytes(array))
    columns = {name: _json_value(value) for name, value in columns_of(item).items()}
    if columns["label"] is not None:
        _add(tar, f"{key}.cls", str(columns["label"]).encode())
    _add(tar, f"{key}.json", json.dumps(columns, ensure_ascii=False).encode())


def member_key(key: str) -> str:
    """A key as the ``__key__`` of a sample."""
    path = safe_path(key, escaped=".")
    return f"%5F{path[1:]}" if path.startswith("_") else path


def _json_value(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # owned by nobody, at time 0: equal bytes for equal contents
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
