"""What a term learns beside the autoencoder trains, is saved and resumes with it."""

import pytest
import torch
from torch import nn

import latentae
from latentae.objectives import L1, Alignment


class Patches(nn.Module):
    """A fixed 'vision network': the mean colour of 8×8 blocks in six directions."""

    def forward(self, pixels):
        blocks = nn.functional.avg_pool2d(pixels, 8)
        return torch.cat([blocks, blocks.flip(1) - blocks], dim=1)


def test_the_projection_trains_and_resumes_with_the_autoencoder(runs, folder, tmp_path):
    def go(run_dir, **options):
        torch.manual_seed(0)
        term = Alignment(Patches(), latent_channels=8, size=32, cosine_margin=0.0, distance_margin=0.0)
        module = runs.module(runs.adversary(), objective={"l1": L1(), "align": term})
        start = term.projection.weight.detach().clone()
        return runs.fit(module, runs.data(folder), run_dir, 4, **options), start

    straight, start = go(tmp_path / "straight")
    with pytest.raises(runs.Crash):
        go(tmp_path / "resumed", crash_at=2)
    resumed, _ = go(tmp_path / "resumed")
    assert {step: straight[step] for step in resumed} == resumed

    first, second = (torch.load(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("straight", "resumed"))
    key = "objective.align.projection.weight"
    assert not torch.equal(first["state_dict"][key], start)
    assert torch.equal(first["state_dict"][key], second["state_dict"][key])
    assert not any(name.startswith("objective.") and name != key for name in first["state_dict"])
    assert latentae.load(tmp_path / "straight").latent_channels == 8  # the projection is no part of the model
