"""How far reconstructions are like originals, beyond squared error, and the impostors that make them look so."""

import statistics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentae.nn.wavelet import dwt2

CLASSIFIER_BATCH, CLASSIFIER_RATE = 32, 2e-3


def calibration(samples: Tensor, original: Tensor) -> dict[str, float]:
    """Whether the original could be one more of the samples.

    Args:
        samples: of the same images, (K, B, 3, H, W), K at least 2.
        original: (B, 3, H, W).

    Returns:
        ``variance`` of the samples, the squared ``error_of_mean`` of infinitely many, without bias for any K, their
        ``calibration`` variance / error, and the mean squared ``error`` of one sample.
    """
    variance = samples.var(0).mean().item()
    of_few = (samples.mean(0) - original).square().mean().item()
    of_mean = of_few - variance / len(samples)
    error = (samples - original).square().mean().item()
    return {"variance": variance, "error_of_mean": of_mean, "calibration": variance / of_mean, "error": error}


def haar_distance(made: Tensor, original: Tensor, levels: int = 3) -> float:
    """Wasserstein-1 distance between the distributions of Haar details, over the originals' mean size.

    Each of the three bands of each level has its own distribution; the mean over them is taken. 0 means equal
    histograms, 1 about what flat pictures have.

    Args:
        made, original: (B, 3, H, W) with sides that are multiples of ``2 ** levels``.
    """
    distances = []
    for _ in range(levels):
        made, *details = dwt2(made)
        original, *wanted = dwt2(original)
        for a, b in zip(details, wanted):
            a, b = a.flatten().sort().values, b.flatten().sort().values
            distances.append(((a - b).abs().mean() / b.abs().mean()).item())
    return statistics.fmean(distances)


def roughness(pixels: Tensor) -> float:
    """The mean squared difference of neighbours in a row and in a column."""
    return (pixels.diff(dim=-1).square().mean() + pixels.diff(dim=-2).square().mean()).item() / 2


def matching_noise(smooth: Tensor, original: Tensor) -> float:
    """The standard deviation of the white noise that makes ``smooth`` as rough as ``original``."""
    return (max(roughness(original) - roughness(smooth), 0.0) / 2) ** 0.5


def unsharp(pixels: Tensor, amount: float) -> Tensor:
    """Pixels plus ``amount`` times what a 3 x 3 binomial blur takes from them."""
    return pixels + amount * (pixels - _blur(pixels))


def matching_amount(smooth: Tensor, original: Tensor) -> float:
    """The ``amount`` of `unsharp` that makes ``smooth`` as rough as ``original``: the root of a parabola."""
    at = [roughness(unsharp(smooth, amount)) for amount in (0.0, 1.0, 2.0)]
    square = (at[2] - 2 * at[1] + at[0]) / 2
    linear = at[1] - at[0] - square
    missing = max(roughness(original) - at[0], 0.0)
    return (-linear + (linear**2 + 4 * square * missing) ** 0.5) / (2 * square)


def _blur(pixels: Tensor) -> Tensor:
    taps = pixels.new_tensor([0.25, 0.5, 0.25])
    kernel = (taps[:, None] * taps).expand(pixels.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(pixels, (1, 1, 1, 1), mode="reflect"), kernel, groups=pixels.shape[1])


class Classifier(nn.Sequential):
    """Pixels (B, 3, H, W) to logits (B,), larger for originals."""

    def __init__(self, width: int = 24):
        super().__init__(
            nn.Conv2d(3, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, 1),
            nn.Flatten(0),
        )


def held_out_auc(seen: tuple[Tensor, Tensor], unseen: tuple[Tensor, Tensor], seed: int, steps: int) -> float:
    """How well a small network tells originals from reconstructions that it has not seen: 1 always, 0.5 not at all.

    Args:
        seen: originals and reconstructions that it learns from, each (N, 3, H, W).
        unseen: those that it is tried on.
        seed: of its weights and batches.
        steps: of its training, 32 of each kind in every step.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier().train()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=CLASSIFIER_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            batch = [pixels[torch.randint(len(pixels), (CLASSIFIER_BATCH,))] for pixels in seen]
            if torch.rand(()) < 0.5:
                batch = [pixels.flip(-1) for pixels in batch]
            with torch.enable_grad():
                real, made = (classifier(pixels) for pixels in batch)
                loss = F.softplus(-real).mean() + F.softplus(made).mean()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    with torch.no_grad():
        return auc(*(torch.cat([classifier(part) for part in pixels.split(64)]) for pixels in unseen))


def auc(real: Tensor, made: Tensor) -> float:
    """The share of pairs in which the real one has the larger score, ties counting half."""
    difference = real[:, None] - made[None]
    return ((difference > 0).double() + 0.5 * (difference == 0).double()).mean().item()
