"""Bits of latents: entropies in closed form, the chosen step, discrete latents; and of files as Pillow writes them."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from PIL import Image
from scipy import stats
from torch import nn

from latentae.bench.altered import ALLOWED_LOSS, STEPS, AlteredLatents, entropy_bits
from latentae.bench.baselines import block_mean_baseline, pca_baseline
from latentae.bench.codecs import ClassicalCodec, classical_codec
from latentae.codec import LatentCodec
from latentae.data.samples import dead_leaves
from latentae.data.transforms import to_tensor
from latentae.errors import RequestError
from latentae.families.presets import create
from latentae.metrics.image import psnr
from latentae.nn.pixels import to_uint8

GOLDEN = Path(__file__).parent.parent / "golden" / "reference_codecs.json"


class Averages(nn.Module, ConfigMixin):
    """Latents are 2x2 means of the pixels, so that rates and distortions are known in closed form."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, latent_channels: int = 3, spatial_compression_ratio: int = 2, scaling_factor: float = 0.5):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def encode(self, x):
        return nn.functional.avg_pool2d(x, 2)

    def decode(self, z):
        return nn.functional.interpolate(z, scale_factor=2)


def no_noise(keys):
    return None


def test_entropy_of_a_rounded_gaussian_is_that_of_its_bins():
    values = np.random.default_rng(0).normal(size=200_000)
    for step in (0.25, 1.0):
        edges = (np.arange(-60, 61) - 0.5) * step
        share = np.diff(stats.norm.cdf(edges))
        expected = stats.entropy(share, base=2)
        assert entropy_bits(np.round(values / step)) == pytest.approx(expected, abs=3e-3)


def test_few_samples_are_corrected_upwards():
    """128 draws of 64 equally likely symbols: the plain estimate misses a third of a bit, the corrected one little."""
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, 64, 128) for _ in range(50)]
    plain = np.mean([stats.entropy(np.unique(d, return_counts=True)[1], base=2) for d in draws])
    corrected = np.mean([entropy_bits(d) for d in draws])
    assert plain < 6 - 0.3
    assert abs(corrected - 6) < 0.1
    assert entropy_bits(np.zeros(10)) == 0


def measured(codec, originals, count=32):
    altered = AlteredLatents(codec, no_noise, count)
    for start in range(0, len(originals), 2):
        batch = originals[start : start + 2]
        places = range(start, start + len(batch))
        altered.add(places, [str(place) for place in places], batch, codec.encode(batch).posterior.mode())
    return altered.results()["rate"]


def test_rates_and_distortions_of_averages_in_closed_form():
    """Blocks of constant random colours: only the rounding of latents loses anything, a twelfth of its step squared."""
    colours = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    originals = colours.repeat_interleave(2, 2).repeat_interleave(2, 3)
    found = measured(LatentCodec(Averages()), originals)
    assert found["psnr_unaltered"] == 100.0
    std = (colours.double() / 127.5 - 1).std()
    for point in found["curve"]:
        step = float(std) * point["step"]
        noise = 127.5**2 * step**2 / 12 + 1 / 12  # and of the rounding to uint8, where it is not exact anyway
        if 127.5 * step > 4 and point["step"] < 1:  # at 1 the outermost bins are half empty
            assert point["psnr"] == pytest.approx(10 * math.log10(255**2 / noise), abs=0.3)
        edges = ((np.arange(-200, 201) - 0.5) * step).clip(-1, 1)  # of a uniform distribution over [-1, 1]
        assert point["bits_per_pixel"] == pytest.approx(3 / 4 * stats.entropy(np.diff(edges), base=2), abs=0.05)
    assert not found["within"]
    assert found["step"] == STEPS[-1]


def test_the_coarsest_step_that_loses_little_is_taken():
    rng = torch.Generator().manual_seed(0)
    originals = (127 + 50 * torch.randn(6, 3, 32, 32, generator=rng)).clamp(0, 255).to(torch.uint8)
    found = measured(LatentCodec(Averages()), originals)  # the mean of four pixels loses much more than rounding
    curve = {point["step"]: point["psnr"] for point in found["curve"]}
    assert found["within"]
    assert found["psnr"] >= found["psnr_unaltered"] - ALLOWED_LOSS
    coarser = [step for step in STEPS if step > found["step"]]
    assert coarser
    assert all(curve[step] < found["psnr_unaltered"] - ALLOWED_LOSS for step in coarser)
    bits = [point["bits_per_pixel"] for point in found["curve"]]
    assert bits == sorted(bits)


def test_scale_and_offset_of_the_latents_change_nothing():
    rng = torch.Generator().manual_seed(0)
    originals = torch.randint(0, 256, (2, 3, 16, 16), generator=rng, dtype=torch.uint8)

    class Scaled(Averages):
        def encode(self, x):
            return super().encode(x) * 7 + 3

        def decode(self, z):
            return super().decode((z - 3) / 7)

    one, other = (measured(LatentCodec(model()), originals) for model in (Averages, Scaled))
    assert one["bits_per_pixel"] == pytest.approx(other["bits_per_pixel"], abs=1e-2)
    assert one["psnr"] == pytest.approx(other["psnr"], abs=1e-2)


def test_discrete_latents_take_the_bits_of_a_code():
    codec = LatentCodec(create("dc-ae-tiny", quantizer={"kind": "vq", "codes": 64}))
    originals = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)
    found = measured(codec, originals)
    assert found["bits_per_pixel"] == 6 / codec.spatial_ratio**2
    assert found["codes"] == 64
    expected = psnr(to_uint8(codec.reconstruct(originals)), originals).mean()
    assert found["psnr"] == pytest.approx(float(expected), abs=1e-4)


def test_only_so_many_images_and_none_with_nan():
    codec = LatentCodec(Averages())
    originals = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    assert measured(codec, originals, count=3)["images"] == 3
    rate = AlteredLatents(codec, no_noise, 32)
    rate.add([0], ["a"], originals[:1], torch.full((1, 3, 4, 4), math.nan))
    assert rate.results() == {"rate": None, "noise_robustness": None}


def test_processes_together_keep_the_first_images():
    codec = LatentCodec(Averages())
    originals = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    z = codec.encode(originals).posterior.mode()
    parts = [AlteredLatents(codec, no_noise, 3) for _ in range(2)]
    for place in range(6):
        part = parts[(place // 2) % 2]
        part.add([place], [str(place)], originals[place : place + 1], z[place : place + 1])
    parts[0].merge(parts[1])
    assert [place for place, *_ in parts[0].kept] == [0, 1, 2]
    assert parts[0].results()["rate"] == measured(codec, originals, count=3)


def test_noise_on_latents_in_closed_form():
    """A gain of one from latents to pixels: the error of the pixels is the noise of the latents."""
    rng = torch.Generator().manual_seed(0)
    originals = (127 + 20 * torch.randn(4, 3, 32, 32, generator=rng)).clamp(0, 255).to(torch.uint8)
    originals = originals.repeat_interleave(2, 2).repeat_interleave(2, 3)
    codec = LatentCodec(Averages())
    altered = AlteredLatents(codec, no_noise, 32)
    altered.add(range(4), ["a", "b", "c", "d"], originals, codec.encode(originals).posterior.mode())
    found = altered.results()["noise_robustness"]
    assert found["psnr_unaltered"] == 100.0
    for point in found["curve"]:
        error = (point["noise"] * 20) ** 2 + 1 / 12  # and the rounding to uint8
        assert point["psnr"] == pytest.approx(10 * math.log10(255**2 / error), abs=0.15)


@pytest.mark.parametrize("name", ["jpeg:75", "webp:80", "avif:60"])
def test_files_are_those_of_pillow(name):
    codec = classical_codec(name)
    image = dead_leaves(0, 64)
    reconstruction, bits = codec.reconstruct(image)
    assert reconstruction.shape == image.shape
    assert reconstruction.dtype == np.uint8
    assert codec.name == name
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, codec.format, quality=codec.quality)
    assert abs(bits - 8 * len(stream.getvalue())) < 0.2 * bits  # apart from what the options gain
    finer, more = ClassicalCodec(codec.format, 95).reconstruct(image)
    assert more > bits
    assert np.square(finer - image.astype(float)).mean() < np.square(reconstruction - image.astype(float)).mean()


def test_names_of_codecs():
    assert classical_codec("dc-ae-tiny") is None
    assert classical_codec("folder/jpeg") is None
    for name in ("jpeg:", "jpeg:0", "webp:101", "avif:high", "jpeg:7.5"):
        with pytest.raises(RequestError, match="quality"):
            classical_codec(name)


def test_reference_points_stay_where_they_are():
    """Golden: what needs no weights. Encoders and their versions differ a little, so figures are held to 2 %."""
    golden = json.loads(GOLDEN.read_text())
    images = [dead_leaves(i, 128) for i in range(4)]
    for name, expected in golden["codecs"].items():
        pairs = [classical_codec(name).reconstruct(image) for image in images]
        values = [float(psnr(to_tensor(a)[None], to_tensor(b)[None])) for (a, _), b in zip(pairs, images, strict=True)]
        assert np.mean(values) == pytest.approx(expected["psnr"], rel=0.02), name
        bits = sum(bits for _, bits in pairs) / (4 * 128**2)
        assert bits == pytest.approx(expected["bits_per_pixel"], rel=0.05), name
    assert block_mean_baseline(images).psnr == pytest.approx(golden["block_mean"], abs=1e-6)
    assert pca_baseline(images[2:], images[:2]).psnr == pytest.approx(golden["pca"], abs=1e-3)
