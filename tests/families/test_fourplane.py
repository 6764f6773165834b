"""The four-plane autoencoder: what sees what, pooling by hand, windows."""

import pytest
import torch

import latentae
from latentae.errors import RequestError
from latentae.families.fourplane import time_weights
from latentae.training.latents import draw_latents


@pytest.fixture
def tiny(randomise):
    def build(**options):
        return randomise(latentae.create("fourplane-tiny", **options))

    return build


def clip(frames, height=16, width=24, batch=1, seed=0):
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_features_know_nothing_of_later_frames(tiny):
    autoencoder = tiny()
    pixels = clip(9).requires_grad_()
    features = autoencoder.encoder(pixels)  # 5 latent frames: 1 + 2 + 2 + 2 + 2
    assert features.shape[2] == 5
    for latent_frame in range(5):
        (gradient,) = torch.autograd.grad(features[:, :, latent_frame].sum(), pixels, retain_graph=True)
        seen = gradient.abs().sum((0, 1, 3, 4)) > 0
        assert seen[: 2 * latent_frame + 1].all()
        assert not seen[2 * latent_frame + 1 :].any()


def test_planes_of_the_endpoints_are_those_of_the_frames_alone(tiny):
    autoencoder = tiny(time_weights="endpoints")
    pixels = clip(9)
    with torch.no_grad():
        planes = autoencoder.layout(pixels.shape).split(autoencoder.encode(pixels).latent_dist.mean)
        other = clip(9, seed=1)
        other[:, :, 0], other[:, :, -1] = pixels[:, :, 0], pixels[:, :, -1]
        others = autoencoder.layout(pixels.shape).split(autoencoder.encode(other).latent_dist.mean)
        first = autoencoder.encode_frames(pixels[:, :, 0])
        image = autoencoder.encode(pixels[:, :, 0]).latent
    torch.testing.assert_close(planes["xy1"], first)
    torch.testing.assert_close(image[:, :4], first)
    torch.testing.assert_close(others["xy1"], planes["xy1"])
    torch.testing.assert_close(others["xy2"], planes["xy2"])
    assert not torch.allclose(others["xt"], planes["xt"])


def test_planes_are_heads_of_means_of_the_features(tiny):
    autoencoder = tiny(time_weights="uniform")
    pixels = clip(5)
    with torch.no_grad():
        features, heads = autoencoder.encoder(pixels), autoencoder.encoder.heads
        planes = autoencoder.layout(pixels.shape).split(autoencoder.encode(pixels).latent_dist.mean)
        for name, axis in {"xy1": 2, "xy2": 2, "xt": 3, "yt": 4}.items():
            expected = heads[name](features.mean(axis)).chunk(2, dim=1)[0]
            torch.testing.assert_close(planes[name], expected)


@pytest.mark.parametrize(
    ("kind", "planes", "frames", "expected"),
    [
        ("uniform", 2, 4, [[0.25] * 4, [0.25] * 4]),
        ("halves", 2, 4, [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]),
        ("halves", 2, 5, [[0.4, 0.4, 0.2, 0, 0], [0, 0, 0.2, 0.4, 0.4]]),
        ("halves", 1, 3, [[1 / 3] * 3]),
        ("hat", 2, 3, [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]]),
        ("hat", 3, 5, [[2 / 3, 1 / 3, 0, 0, 0], [0, 0.25, 0.5, 0.25, 0], [0, 0, 0, 1 / 3, 2 / 3]]),
        ("hat", 1, 3, [[1 / 3] * 3]),
    ],
)
def test_weights_of_frames(kind, planes, frames, expected):
    torch.testing.assert_close(time_weights(kind, planes, frames), torch.tensor(expected))


def test_the_fused_planes_are_a_convolution_of_their_concatenation(tiny):
    """The two ways to write it: spread, concatenate, one 1x1x1 convolution; or a sum of what it makes of each."""
    autoencoder = tiny()
    layout = autoencoder.layout((1, 3, 5, 16, 24))
    tokens = torch.randn(1, layout.num_tokens, layout.channels)
    decoder, planes = autoencoder.decoder, layout.split(tokens)
    with torch.no_grad():
        decoder.time.weight.zero_()
        for embed in decoder.embeds.values():  # 1x1 convolutions only, so that spreading and convolving commute
            centre = embed[1].weight[:, :, 1:2, 1:2].clone()
            embed[1].weight.zero_()[:, :, 1:2, 1:2] = centre
        spread = torch.cat([layout.spread(name, plane) for name, plane in planes.items()], dim=1)
        matrices = [embed[1].weight[:, :, 1, 1] @ embed[0].weight[:, :, 0, 0] for embed in decoder.embeds.values()]
        offsets = [embed[1].weight[:, :, 1, 1] @ embed[0].bias + embed[1].bias for embed in decoder.embeds.values()]
        expected = torch.einsum("oc,bcthw->bothw", torch.cat(matrices, 1), spread) + sum(offsets).view(1, -1, 1, 1, 1)
        torch.testing.assert_close(decoder.fuse(planes, layout), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"spatial_planes": 1}, {"spatial_planes": 0}, {"temporal_compression": 1}])
@pytest.mark.parametrize("frames", [1, 2, 5, 9, 12, 23])
def test_the_codec_gives_clips_of_any_length_and_size_back(tiny, options, frames):
    autoencoder = tiny(**options)
    codec = latentae.LatentCodec(autoencoder)
    pixels = clip(frames, 13, 18)
    latents = codec.encode(pixels)
    assert tuple(latents.tensor.shape) == autoencoder.latent_shape(tuple(pixels.shape))
    assert codec.decode(latents).shape == pixels.shape


def test_a_posterior_counts_each_latent_once_and_draws_planes(tiny):
    autoencoder = tiny()
    pixels = clip(9, batch=2)
    posterior = autoencoder.encode(pixels).latent_dist
    layout = autoencoder.layout(pixels.shape)
    assert posterior.mean.shape == posterior.std.shape == (2, layout.num_tokens, 4)
    for drawn in (posterior.sample(torch.Generator().manual_seed(0)), draw_latents(posterior)):
        assert drawn.shape == autoencoder.latent_shape(pixels.shape)
        tokens = layout.unpack(drawn, "volume")
        torch.testing.assert_close(layout.pack(tokens, "volume"), drawn, atol=1e-5, rtol=1e-5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        many = torch.stack([layout.unpack(draw_latents(posterior), "volume") for _ in range(400)]).detach()
    torch.testing.assert_close(many.std(0).mean(), posterior.std.mean().detach(), rtol=0.02, atol=0)


def test_long_clips_are_windows_whose_seams_fade(tiny):
    autoencoder = tiny()  # windows of 9 frames that share 2
    pixels = clip(16)
    with torch.no_grad():
        z = autoencoder.encode(pixels).latent
        parts = [autoencoder.encode(part).latent for part in (pixels[:, :, :9], pixels[:, :, 7:])]
        torch.testing.assert_close(z, torch.cat(parts, dim=2))
        first, second = (autoencoder.decode(part).sample for part in parts)
        decoded = autoencoder.decode(z).sample
    torch.testing.assert_close(decoded[:, :, :7], first[:, :, :7])
    torch.testing.assert_close(decoded[:, :, 7], first[:, :, 7] * 2 / 3 + second[:, :, 0] / 3)
    torch.testing.assert_close(decoded[:, :, 8], first[:, :, 8] / 3 + second[:, :, 1] * 2 / 3)
    torch.testing.assert_close(decoded[:, :, 9:], second[:, :, 2:])


def test_planes_are_of_the_whole_image_also_with_tiles(tiny):
    autoencoder = tiny()
    pixels = clip(5, 32, 32)
    with torch.no_grad():
        whole = autoencoder.encode(pixels).latent
        autoencoder.enable_tiling(16, 16)
        tiled = autoencoder.encode(pixels).latent
        assert autoencoder.decode(tiled).sample.shape == pixels.shape
    layout = autoencoder.layout(pixels.shape)
    torch.testing.assert_close(layout.pack(layout.unpack(tiled, "volume"), "volume"), tiled, atol=1e-5, rtol=1e-5)
    assert (tiled - whole).abs().mean() < 0.5 * whole.abs().mean()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temporal_compression": 3}, "is not 1, 2"),
        ({"temporal_compression": 8}, "is not 1, 2"),
        ({"time_weights": "thirds"}, "expected halves, hat, endpoints, uniform"),
        ({"time_weights": "endpoints", "spatial_planes": 3}, "two endpoints"),
        ({"window_frames": 8}, "1 more than a multiple"),
        ({"window_overlap": 9}, "less than that"),
    ],
)
def test_configurations_that_cannot_be_are_refused(options, sentence):
    with pytest.raises(RequestError, match=sentence):
        latentae.create("fourplane-tiny", **options)


def test_clips_and_latents_that_do_not_fit_are_refused(tiny):
    autoencoder = tiny()
    with pytest.raises(RequestError, match="the next is 3"):
        autoencoder.encode(clip(2))
    with pytest.raises(RequestError, match="the next is 16"):
        autoencoder.encode(clip(11))
    with pytest.raises(RequestError, match="whole windows of 5: ask a pipeline for num_frames 9, 19, 29 "):
        autoencoder.decode(torch.zeros(1, 16, 7, 2, 2))
    with pytest.raises(RequestError, match="A clip of 65 frames has planes of its own for each window of 9"):
        autoencoder.layout((1, 3, 65, 16, 16))
    with pytest.raises(RequestError, match="latents are a volume"):
        tiny(spatial_planes=0).layout((1, 3, 5, 16, 16))
