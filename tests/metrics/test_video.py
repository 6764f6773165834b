"""The Fréchet video distance with a random TorchScript network of the published file's interface."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from latentae.errors import MissingWeights, RequestError
from latentae.files import sha256_file
from latentae.metrics.video import FrechetVideoDistance
from latentae.weights import WEIGHT_FILES


class Features(nn.Module):
    """As I3D is called: pixels from 0 to 255, 16 frames, features of (B, 400)."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv3d(3, 400, (16, 14, 14), stride=(1, 14, 14))

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        if resize:
            frames = x.transpose(1, 2).flatten(0, 1)
            frames = nn.functional.interpolate(frames, size=(224, 224), mode="bilinear", align_corners=False)
            x = frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
        if rescale:
            x = x / 255 * 2 - 1
        h = self.convolution(x).relu().mean((2, 3, 4))
        return h if return_features else h.softmax(1)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Features().requires_grad_(False)


@pytest.fixture
def published(network, tmp_path, monkeypatch):
    """The random file passes for the published one, so that the real way of loading it is what is tested."""
    path = tmp_path / WEIGHT_FILES["i3d"].name
    torch.jit.script(network).save(path)
    monkeypatch.setenv("LATENTAE_WEIGHTS", str(tmp_path))
    monkeypatch.setitem(WEIGHT_FILES, "i3d", replace(WEIGHT_FILES["i3d"], sha256_prefix=sha256_file(path)))
    return path


def videos(count, frames=16, size=40, seed=0, noise=0.0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 5, 5, generator=generator) * 255
    pixels = nn.functional.interpolate(coarse, (frames, size, size), mode="trilinear")
    pixels = pixels + noise * torch.randn(pixels.shape, generator=generator)
    return pixels.clamp(0, 255).to(torch.uint8)


def test_it_is_the_frechet_distance_of_the_features_of_windows(network, published):
    originals, reconstructions = videos(5, frames=37), videos(5, frames=37, noise=60)
    metric = FrechetVideoDistance()
    metric.update(originals[:2], original=True)
    metric.update(originals[2:], original=True)
    metric.update(reconstructions, original=False)
    sides = []
    for side in (originals, reconstructions):
        windows = torch.cat([side[:, :, :16], side[:, :, 16:32]])  # the last five frames are left out
        sides.append(network(windows.float(), rescale=True, resize=True, return_features=True).double())
    # With centred features X and Y the trace of the root is the sum of the singular values of X Y^T / (N - 1).
    x, y = (side - side.mean(0) for side in sides)
    traces = (x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum()) / 9
    expected = (sides[0].mean(0) - sides[1].mean(0)).square().sum() + traces
    assert metric.count_original == metric.count_reconstruction == 10
    assert metric.published
    assert metric.weights_sha256 == sha256_file(published)
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-4)  # float32 features
    assert expected > 0.01


def test_parts_merge_into_the_whole(published):
    originals, reconstructions = videos(6), videos(6, noise=60)
    whole, part, other = (FrechetVideoDistance() for _ in range(3))
    for metric, chosen in ((whole, slice(None)), (part, slice(2)), (other, slice(2, None))):
        metric.update(originals[chosen], original=True)
        metric.update(reconstructions[chosen], original=False)
    part.merge_state(other)
    assert part.compute().item() == pytest.approx(whole.compute().item(), rel=1e-9)


def test_autocast_changes_nothing(published):
    metric, plain = FrechetVideoDistance(), FrechetVideoDistance()
    clips = videos(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = metric.features(clips)
    torch.testing.assert_close(features, plain.features(clips), rtol=0, atol=0)
    assert not metric.state_dict()


@pytest.mark.parametrize("shape", [(2, 3, 15, 32, 32), (2, 3, 32, 32), (2, 1, 16, 32, 32)])
def test_anything_but_clips_of_16_frames_is_refused(shape, published):
    with pytest.raises(RequestError, match="of at least 16 frames"):
        FrechetVideoDistance().update(torch.zeros(shape, dtype=torch.uint8), original=True)


def test_a_missing_file_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("LATENTAE_WEIGHTS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingWeights, match=r"i3d_torchscript\.pt, of rFVD, is not found.*fetch"):
        FrechetVideoDistance()


def test_another_file_is_refused_before_it_is_opened(published, monkeypatch):
    monkeypatch.setitem(WEIGHT_FILES, "i3d", replace(WEIGHT_FILES["i3d"], sha256_prefix="0" * 64))
    with pytest.raises(RequestError, match="not the published file"):
        FrechetVideoDistance()


def test_no_torchscript_is_refused(tmp_path):
    (tmp_path / "file.pt").write_bytes(b"no archive")
    with pytest.raises(RequestError, match=r"file\.pt is no TorchScript file"):
        FrechetVideoDistance(tmp_path / "file.pt")
