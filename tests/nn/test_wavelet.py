"""The wavelet transform equals PyWavelets', inverts exactly and has exact gradients."""

import numpy as np
import pytest
import pywt
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from latentae.errors import RequestError
from latentae.nn.wavelet import MODES, dwt2, dwt3, idwt2, idwt3, wavedec2, waverec2

WAVELETS = ("haar", "db2", "db4", "sym4", "bior2.2", "bior4.4")
BANDS_3D = ("aaa", "aad", "ada", "add", "daa", "dad", "dda", "ddd")

wavelets = st.sampled_from(WAVELETS)
modes = st.sampled_from(MODES)
sides = st.integers(1, 24)
seeds = st.integers(0, 2**32 - 1)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def assert_equal(actual, expected, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=0, atol=tolerance)


def assert_restored(actual, x) -> None:
    """The taps of some wavelets stand in PyWavelets with eleven digits, so no inverse is better than that."""
    assert_equal(actual[tuple(map(slice, x.shape))], x, 1e-10)


@given(wavelets, modes, sides, sides, seeds)
@settings(max_examples=300, deadline=None)
def test_one_level_and_its_inverse_are_pywavelets(wavelet, mode, height, width, seed):
    assume(mode != "reflect" or min(height, width) > 1)  # refused by both
    x = noise(2, 3, height, width, seed=seed)
    bands = dwt2(x, wavelet, mode)
    low, details = pywt.dwt2(x.numpy(), wavelet, mode)
    for band, expected in zip(bands, (low, *details), strict=True):
        assert_equal(band, expected)

    other = [noise(*low.shape, seed=seed + i) for i in range(4)]  # no image has these bands
    expected = pywt.idwt2((other[0].numpy(), tuple(b.numpy() for b in other[1:])), wavelet, mode)
    assert_equal(idwt2(*other, wavelet, mode), expected)
    assert_restored(idwt2(*bands, wavelet, mode), x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("size", [(32, 32), (31, 33), (24, 17)])
def test_levels_are_pywavelets(wavelet, mode, size):
    x = noise(2, 3, *size)
    coefficients = wavedec2(x, wavelet, mode, levels=3)
    with np.testing.suppress_warnings() as quiet:
        quiet.filter(UserWarning)  # that the filter is longer than the band
        expected = pywt.wavedec2(x.numpy(), wavelet, mode, level=3)
    assert_equal(coefficients[0], expected[0])
    for bands, theirs in zip(coefficients[1:], expected[1:], strict=True):
        for band, their in zip(bands, theirs, strict=True):
            assert_equal(band, their)
    restored = waverec2(coefficients, wavelet, mode)
    assert_equal(restored, pywt.waverec2(expected, wavelet, mode))
    assert_restored(restored, x)


@pytest.mark.parametrize("wavelet", [*pywt.wavelist(kind="discrete")])
@pytest.mark.parametrize("mode", MODES)
def test_every_discrete_wavelet(wavelet, mode):
    x = noise(1, 1, 9, 12)
    low, details = pywt.dwt2(x.numpy(), wavelet, mode)
    bands = dwt2(x, wavelet, mode)
    for band, expected in zip(bands, (low, *details), strict=True):
        assert_equal(band, expected)
    assert_equal(idwt2(*bands, wavelet, mode), pywt.idwt2((low, details), wavelet, mode))


@given(modes, st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), seeds)
@settings(max_examples=50, deadline=None)
def test_video_is_dwtn(mode, frames, height, width, seed):
    assume(mode != "reflect" or min(frames, height, width) > 1)
    x = noise(2, 3, frames, height, width, seed=seed)
    bands = dwt3(x, mode)
    expected = pywt.dwtn(x.numpy(), "haar", mode, axes=(-3, -2, -1))
    for band, name in zip(bands, BANDS_3D, strict=True):
        assert_equal(band, expected[name])
    restored = idwt3(bands)
    assert_equal(restored, pywt.idwtn(expected, "haar", mode, axes=(-3, -2, -1)))
    assert_restored(restored, x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wavelet", ["haar", "db2", "bior2.2"])
def test_gradients_are_exact_to_second_order(wavelet, mode):
    x = noise(1, 2, 5, 6).requires_grad_()
    bands = [noise(1, 2, 3, 4, seed=i).requires_grad_() for i in range(4)]

    def energy_of_gradient(x: torch.Tensor) -> torch.Tensor:
        loss = sum(band.pow(3).sum() for band in dwt2(x, wavelet, mode))
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        return gradient.square().sum()

    assert torch.autograd.gradcheck(lambda x: dwt2(x, wavelet, mode), x)
    assert torch.autograd.gradcheck(lambda *bands: idwt2(*bands, wavelet, mode), bands)
    assert torch.autograd.gradcheck(energy_of_gradient, x)


def test_gradient_of_videos():
    x = noise(1, 1, 3, 4, 2).requires_grad_()
    assert torch.autograd.gradcheck(dwt3, x)
    assert torch.autograd.gradcheck(lambda *bands: idwt3(bands), [band.detach().requires_grad_() for band in dwt3(x)])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_haar_is_orthonormal_and_without_memory_of_layout(memory_format):
    x = noise(2, 3, 8, 6)
    bands = torch.stack(dwt2(x.contiguous(memory_format=memory_format)))
    a, b, c, d = x[..., 0::2, 0::2], x[..., 0::2, 1::2], x[..., 1::2, 0::2], x[..., 1::2, 1::2]
    assert_equal(bands, torch.stack([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d]) / 2)
    assert_equal(bands.square().sum(), x.square().sum())


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_one_compiled_graph_also_backwards(wavelet):
    def round_trip(x: torch.Tensor) -> torch.Tensor:
        return waverec2(wavedec2(x, wavelet, "symmetric", levels=2), wavelet, "symmetric")

    x = noise(1, 3, 16, 12).requires_grad_()
    restored = torch.compile(round_trip, fullgraph=True, backend="aot_eager")(x)
    assert_restored(restored, x)
    (gradient,) = torch.autograd.grad(restored.square().sum(), x)
    assert_equal(gradient, 2 * x, 1e-10)


@pytest.mark.parametrize("wavelet", ["haar", "db4"])
def test_half_precision_rounds_like_its_own_numbers(wavelet):
    x = noise(2, 3, 16, 16).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        bands = dwt2(x, wavelet)
        restored = idwt2(*bands, wavelet)
        full = dwt2(x.float(), wavelet)
    assert {band.dtype for band in bands} == {torch.bfloat16} == {restored.dtype}
    assert {band.dtype for band in full} == {torch.float32}  # autocast takes nothing from fp32
    for band, expected in zip(full, dwt2(x.double(), wavelet)):
        torch.testing.assert_close(band.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(restored, x, rtol=0, atol=0.06)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (lambda x: dwt2(x, "db99"), r"There is no wavelet 'db99'; did you mean db\d+\?"),
        (lambda x: dwt2(x, "bior4,4"), "did you mean bior4.4?"),
        (lambda x: dwt2(x, "Haar"), "did you mean haar?"),
        (lambda x: dwt2(x, "mexh"), "The wavelet 'mexh' is continuous"),
        (lambda x: dwt2(x, "cmor1.5-1.0"), "is continuous: choose a discrete one, such as haar or db2."),
        (lambda x: dwt2(x, "db2", "smooth"), "mode 'smooth': PyWavelets has it, this transform does not; choose zero"),
        (lambda x: dwt2(x, "db2", "mirror"), "mode 'mirror': no such mode; choose zero"),
        (lambda x: dwt2(x[..., :1, :], "db2", "reflect"), "mode 'reflect' needs sides of at least 2, not 1"),
        (lambda x: dwt2(x[..., :0]), r"needs floats \(B, C, H, W\), not \(1, 3, 12, 0\)"),
        (lambda x: dwt2(x[0]), r"not \(3, 12, 8\)"),
        (lambda x: dwt2(x.to(torch.uint8)), "torch.uint8"),
        (lambda x: wavedec2(x, levels=4), "A wavelet transform of 4 levels needs sides of at least 16, not 12 x 8"),
        (lambda x: wavedec2(x, levels=0), "levels must be a whole number of at least 1, not 0"),
        (lambda x: wavedec2(x, levels=1.5), "levels must be a whole number of at least 1, not 1.5"),
        (lambda x: dwt2(x.numpy()), r"needs a torch tensor of floats \(B, C, H, W\), not ndarray"),
        (lambda x: dwt2(None, "db2"), "not NoneType"),
        (lambda x: dwt2(x.to(torch.complex64)), "torch.complex64"),
        (lambda x: dwt2(x, pywt.Wavelet("db2")), "given by its name, such as 'db2', not as Wavelet"),
        (lambda x: dwt2(x, None), "not as NoneType"),
        (lambda x: dwt2(x, "db2", None), "mode None: no such mode"),
        (lambda x: idwt2(x, x, None, x), "not NoneType"),
        (lambda x: idwt2(x, x, x, x[..., 1:]), "The four bands must have one shape"),
        (lambda x: idwt2(*[x[..., :3]] * 4, "db4", "zero"), "Bands of 12 x 3 are too small for db4, mode zero"),
        (lambda x: dwt3(x), r"\(B, C, T, H, W\)"),
        (lambda x: idwt3([x[None]] * 4), "eight bands of one shape"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(request_, sentence):
    with pytest.raises(RequestError, match=sentence) as error:
        request_(torch.zeros(1, 3, 12, 8))
    assert "\n" not in str(error.value)
