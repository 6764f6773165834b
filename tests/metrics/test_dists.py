"""DISTS against torchmetrics' network with the same random VGG16."""

import pytest
import torch
import torchvision
from torchmetrics.functional.image import dists as theirs

from latentae.errors import MissingWeights, RequestError
from latentae.metrics.dists import DISTS


@pytest.fixture(scope="module")
def features():
    torch.manual_seed(0)
    return torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])


@pytest.fixture(scope="module")
def file(features, tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, path)
    return path


def pair(count, height, width):
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 3, 6, 6, generator=generator) * 300 - 20
    reference = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    reconstruction = reference + 25 * torch.randn(reference.shape, generator=generator)
    return [images.clamp(0, 255).to(torch.uint8) for images in (reconstruction, reference)]


def test_it_is_that_of_torchmetrics(features, file, monkeypatch):
    class Backbone:
        def __init__(self, weights):
            self.features = features

    monkeypatch.setattr(theirs, "vgg16", Backbone)  # theirs would download it
    reconstruction, reference = pair(3, 64, 83)
    values = DISTS(file).values(reconstruction, reference)
    expected = theirs.DISTSNetwork()(reconstruction / 255, reference / 255)
    torch.testing.assert_close(values.float(), expected, rtol=0, atol=1e-6)  # theirs sums similarities in float32
    assert 0.003 < values.min() < values.max() < 1


def test_identical_images_are_no_distance_apart(file):
    _, reference = pair(2, 40, 40)
    torch.testing.assert_close(DISTS(file).values(reference, reference), torch.zeros(2).double(), rtol=0, atol=1e-7)


def test_bare_features_parts_and_autocast(features, file, tmp_path):
    torch.save(features.state_dict(), tmp_path / "bare.pth")
    reconstruction, reference = pair(5, 32, 32)
    part, other = DISTS(tmp_path / "bare.pth"), DISTS(file)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        part.update(reconstruction[:2], reference[:2])
    other.update(reconstruction[2:], reference[2:])
    part.merge_state(other)
    expected = DISTS(file).values(reconstruction, reference).mean().item()
    assert part.compute().item() == pytest.approx(expected, rel=1e-9)
    assert not part.state_dict()


def test_a_missing_or_another_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("LATENTAE_WEIGHTS", raising=False)
    with pytest.raises(MissingWeights, match=r"vgg16-397923af\.pth"):
        DISTS()
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(RequestError, match=r"lacks features\.0\.bias"):
        DISTS(tmp_path / "other.pth")
