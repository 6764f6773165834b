"""The denoiser is diffusers' U-Net of the consistency decoder, in the published sizes; the U-ViT's positions."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D

from latentae.families.presets import DITO_SIZES
from latentae.nn.unet import ResBlock, TransformerBlock, UNet, rotate, rotation_of, time_frequencies

WIDTHS = (320, 64, 32)  # 320 at first, as stock U-Nets have as many frequencies of the time as channels there


def seeded(module, seed=0):
    """The module with every parameter drawn, so that no norm is the identity and no bias zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data.normal_(0, scale, generator=generator)
    return module.eval()


def residual_blocks(*modules):
    return [block for module in modules for block in module.modules() if isinstance(block, ResnetBlock2D)]


def copy_weights(ours, stock):
    """Weights of a `UNet` into a `UNet2DModel`, part by part in the order of computation."""
    pairs = [
        (ours.time_in, stock.time_embedding.linear_1),
        (ours.time_out, stock.time_embedding.linear_2),
        (ours.conv_in, stock.conv_in),
        (ours.norm_out, stock.conv_norm_out),
        (ours.conv_out, stock.conv_out),
    ]
    blocks = [*ours.down_blocks, *ours.mid_blocks, *ours.up_blocks]
    for block, other in zip(blocks, residual_blocks(stock.down_blocks, stock.mid_block, stock.up_blocks), strict=True):
        pairs += [(block.norm1, other.norm1), (block.conv1, other.conv1), (block.time, other.time_emb_proj)]
        pairs += [(block.norm2, other.norm2), (block.conv2, other.conv2)]
        if other.conv_shortcut is not None:
            pairs.append((block.shortcut, other.conv_shortcut))
    for mine, theirs in pairs:
        theirs.load_state_dict(mine.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in stock.parameters())


@pytest.mark.parametrize("layers", [3, 1])
def test_it_is_the_consistency_decoder_s_network_of_diffusers(layers):
    ours = seeded(UNet(3, 4, WIDTHS, layers))
    stock = UNet2DModel(
        in_channels=7, out_channels=3, block_out_channels=WIDTHS, layers_per_block=layers, add_attention=False,
        down_block_types=("ResnetDownsampleBlock2D",) * 3, up_block_types=("ResnetUpsampleBlock2D",) * 3,
        resnet_time_scale_shift="scale_shift", norm_num_groups=32, norm_eps=1e-5, downsample_padding=1,
    ).eval()  # fmt: skip
    copy_weights(ours, stock)
    noisy, condition = torch.randn(2, 3, 8, 12), torch.randn(2, 4, 8, 12)
    t = torch.tensor([0.02, 0.7])
    with torch.no_grad():
        expected = stock(torch.cat([noisy, condition], dim=1), 1000 * t).sample
        found = ours(noisy, t, condition)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_frequencies_are_those_of_diffusers():
    t = torch.tensor([0.0, 1e-3, 0.3, 1.0])
    expected = get_timestep_embedding(1000 * t, 320, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(time_frequencies(t), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("size", "millions"), [("b", 162.8), ("l", 338.5), ("xl", 620.9)])
def test_published_sizes(size, millions):
    with torch.device("meta"):
        network = UNet(3, 4, DITO_SIZES[size])
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"transformer_layers": 2}, {"latent_channels": 4}])
def test_every_form_gives_pixels_and_a_gradient_to_all_that_it_sees(patch, options):
    network = seeded(UNet(3, 5, (8, 16), 1, patch, **options))
    noisy = torch.randn(2, 3, 8 * patch, 4 * patch, requires_grad=True)
    condition = torch.randn(2, 5, 8, 4, requires_grad=True)
    latents = torch.randn(2, 4, 2, 1, requires_grad=True) if "latent_channels" in options else None
    out = network(noisy, torch.tensor([0.1, 0.9]), condition, latents)
    assert out.shape == noisy.shape
    out.square().sum().backward()
    for name, seen in (("noisy", noisy), ("condition", condition), ("latents", latents)):
        assert seen is None or seen.grad.abs().min() > 0, name
    unused = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert not unused
    with torch.no_grad():
        other = network(noisy, torch.tensor([0.1, 0.8]), condition, latents)
    assert torch.equal(other[0], out[0]), "images do not see each other"
    assert not torch.equal(other[1], out[1])


@pytest.mark.parametrize("options", [{}, {"transformer_layers": 1}])
def test_checkpointing_changes_no_gradient(options):
    network = seeded(UNet(3, 4, (8, 16), 1, **options)).train()
    noisy, t, condition = torch.randn(1, 3, 4, 4), torch.tensor([0.5]), torch.randn(1, 4, 4, 4)

    def gradients():
        network.zero_grad()
        network(noisy, t, condition).square().sum().backward()
        return [parameter.grad.clone() for parameter in network.parameters()]

    plain, calls = gradients(), []

    def checkpoint(function, *arguments):
        calls.append(function)
        return torch.utils.checkpoint.checkpoint(function, *arguments, use_reentrant=False)

    network.gradient_checkpointing, network._gradient_checkpointing_func = True, checkpoint
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(other, one)
    assert len(calls) == sum(isinstance(module, (ResBlock, TransformerBlock)) for module in network.modules())


def test_attention_knows_the_difference_of_positions_alone():
    height, width, channels = 6, 7, 16
    query, key = np.random.default_rng(0).standard_normal((2, channels))
    rotation = rotation_of(height, width, channels, torch.zeros(1, dtype=torch.float64))
    tokens = [torch.from_numpy(vector).expand(1, 1, height * width, channels) for vector in (query, key)]
    turned = [rotate(each, rotation)[0, 0] for each in tokens]
    for each, vector in zip(turned, (query, key)):
        np.testing.assert_allclose(each.norm(dim=1), np.linalg.norm(vector), rtol=1e-12)
    scores = (turned[0] @ turned[1].T).view(height, width, height, width)
    torch.testing.assert_close(scores[:-1, :-1, :-1, :-1], scores[1:, 1:, 1:, 1:], rtol=0, atol=1e-12)
    torch.testing.assert_close(scores[:-2, :, :-2, :], scores[2:, :, 2:, :], rtol=0, atol=1e-12)
    assert (scores[0, 0, 0, 1] - scores[0, 0, 1, 0]).abs() > 1e-3, "rows and columns differ"
    assert (scores[0, 0, 0, 1] - scores[0, 0, 0, 2]).abs() > 1e-3

    # in complex numbers: half of the pairs turn with the row, half with the column
    pairs = [vector[: channels // 2] + 1j * vector[channels // 2 :] for vector in (query, key)]
    frequencies = 100.0 ** (-np.arange(channels // 4) / (channels // 4))
    for (row, column), (other_row, other_column) in [((3, 1), (1, 4)), ((0, 6), (5, 0))]:
        angles = np.concatenate([(row - other_row) * frequencies, (column - other_column) * frequencies])
        expected = (pairs[0] * pairs[1].conj() * np.exp(1j * angles)).sum().real
        assert scores[row, column, other_row, other_column].item() == pytest.approx(expected, abs=1e-12)


def test_a_transformer_block_sees_where_its_tokens_are():
    block = seeded(TransformerBlock(32)).double()
    tokens = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 12, 32)))
    embedding = torch.zeros(1, 1280, dtype=torch.float64)
    order = torch.randperm(12)
    with torch.no_grad():
        found = block(tokens, embedding, rotation_of(3, 4, 32, tokens))
        moved = block(tokens[:, order], embedding, rotation_of(3, 4, 32, tokens))
        nowhere = (torch.ones(12, 16, dtype=torch.float64), torch.zeros(12, 16, dtype=torch.float64))
        plain, plain_moved = block(tokens, embedding, nowhere), block(tokens[:, order], embedding, nowhere)
    torch.testing.assert_close(plain_moved, plain[:, order])
    assert (moved - found[:, order]).abs().max() > 1e-3


def test_heads_that_cannot_turn_are_refused():
    with pytest.raises(ValueError, match="channels of each head in fours, not 30 / 1"):
        TransformerBlock(30)
