import numpy as np
import pytest
import torch

from latentae.nn.pixels import pad_frames, pad_to_multiple, to_float, to_uint8


def test_every_byte_survives_the_round_trip_also_through_bf16():
    image = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(image)), image)
    assert torch.equal(to_uint8(to_float(image).bfloat16()), image)


def test_rounds_half_up_and_clamps():
    pixels = torch.tensor([-2.0, -1.0, 1.0, 2.0, (100.5 - 127.5) / 127.5])
    assert to_uint8(pixels).tolist() == [0, 0, 255, 255, 101]


@pytest.mark.parametrize(("size", "multiple"), [((5, 7), 4), ((8, 8), 8), ((1, 3), 32), ((33, 31), 32)])
def test_padding_reflects_or_repeats_as_numpy_does(size, multiple):
    x = torch.rand(2, 3, *size)
    pads = [-side % multiple for side in size]
    expected = x.numpy()
    for axis, (side, pad) in enumerate(zip(size, pads), start=2):
        width = [(0, 0)] * 4
        width[axis] = (0, pad)
        expected = np.pad(expected, width, mode="reflect" if pad < side else "edge")
    assert np.array_equal(pad_to_multiple(x, multiple).numpy(), expected)


def test_video_frames_are_padded_alike():
    video = torch.rand(1, 3, 4, 5, 6)
    padded = pad_to_multiple(video, 8)
    assert padded.shape == (1, 3, 4, 8, 8)
    assert torch.equal(padded[:, :, 2], pad_to_multiple(video[:, :, 2], 8))


def test_the_last_frame_is_repeated():
    clip = torch.randint(0, 256, (2, 3, 5, 4, 6), dtype=torch.uint8)
    padded = pad_frames(clip, 9)
    assert padded.dtype == torch.uint8
    assert np.array_equal(padded, np.pad(clip.numpy(), ((0, 0), (0, 0), (0, 4), (0, 0), (0, 0)), mode="edge"))
    assert torch.equal(pad_frames(clip, 5), clip)
