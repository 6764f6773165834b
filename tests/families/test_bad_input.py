"""What cannot be is refused in one sentence with the way out: shapes, normalisation, configurations."""

import json
import re

import diffusers
import pytest
import torch

import latentae
from latentae.errors import RequestError
from latentae.families.presets import PRESETS

TINY = [name for name in PRESETS if name.endswith("-tiny")]
IMAGES = [name for name in TINY if not name.startswith("fourplane")]


@pytest.fixture(scope="module", params=TINY)
def autoencoder(request):
    return latentae.create(request.param)


@pytest.fixture(scope="module", params=IMAGES)
def of_images(request):
    return latentae.create(request.param)


def sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


@pytest.mark.parametrize("more", [1, 4])
def test_latents_of_other_channels(autoencoder, more):
    channels = autoencoder.latent_channels
    with pytest.raises(RequestError, match=f"{channels + more} channels are another autoencoder's") as error:
        autoencoder.decode(torch.zeros(1, channels + more, 2, 2))
    assert f"in_channels {channels}" in sentence(error)


def test_latents_of_a_video_for_images(of_images):
    with pytest.raises(RequestError, match=f"video's, but {type(of_images).__name__} is an autoencoder of images") as e:
        of_images.decode(torch.zeros(1, of_images.latent_channels, 2, 2, 2))
    assert "FourPlane" in sentence(e)
    with pytest.raises(RequestError, match="a video's"):
        of_images.encode(torch.zeros(1, 3, 2, 8, 8))


def test_a_clip_of_one_frame_is_an_image(of_images):
    image = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        posterior = of_images.encode(image[:, :, None]).latent_dist
        z = of_images.encode(image).latent
        assert torch.equal(posterior.mode(), z[:, :, None])
        assert posterior.sample(torch.Generator().manual_seed(0)).shape == (*z.shape[:2], 1, *z.shape[2:])
        assert torch.equal(of_images.decode(z[:, :, None]).sample, of_images.decode(z).sample[:, :, None])


def test_an_image_for_videos_is_a_clip_of_one_frame():
    fourplane = latentae.create("fourplane-tiny")
    z = torch.randn(1, fourplane.latent_channels, 2, 3)
    with torch.no_grad():
        assert torch.equal(fourplane.decode(z).sample, fourplane.decode(z[:, :, None]).sample[:, :, 0])
    with pytest.raises(RequestError, match=r"of images \(B, 16, h, w\)"):
        fourplane.decode(torch.zeros(16, 2, 2))
    with pytest.raises(RequestError, match="3 channels are another"):  # a clip without its batch
        fourplane.decode(torch.zeros(16, 3, 2, 2))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (dict(scaling_factor=None), "scaling_factor of .* is None and must be a positive number.*write 1.0 there"),
        (dict(scaling_factor=0.0), "is 0.0 and must be a positive number"),
        (dict(scaling_factor=float("nan")), "is nan and must be"),
        (dict(scaling_factor=[1.0]), r"is \[1.0\] and must be"),
        (dict(latents_mean=[0.0]), "need one value for each .* they have 1 and None: give both, or neither"),
        (dict(latents_mean=[0.0] * 3, latents_std=[1.0] * 3), "they have 3 and 3"),
        (dict(latents_mean=[0.0] * 64, latents_std=[0.0] * 64), "deviations above 0"),
    ],
)
def test_a_normalisation_that_cannot_be(autoencoder, values, match):
    before = dict(autoencoder.config)
    with pytest.raises(RequestError, match=match) as error:
        autoencoder.register_to_config(**values)
    sentence(error)
    assert dict(autoencoder.config) == before


def test_a_shift_factor_that_is_none(autoencoder):
    with pytest.raises(RequestError, match=r"shift_factor of .* is None and must be a number.*write 0.0 there"):
        autoencoder.register_to_config(shift_factor=None)


def edited(autoencoder, folder, **changes):
    autoencoder.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_a_folder_without_scaling_factor(autoencoder, tmp_path):
    folder = edited(autoencoder, tmp_path, scaling_factor=None)
    for opened in (latentae.load, type(autoencoder).from_pretrained):
        with pytest.raises(RequestError, match=r"scaling_factor of .* is None"):
            opened(folder)


def test_a_configuration_of_a_newer_version(autoencoder, tmp_path):
    folder = edited(autoencoder, tmp_path, _latentae_version="99.1.0", rotary=True)
    match = f"written by latentae 99.1.0, and this is {re.escape(latentae.__version__)}, which does not know its rotary"
    for opened in (latentae.load, type(autoencoder).from_pretrained):
        with pytest.raises(RequestError, match=f"{match}: upgrade with 'pip install --upgrade latentae'"):
            opened(folder)


def test_a_newer_version_whose_arguments_are_known_opens(autoencoder, tmp_path):
    folder = edited(autoencoder, tmp_path, _latentae_version="99.1.0")
    assert type(latentae.load(folder)) is type(autoencoder)


def test_keys_that_no_version_knows(autoencoder, tmp_path):
    folder = edited(autoencoder, tmp_path, scaling_facto=0.5)
    with pytest.raises(RequestError, match=r"does not know, scaling_facto: did you mean scaling_factor\?"):
        latentae.load(folder)
    folder = edited(autoencoder, tmp_path, qqqq=0.5)
    with pytest.raises(RequestError, match="qqqq: remove what is not an argument"):
        latentae.load(folder)


def test_statistics_are_saved_and_stock_export_keeps_the_class_that_knows_them(tmp_path):
    dcae = latentae.create("dc-ae-tiny")
    assert "latents_mean" not in dcae.to_json_string()
    dcae.register_to_config(latents_mean=[0.5] * 8, latents_std=[2.0] * 8)
    from latentae.loading import export

    assert export(dcae, tmp_path) == "DCAE"
    again = latentae.load(tmp_path)
    assert list(again.config.latents_std) == [2.0] * 8
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    raw = again.encode(pixels).latent
    torch.testing.assert_close(latentae.LatentCodec(again).encode(pixels).tensor, (raw - 0.5) / 2)


@pytest.fixture
def stock():
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
    )  # fmt: skip


def test_the_codec_refuses_for_stock_classes(stock):
    codec = latentae.LatentCodec(stock)
    with pytest.raises(RequestError, match=r"AutoencoderKL takes those of 4 channels in 4 dimensions"):
        codec.decode(torch.zeros(1, 8, 2, 2))
    with pytest.raises(RequestError, match="a video's"):
        codec.decode_raw(torch.zeros(1, 4, 3, 2, 2))
    stock.register_to_config(scaling_factor=None)
    with pytest.raises(RequestError, match=r"AutoencoderKL has scaling_factor null.*1.0 if"):
        codec.encode(torch.zeros(1, 3, 8, 8))


def test_statistics_that_xl_cannot_take_are_refused_with_what_helps():
    """DCAE can do without; FourPlane publishes them for the pipelines of videos."""
    xl = diffusers.StableDiffusionXLPipeline
    stated = latentae.create("dc-ae-tiny", latents_mean=[0.0] * 8, latents_std=[1.0] * 8)
    parts = dict.fromkeys(["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler"])
    with pytest.raises(RequestError, match=r"register_to_config\(latents_mean=None, latents_std=None\)"):
        xl(vae=stated, **parts)
    stated.register_to_config(latents_mean=None, latents_std=None)
    xl(vae=stated, **parts)
    with pytest.raises(RequestError, match="has 16: use another pipeline, or an autoencoder whose latents have 4"):
        xl(vae=latentae.create("fourplane-tiny"), **parts)
