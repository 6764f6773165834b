"""Every term against an independent reference: PyWavelets, scipy, scikit-image, torch's own distributions."""

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution, IdentityDistribution
from scipy.ndimage import correlate1d, gaussian_filter
from skimage.metrics import structural_similarity

from latentae.errors import RequestError
from latentae.objectives import (
    KL,
    L1,
    L2,
    MSSSIM,
    Charbonnier,
    FocalFrequency,
    GaussianDetail,
    HaarDetail,
    Objective,
    Step,
    Term,
)
from latentae.objectives.perceptual import SCALE_WEIGHTS


def pair(height, width, batch=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(batch, 3, height, width, generator=generator, dtype=dtype) * 2 - 1
    noise = torch.randn(batch, 3, height, width, generator=generator, dtype=dtype)
    return Step(target=target, reconstruction=(target + 0.2 * noise).requires_grad_())


def test_pixel_distances():
    step = pair(9, 14)
    torch.testing.assert_close(L1()(step), F.l1_loss(step.reconstruction, step.target))
    torch.testing.assert_close(L2()(step), F.mse_loss(step.reconstruction, step.target))
    difference = (step.reconstruction - step.target).detach().numpy()
    assert Charbonnier(epsilon=0.05)(step).item() == pytest.approx(np.hypot(difference, 0.05).mean())


@pytest.mark.parametrize("levels", [1, 3])
def test_haar_detail_is_the_charbonnier_of_pywavelets_bands(levels):
    step = pair(16, 24)
    coefficients = [
        pywt.wavedec2(x.detach().numpy(), "haar", mode="periodization", level=levels)
        for x in (step.reconstruction, step.target)
    ]
    per_level = []
    for level in range(1, levels + 1):
        bands = [np.stack(c[-level]) / 2**level for c in coefficients]
        per_level.append(np.hypot(bands[0] - bands[1], 1e-3).mean())
    assert HaarDetail(levels=levels)(step).item() == pytest.approx(np.mean(per_level), rel=1e-12)


def test_gaussian_detail_is_what_scipy_s_blur_removes():
    step = pair(20, 17)
    high = [
        x - gaussian_filter(x, 2.0, radius=4, mode="mirror", axes=(2, 3))
        for x in (step.reconstruction.detach().numpy(), step.target.numpy())
    ]
    assert GaussianDetail(kernel_size=9, sigma=2.0)(step).item() == pytest.approx(np.abs(high[0] - high[1]).mean())


def ssim_and_contrast(a, b):
    """SSIM's mean and its contrast-structure part for one channel, in numpy, valid region."""
    taps = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    taps /= taps.sum()

    def blur(x):
        return correlate1d(correlate1d(x, taps, axis=0), taps, axis=1)[5:-5, 5:-5]

    c1, c2 = 0.02**2, 0.06**2
    va, vb, vab = blur(a * a) - blur(a) ** 2, blur(b * b) - blur(b) ** 2, blur(a * b) - blur(a) * blur(b)
    contrast = (2 * vab + c2) / (va + vb + c2)
    luminance = (2 * blur(a) * blur(b) + c1) / (blur(a) ** 2 + blur(b) ** 2 + c1)
    return (luminance * contrast).mean(), contrast.mean()


def test_ms_ssim_with_one_scale_is_scikit_image_s_ssim():
    step = pair(21, 16)
    reference = [
        structural_similarity(
            a.detach().numpy(),
            b.numpy(),
            data_range=2,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(step.reconstruction, step.target, strict=True)
    ]
    assert MSSSIM()(step).item() == pytest.approx(1 - np.mean(reference), rel=1e-9)


@pytest.mark.parametrize(("height", "width", "scales"), [(44, 50, 3), (176, 180, 5), (400, 352, 5)])
def test_ms_ssim_takes_as_many_scales_as_fit(height, width, scales):
    step = pair(height, width, batch=1)
    weights = np.array(SCALE_WEIGHTS[:scales]) / sum(SCALE_WEIGHTS[:scales])
    values = []
    for a, b in zip(step.reconstruction[0].detach().numpy(), step.target[0].numpy(), strict=True):
        value = 1.0
        for scale in range(scales):
            ssim, contrast = ssim_and_contrast(a, b)
            value *= (ssim if scale == scales - 1 else contrast) ** weights[scale]
            a, b = (
                x[: x.shape[0] // 2 * 2, : x.shape[1] // 2 * 2]
                .reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2)
                .mean((1, 3))
                for x in (a, b)
            )
        values.append(value)
    assert MSSSIM()(step).item() == pytest.approx(1 - np.mean(values), rel=1e-9)


def test_ms_ssim_has_finite_gradients_where_similarity_is_negative():
    target = torch.rand(1, 3, 44, 44) * 2 - 1
    reconstruction = (-target).requires_grad_()
    MSSSIM()(Step(target, reconstruction)).backward()
    assert torch.isfinite(reconstruction.grad).all()


def test_kl_is_torch_distributions_divergence_per_element():
    posterior = DiagonalGaussianDistribution(torch.randn(2, 8, 5, 3, dtype=torch.float64))
    step = pair(8, 8)
    step = Step(step.target, step.reconstruction, posterior)
    normal = torch.distributions.Normal
    reference = torch.distributions.kl_divergence(normal(posterior.mean, posterior.std), normal(0.0, 1.0)).mean()
    torch.testing.assert_close(KL()(step), reference)


def test_kl_refuses_a_deterministic_posterior():
    step = pair(8, 8)
    with pytest.raises(RequestError, match="IdentityDistribution"):
        KL()(Step(step.target, step.reconstruction, IdentityDistribution(torch.zeros(1))))


TERMS = [L1, L2, Charbonnier, HaarDetail, GaussianDetail, MSSSIM, FocalFrequency]


@pytest.mark.parametrize("term", TERMS)
def test_terms_are_float32_under_autocast_and_for_half_inputs(term):
    step = pair(32, 32, dtype=torch.float32)
    half = Step(step.target.bfloat16(), step.reconstruction.bfloat16())
    widened = Step(half.target.float(), half.reconstruction.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(term()(half), term()(widened))
    assert term()(half).dtype == torch.float32


@pytest.mark.parametrize("term", [term for term in TERMS if term is not FocalFrequency])  # its weight has no gradient
def test_gradients_agree_with_finite_differences(term):
    step = pair(11, 12, batch=1)
    assert torch.autograd.gradcheck(lambda x: term()(Step(step.target, x)), (step.reconstruction,), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("term", TERMS)
def test_a_batch_is_the_mean_of_its_images(term):
    step = pair(24, 24, batch=3)
    singles = [term()(Step(a[None], b[None])) for a, b in zip(step.target, step.reconstruction, strict=True)]
    torch.testing.assert_close(term()(step), torch.stack(singles).mean())


def test_shapes_that_differ_are_named():
    with pytest.raises(RequestError, match=r"L1 .*\(1, 3, 8, 8\).*\(1, 3, 8, 9\)"):
        L1()(Step(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9)))


def test_images_below_the_ssim_window_are_refused():
    with pytest.raises(RequestError, match="10x40"):
        MSSSIM()(pair(10, 40))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_focal_frequency_is_the_paper_s_formula_in_numpy(alpha):
    step = pair(9, 14)
    spectra = [np.fft.fft2(x.detach().numpy(), norm="ortho") for x in (step.reconstruction, step.target)]
    distance = np.abs(spectra[0] - spectra[1])
    weight = distance**alpha / (distance**alpha).max(axis=(2, 3), keepdims=True)
    value = FocalFrequency(alpha=alpha)(step)
    assert value.item() == pytest.approx((weight * distance**2).mean(), rel=1e-12)

    # The weight is constant in the gradient, which is that of a quadratic form: 2 F* (w F d) over the elements.
    (gradient,) = torch.autograd.grad(value, step.reconstruction)
    expected = 2 * np.fft.ifft2(weight * (spectra[0] - spectra[1]), norm="ortho").real / distance.size
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-9, atol=1e-15)


def test_focal_frequency_without_focus_is_l2_and_of_equal_images_is_zero():
    step = pair(9, 14)
    torch.testing.assert_close(FocalFrequency(alpha=0.0)(step), L2()(step))
    same = step.target.clone().requires_grad_()
    value = FocalFrequency()(Step(step.target, same))
    value.backward()
    assert value == 0
    assert torch.equal(same.grad, torch.zeros_like(same))


@pytest.mark.parametrize(("size", "latent_channels", "ratio"), [((32, 32), 4, 8), ((32, 64), 16, 16)])
def test_ldm_s_reduction_gives_ldm_s_gradients_up_to_one_factor(size, latent_channels, ratio):
    """LDM's own formula, LPIPSWithDiscriminator's sums, with logvar and with the adaptive weight's inputs."""
    torch.manual_seed(0)
    target = torch.rand(2, 3, *size, dtype=torch.float64) * 2 - 1
    latent_shape = (2, 2 * latent_channels, size[0] // ratio, size[1] // ratio)
    parameters = torch.randn(latent_shape, dtype=torch.float64, requires_grad=True)
    maps = torch.randn(2, 1, 1, 1, dtype=torch.float64)
    logvar, perceptual_weight, kl_weight = 0.3, 0.8, 1e-3
    decoder = torch.randn(latent_channels, 3, dtype=torch.float64)

    def forward():
        posterior = DiagonalGaussianDistribution(parameters)
        small = torch.einsum("bchw,cd->bdhw", posterior.mode(), decoder).tanh()
        return posterior, F.interpolate(small, size)

    def perceptual(a, b):
        return ((a - b) ** 2).mean(dim=(1, 2, 3), keepdim=True) * maps**2  # (B, 1, 1, 1), as LPIPS gives it

    class Perceptual(Term):
        def measure(self, step):
            return perceptual(step.target, step.reconstruction).mean()

    posterior, reconstruction = forward()
    rec = (target - reconstruction).abs() + perceptual_weight * perceptual(target, reconstruction)
    nll = rec / np.exp(logvar) + logvar
    theirs = nll.sum() / nll.shape[0] + kl_weight * posterior.kl().sum() / 2
    (expected,) = torch.autograd.grad(theirs, parameters)

    posterior, reconstruction = forward()
    objective = Objective(
        {
            "l1": L1(np.exp(-logvar)),
            "lpips": Perceptual(perceptual_weight * np.exp(-logvar)),
            "kl": KL(kl_weight, reduction="ldm"),
        }
    )
    ours, values = objective(Step(target, reconstruction, posterior))
    (gradient,) = torch.autograd.grad(ours, parameters)
    torch.testing.assert_close(gradient * (3 * size[0] * size[1]), expected)
    torch.testing.assert_close(values["kl"], (posterior.kl().sum() / parameters[:, ::2].numel()).detach())


def test_the_objective_is_the_weighted_sum_and_logs_unweighted_values():
    step = pair(16, 16)
    objective = Objective({"l1": L1(0.25), "l2": L2(3.0)})
    total, values = objective(step)
    torch.testing.assert_close(values["l1"], F.l1_loss(step.reconstruction, step.target).detach())
    torch.testing.assert_close(total.detach(), 0.25 * values["l1"] + 3 * values["l2"])
    assert total.requires_grad
    assert not values["l2"].requires_grad
