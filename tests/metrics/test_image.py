"""PSNR and SSIM against scikit-image, LPIPS against the lpips package reading the same file its own way."""

from dataclasses import replace

import lpips
import numpy as np
import pytest
import torch
import torchvision
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from latentae.errors import MissingWeights, RequestError
from latentae.files import sha256_file
from latentae.metrics.image import PSNR, SSIM, LPIPSMetric, psnr, ssim
from latentae.weights import WEIGHT_FILES


def smooth_images(count, height, width, seed):
    """uint8 images with edges, gradients and flat saturated areas, (B, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 7, generator=generator) * 360 - 50
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return fine.clamp(0, 255).to(torch.uint8)


def degraded(images, strength, seed=9):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)) * strength
    return (images + noise).clamp(0, 255).round().to(torch.uint8)


def as_numpy(image):
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", [(11, 11), (37, 64), (128, 96)])
@pytest.mark.parametrize("strength", [1, 12, 90])
def test_psnr_and_ssim_are_those_of_scikit_image(size, strength):
    reference = smooth_images(4, *size, seed=1)
    reconstruction = degraded(reference, strength)
    for i, (p, s) in enumerate(zip(psnr(reconstruction, reference), ssim(reconstruction, reference), strict=True)):
        pair = as_numpy(reference[i]), as_numpy(reconstruction[i])
        assert p.item() == pytest.approx(peak_signal_noise_ratio(*pair, data_range=255), abs=1e-9)
        expected = structural_similarity(
            *pair, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=2
        )
        assert s.item() == pytest.approx(expected, abs=1e-9)


def test_floats_with_their_range_give_what_bytes_give():
    reference = smooth_images(3, 40, 40, seed=2)
    reconstruction = degraded(reference, 10)
    as_floats = reconstruction.double() / 127.5 - 1, reference.double() / 127.5 - 1
    torch.testing.assert_close(psnr(*as_floats, data_range=2), psnr(reconstruction, reference))
    # SSIM compares means, so it depends on where black is: 0 in [0, 1] as in bytes.
    as_units = reconstruction.double() / 255, reference.double() / 255
    torch.testing.assert_close(ssim(*as_units, data_range=1), ssim(reconstruction, reference))


def test_known_values():
    black = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    white = torch.full_like(black, 255)
    assert psnr(white, black).item() == 0
    assert psnr(black + 1, black).item() == pytest.approx(20 * np.log10(255))
    assert psnr(black, black).item() == float("inf")
    assert ssim(white, white).item() == pytest.approx(1)
    assert ssim(white, black).item() == pytest.approx(0.01**2 / (1 + 0.01**2))  # no structure: luminance alone


def test_psnr_is_the_mean_over_images_not_of_the_pooled_error():
    reference = smooth_images(2, 32, 32, seed=3)
    reconstruction = torch.stack([degraded(reference, 2)[0], degraded(reference, 50)[1]])
    metric = PSNR()
    metric.update(reconstruction, reference)
    each = [
        peak_signal_noise_ratio(as_numpy(a), as_numpy(b), data_range=255)
        for a, b in zip(reference, reconstruction, strict=True)
    ]
    assert metric.compute().item() == pytest.approx(np.mean(each), abs=1e-9)


def test_identical_images_stay_out_of_the_mean_and_are_counted():
    reference = smooth_images(3, 32, 32, seed=4)
    reconstruction = degraded(reference, 10)
    reconstruction[1] = reference[1]
    metric = PSNR()
    metric.update(reconstruction, reference)
    assert metric.excluded.item() == 1
    assert metric.compute().item() == pytest.approx(psnr(reconstruction, reference)[[0, 2]].mean().item())
    nothing = PSNR()
    nothing.update(reference, reference)
    assert nothing.compute().isnan()


@pytest.mark.parametrize("metric_class", [PSNR, SSIM])
def test_parts_merge_into_the_whole(metric_class):
    reference = smooth_images(5, 24, 24, seed=5)
    reconstruction = degraded(reference, 20)
    whole, part, other = metric_class(), metric_class(), metric_class()
    whole.update(reconstruction, reference)
    part.update(reconstruction[:2], reference[:2])
    other.update(reconstruction[2:], reference[2:])
    part.merge_state(other)
    torch.testing.assert_close(part.compute(), whole.compute(), rtol=1e-14, atol=0)


def test_a_cast_of_the_surrounding_module_leaves_the_sums_in_float64():
    holder = torch.nn.ModuleDict({"psnr": PSNR()}).to(torch.bfloat16)
    assert holder["psnr"].total.dtype == torch.float64


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)),  # floats without a range
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 17, dtype=torch.uint8)),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 16)),
        (torch.zeros(3, 16, 16, dtype=torch.uint8), torch.zeros(3, 16, 16, dtype=torch.uint8)),
    ],
)
def test_ambiguous_pairs_are_refused(a, b):
    for function in (psnr, ssim, PSNR().update, SSIM().update):
        with pytest.raises(RequestError):
            function(a, b)


def test_an_image_smaller_than_the_window_is_refused():
    small = torch.zeros(1, 3, 10, 40, dtype=torch.uint8)
    with pytest.raises(RequestError, match="at least 11x11"):
        ssim(small, small)


@pytest.fixture(scope="module")
def alexnet_home(tmp_path_factory):
    """A TORCH_HOME with a random AlexNet under the published name and in the published format."""
    home = tmp_path_factory.mktemp("torch_home")
    checkpoints = home / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet().state_dict(), checkpoints / WEIGHT_FILES["alexnet"].name)
    return home


@pytest.fixture
def published(alexnet_home, monkeypatch):
    """The random file passes for the published one, so that the real way of loading it is what is tested."""
    file = alexnet_home / "hub" / "checkpoints" / WEIGHT_FILES["alexnet"].name
    monkeypatch.setenv("TORCH_HOME", str(alexnet_home))
    monkeypatch.delenv("LATENTAE_WEIGHTS", raising=False)
    accepted = replace(WEIGHT_FILES["alexnet"], sha256_prefix=sha256_file(file)[:8])
    monkeypatch.setitem(WEIGHT_FILES, "alexnet", accepted)
    return file


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_alex_is_that_of_the_lpips_package(published):
    reference = smooth_images(3, 64, 80, seed=6)
    reconstruction = degraded(reference, 25)
    metric = LPIPSMetric("alex")
    metric.update(reconstruction[:2], reference[:2])
    metric.update(reconstruction[2:], reference[2:])
    theirs = lpips.LPIPS(net="alex", verbose=False)  # finds the same file through torch.hub
    expected = theirs(reconstruction / 127.5 - 1, reference / 127.5 - 1).flatten()
    torch.testing.assert_close(metric.values(reconstruction, reference), expected.detach(), rtol=1e-5, atol=1e-7)
    assert metric.compute().item() == pytest.approx(expected.mean().item(), rel=1e-5)
    assert expected.min() > 1e-4


def test_autocast_around_it_changes_nothing(published):
    reference = smooth_images(2, 64, 64, seed=7)
    reconstruction = degraded(reference, 25)
    metric = LPIPSMetric("alex")
    plain = metric.values(reconstruction, reference)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(metric.values(reconstruction, reference), plain, rtol=0, atol=0)


def test_the_network_enters_no_checkpoint(published):
    metric = LPIPSMetric("alex")
    assert not metric.state_dict()
    assert not list(metric.parameters())


def test_an_unpublished_file_of_that_name_is_refused(alexnet_home, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(alexnet_home))
    with pytest.raises(RequestError, match="not the published file"):
        LPIPSMetric("alex")


def test_a_file_of_the_features_alone_is_enough(tmp_path):
    torch.manual_seed(1)
    vgg = torch.nn.ModuleDict({"features": torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])})
    torch.save(vgg.state_dict(), tmp_path / "prefixed.pth")
    torch.save(vgg["features"].state_dict(), tmp_path / "bare.pth")
    reference = smooth_images(1, 32, 32, seed=8)
    pair = degraded(reference, 30), reference
    first, second = (LPIPSMetric("vgg", tmp_path / name).values(*pair) for name in ("prefixed.pth", "bare.pth"))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first.item() > 0


def test_another_network_is_named(tmp_path):
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(RequestError, match="lacks features"):
        LPIPSMetric("alex", tmp_path / "other.pth")


def test_a_missing_file_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingWeights, match=r"vgg16-397923af\.pth.*curl"):
        LPIPSMetric("vgg")


def test_an_unknown_net_is_refused():
    with pytest.raises(RequestError, match="alex or vgg"):
        LPIPSMetric("squeeze")
