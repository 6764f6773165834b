"""Stores from every kind of source: the same latents, and each image's label with them."""

import csv
import io
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

import latentae
from latentae.store.encode import encode_dataset


@pytest.fixture
def labelled(tmp_path):
    """Six images with labels 0, 1, 2 as a folder with a manifest, a tar and a parquet file."""
    rng = np.random.default_rng(0)
    images = {}
    for i in range(6):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (40 + i, 36, 3), dtype=np.uint8)).save(stream, "png")
        images[f"{i}.png"] = stream.getvalue()
    with tarfile.open(tmp_path / "x.tar", "w") as tar, (tmp_path / "x.csv").open("w", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(["path", "label"])
        for i, (name, data) in enumerate(images.items()):
            (tmp_path / name).write_bytes(data)
            rows.writerow([name, i % 3])
            for member_name, content in ((name, data), (f"{i}.cls", b"%d" % (i % 3))):
                member = tarfile.TarInfo(member_name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    column = pyarrow.array([{"bytes": data, "path": name} for name, data in images.items()], kind)
    table = pyarrow.table({"image": column, "label": [i % 3 for i in range(6)]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=4)
    return tmp_path


def test_labels_and_latents_are_the_same_from_every_source(labelled, tiny_dcae):
    stores = {}
    for name in ("x.tar", "x.parquet", "x.csv"):
        for _ in range(2):  # the second time, nothing is left to do
            summary = encode_dataset(labelled / name, labelled / f"{name}.latents", tiny_dcae, size=32, shard_size=4)
        assert (summary.encoded, summary.encoded_now) == (6, 0)
        stores[name] = latentae.LatentStore(labelled / f"{name}.latents")
    for store in stores.values():
        assert [store[i]["label"] for i in range(6)] == [0, 1, 2, 0, 1, 2]
        for i in range(6):
            torch.testing.assert_close(store[i]["latents"], stores["x.tar"][i]["latents"], rtol=0, atol=0)
    assert stores["x.tar"].keys == stores["x.csv"].keys == [f"{i}.png" for i in range(6)]
    assert stores["x.parquet"].keys == [f"{i:08d}-{i}.png" for i in range(6)]


def test_stores_from_an_object_store_and_of_data_sets(labelled, tiny_dcae):
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": (labelled / f"{i}.png").read_bytes(), "path": f"{i}.png"} for i in range(6)]
    columns = {"image": images, "label": [i % 3 for i in range(6)], "caption": [f"n{i}" for i in range(6)]}
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(num_classes=3), caption=datasets.Value("string")
    )
    dataset = datasets.Dataset.from_dict(columns, features=features)
    dataset.save_to_disk(labelled / "saved", num_shards=2)
    memory = MemoryFileSystem()
    memory.pipe_file("/stores/x.tar", (labelled / "x.tar").read_bytes())
    whole = encode_dataset(labelled / "x.tar", labelled / "latents", tiny_dcae, size=32)
    expected = latentae.LatentStore(whole.store)
    for number, src in enumerate((dataset, labelled / "saved", "memory://stores/x.tar")):
        for _ in range(2):  # the second time, nothing is left to do
            summary = encode_dataset(src, labelled / f"latents-{number}", tiny_dcae, size=32, shard_size=4)
        assert (summary.encoded, summary.encoded_now) == (6, 0)
        store = latentae.LatentStore(summary.store)
        for i in range(6):
            assert store[i]["label"] == i % 3
            assert store[i].get("caption") == (f"n{i}" if number < 2 else None)
            torch.testing.assert_close(store[i]["latents"], expected[i]["latents"], rtol=0, atol=0)
    memory.rm("/stores", recursive=True)
