"""What lands on disk, compared with the models and with numpy, and what is refused."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from latentae.codec import LatentCodec
from latentae.data.decode import DecodePolicy
from latentae.data.sources import FolderSource
from latentae.data.transforms import adm_center_crop
from latentae.errors import DataError, RequestError, ResumableError
from latentae.files import write_json
from latentae.loading import weights_hash
from latentae.nn.pixels import to_uint8
from latentae.store.decode import decode_store
from latentae.store.encode import encode_dataset
from latentae.store.reader import LatentStore


def test_latents_are_the_models_own_in_the_order_of_the_rows(seven, tmp_path, dcae, read_raw, reference_latents):
    folder, images = seven
    summary = encode_dataset(folder, tmp_path / "store", dcae, size=32, shard_size=3, batch_size=2)
    assert (summary.inputs, summary.shards, summary.encoded, summary.bad) == (7, 3, 7, 0)
    store = read_raw(tmp_path / "store")
    assert [len(tensors["latents"]) for tensors in store.tensors] == [3, 3, 1]
    assert [row["key"] for row in store.rows] == sorted(images)
    np.testing.assert_allclose(store.latents, reference_latents(dcae, images.values()), rtol=0, atol=1e-5)
    assert np.concatenate([tensors["labels"] for tensors in store.tensors]).tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_a_row_says_where_its_latents_come_from(seven, tmp_path, dcae, read_raw):
    folder, _ = seven
    encode_dataset(folder, tmp_path / "store", dcae, size=16, shard_size=4)
    row = read_raw(tmp_path / "store").rows[5]
    content = (folder / "dogs/c.png").read_bytes()
    assert row["key"] == "dogs/c.png"
    assert row["uri"].endswith("/seven/dogs/c.png")
    assert (row["status"], row["reason"], row["message"]) == ("ok", None, None)
    assert (row["sha256"], row["bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
    assert (row["height"], row["width"], row["label"], row["row"]) == (32, 32, 1, 1)


def test_crop_tells_which_part_of_a_wide_image_was_encoded(tmp_path, write_images, dcae, read_raw):
    write_images(tmp_path / "wide", {"wide.png": (32, 50)})
    encode_dataset(tmp_path / "wide", tmp_path / "store", dcae, size=32)
    row = read_raw(tmp_path / "store").rows[0]
    assert [row[f"crop_{name}"] for name in ("top", "left", "height", "width")] == [0, 9, 32, 32]


def test_store_json_records_the_model_and_never_applies_its_scaling(seven, tmp_path, kl, read_raw, reference_latents):
    folder, images = seven
    encode_dataset(folder, tmp_path / "store", kl, size=32)
    store = read_raw(tmp_path / "store")
    assert store.json["model"]["class"] == "AutoencoderKL"
    assert store.json["model"]["weights_sha256"] == weights_hash(kl)
    assert store.json["model"]["config"]["block_out_channels"] == [8, 8, 8]
    assert store.json["normalisation"]["scaling_factor"] == 0.25
    assert store.json["normalisation"]["shift_factor"] == 0.125
    assert (store.json["kind"], store.json["dtype"], store.json["pixel_range"]) == ("mode", "float32", [-1, 1])
    assert store.json["preprocess"]["decode"] == DecodePolicy().describe()
    np.testing.assert_allclose(store.latents, reference_latents(kl, images.values()), rtol=0, atol=1e-5)


def test_markers_hold_counts_hashes_and_sums(seven, tmp_path, dcae, read_raw):
    encode_dataset(seven[0], tmp_path / "store", dcae, size=32, shard_size=4, batch_size=3)
    store = read_raw(tmp_path / "store")
    assert [(m["inputs"], m["encoded"], m["bad"], m["batch_size"]) for m in store.markers] == [
        (4, 4, 0, 3),
        (3, 3, 0, 3),
    ]
    for marker, tensors in zip(store.markers, store.tensors):
        data = tmp_path / "store" / "shards" / f"{marker['shard']:05d}.safetensors"
        assert marker["data"]["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
        latents = tensors["latents"].astype(np.float64)
        np.testing.assert_allclose(marker["sum"], latents.sum((0, 2, 3)), rtol=1e-12)
        np.testing.assert_allclose(marker["sum_of_squares"], (latents**2).sum((0, 2, 3)), rtol=1e-12)


def test_two_runs_give_the_same_bytes(seven, tmp_path, dcae, tree):
    for name in ("one", "two"):
        encode_dataset(seven[0], tmp_path / name, dcae, size=32, shard_size=3, batch_size=2, workers=3)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert (tmp_path / "one.log").exists()  # what differs from run to run lies beside the store


def test_moments_are_mean_and_log_variance(seven, tmp_path, kl, read_raw):
    folder, images = seven
    encode_dataset(folder, tmp_path / "store", kl, size=32, kind="moments", shard_size=3)
    store = read_raw(tmp_path / "store")
    pixels = torch.stack([torch.from_numpy(i.copy()).permute(2, 0, 1) for i in images.values()]) / 127.5 - 1
    with torch.no_grad():
        posterior = kl.encode(pixels).latent_dist
    expected = torch.cat([posterior.mean, posterior.logvar], dim=1).numpy()
    moments = np.concatenate([tensors["moments"] for tensors in store.tensors])
    np.testing.assert_allclose(moments, expected, rtol=0, atol=1e-5)
    assert store.markers[0]["latent_shape"] == [8, 8, 8]


def test_samples_depend_on_seed_and_key_only(seven, tmp_path, kl, read_raw):
    folder, _ = seven

    def samples(name, source=folder, **options):
        encode_dataset(source, tmp_path / name, kl, size=32, kind="sample", **options)
        store = read_raw(tmp_path / name)
        return {row["key"]: z for row, z in zip(store.rows, store.latents)}

    class Backwards(FolderSource):
        def items(self):
            return super().items()[::-1]

    first = samples("first", batch_size=4, shard_size=100)
    others = [samples("batches", batch_size=1, shard_size=2), samples("order", Backwards(folder), batch_size=3)]
    for other in others:
        assert other.keys() == first.keys()
        for key in first:
            np.testing.assert_allclose(other[key], first[key], rtol=0, atol=1e-5)
    reseeded = samples("seed", seed=1)
    assert all(np.abs(reseeded[key] - first[key]).max() > 1e-2 for key in first)


def test_samples_are_distributed_as_the_posterior_says(seven, tmp_path, kl, read_raw):
    encode_dataset(seven[0], tmp_path / "moments", kl, size=32, kind="moments")
    mean, log_variance = np.split(read_raw(tmp_path / "moments").tensors[0]["moments"], 2, axis=1)
    encode_dataset(seven[0], tmp_path / "sample", kl, size=32, kind="sample")
    standard = (read_raw(tmp_path / "sample").latents - mean) / np.exp(log_variance / 2)
    assert abs(standard.mean()) < 0.1  # 7 * 4 * 8 * 8 draws: a standard error of 0.024
    assert abs(standard.std() - 1) < 0.1
    between = np.corrcoef(standard.reshape(7, -1)) - np.eye(7)
    assert np.abs(between).max() < 0.3  # no two inputs share their noise: a standard error of 0.06


@pytest.mark.parametrize("kind", ["moments", "sample"])
def test_a_deterministic_encoder_has_no_moments(kind, seven, tmp_path, dcae):
    with pytest.raises(RequestError, match="DCAE is deterministic: use kind='mode'"):
        encode_dataset(seven[0], tmp_path / "store", dcae, size=32, kind=kind)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_rounded_once(dtype, seven, tmp_path, dcae):
    from safetensors.torch import load_file

    encode_dataset(seven[0], tmp_path / "full", dcae, size=32)
    encode_dataset(seven[0], tmp_path / "half", dcae, size=32, dtype=dtype)
    full, half = (load_file(tmp_path / name / "shards/00000.safetensors")["latents"] for name in ("full", "half"))
    assert half.dtype == getattr(torch, dtype)
    assert torch.equal(half, full.to(half.dtype))


class Broken(torch.nn.Module):
    """Wraps an autoencoder and spoils the latents of dark images."""

    def __init__(self, inner, value):
        super().__init__()
        self.inner, self.value, self.config = inner, value, inner.config

    def to_json_string(self):
        return self.inner.to_json_string()

    def encode(self, pixels):
        output = self.inner.encode(pixels)
        dark = pixels.mean((1, 2, 3)) < -0.9
        output.latent_dist.parameters[dark, 0, 0, 0] = self.value
        return output

    def decode(self, z):
        return self.inner.decode(z)


@pytest.mark.parametrize(
    ("value", "dtype", "reason"),
    [(float("nan"), "float32", "not-finite"), (float("inf"), "float32", "not-finite"), (1e6, "float16", "overflow")],
)
def test_latents_that_cannot_be_stored_make_the_input_bad_not_the_shard(
    value, dtype, reason, seven, tmp_path, dcae, read_raw
):
    folder, _ = seven
    Image.new("RGB", (32, 32), (2, 1, 0)).save(folder / "dogs/black.png")
    summary = encode_dataset(
        folder, tmp_path / "store", LatentCodec(Broken(dcae, value)), size=32, dtype=dtype, max_bad=1
    )
    assert (summary.encoded, summary.bad, summary.reasons) == (7, 1, {reason: 1})
    store = read_raw(tmp_path / "store")
    assert [row["key"] for row in store.quarantine] == ["dogs/black.png"]
    assert np.isfinite(store.latents).all()


def test_one_broken_image_among_good_ones(seven, tmp_path, dcae, read_raw, reference_latents):
    folder, images = seven
    (folder / "cats/b.jpg").write_text("<html>not found</html>")
    (folder / "cats/empty.png").write_bytes(b"")
    (folder / "dogs/cut.png").write_bytes((folder / "dogs/a.png").read_bytes()[:200])
    with pytest.raises(DataError, match=r"3 of 10 inputs are bad \(.*1 empty.*\), more than max_bad=0.01 allows"):
        encode_dataset(folder, tmp_path / "store", dcae, size=32, shard_size=4)
    store = read_raw(tmp_path / "store")  # nothing is lost
    bad = {row["key"]: row["reason"] for row in store.quarantine}
    assert bad == {"cats/b.jpg": "not-an-image", "cats/empty.png": "empty", "dogs/cut.png": "truncated"}
    assert {row["key"] for row in store.rows} == {*images, *bad}
    np.testing.assert_allclose(store.latents, reference_latents(dcae, images.values()), rtol=0, atol=1e-5)
    assert [row["row"] for row in store.rows] == [0, None, 1, 2, None, 0, 1, 2, None, 0]

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "store/shards").iterdir()}
    summary = encode_dataset(folder, tmp_path / "store", dcae, size=32, shard_size=4, max_bad=3)
    assert (summary.encoded, summary.bad, summary.encoded_now) == (7, 3, 0)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "store/shards").iterdir()} == before


@pytest.mark.parametrize(("max_bad", "allowed"), [(0, False), (0.1, False), (0.125, True), (1, True), (1.0, True)])
def test_max_bad_is_a_share_or_a_number(max_bad, allowed, seven, tmp_path, dcae):
    (seven[0] / "bad.png").write_bytes(b"")
    if allowed:
        assert encode_dataset(seven[0], tmp_path / "store", dcae, size=32, max_bad=max_bad).bad == 1
    else:
        with pytest.raises(DataError):
            encode_dataset(seven[0], tmp_path / "store", dcae, size=32, max_bad=max_bad)


def test_a_store_of_bad_inputs_only_is_still_a_store(tmp_path, dcae, read_raw):
    folder = tmp_path / "bad"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"")
    summary = encode_dataset(folder, tmp_path / "store", dcae, max_bad=1.0)
    assert (summary.encoded, summary.bad) == (0, 2)
    assert not list((tmp_path / "store").rglob("*.safetensors"))
    assert len(read_raw(tmp_path / "store").quarantine) == 2


def test_names_that_differ_only_in_extension_stay_apart(tmp_path, write_images, dcae, read_raw):
    write_images(tmp_path / "twins", {"a.png": (32, 32), "a.jpg": (32, 32), "a.PNG": (32, 32)})
    encode_dataset(tmp_path / "twins", tmp_path / "store", dcae, size=32)
    assert [row["key"] for row in read_raw(tmp_path / "store").rows] == ["a.PNG", "a.jpg", "a.png"]


def test_native_sizes_are_padded_and_share_shards_by_shape(tmp_path, write_images, dcae, read_raw):
    sizes = {"a.png": (30, 50), "b.png": (32, 56), "c.png": (64, 40), "d.png": (29, 49), "e.png": (8, 8)}
    images = write_images(tmp_path / "mixed", sizes)
    (tmp_path / "mixed" / "f.png").write_bytes(b"\x89PNG but no more")
    summary = encode_dataset(tmp_path / "mixed", tmp_path / "store", dcae, size="native", max_bad=1)
    assert (summary.encoded, summary.bad, summary.shards) == (5, 1, 4)
    store = read_raw(tmp_path / "store")
    rows = {row["key"]: row for row in store.rows}
    assert {key: (row["height"], row["width"]) for key, row in rows.items() if row["status"] == "ok"} == sizes
    shapes = {key: -(-h // 8) * 10000 + -(-w // 8) for key, (h, w) in sizes.items()}
    assert len(set(shapes.values())) == 3
    assert sorted(tensors["latents"].shape for tensors in store.tensors) == [(1, 8, 1, 1), (1, 8, 8, 5), (3, 8, 4, 7)]
    wide = next(tensors["latents"] for tensors in store.tensors if len(tensors["latents"]) == 3)
    for key in ("a.png", "b.png", "d.png"):
        height, width = sizes[key]
        padding = ((0, -height % 8), (0, -width % 8), (0, 0))
        padded = torch.from_numpy(np.pad(images[key], padding, mode="reflect")).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            expected = dcae.encode(padded).latent_dist.mode()[0].numpy()
        np.testing.assert_allclose(wide[rows[key]["row"]], expected, rtol=0, atol=1e-5)


def test_limit_plans_the_first_inputs(seven, tmp_path, dcae, read_raw):
    encode_dataset(seven[0], tmp_path / "store", dcae, size=32, limit=4, shard_size=3)
    assert [row["key"] for row in read_raw(tmp_path / "store").rows] == sorted(seven[1])[:4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 30}, "size=30 is not a multiple of 8, the model's ratio: use 24 or 32"),
        ({"size": 4}, "size=4 is not a multiple of 8, the model's ratio: use 8"),
        ({"size": 0}, "size=0"),
        ({"size": "huge"}, "'huge'; expected a number of pixels or 'native'"),
        ({"kind": "mean"}, "kind='mean'; expected one of mode, moments, sample"),
        ({"dtype": "int8"}, "dtype='int8'; expected one of float32"),
        ({"shard_size": 0}, "shard_size=0; expected at least 1"),
        ({"batch_size": -1}, "batch_size=-1; expected at least 1"),
        ({"limit": 0}, "limit=0; expected at least 1"),
        ({"workers": 0}, "workers=0; expected at least 1"),
        ({"max_bad": -0.5}, "max_bad=-0.5; expected a share"),
    ],
)
def test_options_that_cannot_be_met_are_named_and_nothing_is_written(options, message, seven, tmp_path, dcae):
    with pytest.raises(RequestError, match=message.replace("(", r"\(")):
        encode_dataset(seven[0], tmp_path / "store", dcae, **{"size": 32, **options})
    assert not (tmp_path / "store").exists()


def test_a_folder_with_other_things_in_it_does_not_become_a_store(seven, tmp_path, dcae):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").write_text("...")
    with pytest.raises(RequestError, match=r"not empty \(it has thesis\.tex\)"):
        encode_dataset(seven[0], tmp_path / "store", dcae, size=32)
    with pytest.raises(RequestError, match="is a file; expected a folder"):
        encode_dataset(seven[0], tmp_path / "store" / "thesis.tex", dcae, size=32)


def test_a_batch_that_does_not_fit_is_halved_and_its_marker_says_so(seven, tmp_path, dcae, read_raw, reference_latents):
    class Small(LatentCodec):
        def posterior(self, pixels):
            if len(pixels) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super().posterior(pixels)

    folder, images = seven
    encode_dataset(folder, tmp_path / "store", Small(dcae), size=32, batch_size=5, shard_size=5)
    store = read_raw(tmp_path / "store")
    np.testing.assert_allclose(store.latents, reference_latents(dcae, images.values()), rtol=0, atol=1e-5)
    assert [marker["batch_size"] for marker in store.markers] == [2, 2]


def test_out_of_memory_with_one_image_stops_and_loses_nothing(seven, tmp_path, dcae, read_raw):
    class Full(LatentCodec):
        calls = 0

        def posterior(self, pixels):
            self.calls += 1
            if self.calls > 2:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
            return super().posterior(pixels)

    with pytest.raises(ResumableError, match="Out of memory with a single image"):
        encode_dataset(seven[0], tmp_path / "store", Full(dcae), size=32, batch_size=2, shard_size=2)
    assert encode_dataset(seven[0], tmp_path / "store", dcae, size=32, batch_size=2, shard_size=2).encoded == 7


def test_storage_that_goes_away_stops_the_run_and_quarantines_nothing(seven, tmp_path, dcae):
    class Share(FolderSource):
        def read(self, item):
            if item.key == "dogs/b.png":
                raise OSError(107, "Transport endpoint is not connected")
            return super().read(item)

    with pytest.raises(ResumableError, match=r"dogs/b\.png cannot be read \(Transport endpoint"):
        encode_dataset(Share(seven[0]), tmp_path / "store", dcae, size=32, shard_size=2)
    summary = encode_dataset(seven[0], tmp_path / "store", dcae, size=32, shard_size=2)
    assert (summary.encoded, summary.bad) == (7, 0)
    assert summary.encoded_now < 7  # the shards before it were kept


def test_an_input_that_vanished_is_bad(seven, tmp_path, dcae):
    source = FolderSource(seven[0])
    (seven[0] / "cats/a.png").unlink()
    summary = encode_dataset(source, tmp_path / "store", dcae, size=32, max_bad=1)
    assert summary.reasons == {"unreadable": 1}


def test_a_codec_given_as_name_says_so(seven, tmp_path, read_raw):
    encode_dataset(seven[0], tmp_path / "store", "dc-ae-tiny", size=32)
    assert read_raw(tmp_path / "store").json["model"]["name"] == "dc-ae-tiny"


def test_a_later_schema_is_not_misread(seven, tmp_path, dcae):
    encode_dataset(seven[0], tmp_path / "store", dcae, size=32)
    write_json(tmp_path / "store/store.json", {"schema": 99})
    with pytest.raises(RequestError, match="has schema 99"):
        encode_dataset(seven[0], tmp_path / "store", dcae, size=32)


def test_a_path_that_looks_like_a_partition_is_only_a_path(seven, tmp_path, dcae):
    store = tmp_path / "key=1" / "status=ok" / "store"
    assert encode_dataset(seven[0], store, dcae, size=32, shard_size=3).encoded == 7
    assert encode_dataset(seven[0], store, dcae, size=32, shard_size=3).encoded_now == 0
    assert LatentStore(store).keys == sorted(seven[1])


def test_a_video_autoencoder_takes_images_as_videos_of_one_frame(seven, tmp_path):
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    wan = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], latents_mean=[0.1] * 4,
        latents_std=[2.0] * 4, scale_factor_spatial=2,
    )  # fmt: skip
    encode_dataset(seven[0], tmp_path / "store", wan, size=16)
    store = LatentStore(tmp_path / "store")
    assert store[0]["latents"].shape == (4, 1, 8, 8)
    codec = LatentCodec(wan)
    image = adm_center_crop(seven[1]["dogs/b.png"], 16)
    expected = codec.encode(torch.from_numpy(image).permute(2, 0, 1)[None])
    torch.testing.assert_close(store.normalise(store[4]["latents"]), expected.tensor[0], atol=1e-5, rtol=0)
    assert store.statistics().mean.shape == (4,)
    decode_store(tmp_path / "store", tmp_path / "out", wan)
    written = np.asarray(Image.open(tmp_path / "out/dogs/b.png")).astype(int)
    difference = written - to_uint8(codec.decode(expected))[0].permute(1, 2, 0).numpy()
    assert np.abs(difference).max() <= 1


def test_a_header_of_impossible_size_is_one_bad_input_at_native_sizes(tmp_path, write_images, dcae):
    import struct
    import zlib

    inputs = write_images(tmp_path / "mixed", {"a.png": (32, 32), "b.png": (32, 40)}) and tmp_path / "mixed"
    header = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (inputs / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    summary = encode_dataset(inputs, tmp_path / "store", dcae, size="native", max_bad=1)
    assert (summary.encoded, summary.bad) == (2, 1)
    assert list(summary.reasons.values()) == [1]
