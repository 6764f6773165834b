"""Use of a codebook, against scipy and against diffusers' own indices."""

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import VQModel

import latentae
from latentae.metrics.codebook import CodebookUsage, codes_of, indices_of


def test_used_codes_and_perplexity_of_batches():
    torch.manual_seed(0)
    indices = torch.randint(0, 40, (6, 5, 5)) // 3  # 14 of 32 codes
    usage = CodebookUsage(32)
    for batch in indices.split(4):
        usage.update(batch)
    counts = np.bincount(indices.flatten(), minlength=32)
    found = usage.compute()
    assert found["codes"] == 32
    assert found["used"].item() == np.count_nonzero(counts) / 32
    assert found["perplexity"].item() == pytest.approx(np.exp(scipy.stats.entropy(counts)))


def test_indices_are_those_that_the_decoder_takes():
    torch.manual_seed(0)
    stock = VQModel(block_out_channels=(32,), latent_channels=3, num_vq_embeddings=16).eval()
    ours = latentae.create("dc-ae-tiny", latent_channels=4, quantizer={"kind": "fsq", "levels": [3, 4, 5, 3]})
    with torch.no_grad():
        z = stock.encode(torch.rand(2, 3, 8, 8)).latents
        codes = stock.quantize.embedding(indices_of(stock.quantize, z))
        torch.testing.assert_close(codes, stock.quantize(z)[0].movedim(1, -1).flatten(0, -2))
        z = ours.encode(torch.rand(2, 3, 32, 32)).latent_dist.mode()
        assert torch.equal(indices_of(ours.quantize, z), ours.indices_of(z))
    assert (codes_of(stock.quantize), codes_of(ours.quantize)) == (16, 180)
