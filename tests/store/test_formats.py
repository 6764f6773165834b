"""Exports, read by readers of our own that know nothing but each format: numpy, safetensors, torch.load, tarfile."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import safetensors
import torch
from PIL import Image

from latentae.codec import LatentCodec
from latentae.data.transforms import adm_center_crop
from latentae.errors import DataError, RequestError
from latentae.files import TEMPORARY_SUFFIX
from latentae.store.encode import encode_dataset
from latentae.store.formats import FORMATS, export_store
from latentae.store.formats import lightningdit as lightningdit_module
from latentae.store.formats import output as output_module
from latentae.store.formats import parquet as parquet_module
from latentae.store.formats import webdataset as webdataset_module
from latentae.store.formats.output import safe_path
from latentae.store.formats.webdataset import member_key
from latentae.store.reader import LatentStore

SIZE = 32


@pytest.fixture
def stores(seven, tmp_path, kl):
    """Makes a store of the seven images."""

    def make(kind="moments", flip=True, **options):
        store = tmp_path / f"{kind}-{flip}"
        encode_dataset(seven[0], store, kl, **{"size": SIZE, "shard_size": 3, "kind": kind, "flip": flip, **options})
        return LatentStore(store)

    return make


@pytest.fixture
def moments(seven, kl):
    """Mean and log-variance of the seven images, straight from the model: (7, 8, 8, 8) float32."""

    @torch.no_grad()
    def of(images):
        pixels = torch.stack([torch.from_numpy(image.copy()).permute(2, 0, 1) for image in images]) / 127.5 - 1
        return torch.cat([kl.encode(one[None]).latent_dist.parameters for one in pixels]).numpy()

    return of(seven[1].values()), of([image[:, ::-1] for image in seven[1].values()])


def mean_and_std(moments: np.ndarray) -> np.ndarray:
    mean, log_variance = np.split(moments, 2, axis=-3)
    return np.concatenate([mean, np.exp(log_variance / 2)], axis=-3)


def read_keys(folder: Path) -> list[dict]:
    return pyarrow.parquet.read_table(folder / "keys.parquet").to_pylist()


def test_lightningdit(stores, seven, moments, tmp_path, monkeypatch):
    monkeypatch.setattr(lightningdit_module, "MOST_ENTRIES", 4)
    summary = export_store(stores(), tmp_path / "out", "lightningdit", seed=3)
    assert (summary.entries, summary.missing) == (7, 0)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names == ["latents_rank00_shard000.safetensors", "latents_rank00_shard001.safetensors"]
    parts = []
    for name, rows in zip(names, (4, 3)):
        with safetensors.safe_open(tmp_path / "out" / name, framework="np") as file:
            assert file.metadata() == {"total_size": str(rows), "dtype": "torch.float32", "device": "cpu"}
            parts.append({key: file.get_tensor(key) for key in ("labels", "latents", "latents_flip")})
    tensors = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    assert tensors["labels"].dtype == np.int64
    assert tensors["labels"].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert tensors["latents"].dtype == np.float32
    # what encoding with --kind sample and that seed stores, unscaled
    drawn = stores("sample", seed=3)
    np.testing.assert_array_equal(tensors["latents"], torch.stack([item["latents"] for item in drawn]))
    np.testing.assert_array_equal(tensors["latents_flip"], torch.stack([item["latents_flip"] for item in drawn]))
    means, log_variances = np.split(moments[1], 2, axis=1)
    noise = (tensors["latents_flip"] - means) / np.exp(log_variances / 2)
    assert abs(noise.mean()) < 0.15
    assert 0.85 < noise.std() < 1.15
    assert not np.allclose(tensors["latents_flip"], tensors["latents"][..., ::-1], atol=1e-2)

    statistics = torch.load(tmp_path / "out/latents_stats.pt", weights_only=True)
    assert statistics["mean"].shape == statistics["std"].shape == (1, 4, 1, 1)
    np.testing.assert_allclose(statistics["mean"].flatten(), tensors["latents"].mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(statistics["std"].flatten(), tensors["latents"].std((0, 2, 3), ddof=1), rtol=1e-5)
    rows = read_keys(tmp_path / "out")
    assert [row["key"] for row in rows] == sorted(seven[1])
    assert [(row["file"], row["row"]) for row in rows] == [(names[i // 4], i % 4) for i in range(7)]


@pytest.mark.parametrize("kind", ["mode", "sample"])
def test_lightningdit_takes_what_is_stored_where_that_is_no_moments(stores, tmp_path, kind):
    store = stores(kind, dtype="float16")
    export_store(store, tmp_path / "out", "lightningdit")
    with safetensors.safe_open(tmp_path / "out/latents_rank00_shard000.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("latents"), torch.stack([item["latents"] for item in store]).float())
        flipped = torch.stack([item["latents_flip"] for item in store]).float()
        assert torch.equal(file.get_tensor("latents_flip"), flipped)


def test_fastdit(stores, seven, moments, kl, tmp_path):
    export_store(stores("mode", flip=False), tmp_path / "out", "fastdit")
    features = sorted((tmp_path / "out/imagenet32_features").iterdir())
    labels = sorted((tmp_path / "out/imagenet32_labels").iterdir())
    assert [path.name for path in features] == [path.name for path in labels]
    assert [np.load(path).tolist() for path in labels] == [[0], [0], [0], [1], [1], [1], [1]]
    assert np.load(labels[0]).dtype == np.int64
    latents = np.concatenate([np.load(path) for path in features])
    assert np.load(features[0]).shape == (1, 4, 8, 8)
    assert latents.dtype == np.float32
    expected = LatentCodec(kl).normalise(torch.from_numpy(moments[0][:, :4])).numpy()
    np.testing.assert_allclose(latents, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(latents, (moments[0][:, :4] - 0.125) * 0.25, rtol=0, atol=1e-5)
    rows = read_keys(tmp_path / "out")
    assert [row["key"] for row in rows] == sorted(seven[1])
    assert [row["file"] for row in rows] == [f"imagenet32_features/{path.name}" for path in features]


def test_edm2(stores, moments, tmp_path):
    summary = export_store(stores(flip=False), tmp_path / "out", "edm2")
    assert "pixels in [0, 1]" in summary.note
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(7)]
    labels = json.loads((tmp_path / "out/dataset.json").read_text())["labels"]
    assert labels == [[name, label] for name, label in zip(names, [0, 0, 0, 1, 1, 1, 1])]
    stored = np.stack([np.load(tmp_path / "out" / name) for name in names])
    assert stored.dtype == np.float32
    np.testing.assert_allclose(stored, mean_and_std(moments[0]), rtol=1e-5, atol=1e-5)
    record = json.loads((tmp_path / "out/export.json").read_text())
    np.testing.assert_allclose(record["encoder"]["raw_mean"], moments[0][:, :4].mean((0, 2, 3)), atol=1e-4)


def test_edm2_can_do_without_labels(seven, tmp_path, kl):
    for key in list(seven[1]):
        (seven[0] / key).rename(seven[0] / key.replace("/", "-"))
    for folder in ("cats", "dogs"):
        (seven[0] / folder).rmdir()
    encode_dataset(seven[0], tmp_path / "store", kl, size=SIZE, kind="moments")
    export_store(tmp_path / "store", tmp_path / "out", "edm2")
    assert json.loads((tmp_path / "out/dataset.json").read_text()) == {"labels": None}
    for format in ("lightningdit", "fastdit", "repa", "mar", "dcae"):
        if not FORMATS[format].flips:
            with pytest.raises(RequestError, match=r"7 of 7 entries of .* have no label, such as 'cats-a\.png'"):
                export_store(tmp_path / "store", tmp_path / format, format)
    export_store(tmp_path / "store", tmp_path / "tars", "webdataset")
    with tarfile.open(tmp_path / "tars/00000.tar") as tar:
        assert not [name for name in tar.getnames() if name.endswith(".cls")]


@pytest.mark.parametrize("given", [False, True])
def test_repa(given, tmp_path, write_images, kl, moments):
    sizes = {"cats/a.png": (70, 97), "cats/b.png": (32, 32), "dogs/c.webp": (140, 66)}
    images = write_images(tmp_path / "photos", sizes)
    encode_dataset(tmp_path / "photos", tmp_path / "store", kl, size=SIZE, kind="moments")
    (tmp_path / "photos/cats/a0.png").write_bytes(b"")
    export_store(tmp_path / "store", tmp_path / "out", "repa", **({"images": tmp_path / "photos"} if given else {}))
    features = [f"00000/img-mean-std-{i:08d}.npy" for i in range(3)]
    assert json.loads((tmp_path / "out/vae-sd/dataset.json").read_text())["labels"] == [
        [name, label] for name, label in zip(features, [0, 0, 1])
    ]
    names = sorted(str(path.relative_to(tmp_path / "out/images")) for path in (tmp_path / "out/images").rglob("*.png"))
    assert names == [f"00000/img{i:08d}.png" for i in range(3)]
    store = LatentStore(tmp_path / "store")
    for name, feature, item in zip(names, features, store):
        picture = np.asarray(Image.open(tmp_path / "out/images" / name))
        original = np.asarray(Image.open(tmp_path / "photos" / item["key"]).convert("RGB"))
        np.testing.assert_array_equal(picture, adm_center_crop(original, SIZE))
        stored = np.load(tmp_path / "out/vae-sd" / feature)
        np.testing.assert_allclose(stored, mean_and_std(item["moments"].numpy()), rtol=1e-6)
    assert len(images) == 3


def test_repa_says_what_its_pictures_lack(stores, seven, tmp_path):
    store = stores(flip=False)
    (seven[0] / "dogs/c.png").unlink()
    with pytest.raises(RequestError, match=r"lacks 1 of the 7 images of .*, such as 'dogs/c\.png': give what was"):
        export_store(store, tmp_path / "out", "repa", images=seven[0])
    with pytest.raises(RequestError, match="--images is for the format repa; edm2 holds no pictures"):
        export_store(store, tmp_path / "other", "edm2", images=seven[0])
    (seven[0] / "dogs/c.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"dogs/c\.png cannot be read any more \(the file has no bytes\): say by --images"
    ):
        export_store(store, tmp_path / "third", "repa", images=seven[0])


def test_mar(stores, seven, moments, tmp_path):
    export_store(stores(), tmp_path / "out", "mar")
    for key, straight, mirrored in zip(sorted(seven[1]), *moments):
        with np.load(tmp_path / "out" / f"{key}.npz") as file:
            assert sorted(file) == ["moments", "moments_flip"]
            np.testing.assert_allclose(file["moments"], straight, rtol=0, atol=1e-5)
            np.testing.assert_allclose(file["moments_flip"], mirrored, rtol=0, atol=1e-5)


def test_dcae(tmp_path, write_images, dcae, reference_latents):
    images = write_images(tmp_path / "photos", dict.fromkeys(["x/a.png", "x/a.webp", "y/a.png"], (32, 32)))
    encode_dataset(tmp_path / "photos", tmp_path / "store", dcae, size=SIZE)
    export_store(tmp_path / "store", tmp_path / "out", "dcae")
    store = LatentStore(tmp_path / "store")
    for key, raw in zip(["x/a.png", "y/a.png"], reference_latents(dcae, [images["x/a.png"], images["y/a.png"]])):
        stored = np.load(tmp_path / "out" / f"{key}.npy")
        np.testing.assert_allclose(stored, raw * dcae.config.scaling_factor, rtol=0, atol=1e-5)
        assert stored.dtype == np.float32
    assert (tmp_path / "out/x/a.webp.npy").exists()
    assert len(store) == 3


def test_class_folders_are_numbers_where_the_keys_have_none(tmp_path, write_images, dcae):
    torchvision = pytest.importorskip("torchvision.datasets.folder")
    write_images(tmp_path / "photos", dict.fromkeys(["zebra.png", "ant.png", "more/bee.png"], (32, 32)))
    manifest = ["path,label", "zebra.png,1", "ant.png,0", "more/bee.png,1"]
    (tmp_path / "photos/list.csv").write_text("\n".join(manifest))
    encode_dataset(tmp_path / "photos/list.csv", tmp_path / "store", dcae, size=SIZE)
    export_store(tmp_path / "store", tmp_path / "out", "dcae")
    read = torchvision.DatasetFolder(str(tmp_path / "out"), np.load, (".npy",))
    store = LatentStore(tmp_path / "store")
    expected = {f"{label:05d}/{key}.npy": label for key, label in zip(store.keys, store.labels)}
    assert {str(Path(path).relative_to(tmp_path / "out")): label for path, label in read.samples} == expected


def test_a_class_without_entries_is_refused_where_folders_are_counted(tmp_path, write_images, dcae):
    write_images(tmp_path / "photos", dict.fromkeys(["a.png", "b.png"], (32, 32)))
    (tmp_path / "photos/list.csv").write_text("path,label\na.png,0\nb.png,2\n")
    encode_dataset(tmp_path / "photos/list.csv", tmp_path / "store", dcae, size=SIZE)
    with pytest.raises(RequestError, match="has labels up to 2 but none is 1; this loader counts folders"):
        export_store(tmp_path / "store", tmp_path / "out", "dcae")


AWKWARD = ["a.b.jpg", "a.jpg", "a.png", "__a__.png", "d.1/a.png", "d/1.a.png", "über 1%.png"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its files open
def test_webdataset_keeps_awkward_keys_apart(tmp_path, write_images, kl, monkeypatch):
    wds = pytest.importorskip("webdataset")
    monkeypatch.setattr(webdataset_module, "MOST_ENTRIES", 3)
    write_images(tmp_path / "photos", dict.fromkeys(AWKWARD, (32, 32)))
    table = [f"{key},{i},caption of {key}" for i, key in enumerate(AWKWARD)]
    (tmp_path / "photos/list.csv").write_text("\n".join(["path,label,caption", *table]), encoding="utf-8")
    encode_dataset(tmp_path / "photos/list.csv", tmp_path / "store", kl, size=SIZE, kind="moments")
    export_store(tmp_path / "store", tmp_path / "out", "webdataset")
    tars = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    assert [Path(tar).name for tar in tars] == ["00000.tar", "00001.tar", "00002.tar"]
    read = list(wds.WebDataset(tars, shardshuffle=False, empty_check=False).decode())
    store = LatentStore(tmp_path / "store")
    assert [sample["json"]["key"] for sample in read] == store.keys
    assert len({sample["__key__"] for sample in read}) == len(AWKWARD)
    for sample, item in zip(read, store):
        np.testing.assert_array_equal(sample["moments.npy"], item["moments"])
        assert sample["cls"] == sample["json"]["label"] == item["label"] == AWKWARD.index(item["key"])
        assert (sample["json"]["height"], sample["json"]["width"]) == (32, 32)


def test_webdataset_is_the_same_to_the_byte(stores, tmp_path, tree):
    store = stores("sample")
    trees = []
    for name in ("one", "two"):
        export_store(store, tmp_path / name, "webdataset")
        trees.append(tree(tmp_path / name))
    assert trees[0] == trees[1]
    with tarfile.open(tmp_path / "one/00000.tar") as tar:
        assert {member.mtime for member in tar} == {0}
        assert tar.getnames()[:4] == [
            f"cats/a%2Epng.{end}" for end in ("latents.npy", "latents_flip.npy", "cls", "json")
        ]
        latents = np.load(io.BytesIO(tar.extractfile("dogs/d%2Epng.latents_flip.npy").read()))
    np.testing.assert_array_equal(latents, store[6]["latents_flip"])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_parquet(stores, tmp_path, dtype, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(parquet_module, "MOST_ENTRIES", 4)
    monkeypatch.setattr(parquet_module, "GROUP_BYTES", 2 * 2 * 4 * 64 * (2 if dtype == "float16" else 4))
    store = stores("mode", dtype=dtype)
    export_store(store, tmp_path / "out", "parquet")
    files = sorted((tmp_path / "out/data").iterdir())
    assert [path.name for path in files] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    groups = [pyarrow.parquet.ParquetFile(path).metadata for path in files]
    assert [m.row_group(i).num_rows for m in groups for i in range(m.num_row_groups)] in ([2, 2, 2, 1], [4, 3])
    read = datasets.load_dataset(
        "parquet", data_dir=str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "c")
    )
    assert type(read.features["latents"]).__name__ == "Array3D"
    assert read.features["latents"].dtype == ("float16" if dtype == "float16" else "float32")
    read = read.with_format("numpy")
    assert read[:]["key"].tolist() == store.keys
    assert read[:]["label"].tolist() == store.labels
    for row, item in zip(read, store):
        for name in ("latents", "latents_flip"):
            np.testing.assert_array_equal(row[name], item[name].float())
    plain = pyarrow.parquet.read_table(files[0]).to_pylist()
    np.testing.assert_array_equal(np.array(plain[1]["latents"], np.float32), store[1]["latents"].float())
    card = (tmp_path / "out/README.md").read_text()
    assert store.config["model"]["weights_sha256"] in card
    assert '"scaling_factor": 0.25' in card
    assert "raw: no scale is applied" in card


def test_parquet_carries_columns_and_opens_as_a_folder(tmp_path, write_images, kl):
    datasets = pytest.importorskip("datasets")
    names = ["a.png", "b.png", "c.png"]
    write_images(tmp_path / "photos", dict.fromkeys(names, (32, 32)))
    rows = [
        {"path": "a.png"},
        {"path": "b.png", "caption": "zwei Bären", "score": 0.5},
        {"path": "c.png", "score": 1.5},
    ]
    (tmp_path / "photos/list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    encode_dataset(tmp_path / "photos/list.jsonl", tmp_path / "store", kl, size=SIZE)
    export_store(tmp_path / "store", tmp_path / "out", "parquet")
    read = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "c"))
    assert read["key"][:] == names
    assert read["caption"][:] == [None, "zwei Bären", None]
    assert read["score"][:] == [None, 0.5, 1.5]
    assert read["label"][:] == [None, None, None]
    np.testing.assert_array_equal(np.float32(read[2]["latents"]), LatentStore(tmp_path / "store")[2]["latents"])


def test_parquet_of_several_shapes(tmp_path, write_images, dcae):
    datasets = pytest.importorskip("datasets")
    write_images(tmp_path / "mixed", {"a.png": (32, 64), "b.png": (8, 8), "c.png": (40, 24)})
    encode_dataset(tmp_path / "mixed", tmp_path / "store", dcae, size="native")
    store = LatentStore(tmp_path / "store")
    export_store(store, tmp_path / "out", "parquet")
    read = datasets.load_dataset(
        "parquet", data_dir=str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "c")
    )
    for row, item in zip(read, store):
        np.testing.assert_array_equal(np.float32(row["latents"]).reshape(row["latents_shape"]), item["latents"])
        assert row["label"] is None
    for format in ("fastdit", "dcae"):
        with pytest.raises(RequestError, match=r"holds latents of several shapes and .* takes images of one size"):
            export_store(store, tmp_path / format, format)


def test_what_a_loader_needs_and_the_store_lacks_is_said(stores, tmp_path):
    mode = stores("mode", flip=False)
    for format in ("repa", "edm2", "mar"):
        with pytest.raises(RequestError, match=r"holds no moments, which .* needs: encode again with --kind moments"):
            export_store(mode, tmp_path / "out", format)
    with pytest.raises(RequestError, match=r"no latents of mirrored images, which LightningDiT's .* with --flip"):
        export_store(mode, tmp_path / "out", "lightningdit")
    with pytest.raises(RequestError, match="format='zip'; expected one of lightningdit, fastdit"):
        export_store(mode, tmp_path / "out", "zip")
    assert not (tmp_path / "out").exists()


def test_an_incomplete_store_only_by_request(stores, tmp_path):
    stores("mode", flip=False)
    (tmp_path / "mode-False/shards/00001.json").unlink()
    with pytest.raises(RequestError, match="is not complete: run its encode command to the end"):
        export_store(tmp_path / "mode-False", tmp_path / "out", "fastdit")
    summary = export_store(tmp_path / "mode-False", tmp_path / "out", "fastdit", partial=True)
    assert (summary.entries, summary.missing) == (4, 3)
    assert len(list((tmp_path / "out/imagenet32_features").iterdir())) == 4
    assert json.loads((tmp_path / "out/export.json").read_text())["complete"] is False


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; of safetensors the metadata, whose order changes from run to run, are left out."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data.partition(b"}")[2] if name.endswith(".safetensors") else data for name, data in files.items()}


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_that_was_cut_short_goes_on_to_the_same_files(format, stores, seven, tmp_path, monkeypatch):
    store = stores()
    options = {"images": seven[0]} if format == "repa" else {}
    export_store(store, tmp_path / "whole", format, **options)
    expected = contents(tmp_path / "whole")
    for written in range(len(expected)):
        out, count, real = tmp_path / f"cut{written}", [0], os.replace
        monkeypatch.setattr(output_module, "WRITERS", 1)

        def fail(*names, real=real, count=count, written=written):
            count[0] += 1
            if count[0] > written:
                raise OSError(28, "No space left on device")
            real(*names)

        with monkeypatch.context() as patch:
            patch.setattr("latentae.files.os.replace", fail)
            with pytest.raises(OSError, match="No space left"):
                export_store(store, out, format, **options)
        assert not (out / "export.json").exists()
        assert not list(out.rglob(f"*{TEMPORARY_SUFFIX}"))
        export_store(store, out, format, **options)
        assert contents(out) == expected
    assert export_store(store, tmp_path / "whole", format, **options).entries == 7
    assert contents(tmp_path / "whole") == expected


KILLED = """
import os, signal, sys
from latentae.store.formats import export_store
count, real = 0, os.replace
def replace(*names):
    global count
    count += 1
    if count == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*names)
os.replace = replace
export_store(sys.argv[1], sys.argv[2], "fastdit")
"""


def test_an_export_that_was_killed_leaves_nothing_that_a_loader_would_count(stores, tmp_path):
    store = stores("mode", flip=False)
    export_store(store, tmp_path / "whole", "fastdit")
    command = [sys.executable, "-c", KILLED, str(store.path), str(tmp_path / "out")]
    assert subprocess.run(command).returncode == -9
    assert list((tmp_path / "out").rglob(f"*{TEMPORARY_SUFFIX}"))
    export_store(store, tmp_path / "out", "fastdit")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_export_or_other_things_in_the_folder_are_refused(stores, tmp_path):
    store = stores("mode", flip=False)
    export_store(store, tmp_path / "out", "fastdit")
    with pytest.raises(RequestError, match=r"another export, which differs in format, .*'fastdit' there, 'dcae' now"):
        export_store(store, tmp_path / "out", "dcae")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("x")
    with pytest.raises(RequestError, match=r"full is not empty \(it has thesis\.tex\) and no export"):
        export_store(store, tmp_path / "full", "fastdit")
    moments = stores(flip=False)
    export_store(moments, tmp_path / "drawn", "fastdit", seed=1)
    with pytest.raises(RequestError, match="differs in seed"):
        export_store(moments, tmp_path / "drawn", "fastdit", seed=2)


def test_a_damaged_store_is_not_exported(stores, tmp_path):
    store = stores("mode", flip=False)
    path = store.path / "shards/00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"1 files of the store are damaged; the first: .*00001\.safetensors is not what"
    ):
        export_store(store, tmp_path / "out", "parquet")
    assert not (tmp_path / "out/export.json").exists()


def test_the_record_says_what_was_done(stores, tmp_path):
    store = stores(flip=False)
    export_store(store, tmp_path / "out", "fastdit", seed=5)
    record = json.loads((tmp_path / "out/export.json").read_text())
    assert record["model"]["weights_sha256"] == store.config["model"]["weights_sha256"]
    assert record["normalisation"]["scaling_factor"] == 0.25
    assert (record["kind"], record["seed"], record["applied"]) == ("sample", 5, "the normalisation")
    assert record["pixel_range"] == [-1, 1]
    assert record["preprocess"]["size"] == SIZE
    assert str(tmp_path) not in json.dumps(record)


HOSTILE = ["../x.png", "/etc/x.png", "a/../../x.png", "a/./x.png", "a//x.png", "", "..", "a\0b.png", "%2E%2E/x.png"]


def test_hostile_keys_stay_in_the_folder():
    paths = [safe_path(key) for key in HOSTILE]
    assert len(set(paths)) == len(HOSTILE)
    for path in [*paths, *(member_key(key) for key in HOSTILE)]:
        parts = path.split("/")
        assert not {"", ".", ".."} & set(parts)
        assert "\0" not in path
    assert safe_path("cats/a b.JPEG") == "cats/a b.JPEG"
    long = safe_path("x" * 300 + "/" + "y" * 300)
    assert max(len(part) for part in long.split("/")) < 100
    assert long != safe_path("x" * 300 + "/" + "y" * 301)


def test_a_hostile_key_of_a_store_is_exported_inside(stores, tmp_path, monkeypatch):
    store = stores("mode", flip=False)
    keys = [*HOSTILE[:5], "ok.png", "also/ok.png"]
    real = LatentStore.__getitem__
    monkeypatch.setattr(LatentStore, "__getitem__", lambda self, i: {**real(self, i), "key": keys[i]})
    monkeypatch.setattr(LatentStore, "keys", keys)
    before = {path for path in tmp_path.rglob("*")}
    export_store(store, tmp_path / "out", "dcae")
    new = {path for path in tmp_path.rglob("*")} - before
    assert all(path.is_relative_to(tmp_path / "out") for path in new)
    assert sum(path.suffix == ".npy" for path in new) == 7


def test_as_users_type_it(stores, tmp_path, capsys):
    from latentae.cli import export
    from latentae.cli.main import main

    assert tuple(FORMATS) == export.FORMATS
    store, out = str(stores().path), str(tmp_path / "out")
    assert main(["export", store, out, "--format", "edm2"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}: 7 entries as edm2; export.json says what they are\n"
    assert "note: EDM2's own tool feeds pixels in [0, 1]" in captured.err
    assert main(["export", store, out, "--format", "edm2"]) == 0
    capsys.readouterr()
    for arguments, sentence in (
        ([store, out], "is a store of latents: say by --format"),
        ([store, out, "--format", "edm2", "--with-code"], "--with-code is for models"),
        (["dc-ae-tiny", out, "--format", "edm2"], "--format is for a store of latents; dc-ae-tiny is none"),
    ):
        assert main(["export", *arguments]) == 2
        assert sentence in capsys.readouterr().err
