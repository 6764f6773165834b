"""Terms and adversaries of images on clips: frame by frame, some frames in training, all of them else."""

import pytest
import torch

from latentae.errors import RequestError
from latentae.objectives import (
    L1,
    MSSSIM,
    Adversary,
    FocalFrequency,
    GaussianDetail,
    HaarDetail,
    PatchGAN,
    PatchGAN3D,
    Step,
)


@pytest.fixture
def step():
    return Step(torch.rand(2, 3, 6, 16, 24) * 2 - 1, torch.rand(2, 3, 6, 16, 24) * 2 - 1)


@pytest.mark.parametrize("term", [L1(), MSSSIM(), HaarDetail(), GaussianDetail(), FocalFrequency()])
def test_a_clip_is_the_mean_of_its_frames(step, term):
    frames = [term(Step(step.target[:, :, t], step.reconstruction[:, :, t])) for t in range(6)]
    torch.testing.assert_close(term(step), torch.stack(frames).mean())


def test_some_frames_in_training_and_all_of_them_else(step):
    term, frames = L1(frames=2), [L1()(Step(step.target[:, :, t], step.reconstruction[:, :, t])) for t in range(6)]
    torch.manual_seed(0)
    chosen = torch.randperm(6)[:2]
    torch.manual_seed(0)
    torch.testing.assert_close(term(step), torch.stack(frames)[chosen].mean())
    torch.testing.assert_close(term.eval()(step), torch.stack(frames).mean())
    with pytest.raises(RequestError, match="frames=0 of a clip"):
        L1(frames=0)


def test_discriminators_of_images_judge_frames_and_those_of_clips_take_images(step):
    made = step.reconstruction
    of_images, of_clips = PatchGAN(channels=8, layers=2), PatchGAN3D(channels=8, layers=2)
    frames = torch.stack([of_images(made[:, :, t]) for t in range(6)])
    torch.testing.assert_close(Adversary(of_images).generator_loss(made), -frames.mean())
    torch.testing.assert_close(Adversary(of_clips).generator_loss(made), -of_clips(made).mean())
    image = made[:, :, 0]
    torch.testing.assert_close(Adversary(of_clips).generator_loss(image), -of_clips(image.unsqueeze(2)).mean())
