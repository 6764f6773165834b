from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import latentae
from latentae.codec import LatentCodec
from latentae.errors import DataError, RequestError
from latentae.nn.pixels import to_uint8
from latentae.store.decode import decode_store
from latentae.store.encode import encode_dataset
from latentae.store.reader import LatentStore
from latentae.store.reconstruction import reconstruct


def through(codec, image) -> np.ndarray:
    """One uint8 image (H, W, 3) through the codec alone."""
    pixels = codec.decode(codec.encode(torch.from_numpy(image.copy()).permute(2, 0, 1)[None]))
    return to_uint8(pixels[0]).permute(1, 2, 0).numpy()


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def assert_same_pixels(path, expected):
    """Equal but for rounding where the batch moved a value across the middle between two levels."""
    difference = np.abs(read(path) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("model", ["dcae", "kl"])
@pytest.mark.parametrize("format", ["png", "webp"])
def test_a_store_decodes_to_what_the_codec_gives_for_each_image(model, format, seven, tmp_path, request):
    folder, images = seven
    codec = LatentCodec(request.getfixturevalue(model))
    encode_dataset(folder, tmp_path / "store", codec, size=32, shard_size=3)
    summary = decode_store(tmp_path / "store", tmp_path / "out", codec, format=format, batch_size=2)
    assert (summary.images, summary.missing) == (7, 0)
    for key, image in images.items():
        assert_same_pixels((tmp_path / "out" / key).with_suffix(f".{format}"), through(codec, image))
    assert len([path for path in (tmp_path / "out").rglob("*") if path.is_file()]) == 7


def test_moments_decode_by_their_mode(seven, tmp_path, kl):
    folder, images = seven
    encode_dataset(folder, tmp_path / "store", kl, size=32, kind="moments")
    decode_store(tmp_path / "store", tmp_path / "out", kl)
    assert_same_pixels(tmp_path / "out/dogs/b.png", through(LatentCodec(kl), images["dogs/b.png"]))


def test_native_sizes_come_back(tmp_path, write_images, dcae):
    sizes = {"a.png": (30, 50), "b.jpg": (32, 56), "sub/c.png": (5, 41)}
    write_images(tmp_path / "mixed", sizes)
    encode_dataset(tmp_path / "mixed", tmp_path / "store", dcae, size="native")
    decode_store(tmp_path / "store", tmp_path / "out", dcae)
    for name, key in (("a.png", "a.png"), ("b.png", "b.jpg"), ("sub/c.png", "sub/c.png")):
        image = np.asarray(Image.open(tmp_path / "mixed" / key))
        assert read(tmp_path / "out" / name).shape[:2] == sizes[key]
        assert_same_pixels(tmp_path / "out" / name, through(LatentCodec(dcae), image))


def test_the_store_knows_its_model(seven, tmp_path, dcae):
    dcae.save_pretrained(tmp_path / "model")
    encode_dataset(seven[0], tmp_path / "store", str(tmp_path / "model"), size=32)
    assert decode_store(tmp_path / "store", tmp_path / "out").images == 7


def test_a_model_with_other_weights_is_refused_unless_allowed(seven, tmp_path, dcae):
    encode_dataset(seven[0], tmp_path / "store", dcae, size=32)
    other = latentae.create("dc-ae-tiny", seed=9)
    with pytest.raises(RequestError, match="does not have the weights that encoded"):
        decode_store(tmp_path / "store", tmp_path / "out", other)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RequestError, match="does not say where its DCAE is: give a model"):
        decode_store(tmp_path / "store", tmp_path / "out")
    assert decode_store(tmp_path / "store", tmp_path / "out", other, allow_other_model=True).images == 7


def test_an_unfinished_store_decodes_as_far_as_it_is(seven, tmp_path, dcae):
    encode_dataset(seven[0], tmp_path / "store", dcae, size=32, shard_size=3)
    (tmp_path / "store/shards/00000.json").unlink()
    summary = decode_store(tmp_path / "store", tmp_path / "out", dcae)
    assert (summary.images, summary.missing) == (4, 3)


def test_a_damaged_store_is_not_decoded(seven, tmp_path, dcae):
    encode_dataset(seven[0], tmp_path / "store", dcae, size=32)
    path = tmp_path / "store/shards/00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-10] ^= 4
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"00000\.safetensors is not what was written"):
        decode_store(tmp_path / "store", tmp_path / "out", dcae)


@pytest.mark.parametrize("key", ["../../evil.png", "/tmp/evil.png", "a\0.png"])
def test_hostile_keys_in_a_store_are_refused_before_anything_is_written(key, seven, tmp_path, dcae):
    from latentae.files import read_json, sha256_file, write_json

    encode_dataset(seven[0], tmp_path / "store", dcae, size=32)
    rows, marker = (tmp_path / "store/shards" / f"00000.{suffix}" for suffix in ("parquet", "json"))
    table = pyarrow.parquet.read_table(rows)
    keys = [key, *table["key"].to_pylist()[1:]]
    pyarrow.parquet.write_table(table.set_column(0, "key", [keys]), rows)
    forged = {**read_json(marker), "rows": {"sha256": sha256_file(rows), "bytes": rows.stat().st_size}}
    write_json(marker, forged)
    assert LatentStore(tmp_path / "store").keys[0] == key
    with pytest.raises(DataError, match="refused"):
        decode_store(tmp_path / "store", tmp_path / "out" / "deep", dcae)
    assert not (tmp_path / "out").exists()


def test_decoding_over_the_inputs_is_refused(seven, tmp_path, dcae, tree):
    folder, _ = seven
    before = tree(folder)
    encode_dataset(folder, tmp_path / "store", dcae, size=32)
    with pytest.raises(RequestError, match="is an input and would be overwritten"):
        decode_store(tmp_path / "store", folder, dcae)
    assert tree(folder) == before


def test_reconstruct_keeps_every_size_and_name(photo_folder, tmp_path, dcae):
    summary = reconstruct(photo_folder, tmp_path / "out", dcae, batch_size=3)
    assert (summary.images, summary.bad) == (6, {})
    names = {"a.png", "b.jpg", "sub/c.webp", "sub/deeper/d.png", "e e.jpeg", "f.PNG"}
    for name in names:
        image = np.asarray(Image.open(photo_folder / name).convert("RGB"))
        out = (tmp_path / "out" / name).with_suffix(".png")
        assert read(out).shape == image.shape
        assert_same_pixels(out, through(LatentCodec(dcae), image))


def test_reconstruct_lists_broken_images_and_writes_the_others(seven, tmp_path, dcae, capsys):
    (seven[0] / "cats/b.jpg").write_text("<html>")
    with pytest.raises(DataError, match=r"1 of 8 inputs are bad \(1 not-an-image\)"):
        reconstruct(seven[0], tmp_path / "out", dcae)
    assert "bad: cats/b.jpg: the file begins with" in capsys.readouterr().err
    summary = reconstruct(seven[0], tmp_path / "out", dcae, max_bad=1)
    assert summary.bad == {"cats/b.jpg": "not-an-image"}
    written = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    assert written == {*sorted(seven[1])} - {"cats/b.png"} | {"cats/b.png.png"}  # b.png and b.jpg stay apart


def test_reconstruct_into_its_own_inputs_is_refused(seven, tmp_path, dcae, tree):
    folder, _ = seven
    before = tree(folder)
    for dst in (folder, folder / "out"):
        with pytest.raises(RequestError, match="choose another folder"):
            reconstruct(folder, dst, dcae)
    with pytest.raises(RequestError, match="choose another folder"):
        reconstruct(folder / "cats/a.png", folder / "cats", dcae)
    assert tree(folder) == before


def test_reconstruct_halves_a_batch_that_does_not_fit(seven, tmp_path, dcae):
    class Small(LatentCodec):
        def reconstruct(self, pixels, **options):
            if len(pixels) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().reconstruct(pixels, **options)

    assert reconstruct(seven[0], tmp_path / "out", Small(dcae), batch_size=4).images == 7


# Decoders that sample


def sampler(name="dito-tiny"):
    return latentae.create(name)


def pictures(folder) -> dict[str, np.ndarray]:
    return {path.relative_to(folder).as_posix(): read(path) for path in folder.rglob("*.png")}


@pytest.mark.parametrize("name", ["dito-tiny", "swycc-tiny"])
def test_the_noise_of_an_image_is_that_of_its_key_in_any_batch_store_or_order(name, seven, tmp_path):
    folder, images = seven
    encode_dataset(folder, tmp_path / "store", sampler(name), size=32, shard_size=3)
    encode_dataset(folder / "dogs", tmp_path / "other", sampler(name), size=32)
    out = {}
    for label, store, batch_size in (("a", "store", 16), ("b", "store", 1), ("c", "other", 2)):
        decode_store(tmp_path / store, tmp_path / label, sampler(name), batch_size=batch_size)
        out[label] = pictures(tmp_path / label)
    reconstruct(folder, tmp_path / "d", sampler(name), batch_size=2)
    out["d"] = pictures(tmp_path / "d")
    assert set(out["a"]) == set(images)
    for key in images:
        for label in "bd":
            assert np.abs(out["a"][key] - out[label][key]).max() <= 1
    # keys of the other store have no folder, and so other noise
    assert all(np.abs(out["c"][Path(key).name] - out["a"][key]).max() > 1 for key in images if "dogs" in key)


def test_equal_latents_of_other_keys_get_other_noise_and_a_seed_changes_all(tmp_path, write_images):
    image = next(iter(write_images(tmp_path / "one", {"a.png": (32, 32)}).values()))
    Image.fromarray(image).save(tmp_path / "one" / "b.png")
    encode_dataset(tmp_path / "one", tmp_path / "store", sampler(), size=32)
    first, second = LatentStore(tmp_path / "store")[0]["latents"], LatentStore(tmp_path / "store")[1]["latents"]
    torch.testing.assert_close(first, second)
    for seed in (0, 0, 1):
        out = tmp_path / f"out{seed}"
        decode_store(tmp_path / "store", out, sampler(), seed=seed)
    zero, one = pictures(tmp_path / "out0"), pictures(tmp_path / "out1")
    assert np.abs(zero["a.png"] - zero["b.png"]).mean() > 1
    assert all(np.abs(zero[key] - one[key]).mean() > 1 for key in zero)


def test_steps_of_the_command_are_those_of_the_model_with_that_configuration(seven, tmp_path, dcae):
    encode_dataset(seven[0], tmp_path / "store", sampler(), size=32)
    decode_store(tmp_path / "store", tmp_path / "asked", sampler(), num_inference_steps=2)
    decode_store(tmp_path / "store", tmp_path / "set", latentae.create("dito-tiny", num_inference_steps=2))
    decode_store(tmp_path / "store", tmp_path / "default", sampler())
    asked, as_set, default = (pictures(tmp_path / name) for name in ("asked", "set", "default"))
    assert all(np.array_equal(asked[key], as_set[key]) for key in asked)
    assert not any(np.array_equal(asked[key], default[key]) for key in asked)
    for call in (
        lambda: decode_store(tmp_path / "store", tmp_path / "x", sampler(), num_inference_steps=0),
        lambda: reconstruct(seven[0], tmp_path / "x", sampler(), num_inference_steps=0),
    ):
        with pytest.raises(RequestError, match="at least 1, not 0"):
            call()
    with pytest.raises(RequestError, match="DCAE decodes at once, not by steps"):
        reconstruct(seven[0], tmp_path / "x", dcae, num_inference_steps=4)
