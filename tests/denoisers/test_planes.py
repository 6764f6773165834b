"""The transformer of planes: rotations by hand, positions that only count relatively, given tokens that stay clean."""

import pytest
import torch

from latentae.denoisers import build_denoiser, create_denoiser, sample, velocity_errors
from latentae.denoisers.planes import PlaneTransformer, rotate, rotation_of
from latentae.errors import RequestError
from latentae.nn.planes import PlaneLayout

LAYOUT = PlaneLayout(3, 4, 5, planes=2, channels=6)


def shaken(num_classes=3, **options):
    denoiser = create_denoiser({"preset": "planes-tiny", **options}, LAYOUT, num_classes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return denoiser.eval()


def tokens(batch=2, seed=0):
    shape = (batch, LAYOUT.num_tokens, LAYOUT.channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_it_begins_with_a_velocity_of_zero_and_blocks_that_change_nothing():
    denoiser = create_denoiser({"preset": "planes-tiny"}, LAYOUT)
    assert denoiser(tokens(), torch.rand(2)).abs().max() == 0
    transformer = denoiser.transformer
    x = torch.randn(1, LAYOUT.num_tokens, 128)
    block = transformer.transformer_blocks[0]
    torch.testing.assert_close(block(x, torch.randn(1, 1, 128), transformer.rotation), x)


def test_it_knows_times_classes_and_planes():
    denoiser, x = shaken(), tokens()
    velocity = denoiser(x, torch.tensor([0.2, 0.9]), torch.tensor([0, 2]))
    assert velocity.shape == x.shape
    assert not torch.allclose(velocity, denoiser(x, torch.tensor([0.3, 0.9]), torch.tensor([0, 2])))
    assert not torch.allclose(velocity, denoiser(x, torch.tensor([0.2, 0.9]), torch.tensor([1, 2])))
    with torch.no_grad():
        denoiser.transformer.planes.weight[1] += 1
    assert not torch.allclose(velocity, denoiser(x, torch.tensor([0.2, 0.9]), torch.tensor([0, 2])))


def test_a_time_for_each_token_that_is_the_same_is_one_time():
    denoiser, x, labels = shaken(), tokens(), torch.tensor([0, 1])
    t = torch.tensor([0.2, 0.7])
    each = t[:, None].expand(-1, LAYOUT.num_tokens)
    torch.testing.assert_close(denoiser(x, each, labels), denoiser(x, t, labels))


def test_rotations_are_those_of_complex_numbers():
    positions = torch.rand(7, 3) * 10
    x = torch.randn(1, 2, 7, 12)
    frequencies = 100.0 ** (-torch.arange(2) / 2)
    angles = torch.cat([positions[:, axis, None] * frequencies for axis in range(3)], dim=1)  # (N, 6)
    expected = torch.view_as_complex(x.unflatten(-1, (6, 2))) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(rotate(x, rotation_of(positions, 12)), torch.view_as_real(expected).flatten(-2))


@pytest.mark.parametrize("head_dim", [6, 7, 16, 32, 72])
def test_products_of_rotated_vectors_know_distances_alone(head_dim):
    positions = torch.rand(5, 3) * 10
    q, k = torch.randn(2, 1, 1, 5, head_dim).unbind(0)
    product, moved = (
        rotate(q, rotation_of(at, head_dim)) @ rotate(k, rotation_of(at, head_dim)).mT
        for at in (positions, positions + torch.tensor([3.0, -2.0, 5.0]))
    )
    torch.testing.assert_close(product, moved, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(product, q @ k.mT)


def test_given_tokens_are_clean_and_do_not_count():
    denoiser, clean, noise = shaken(), tokens(), tokens(seed=1)
    given = (LAYOUT.types == 0).expand(2, -1)
    t, labels = torch.tensor([0.3, 0.8]), torch.tensor([0, 1])
    errors = velocity_errors(denoiser, clean, t, noise, labels, given)
    other = noise.clone()
    other[:, LAYOUT.types == 0] += 5  # noise of given tokens is seen by nobody
    torch.testing.assert_close(velocity_errors(denoiser, clean, t, other, labels, given), errors)
    nothing = torch.zeros_like(given)
    expected = velocity_errors(denoiser, clean, t, noise, labels)
    torch.testing.assert_close(velocity_errors(denoiser, clean, t, noise, labels, nothing), expected)
    at = t[:, None, None]
    noisy = torch.where(given[..., None], clean, (1 - at) * clean + at * noise)
    predicted = denoiser(noisy, torch.where(given, 0.0, t[:, None]), labels)
    by_hand = (predicted - (noise - clean)).square()[:, LAYOUT.types != 0].mean((1, 2))
    torch.testing.assert_close(errors, by_hand)


def test_given_tokens_come_out_of_sampling_exactly_as_they_went_in():
    denoiser, known = shaken(), tokens()
    given = (LAYOUT.types < 2).expand(2, -1)
    labels = torch.tensor([0, 1])
    drawn = sample(denoiser, tokens(seed=1), labels, steps=3, guidance_scale=2.0, known=known, given=given)
    assert torch.equal(drawn[:, LAYOUT.types < 2], known[:, LAYOUT.types < 2])
    assert not torch.allclose(drawn, sample(denoiser, tokens(seed=1), labels, steps=3, guidance_scale=2.0))


def test_saved_and_described_it_is_the_same(tmp_path):
    denoiser = shaken()
    denoiser.transformer.save_pretrained(tmp_path)
    x, t, labels = tokens(), torch.rand(2) * 1000, torch.tensor([0, 3])
    again = PlaneTransformer.from_pretrained(tmp_path)
    torch.testing.assert_close(again(x, t, labels).sample, denoiser.transformer(x, t, labels).sample)
    built = build_denoiser(denoiser.describe())
    built.load_state_dict(denoiser.state_dict())
    torch.testing.assert_close(built(x, t / 1000, labels), denoiser(x, t / 1000, labels))


def test_checkpointing_gives_the_same_gradients():
    def gradients(denoiser):
        velocity_errors(
            denoiser, tokens(), torch.tensor([0.2, 0.7]), tokens(seed=1), torch.tensor([0, 1])
        ).sum().backward()
        return [p.grad for p in denoiser.parameters()]

    plain, checkpointed = shaken(), shaken()
    checkpointed.transformer.enable_gradient_checkpointing()
    for a, b in zip(gradients(plain), gradients(checkpointed)):
        torch.testing.assert_close(a, b)


def test_in_half_precision_it_is_near():
    denoiser, x, t = shaken(), tokens(), torch.tensor([0.2, 0.7])
    expected = denoiser(x, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = denoiser(x, t).float()
    half = shaken().bfloat16()(x.bfloat16(), t).float()
    for actual in (autocast, half):
        assert (actual - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_it_is_for_planes_and_images_have_others():
    with pytest.raises(RequestError, match="which are of images: take a denoiser such as dit-s"):
        create_denoiser({"preset": "planes-s"}, (4, 8, 8))
    with pytest.raises(RequestError, match="which are of planes: take a denoiser such as planes-s"):
        create_denoiser({"preset": "dit-s"}, LAYOUT)
    with pytest.raises(RequestError, match="made for 67 tokens of planes"):
        shaken().check_grid((66, 6))
    with pytest.raises(RequestError, match="two for each of three axes"):
        create_denoiser({"preset": "planes-tiny", "attention_head_dim": 4}, LAYOUT)
