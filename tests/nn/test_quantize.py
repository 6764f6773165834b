"""Quantisers against vector-quantize-pytorch and closed forms."""

import pytest
import torch

import latentae
from latentae.errors import RequestError
from latentae.nn.quantize import DEAD, FSQ, VectorQuantizer, make_quantizer

oracle = pytest.importorskip("vector_quantize_pytorch")

LEVELS = [[8, 5, 5, 5], [3, 4], [7], [16, 5, 3]]


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_equals_the_library(levels):
    ours, theirs = FSQ(len(levels), levels).double(), oracle.FSQ(levels).double()
    z = (3 * torch.randn(2, len(levels), 7, 9, dtype=torch.float64)).requires_grad_()
    codes, loss = ours(z)
    expected, indices = theirs(z)
    assert loss is None
    torch.testing.assert_close(codes, expected, rtol=0, atol=1e-12)
    assert torch.equal(ours.indices_of(z), indices.long())
    weights = torch.randn_like(codes)
    (actual,) = torch.autograd.grad((codes * weights).sum(), z)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), z)
    torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-7)  # its levels are fp32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("levels", LEVELS)
def test_every_fsq_index_has_latents_and_its_own_code(levels, dtype):
    quantizer = FSQ(len(levels), levels).to(dtype)
    indices = torch.arange(quantizer.codes).view(1, 1, -1)
    latents = quantizer.latents_of(indices)
    assert latents.isfinite().all()
    assert torch.equal(quantizer.indices_of(latents.to(dtype)), indices)
    codes, _ = quantizer(latents.to(dtype))
    assert codes.dtype == dtype
    assert len(codes.float().flatten(2).unique(dim=2)[0, 0]) == quantizer.codes
    assert codes.abs().max() <= 1
    assert quantizer(torch.zeros(1, len(levels), 1, 1, dtype=dtype))[0].abs().max() == 0


def test_fsq_gradient_is_that_of_the_bound():
    quantizer = FSQ(1, [5]).double()
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 1, -1).requires_grad_()
    quantizer(z)[0].sum().backward()
    torch.testing.assert_close(z.grad, (1 - z.detach().tanh() ** 2) * 2.002 / 2)


def pair(codes=16, channels=5, decay=0.9):
    """Ours and the library's quantiser in the same state, in float32, which is all that the library has."""
    ours = VectorQuantizer(channels, codes, decay=decay, revive=False)
    theirs = oracle.VectorQuantize(
        channels, codes, decay=decay, eps=1e-5, accept_image_fmap=True, rotation_trick=False, commitment_weight=0.25
    )
    codebook = theirs._codebook
    ours.codebook.copy_(codebook.embed[0])
    ours.embedding_sum.copy_(codebook.embed_avg[0])
    ours.cluster_size.copy_(codebook.cluster_size[0])
    return ours, theirs


def test_vq_equals_the_library_over_ten_updates():
    ours, theirs = pair()
    for _ in range(10):
        z = (0.3 * torch.randn(3, 5, 4, 6)).requires_grad_()
        codes, loss = ours(z)
        expected, _, expected_loss = theirs(z)
        torch.testing.assert_close(codes, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loss, expected_loss.squeeze(), rtol=1e-5, atol=1e-6)
        gradients = (
            torch.autograd.grad(out.square().sum() + cost, z)[0]
            for out, cost in ((codes, loss), (expected, expected_loss))
        )
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    codebook = theirs._codebook
    torch.testing.assert_close(ours.cluster_size, codebook.cluster_size[0])
    torch.testing.assert_close(ours.embedding_sum, codebook.embed_avg[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.codebook, codebook.embed[0], rtol=1e-4, atol=1e-6)
    z = 0.3 * torch.randn(3, 5, 4, 6)
    assert torch.equal(ours.indices_of(z), theirs.eval()(z)[1])


@pytest.mark.parametrize("codebook", ["ema", "loss"])
def test_gradients_in_closed_form(codebook):
    """Straight through to the latents, commitment beside it; the codebook's loss to the codes that were chosen."""
    quantizer = VectorQuantizer(3, 8, codebook, commitment=0.5).double()
    z = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    codes, loss = quantizer(z)
    weights = torch.randn_like(codes)
    ((codes * weights).sum() + loss).backward()
    torch.testing.assert_close(z.grad, weights + 0.5 * 2 * (z - codes).detach() / z.numel())
    if codebook == "loss":
        indices = quantizer.indices_of(z).flatten()
        difference = 2 * (codes - z).detach().movedim(1, -1).flatten(0, -2) / z.numel()
        expected = torch.zeros(8, 3, dtype=torch.float64).index_add_(0, indices, difference)
        torch.testing.assert_close(quantizer.codebook.grad, expected)


def test_nearest_codes_in_parts_equal_cdist(monkeypatch):
    quantizer = VectorQuantizer(4, 50).double()
    z = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    expected = torch.cdist(z.movedim(1, -1).flatten(0, -2), quantizer.codebook).argmin(1).view(2, 6, 7)
    assert torch.equal(quantizer.indices_of(z), expected)
    monkeypatch.setattr("latentae.nn.quantize.LARGEST_TABLE", 150)
    assert torch.equal(quantizer.indices_of(z), expected)
    indices = torch.arange(50).view(1, 5, 10)
    assert torch.equal(quantizer.indices_of(quantizer.latents_of(indices)), indices)
    assert torch.equal(quantizer(z)[0], quantizer.latents_of(expected)), "exactly the code"


@pytest.mark.parametrize("codebook", ["ema", "loss"])
@pytest.mark.parametrize("revive", [True, False])
def test_codes_begin_as_latents_and_dead_ones_are_revived(codebook, revive):
    quantizer = VectorQuantizer(2, 8, codebook, revive=revive)
    z = torch.rand(1, 2, 5, 5).requires_grad_()
    quantizer(z)
    vectors = z.detach().movedim(1, -1).flatten(0, -2)
    if codebook == "loss":
        assert torch.cdist(quantizer.codebook.detach(), vectors).min(1).values.max() < 1e-6
        assert len(quantizer.codebook.detach().unique(dim=0)) == 8, "no two on the same latent"
    assert quantizer.usage()["codes_used"] == 1
    with torch.no_grad():  # the latents move far from all codes but one
        far = 100 + torch.rand(1, 2, 5, 5)
        quantizer.codebook[0] = 100
    for _ in range(300):
        quantizer(far.clone().requires_grad_())
    usage = quantizer.usage()
    if revive:
        assert usage["codes_used"] == 1
        assert usage["perplexity"] > 4
    else:
        assert usage["codes_used"] == 1 / 8
        torch.testing.assert_close(usage["perplexity"], torch.tensor(1.0), atol=0.6, rtol=0)


def test_fewer_latents_than_codes_place_what_they_can():
    quantizer = VectorQuantizer(2, 8)
    quantizer(torch.rand(1, 2, 1, 3).requires_grad_())
    assert (quantizer.cluster_size > 0).sum() == 3
    quantizer(torch.rand(1, 2, 3, 3).requires_grad_())
    assert (quantizer.cluster_size > 0).all()
    assert quantizer.codebook.isfinite().all()


def test_nothing_moves_in_evaluation_or_below_a_frozen_encoder():
    for quantizer in (VectorQuantizer(2, 8), VectorQuantizer(2, 8, "loss"), FSQ(2, [4, 3])):
        before = {name: value.clone() for name, value in quantizer.state_dict().items()}
        z = torch.randn(1, 2, 3, 3)
        quantizer(z)
        quantizer.eval()(z.requires_grad_())
        assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_latents_that_are_not_finite_place_no_codes():
    quantizer = VectorQuantizer(2, 8, "loss")
    quantizer(torch.full((1, 2, 3, 3), torch.nan, requires_grad=True))
    assert quantizer.codebook.isfinite().all()


def test_usage_in_closed_form():
    quantizer = FSQ(1, [4])
    assert quantizer.usage()["codes_used"] == 0
    quantizer.share.copy_(torch.tensor([0.5, 0.25, 0.25 - DEAD / 8, DEAD / 8]))
    share = quantizer.share
    usage = quantizer.usage()
    assert usage["codes_used"] == 0.75
    torch.testing.assert_close(usage["perplexity"], (-(share * share.log()).sum()).exp())
    one = torch.full((1, 1, 2, 2), 9.0, requires_grad=True)
    quantizer.share.zero_()
    quantizer(one)
    torch.testing.assert_close(quantizer.usage()["perplexity"], torch.tensor(1.0))


def test_half_precision_is_quantised_in_fp32():
    quantizer = VectorQuantizer(4, 32)
    z = torch.randn(2, 4, 3, 3).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes, loss = quantizer(z)
        assert torch.equal(quantizer.indices_of(z), quantizer.indices_of(z.float()))
    assert codes.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert torch.equal(codes, quantizer.latents_of(quantizer.indices_of(z.float())).bfloat16())


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"codes": 8}, "kind None is unknown; expected vq or fsq"),
        ({"kind": "fsq", "codes": 8}, "has no codes; it has levels"),
        ({"kind": "vq"}, "needs codes"),
        ({"kind": "vq", "codes": 1}, "between 2"),
        ({"kind": "vq", "codes": 8, "codebook": "kmeans"}, "ema or loss"),
        ({"kind": "vq", "codes": 8, "decay": 1.0}, "below 1"),
        ({"kind": "fsq", "levels": [8, 5, 5, 5]}, "4 entries for 8 latent channels"),
        ({"kind": "fsq", "levels": [2] * 8}, "3 or more"),
        ({"kind": "fsq", "levels": [9] * 8}, "product"),
    ],
)
def test_mistakes_are_one_sentence(config, complaint):
    with pytest.raises(RequestError, match=complaint):
        make_quantizer(config, 8)
    with pytest.raises(RequestError, match=complaint):
        latentae.create("dc-ae-tiny", quantizer=config)


def test_the_configuration_of_a_continuous_one_is_as_it_was():
    autoencoder = latentae.create("dc-ae-tiny")
    assert "quantizer" not in autoencoder.config
    assert not any("quantize" in name for name in autoencoder.state_dict())
    structured = dict(decoder_in_shortcut=False, encoder_out_shortcut=False)
    discrete = latentae.create("dc-ae-tiny", **structured, quantizer={"kind": "vq", "codes": 8})
    with pytest.raises(RequestError, match="expected"):
        discrete.decode(torch.zeros(1, 4, 2, 2))  # a prefix of the channels has no code


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("fsq", "must be a mapping"),
        ({"kind": "vq", "codes": "many"}, "codes must be a whole number; got 'many'"),
        ({"kind": "vq", "codes": 8, "revive": "no"}, "revive must be true or false"),
        ({"kind": "fsq", "levels": 8}, "levels must be a list of whole numbers; got 8"),
        ({"kind": "fsq", "levels": []}, "levels must be a list"),
    ],
)
def test_what_describes_no_quantizer_is_one_sentence(config, message):
    with pytest.raises(RequestError, match=message):
        make_quantizer(config, 4)


@pytest.mark.parametrize("config", [{"kind": "vq", "codes": 8}, {"kind": "fsq", "levels": [4, 4]}])
def test_indices_of_no_code_are_refused(config):
    quantizer = make_quantizer(config, 2)
    good = torch.zeros(1, 2, 3, dtype=torch.long)
    assert quantizer.latents_of(good).shape == (1, 2, 2, 3)
    for bad in (good - 1, good + quantizer.codes):
        with pytest.raises(RequestError, match="counted from 0"):
            quantizer.latents_of(bad)
    for bad in (good.float(), good[0]):
        with pytest.raises(RequestError, match=r"expected whole numbers \(B, h, w\)"):
            quantizer.latents_of(bad)
