"""Generated clips: pure functions of their numbers, of which the held-out ones are others."""

import pytest
import torch

from latentae.data.sample_clips import HELD_OUT, SampleClips, _look
from latentae.errors import RequestError


def test_a_clip_is_a_function_of_seed_and_number():
    clips = SampleClips("train", frames=5, size=24, seed=3)
    backwards = [clips[position] for position in reversed(range(6))][::-1]
    again = SampleClips("train", frames=5, size=24, seed=3)
    for position, sample in enumerate(backwards):
        assert torch.equal(again[position]["pixels"], sample["pixels"])
        assert sample["pixels"].shape == (3, 5, 24, 24)
        assert sample["pixels"].dtype == torch.uint8
        assert sample["key"] == f"{'leaves' if position % 2 else 'photos'}/{position}"
        assert (sample["pixels"][:, 1:] != sample["pixels"][:, :-1]).any(), "it moves"
    other = SampleClips("train", frames=5, size=24, seed=4)
    assert not any(torch.equal(other[i]["pixels"], backwards[i]["pixels"]) for i in range(6))
    assert not torch.equal(clips[1000]["pixels"], clips[1002]["pixels"])


def test_held_out_clips_are_the_same_for_every_seed_and_no_others():
    one, two = (SampleClips("held_out", frames=3, size=16, seed=seed) for seed in (0, 9))
    trained = SampleClips("train", frames=3, size=16)
    assert len(one) == HELD_OUT
    for position in range(4):
        assert torch.equal(one[position]["pixels"], two[position]["pixels"])
        assert not torch.equal(one[position]["pixels"], trained[position]["pixels"])


def test_a_camera_in_the_middle_sees_the_middle():
    texture = torch.randn(3, 20, 20)
    line = torch.arange(8) - 3.5
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)[None]
    torch.testing.assert_close(_look(texture, grid)[0], texture[:, 6:14, 6:14], atol=1e-5, rtol=0)
    shifted = _look(texture, grid + torch.tensor([2.0, -1.0]))[0]
    torch.testing.assert_close(shifted, texture[:, 5:13, 8:16], atol=1e-5, rtol=0)


def test_no_frames_are_refused():
    with pytest.raises(RequestError, match="Clips of 0 frames"):
        SampleClips("train", frames=0, size=16)
