"""The errors against closed forms and against a plain evaluation of the paper's formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance as TorchmetricsFID

from latentae.errors import RequestError
from latentae.metrics.equivariance import EquivarianceError, EquivarianceMeasurement
from latentae.metrics.frechet import FrechetDistance

FIGURES = ("rotation_error", "scale_error", "rotation_error_standardised", "scale_error_standardised")


def block_mean(pixels):
    return F.avg_pool2d(pixels, 8)


def nearest(latents):
    return F.interpolate(latents, scale_factor=8, mode="nearest")


def measure(encode, decode=nearest, channels=3, sizes=((64, 64), (96, 64)), **options):
    torch.manual_seed(0)
    measured = EquivarianceMeasurement(encode, decode, channels, **options)
    for size in sizes:
        measured.update(torch.rand(2, 3, *size, dtype=torch.float64) * 2 - 1)
    return measured.results()


def test_block_means_rotate_exactly():
    results = measure(block_mean)
    assert results["rotation_error"] < 1e-25
    assert results["rotation_error_standardised"] < 1e-25
    assert 0 < results["scale_error"] < 1


@pytest.mark.parametrize("transform", ["rotation", "scale"])
def test_the_error_is_the_paper_s_formula(transform):
    """Written out image by image and transform by transform, with torch's own interpolation."""
    torch.manual_seed(3)
    weight = torch.randn(4, 3, 8, 8, dtype=torch.float64)

    def encode(pixels):
        return F.conv2d(pixels, weight, stride=8) + 0.5

    def decode(latents):
        return F.conv_transpose2d(latents, weight, stride=8) / 100

    results = measure(encode, decode, 4)
    torch.manual_seed(0)
    images = [image for size in ((64, 64), (96, 64)) for image in torch.rand(2, 3, *size, dtype=torch.float64) * 2 - 1]
    if transform == "rotation":
        taus = [lambda x, f, k=k: x.rot90(k, (2, 3)) for k in (1, 2, 3)]
    else:
        taus = [
            lambda x, f, s=s: F.interpolate(
                x, tuple(int(n // f * s) * f for n in x.shape[2:]), mode="bicubic", antialias=True
            )
            for s in (0.25, 0.5, 0.75)
        ]
    errors, pairs, psnrs = [], [], []
    for image in images:
        for tau in taus:
            moved, encoded = tau(encode(image[None]), 1), encode(tau(image[None], 8))
            errors.append(((moved - encoded).square().sum() / encoded.square().sum()).item())
            pairs.append((moved, encoded))
            a, b = ((x * 127.5 + 128).floor().clamp(0, 255) for x in (decode(moved), tau(image[None], 8)))
            psnrs.append(10 * torch.log10(255**2 / (a - b).square().mean()).item())
    assert results[f"{transform}_error"] == pytest.approx(sum(errors) / len(errors), rel=1e-9)
    assert results[f"{transform}_psnr"] == pytest.approx(sum(psnrs) / len(psnrs), rel=1e-5)

    z = torch.cat([encode(image[None]).flatten(2) for image in images], 2)
    mean, std = z.mean((0, 2)).view(4, 1, 1), z.std((0, 2), correction=0).view(4, 1, 1)
    difference = sum((((a - b) / std) ** 2).sum() for a, b in pairs)
    size = sum((((b - mean) / std) ** 2).sum() for _, b in pairs)
    assert results[f"{transform}_error_standardised"] == pytest.approx((difference / size).item(), rel=1e-9)


def test_an_offset_lowers_the_error_but_not_the_standardised_one():
    torch.manual_seed(3)
    weight = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    plain = measure(lambda x: F.conv2d(x, weight, stride=8))
    lifted = measure(lambda x: F.conv2d(x, weight, stride=8) + 100)
    for kind in ("rotation", "scale"):
        assert lifted[f"{kind}_error"] < 0.05 * plain[f"{kind}_error"]
        name = f"{kind}_error_standardised"
        assert lifted[name] == pytest.approx(plain[name], rel=1e-6)


def test_channels_of_any_scale_count_alike_when_standardised():
    torch.manual_seed(3)
    weight = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    plain = measure(lambda x: F.conv2d(x, weight, stride=8))
    scaled = measure(lambda x: F.conv2d(x, weight, stride=8) * torch.tensor([1.0, 10, 0.1]).view(3, 1, 1))
    for kind in ("rotation", "scale"):
        name = f"{kind}_error_standardised"
        assert scaled[name] == pytest.approx(plain[name], rel=1e-9)


def test_a_constant_channel_stays_out_of_the_standardised_error():
    results = measure(lambda x: torch.cat([block_mean(x), torch.full_like(block_mean(x)[:, :1], 7.0)], 1), channels=4,
                      decode=lambda z: nearest(z[:, :3]))  # fmt: skip
    alone = measure(block_mean)
    assert results["scale_error_standardised"] == pytest.approx(alone["scale_error_standardised"], rel=1e-9)


def test_processes_merge_exactly():
    torch.manual_seed(0)
    batches = [[torch.randn(2, 4, 6, 6) for _ in range(3)] for _ in range(4)]
    whole, first, second = (EquivarianceError(4) for _ in range(3))
    for i, batch in enumerate(batches):
        whole.update(*batch)
        (first if i < 2 else second).update(*batch)
    second.merge_state(first)
    for name, value in whole.compute().items():
        torch.testing.assert_close(second.compute()[name], value, rtol=1e-12, atol=0)


def test_float_and_half_latents_are_summed_in_float64():
    metric = EquivarianceError(2).to(torch.bfloat16)
    z = torch.full((1, 2, 3, 3), 1.0, dtype=torch.bfloat16)
    metric.update(z, z, z * 2)
    assert metric.moments.dtype == torch.float64
    assert metric.compute()["error"].item() == 0.25


def test_what_has_no_grid_or_no_room_is_one_sentence():
    with pytest.raises(RequestError, match="at least 4x4, got 2x8: take images of at least 32 pixels"):
        measure(block_mean, sizes=((16, 64),))
    with pytest.raises(RequestError, match="on a grid"):
        measure(lambda x: block_mean(x).flatten(2).unsqueeze(2))
    with pytest.raises(RequestError, match="of 4 channels got"):
        EquivarianceError(4).update(*[torch.zeros(1, 3, 4, 4)] * 3)


class TinyFeatures(nn.Module):
    def forward(self, images):
        return F.adaptive_avg_pool2d(images.float() / 128 - 1, (2, 1)).flatten(1)[:, :5]


def test_frechet_distances_are_of_each_transform_and_of_what_it_decodes_to():
    """R-rFID, with a network that needs no weights, by torchmetrics on images made here."""
    original = FrechetDistance(TinyFeatures(), 5, keep_originals=True)
    torch.manual_seed(0)
    images = torch.rand(12, 3, 64, 64, dtype=torch.float64) * torch.rand(12, 3, 1, 1) * 2 - 1
    measured = EquivarianceMeasurement(block_mean, lambda z: 0.8 * nearest(z), 3, frechet=original)
    for some in images.split(5):
        measured.update(some)
    results = measured.results()
    assert list(results["rotation_frechet"]) == ["90", "180", "270"]
    assert list(results["scale_frechet"]) == ["0.25", "0.5", "0.75"]
    assert original.count_original == 0

    def to_uint8(x):
        return (x * 127.5 + 128).floor().clamp(0, 255).to(torch.uint8)

    def resized(x, size):
        return F.interpolate(x, (size, size), mode="bicubic", antialias=True)

    cases = [("rotation", str(90 * k), images.rot90(k, (2, 3)), block_mean(images).rot90(k, (2, 3))) for k in (1, 2, 3)]
    cases += [
        ("scale", str(s), resized(images, int(64 * s)), resized(block_mean(images), int(8 * s)))
        for s in (0.25, 0.5, 0.75)
    ]
    for kind, name, wanted, moved in cases:
        theirs = TorchmetricsFID(feature=TinyFeatures(), input_img_size=(3, 8, 8)).set_dtype(torch.float64)
        theirs.update(to_uint8(wanted), real=True)
        theirs.update(to_uint8(0.8 * nearest(moved)), real=False)
        assert results[f"{kind}_frechet"][name] == pytest.approx(theirs.compute().item(), rel=1e-4)
