"""An inflated video autoencoder against the stock image autoencoder whose weights it took over."""

import pytest
import torch
from diffusers import AutoencoderKL

import latentae
from latentae.errors import RequestError
from latentae.loading.inflation import inflate


@pytest.fixture
def tiny(randomise):
    return lambda **options: randomise(latentae.create("fourplane-tiny", **options))


def clip(frames, height=16, width=24, batch=1, seed=0):
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def image_autoencoder():
    def build(**options):
        torch.manual_seed(1)
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4, **options,
        )  # fmt: skip
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        return model.eval()

    return build


@pytest.mark.parametrize("options", [{}, {"use_quant_conv": False, "use_post_quant_conv": False}])
@torch.no_grad()
def test_inflated_it_does_to_images_and_still_clips_what_the_stock_class_does(tiny, image_autoencoder, options):
    image_model, autoencoder = image_autoencoder(**options), tiny()
    taken = inflate(autoencoder, image_model)
    assert set(autoencoder.state_dict()) - set(taken) == {"decoder.time.weight"}
    autoencoder.decoder.time.weight.zero_()
    images = clip(1, batch=2)[:, :, 0]
    expected = image_model.encode(images).latent_dist
    posterior = autoencoder.encode(images).latent_dist
    plane = autoencoder.layout(images.shape).split(posterior.mean)["xy1"]
    torch.testing.assert_close(plane, expected.mean, atol=1e-5, rtol=1e-4)
    wanted = image_model.decode(expected.mode()).sample
    torch.testing.assert_close(autoencoder.decode(posterior.mode()).sample, wanted, atol=1e-4, rtol=1e-4)
    still = images.unsqueeze(2).expand(-1, -1, 9, -1, -1)
    moving = autoencoder.decode(autoencoder.encode(still).latent).sample
    torch.testing.assert_close(moving, wanted.unsqueeze(2).expand_as(moving), atol=1e-4, rtol=1e-4)


def test_only_what_fits_is_inflated(tiny, image_autoencoder):
    with pytest.raises(RequestError, match="not DCAE into one with spatial_planes 2"):
        inflate(tiny(), latentae.create("dc-ae-tiny"))
    with pytest.raises(RequestError, match="spatial_planes 0"):
        inflate(tiny(spatial_planes=0), image_autoencoder())
    with pytest.raises(RequestError, match="of shape"):
        inflate(tiny(block_out_channels=(8, 16, 32)), image_autoencoder())
