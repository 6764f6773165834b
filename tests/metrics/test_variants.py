"""Variants of metrics against the libraries whose defaults they follow."""

import lpips
import numpy as np
import pytest
import torch
import torchvision
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.image import StructuralSimilarityIndexMeasure

from latentae.errors import RequestError
from latentae.metrics.variants import (
    FloatLPIPS,
    FloatPSNR,
    OwnRangeSSIM,
    PaddedSSIM,
    SignedSSIM,
    UniformSSIM,
    uniform_ssim,
)


def pairs(count=3, size=(40, 53)):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 6, 6, generator=generator) * 255
    original = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 255)
    noisy = (original + 12 * torch.randn(original.shape, generator=generator)).clamp(0, 255)
    return noisy.to(torch.uint8), original.to(torch.uint8)


def signed(images):
    return images.float() / 127.5 - 1


def test_a_flat_window_is_scikit_images_default():
    noisy, original = pairs()
    expected = [
        structural_similarity(x.permute(1, 2, 0).numpy(), y.permute(1, 2, 0).numpy(), channel_axis=2)
        for x, y in zip(noisy, original)
    ]
    np.testing.assert_allclose(uniform_ssim(noisy, original), expected, rtol=1e-9)
    metric = UniformSSIM()
    metric.update(noisy, original)
    assert metric.compute().item() == pytest.approx(np.mean(expected))


@pytest.mark.parametrize(
    ("metric", "data_range", "convert"),
    [(PaddedSSIM(), (0.0, 255.0), lambda x: x), (SignedSSIM(), (-1.0, 1.0), signed), (OwnRangeSSIM(), None, signed)],
)
def test_a_padded_window_is_torchmetrics(metric, data_range, convert):
    noisy, original = (convert(x) for x in pairs())
    theirs = [
        StructuralSimilarityIndexMeasure(data_range=data_range)(x[None].float(), y[None].float()).item()
        for x, y in zip(noisy, original)
    ]
    metric.reset()
    metric.update(noisy, original)
    assert metric.compute().item() == pytest.approx(np.mean(theirs), rel=1e-4)  # theirs is in float32


def test_the_range_changes_ssim():
    noisy, original = pairs()
    values = [
        PaddedSSIM().values(noisy, original).mean(),
        SignedSSIM().values(signed(noisy), signed(original)).mean(),
        uniform_ssim(noisy, original).mean(),
    ]
    assert len({round(value.item(), 3) for value in values}) == 3


def test_psnr_of_floats():
    noisy, original = (signed(x) for x in pairs())
    expected = [peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=2) for x, y in zip(noisy, original)]
    metric = FloatPSNR()
    metric.update(noisy, original)
    assert metric.compute().item() == pytest.approx(np.mean(expected), abs=1e-5)
    with pytest.raises(RequestError, match="expected two float batches"):
        metric.update(*pairs())


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_lpips_of_floats_that_leave_the_range(tmp_path):
    network = torchvision.models.alexnet()
    torch.save(network.state_dict(), tmp_path / "alexnet.pth")
    ours = FloatLPIPS("alex", tmp_path / "alexnet.pth")
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    features = {name.split(".", 1)[1]: w for name, w in network.state_dict().items() if name.startswith("features")}
    for name, value in theirs.net.named_parameters():  # sliceN.INDEX.weight
        value.data.copy_(features[name.split(".", 1)[1]])
    noisy, original = (signed(x) for x in pairs(size=(64, 64)))
    noisy = noisy * 1.5
    with torch.no_grad():
        expected = theirs(noisy, original).flatten()
    torch.testing.assert_close(ours.values(noisy, original), expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ours.values(noisy.clamp(-1, 1), original), expected, rtol=1e-2)
