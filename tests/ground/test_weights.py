"""Weight files are found, checked by hash and never fetched."""

import pytest

from latentae import weights
from latentae.console import Progress, format_table, three_figures
from latentae.errors import MissingWeights, RequestError


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTAE_WEIGHTS", str(tmp_path / "own"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    own, torch_hub = weights.search_folders()
    for folder in (own, torch_hub):
        folder.mkdir(parents=True)
    return own, torch_hub


def test_a_missing_file_is_named_with_folder_command_and_alternative(folders):
    with pytest.raises(MissingWeights) as error:
        weights.find_weight_file("vgg16")
    for part in ("vgg16-397923af.pth", str(folders[0]), str(folders[1]), "curl -L", "https://", "--fetch-weights"):
        assert part in str(error.value)


def test_a_file_that_is_not_the_published_one_is_refused(folders):
    (folders[1] / "vgg16-397923af.pth").write_text("<html>not found</html>")
    with pytest.raises(RequestError, match="397923af"):
        weights.find_weight_file("vgg16")


def test_own_folder_comes_first_and_hashes_are_checked(folders, monkeypatch):
    import dataclasses
    import hashlib

    for folder, content in zip(folders, (b"own", b"hub")):
        (folder / "vgg16-397923af.pth").write_bytes(content)
    published = dataclasses.replace(weights.WEIGHT_FILES["vgg16"], sha256_prefix=hashlib.sha256(b"own").hexdigest()[:8])
    monkeypatch.setitem(weights.WEIGHT_FILES, "vgg16", published)
    assert weights.find_weight_file("vgg16") == folders[0] / "vgg16-397923af.pth"


def test_an_explicit_path_must_exist(tmp_path):
    with pytest.raises(MissingWeights, match="nowhere"):
        weights.find_weight_file("vgg16", tmp_path / "nowhere.pth")
    (tmp_path / "w.pth").write_bytes(b"")
    assert weights.find_weight_file("vgg16", tmp_path / "w.pth") == tmp_path / "w.pth"


def test_table_aligns_and_rounds():
    text = format_table(["name", "dB"], [["a", 27.123456], ["long name", None]])
    assert text.splitlines() == ["name          dB", "---------  -----", "a          27.12", "long name      -"]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.0123456, "0.0123"), (1.2345, "1.23"), (99.96, "100"), (1234.5, "1,234")]
)
def test_three_figures_of_any_size(value, text):
    assert three_figures(value) == text


def test_progress_is_quiet_off_a_terminal(capsys):
    with Progress("encode [/x]", 3) as progress:
        for _ in range(3):
            progress.advance(loss=0.5)
    assert progress.rate > 0
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_shows_names_as_they_are(monkeypatch, capsys):
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("encode [/x]", 2) as progress:
        progress.advance(2, loss=0.5)
    assert "encode [/x]" in capsys.readouterr().err
