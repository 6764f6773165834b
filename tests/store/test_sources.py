"""Stores from every kind of source: the same latents, and each image's label with them."""

import csv
import io
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
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
