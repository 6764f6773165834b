"""Parquet as the Hugging Face hub shows and ``datasets.load_dataset`` reads it, with a data set card beside it."""

import json
from typing import Any, BinaryIO

import numpy as np
import pyarrow
import pyarrow.parquet

from latentae.store.formats.entries import Entries, columns_of
from latentae.store.formats.output import OutputFolder

MOST_ENTRIES = 100_000
GROUP_BYTES = 16 * 2**20

CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
tags:
- latents
---

# {entries} entries of latents

| | |
|---|---|
| autoencoder | {model} |
| hash of its weights (sha256) | `{sha256}` |
| tensors | {tensors}: {kind}, {shape} |
| pixels | in [-1, 1], crop: {crop}, size: {size} |

**The latents are raw: no scale is applied.** A diffusion model is meant to see `(z - shift_factor) * scaling_factor`,
or where there are means by channel `(z - latents_mean) * scaling_factor / latents_std`, with

```json
{normalisation}
```

```python
from datasets import load_dataset

latents = load_dataset("parquet", data_files="data/*.parquet", split="train").with_format("torch")
```

`export.json` has the whole record; written by latentae {version}.
"""


def write_parquet(entries: Entries, folder: OutputFolder) -> dict[str, Any]:
    """Write ``data/train-00000-of-00003.parquet`` and on: for each entry its key, its label, what else the store knows
    of it and its tensors, as arrays of one shape; from a store of several shapes as flat lists, with ``latents_shape``.
    """
    per_file, per_group = entries.per_file(MOST_ENTRIES), max(GROUP_BYTES // entries.bytes_each, 1)
    files = -(-len(entries) // per_file)
    schema = _schema(entries)
    for number, block in enumerate(entries.blocks(per_file)):
        name = f"data/train-{number:05d}-of-{files:05d}.parquet"
        if not folder.has(name):
            with folder.open(name) as stream:
                _write_rows(stream, schema, entries, block, per_group)
    return {}


def write_card(record: dict[str, Any], folder: OutputFolder) -> None:
    """``README.md``, as the hub shows it, from what ``export.json`` says."""
    model, preprocess = record["model"], record["preprocess"]
    card = CARD.format(
        entries=record["entries"],
        model=f"`{model['name']}` ({model['class']})" if model["name"] else model["class"],
        sha256=model["weights_sha256"],
        tensors=", ".join(f"`{name}`" for name in record["tensors"]),
        kind=record["kind"],
        shape=" x ".join(map(str, record["shape"])) if record["shape"] else "of several shapes",
        crop=preprocess["crop"],
        size=preprocess["size"],
        normalisation=json.dumps(record["normalisation"], indent=2),
        version=record["latentae_version"],
    )
    folder.write("README.md", card.encode())


def _schema(entries: Entries) -> pyarrow.Schema:
    """Columns by name and type; arrays are lists in lists, which datasets knows as its Array3D."""
    first = entries.store[0]
    known = _types_of_rows(entries)
    fields = [pyarrow.field(name, known.get(name, pyarrow.string())) for name in columns_of(first)]
    features = {}
    for name, array in entries.arrays(first).items():
        value = pyarrow.from_numpy_dtype(array.dtype)
        if entries.shape is None:
            fields.append(pyarrow.field(name, pyarrow.list_(value)))
            continue
        kind, shape, dtype = f"Array{array.ndim}D", list(array.shape), str(array.dtype)
        about = {
            "ARROW:extension:name": f"datasets.features.features.{kind}ExtensionType",
            "ARROW:extension:metadata": json.dumps([shape, dtype]),
        }
        for _ in shape:
            value = pyarrow.list_(value)
        fields.append(pyarrow.field(name, value, metadata=about))
        features[name] = {"shape": shape, "dtype": dtype, "_type": kind}
    if entries.shape is None:
        fields.append(pyarrow.field("latents_shape", pyarrow.list_(pyarrow.int32())))
    return pyarrow.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})


def _types_of_rows(entries: Entries) -> dict[str, pyarrow.DataType]:
    """The types of what the store's row files hold, by name."""
    rows = next((entries.store.path / "shards").glob("*.parquet"))
    return {field.name: field.type for field in pyarrow.parquet.read_schema(rows)}


def _write_rows(
    stream: BinaryIO, schema: pyarrow.Schema, entries: Entries, block: list[dict[str, Any]], per_group: int
) -> None:
    plain = [name for name in schema.names if name not in entries.tensors]
    with pyarrow.parquet.ParquetWriter(stream, schema, compression="zstd", use_dictionary=plain) as writer:
        for start in range(0, len(block), per_group):
            items = block[start : start + per_group]
            rows = [columns_of(item) for item in items]
            arrays = [entries.arrays(item) for item in items]
            columns = []
            for field in schema:
                if field.name not in entries.tensors and field.name != "latents_shape":
                    columns.append(pyarrow.array([row[field.name] for row in rows], field.type))
                elif entries.shape is not None:
                    columns.append(_nested(np.stack([array[field.name] for array in arrays])))
                elif field.name == "latents_shape":
                    columns.append(pyarrow.array([array[entries.tensors[0]].shape for array in arrays], field.type))
                else:
                    columns.append(pyarrow.array([array[field.name].ravel() for array in arrays], field.type))
            writer.write_table(pyarrow.table(columns, schema=schema))


def _nested(array: np.ndarray) -> pyarrow.Array:
    """(N, ...) as N lists in lists."""
    values = pyarrow.array(array.ravel())
    for size in reversed(array.shape[1:]):
        values = pyarrow.ListArray.from_arrays(np.arange(0, len(values) + 1, size, dtype=np.int32), values)
    return values
