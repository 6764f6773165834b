import os

import numpy as np
import pytest
import torch
from PIL import Image

from latentae.errors import DataError, RequestError
from latentae.nn.pixels import to_float
from latentae.store.images import ImageWriter, output_names


def test_the_extension_changes_and_the_path_stays():
    assert output_names(["a.jpg", "b/c.d.webp", "b/e"], "png") == {
        "a.jpg": "a.png",
        "b/c.d.webp": "b/c.d.png",
        "b/e": "b/e.png",
    }


@pytest.mark.parametrize(
    "keys",
    [
        ["a.png", "a.jpg", "b.jpg"],
        ["a.png", "A.jpg"],  # one file on a disk that does not tell case apart
        ["a.jpg", "a.jpg.png"],
        ["a.jpg", "a.png", "a.jpg.png"],
        ["a", "a.png", "a.png.png", "a.png.jpg"],
    ],
)
def test_no_two_keys_share_a_name(keys):
    names = output_names(keys, "png")
    assert len({name.lower() for name in names.values()}) == len(keys)
    assert all(name.endswith(".png") and name.startswith(key.rsplit(".", 1)[0]) for key, name in names.items())


@pytest.mark.parametrize("key", ["../x.png", "a/../../x.png", "/etc/x.png", "a\0b.png", "", ".", "a/..", "//x.png"])
def test_hostile_keys_are_refused(key):
    with pytest.raises(DataError, match="refused"):
        output_names(["good.png", key], "png")


def test_a_key_that_occurs_twice_is_refused():
    with pytest.raises(DataError, match=r"'a\.png' occurs more than once"):
        output_names(["a.png", "b.png", "a.png"], "png")


@pytest.mark.parametrize("format", ["png", "webp"])
def test_pixels_come_back_as_they_went(format, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (13, 21, 3), np.uint8)
    with ImageWriter(tmp_path, ["a/b.jpg"], [], format=format, workers=2) as writer:
        writer.write("a/b.jpg", to_float(torch.from_numpy(image).permute(2, 0, 1)))
    written = Image.open(tmp_path / f"a/b.{format}")
    assert written.format == format.upper()
    np.testing.assert_array_equal(np.asarray(written), image)


def test_pixels_out_of_range_are_clamped(tmp_path):
    pixels = torch.tensor([-3.0, -1.0, 0.0, 1.0, 7.0]).expand(3, 1, 5)
    with ImageWriter(tmp_path, ["a.png"], [], format="png", workers=1) as writer:
        writer.write("a.png", pixels)
    assert np.asarray(Image.open(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "sub").symlink_to(tmp_path / "elsewhere")
    with (
        pytest.raises(RequestError, match="by a symbolic link"),
        ImageWriter(tmp_path / "out", ["sub/new/x.png"], [], format="png", workers=1),
    ):
        pass
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_link_in_the_place_of_a_file_is_replaced_not_followed(tmp_path):
    (tmp_path / "precious.png").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x.png").symlink_to(tmp_path / "precious.png")
    with ImageWriter(tmp_path / "out", ["x.png"], [], format="png", workers=1) as writer:
        writer.write("x.png", torch.zeros(3, 4, 4))
    assert (tmp_path / "precious.png").read_text() == "precious"


@pytest.mark.parametrize("by_link", [False, True])
def test_an_input_is_never_overwritten(by_link, tmp_path):
    (tmp_path / "in put").mkdir()
    photo = tmp_path / "in put" / "ä.png"
    photo.write_bytes(b"photo")
    if by_link:
        (tmp_path / "link").symlink_to(tmp_path / "in put")
    folder = tmp_path / ("link" if by_link else "in put")
    with pytest.raises(RequestError, match="is an input and would be overwritten"):
        ImageWriter(folder, ["ä.png"], [photo.as_uri()], format="png", workers=1)


def test_a_failed_write_is_raised_and_leaves_nothing(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), monkeypatch.context() as patch:  # noqa: PT012
        patch.setattr(os, "replace", full)
        with ImageWriter(tmp_path / "out", ["a.png"], [], format="png", workers=1) as writer:
            writer.write("a.png", torch.zeros(3, 4, 4))
    assert not list((tmp_path / "out").iterdir())


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(RequestError, match="format='jpeg'; expected one of png, webp"):
        ImageWriter(tmp_path, [], [], format="jpeg", workers=1)
