"""What each transform makes of a pair, how it is drawn, and what is refused."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import latentae
from latentae.errors import RequestError
from latentae.nn.padding import set_padding_mode
from latentae.nn.planes import PlaneLayout
from latentae.objectives import (
    ChannelPrefix,
    Equivariance,
    LatentMask,
    LatentNoise,
    NoiseSynchronization,
    ScaleOnly,
    check_transforms,
)


def pair(grid=(16, 16), ratio=4, batch=2):
    """Pixels, and latents that are their block means: what a perfectly equivariant encoder would give to rotations."""
    pixels = torch.rand(batch, 3, grid[0] * ratio, grid[1] * ratio, dtype=torch.float64)
    return F.avg_pool2d(pixels, ratio), pixels


def steps(transform, count, grid=(16, 16), ratio=4):
    """Many steps: kind, latents before and after, what was encoded, and the target."""
    _, pixels = pair(grid, ratio, batch=1)
    for seed in range(count):
        torch.manual_seed(seed)
        prepared = transform.prepare(pixels, ratio)
        encoded = F.avg_pool2d(prepared, ratio)
        after, target = transform(encoded, prepared)
        yield transform.kind, encoded, after, prepared, target


def test_kinds_of_steps_come_in_their_shares():
    seen = Counter(kind for kind, *_ in steps(Equivariance(eq_prob=0.5, lowres_prob=0.125), 1000, grid=(2, 2), ratio=1))
    expected = {"eq": 500, "lowres": 125, "plain": 375}
    assert stats.chisquare([seen[kind] for kind in expected], list(expected.values())).pvalue > 1e-3


def test_an_eq_step_is_never_the_identity_and_stays_on_the_grid():
    for grid in [(5, 5), (3, 7), (2, 2)]:
        for options in [{}, {"anisotropic": True}, {"rotations": False}, {"scales": None}]:
            for kind, encoded, after, prepared, target in steps(Equivariance(eq_prob=1, **options), 40, grid):
                assert kind == "eq"
                assert prepared.shape[2:] == (grid[0] * 4, grid[1] * 4)
                assert target.shape[2:] == (after.shape[2] * 4, after.shape[3] * 4)
                assert after.shape != encoded.shape or not torch.equal(after, encoded)


def test_sizes_and_turns_are_drawn_evenly():
    transform, sizes, turns = Equivariance(eq_prob=1), Counter(), Counter()
    for _, _, after, _, _ in steps(transform, 1000, grid=(8, 8), ratio=1):
        sizes[tuple(after.shape[2:])] += 1
        turns[transform.quarter_turns] += 1
    assert set(sizes) == {(k, k) for k in range(2, 8)}
    assert set(turns) == {1, 2, 3}
    assert min(stats.chisquare(list(seen.values())).pvalue for seen in (sizes, turns)) > 1e-3
    both = {tuple(after.shape[2:]) for _, _, after, _, _ in steps(Equivariance(1, anisotropic=True), 400, ratio=1)}
    assert len(both) > 100, "height and width are drawn each by itself"


def test_block_means_rotate_with_the_image():
    """A decoder that repeats each latent reconstructs rotated block means exactly as rotated block means."""
    for _, _, after, _, target in steps(Equivariance(eq_prob=1, scales=None), 12):
        torch.testing.assert_close(after, F.avg_pool2d(target, 4), rtol=0, atol=1e-15)


def test_a_low_resolution_step_scales_what_is_encoded_and_nothing_after():
    sizes = set()
    for kind, encoded, after, prepared, target in steps(Equivariance(eq_prob=0, lowres_prob=1), 99, grid=(8, 12)):
        assert kind == "lowres"
        assert encoded is after
        assert prepared is target
        assert prepared.shape[2] % 4 == prepared.shape[3] % 4 == 0
        sizes.add(prepared.shape[3] // 4)
    assert sizes == set(range(3, 12))


def test_a_plain_step_changes_nothing():
    for kind, encoded, after, prepared, target in steps(Equivariance(eq_prob=0), 3):
        assert (kind, encoded is after, prepared is target) == ("plain", True, True)


def test_no_side_of_one_where_convolutions_reflect_their_borders(tiny_dcae):
    for mode, expected in (("zeros", {1, 2, 3}), ("reflect", {2, 3})):
        set_padding_mode(tiny_dcae, mode)
        transform = Equivariance(eq_prob=1)
        transform.check(tiny_dcae)
        assert {after.shape[-1] for *_, after, _, _ in steps(transform, 60, grid=(4, 4))} == expected


def test_target_and_latents_are_scaled_as_torch_does():
    torch.manual_seed(1)
    latents, pixels = pair()
    transform = Equivariance(eq_prob=1, rotations=False, interpolation="bilinear")
    after, target = transform(latents, transform.prepare(pixels, 4))
    rows, columns = after.shape[2:]
    torch.testing.assert_close(after, F.interpolate(latents, (rows, columns), mode="bilinear"))
    torch.testing.assert_close(target, F.interpolate(pixels, (rows * 4, columns * 4), mode="bilinear"))


def test_the_same_seed_draws_the_same_step():
    one, other = (list(steps(Equivariance(lowres_prob=0.3), 20)) for _ in range(2))
    for (kind, *tensors), (same, *equal) in zip(one, other):
        assert kind == same
        for a, b in zip(tensors[1:], equal[1:]):
            assert a.shape == b.shape


def test_scale_only_downsamples_two_to_four_times():
    seen = Counter()
    for kind, _, after, _, target in steps(ScaleOnly(), 300, ratio=2):
        assert target.shape[2] == 2 * after.shape[2]
        seen[kind, after.shape[2]] += 1
    assert {size for kind, size in seen if kind == "eq"} == set(range(4, 9))
    assert sum(n for (kind, _), n in seen.items() if kind == "plain") == pytest.approx(150, abs=40)


def test_videos_and_gradients():
    latents = torch.randn(1, 4, 3, 8, 8, requires_grad=True)
    transform = Equivariance(eq_prob=1)
    after, target = transform(latents, transform.prepare(torch.randn(1, 3, 9, 64, 64), 8))
    assert after.shape[:3] == (1, 4, 3)
    assert target.shape[:3] == (1, 3, 9)
    assert target.shape[3] == 8 * after.shape[3]
    after.sum().backward()
    assert latents.grad.abs().sum() > 0


def test_noise_has_the_spread_that_it_says():
    zeros, target = torch.zeros(400, 4, 8, 8, dtype=torch.float64), torch.zeros(400, 3, 1, 1)

    def spreads(**options):
        noisy, same = LatentNoise(**options)(zeros + 100, target)
        assert same is target
        noise = (noisy - 100).flatten(1)
        return noise, noise.std(1)

    noise, _ = spreads(std=0.08)
    assert stats.kstest(noise.flatten()[:5000] / 0.08, "norm").pvalue > 1e-3
    noise, each = spreads(std=3.0, kind="uniform")
    assert stats.kstest(each / 3, "uniform").pvalue > 1e-3
    noise, each = spreads(std=3.0, kind="interpolated")
    t = -noise.mean(1) / 100  # what is missing of the latents, 100 everywhere, is t of them
    assert stats.kstest(t, "uniform").pvalue > 1e-3
    torch.testing.assert_close(each, 3 * t, rtol=0.25, atol=0.01)
    noise, each = spreads(std=1.0, prob=0.25)
    assert (each == 0).float().mean().item() == pytest.approx(0.75, abs=0.08)


@pytest.mark.parametrize("shape", [(2000, 4, 6, 6), (2000, 3, 2, 3, 4)], ids=["images", "videos"])
def test_masks_leave_out_whole_positions_in_shares_up_to_the_largest(shape):
    target, latents = torch.rand(len(torch.zeros(shape)), 3, 2, 2), torch.ones(shape)
    masked, same = LatentMask(most=0.7)(latents, target)
    assert same is target
    assert torch.equal(masked, masked[:, :1].expand(shape))  # all channels or none
    assert set(masked.unique().tolist()) == {0.0, 1.0}
    shares = 1 - masked[:, 0].flatten(1).mean(1)  # of each image
    whole = 0.1 / 0.8 + 0.7 / 0.8 * sum(  # the draws below zero, and above it all positions kept by chance
        (1 - (k + 0.5) * 0.7 / 1000) ** masked[0, 0].numel() for k in range(1000)
    ) / 1000  # fmt: skip
    assert abs((shares == 0).double().mean() - whole) < 0.03
    assert abs(shares.mean() - 0.7 * 0.7 / 2 / 0.8) < 0.02  # E max(0, U(-0.1, 0.7))


def test_noise_of_videos_and_of_half_precision():
    for kind in ("fixed", "uniform", "interpolated"):
        noisy, _ = LatentNoise(1.0, kind)(torch.zeros(2, 4, 3, 5, 5, dtype=torch.bfloat16), torch.zeros(1))
        assert (noisy.shape, noisy.dtype) == ((2, 4, 3, 5, 5), torch.bfloat16)


REFUSED = {
    "eq_prob 0.7 and lowres_prob 0.4 are shares": [Equivariance(0.7, 0.4)],
    "must not be negative": [Equivariance(-0.1)],
    r"in \(0, 1\], got \(0.5, 0.25\)": [Equivariance(scales=(0.5, 0.25))],
    r"in \(0, 1\], got \(0.0, 1.0\)": [Equivariance(scales=(0.0, 1.0))],
    r"in \(0, 1\], got \(0.5, 2.0\)": [ScaleOnly(scales=(0.5, 2.0))],
    "does not scale must rotate": [Equivariance(scales=None, rotations=False)],
    "needs lowres_prob 0": [Equivariance(scales=None, lowres_prob=0.1)],
    "std above 0": [LatentNoise(0.0)],
    r"largest share": [LatentMask(0.0)],
    r"prob in \(0, 1\]": [LatentNoise(1.0, prob=2.0)],
    "Equivariance and ScaleOnly: only one": [Equivariance(), ScaleOnly()],
    "ChannelPrefix needs a decoder": [ChannelPrefix([4])],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_one_sentence(message, tiny_dcae):
    with pytest.raises(RequestError, match=message):
        check_transforms(REFUSED[message], tiny_dcae)


def test_a_prefix_comes_last():
    import latentae

    structured = latentae.create("dc-ae-tiny", decoder_in_shortcut=False, encoder_out_shortcut=False)
    check_transforms([LatentNoise(0.1), ChannelPrefix([4])], structured)
    with pytest.raises(RequestError, match="must come last"):
        check_transforms([ChannelPrefix([4]), LatentNoise(0.1)], structured)


def test_latents_without_room_or_grid_name_the_way_out():
    with pytest.raises(RequestError, match=r"no size between 0.25 and 1.0 of latents of 1x1: take a larger data.size"):
        Equivariance().prepare(torch.zeros(1, 3, 32, 32), 32)
    transform = Equivariance()
    transform.prepare(torch.zeros(1, 3, 64, 64), 8)
    with pytest.raises(RequestError, match=r"on a grid over the image.*leave it out of model\.latent_transforms"):
        transform(torch.zeros(1, 64, 16), torch.zeros(1, 3, 64, 64))


GRIDS = [Equivariance(), ScaleOnly(), LatentMask(), ChannelPrefix([1]), NoiseSynchronization()]


@pytest.mark.parametrize("transform", GRIDS, ids=lambda transform: type(transform).__name__)
def test_what_changes_a_grid_is_refused_for_planes(transform):
    planes = latentae.create("fourplane-tiny")
    message = r"leave it out of model\.latent_transforms|takes the first channels alone"
    with pytest.raises(RequestError, match=message) as caught:
        check_transforms([transform], planes)
    assert "\n" not in str(caught.value)
    if isinstance(transform, Equivariance | LatentMask):
        assert "which the planes of this FourPlane are not" in str(caught.value)
        check_transforms([transform], latentae.create("fourplane-tiny", spatial_planes=0))


@pytest.mark.parametrize("frames", [None, 5, 16])
def test_noise_of_planes_is_noise_of_their_tokens(frames):
    """Of an image, of a window, and of two; its spread is that of each token, not of a mean over an axis."""
    autoencoder = latentae.create("fourplane-tiny", plane_channels=32)
    noise = LatentNoise(0.5)
    noise.check(autoencoder)
    shape = autoencoder.latent_shape((8, 3, frames, 24, 16) if frames else (8, 3, 24, 16))
    noisy, _ = noise(torch.ones(shape), torch.zeros(()))
    volume = noisy if frames else noisy.unsqueeze(2)
    windows = volume.split(5, dim=2)
    assert len(windows) == (2 if frames == 16 else 1)
    tokens = []
    for window in windows:
        layout = PlaneLayout(*window.shape[2:], planes=2, channels=32)
        tokens.append(layout.unpack(window, "volume"))
        if frames:
            torch.testing.assert_close(layout.pack(tokens[-1], "volume"), window)
        assert tokens[-1].std() == pytest.approx(0.5, rel=0.05)
        assert tokens[-1].mean() == pytest.approx(1.0, abs=0.02)
    assert len(tokens) == 1 or not torch.allclose(*tokens)
