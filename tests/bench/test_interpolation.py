"""iFID: neighbours and midpoints by hand, the distance by torchmetrics' own."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance as TorchmetricsFID

import latentae
from latentae.bench import interpolation, quality
from latentae.bench.interpolation import choose_neighbours, slerp_halfway
from latentae.bench.run import bench
from latentae.metrics.frechet import FrechetDistance


class TinyFeatures(torch.nn.Module):
    """Means and spreads of colours."""

    num_features = 6

    def forward(self, images):
        x = images.float() / 255
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)


@pytest.fixture
def tiny_inception(monkeypatch):
    class Tiny(FrechetDistance):
        published, weights_sha256 = True, "0" * 64

        def __init__(self, keep_originals=False, **_):
            super().__init__(TinyFeatures(), 6, keep_originals)

    monkeypatch.setattr(quality, "FrechetInceptionDistance", Tiny)


def test_midpoints_of_the_sphere():
    angle = torch.rand(5) * 3
    a = torch.stack([torch.ones(5), torch.zeros(5)], 1)
    b = torch.stack([angle.cos(), angle.sin()], 1)
    expected = torch.stack([(angle / 2).cos(), (angle / 2).sin()], 1)
    torch.testing.assert_close(slerp_halfway(a, b), expected, atol=1e-4, rtol=1e-4)
    same = torch.randn(3, 2, 4, 4)
    torch.testing.assert_close(slerp_halfway(same, same), same)
    assert slerp_halfway(same, -same).isfinite().all()


def test_neighbours_are_among_the_nearest_and_mostly_the_nearest():
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(40, 3, 4, 4, generator=rng)
    z[1] = z[0] + 0.01  # much nearer than all others
    chosen = choose_neighbours(z)
    flat = z.flatten(1).numpy().astype(np.float64)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    for i, j in enumerate(chosen.tolist()):
        cosine = unit @ unit[i]
        assert i != j
        assert j in np.argsort(-cosine)[1:11]
    draws = [int(choose_neighbours(z[:5] * 30, seed=seed)[0]) for seed in range(30)]
    assert set(draws) == {1}  # with distances so large, softmax leaves only the nearest
    assert torch.equal(chosen, choose_neighbours(z))


def test_the_distance_is_that_of_what_lies_between(photo_folder, tiny_inception, monkeypatch):
    model = latentae.create("dc-ae-tiny")
    monkeypatch.setattr(interpolation, "BATCH", 4)
    (whole,) = bench(photo_folder, [model], size=64, speed=False, interpolation=6, rate_images=0)["models"]
    found = whole["latents"]["interpolation"]
    assert found["images"] == 6
    theirs = TorchmetricsFID(feature=TinyFeatures().requires_grad_(False), input_img_size=(3, 64, 64))
    codec = latentae.LatentCodec(model)
    from latentae.bench.images import ImageSet
    from latentae.data.sources import open_source

    source = open_source(photo_folder)
    images = ImageSet(source, source.items(), 64, 8, 1)
    originals = torch.cat([batch.pixels for batch in images.batches()])
    z = codec.encode(originals).tensor
    flat = z.flatten(1)
    for i, j in enumerate(choose_neighbours(z).tolist()):
        a, b = flat[i].double(), flat[j].double()
        omega = math.acos(float(a @ b / (a.norm() * b.norm())))
        middle = (math.sin(omega / 2) * a + math.sin(omega / 2) * b) / math.sin(omega)
        pixels = codec.decode(middle.float().view(z[i : i + 1].shape))
        theirs.update((pixels * 127.5 + 128).floor().clamp(0, 255).to(torch.uint8), real=False)
    theirs.update(originals, real=True)
    assert found["ifid"] == pytest.approx(float(theirs.compute()), rel=1e-3)


def test_without_weights_or_neighbours_it_says_why(photo_folder, tiny_inception, monkeypatch):
    def skipped(**options):
        (model,) = bench(photo_folder, ["dc-ae-tiny"], size=64, speed=False, rate_images=0, **options)["models"]
        return model["latents"]["interpolation"]["skipped"]

    assert "three images" in skipped(interpolation=2)
    assert "not asked for" in skipped(interpolation=6, metrics=["psnr"])
    monkeypatch.setattr(interpolation, "MOST_BYTES", 100)
    assert "do not fit" in skipped(interpolation=6)
