"""Listing and reading: order, links, names that no file system should have, and what users are told."""

import errno
import os
import pickle
from pathlib import Path

import pytest

from latentae.data.decode import BadImage
from latentae.data.sources import FolderSource, Item, open_source, refuse_output_in_input
from latentae.errors import RequestError


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode("utf-8", "surrogateescape"))
    return folder


def keys(folder: Path) -> list[str]:
    return [item.key for item in FolderSource(folder).items()]


def test_order_is_that_of_the_keys_whatever_the_file_system_says(tmp_path, monkeypatch):
    names = ["b.png", "a/z.jpg", "a.jpg", "B.png", "a/é.jpg", "a b.jpg", "a/10.jpg", "a/9.jpg", "ä.webp", "a-.jpg"]
    make(tmp_path, *names)
    assert keys(tmp_path) == sorted(names)
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: iter(list(scandir(path))[::-1]))
    assert keys(tmp_path) == sorted(names)


def test_extension_is_part_of_the_key_and_its_case_does_not_matter(tmp_path):
    make(tmp_path, "a.png", "a.jpg", "a.JPG", "a.TiFf", "a.txt", "a", "jpg")
    assert keys(tmp_path) == ["a.JPG", "a.TiFf", "a.jpg", "a.png"]


def test_hidden_files_and_archive_leftovers_are_skipped(tmp_path):
    make(tmp_path, "a.png", ".b.png", "._a.png", ".git/c.png", "__MACOSX/d.png", "e/__MACOSX/f.png", "e/.g/h.png")
    assert keys(tmp_path) == ["a.png"]


def test_items_are_read_back(tmp_path):
    names = [
        "plain.jpg",
        "percent%20%.jpg",
        "white space.jpg",
        "line\nbreak.jpg",
        "quote'\".jpg",
        "#?&.jpg",
        "日本.jpg",
    ]
    source = FolderSource(make(tmp_path, *names))
    assert {item.key for item in source.items()} == set(names)
    for item in source.items():
        assert source.read(item) == item.key.encode()
        assert item.size == len(item.key.encode())
        item.uri.encode("ascii")


def test_a_source_and_its_items_can_be_pickled(tmp_path):
    source = FolderSource(make(tmp_path, "a.png"))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.items() == source.items()
    assert copy.read(copy.items()[0]) == b"a.png"


def test_relative_paths_survive_a_change_of_folder(tmp_path, monkeypatch):
    make(tmp_path, "photos/a.png")
    monkeypatch.chdir(tmp_path)
    source = open_source("photos")
    monkeypatch.chdir("/")
    assert source.read(source.items()[0]) == b"photos/a.png"


# names that are not UTF-8


def make_bytes(folder: Path, name: bytes) -> None:
    try:
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(name)
    except OSError:
        pytest.skip("this file system only takes UTF-8 names")


def test_names_that_are_not_utf8_get_keys_that_are(tmp_path):
    make_bytes(tmp_path, b"caf\xe9.jpg")
    source = FolderSource(tmp_path)
    (item,) = source.items()
    assert item.key == "caf\\xe9.jpg"
    item.key.encode()
    item.uri.encode("ascii")
    assert source.read(item) == b"caf\xe9.jpg"


def test_two_files_with_one_key_are_refused(tmp_path):
    make_bytes(tmp_path, b"caf\xe9.jpg")
    make_bytes(tmp_path, b"caf\\xe9.jpg")
    with pytest.raises(RequestError, match="both get the key") as caught:
        FolderSource(tmp_path)
    assert "caf%E9.jpg" in str(caught.value)
    assert "caf%5Cxe9.jpg" in str(caught.value)


# links and odd files


def test_links_to_files_and_folders_are_followed(tmp_path):
    make(tmp_path, "elsewhere/a.png", "photos/b.png")
    (tmp_path / "photos/link.png").symlink_to(tmp_path / "elsewhere/a.png")
    (tmp_path / "photos/folder").symlink_to(tmp_path / "elsewhere")
    source = FolderSource(tmp_path / "photos")
    assert [item.key for item in source.items()] == ["b.png", "folder/a.png", "link.png"]
    assert source.read(source.items()[2]) == b"elsewhere/a.png"


def test_loops_of_links_end(tmp_path):
    make(tmp_path, "a/b/c.png", "d.png")
    (tmp_path / "a/b/up").symlink_to(tmp_path)
    (tmp_path / "a/self").symlink_to(tmp_path / "a")
    (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
    assert keys(tmp_path) == ["a/b/c.png", "d.png", "round.png"]


def test_two_folders_that_link_to_each_other(tmp_path):
    make(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a/b").symlink_to(tmp_path / "b")
    (tmp_path / "b/a").symlink_to(tmp_path / "a")
    assert keys(tmp_path) == ["a/1.png", "a/b/2.png", "b/2.png", "b/a/1.png"]


def test_a_link_to_nothing_is_an_input_that_cannot_be_read(tmp_path):
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = FolderSource(tmp_path)
    (item,) = source.items()
    with pytest.raises(BadImage, match=r"gone\.png cannot be read") as caught:
        source.read(item)
    assert caught.value.reason == "unreadable"


def test_pipes_are_skipped(tmp_path):
    make(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert keys(tmp_path) == ["a.png"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT])
def test_a_file_that_may_not_be_read_is_a_bad_image(tmp_path, monkeypatch, number):
    source = FolderSource(make(tmp_path, "a.png"))

    def fail(self):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(BadImage, match="unreadable"):
        source.read(source.items()[0])


def test_a_disk_that_fails_is_not_the_image_s_fault(tmp_path, monkeypatch):
    source = FolderSource(make(tmp_path, "a.png"))

    def fail(self):
        raise OSError(errno.EIO, "Input/output error", str(self))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Input/output"):
        source.read(source.items()[0])


def test_a_folder_that_may_not_be_read_stops_the_listing(tmp_path, monkeypatch):
    make(tmp_path, "a/b.png", "c.png")
    scandir = os.scandir

    def guarded(path):
        if Path(path).name == "a":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(RequestError, match=r"/a cannot be read \(Permission denied\)"):
        FolderSource(tmp_path)


# labels


def test_labels_are_the_first_level_folders_in_order(tmp_path):
    make(tmp_path, "n02/b.png", "n01/a.png", "n01/deep/c.png", "loose.png", "empty/readme.txt", "n03/d.png")
    labels = {item.key: item.label for item in FolderSource(tmp_path).items()}
    assert labels == {"loose.png": None, "n01/a.png": 1, "n01/deep/c.png": 1, "n02/b.png": 2, "n03/d.png": 3}


# what users are told


def test_a_single_file(tmp_path):
    make(tmp_path, "some photo.JPG")
    source = open_source(tmp_path / "some photo.JPG")
    assert [(item.key, item.size, item.label) for item in source.items()] == [("some photo.JPG", 14, None)]
    assert source.read(source.items()[0]) == b"some photo.JPG"


def test_missing_folder(tmp_path):
    with pytest.raises(RequestError, match="nowhere does not exist: give a folder") as caught:
        open_source(tmp_path / "nowhere")
    assert caught.value.exit_code == 2


def test_empty_folder(tmp_path):
    with pytest.raises(RequestError, match=r"holds no files: images end in .*\.png"):
        open_source(tmp_path)


def test_folder_without_images_says_what_it_found(tmp_path):
    make(tmp_path, "a.txt", "b.txt", "c/d.MOV", "README")
    with pytest.raises(RequestError, match=r"holds no images but other files \(2 \.txt, 1 no extension, 1 \.mov\)"):
        open_source(tmp_path)


def test_file_that_is_no_image(tmp_path):
    make(tmp_path, "notes.txt")
    with pytest.raises(RequestError, match=r"notes\.txt is not an image file by its name"):
        open_source(tmp_path / "notes.txt")


def test_folder_source_of_a_file(tmp_path):
    make(tmp_path, "a.png")
    with pytest.raises(RequestError, match="is not a folder"):
        FolderSource(tmp_path / "a.png")


def test_items_are_frozen():
    item = Item("a.png", "file:///a.png", 3)
    with pytest.raises(AttributeError):
        item.key = "b.png"


def test_an_output_folder_is_not_the_input(tmp_path):
    with pytest.raises(RequestError, match=r"The output \S+ is the input folder itself, and its images would be"):
        refuse_output_in_input(tmp_path, tmp_path)
    with pytest.raises(RequestError, match=r"The output \S+ lies in the input \S+, and"):
        refuse_output_in_input(str(tmp_path), tmp_path / "out")
