"""How easy a latent space is to model: a small diffusion model of fixed size, trained for a fixed number of steps.

The same for every codec: latents whitened over their channels, a transformer with patches of 1, equal tokens and so
about equal arithmetic in each step at every compression ratio, a fixed number of steps and fixed seeds. What is judged
are decoded samples, by their sliced Wasserstein distance to held-out images. The denoiser's own loss is not: its floor
depends on how much the latents hold.
"""

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from latentae.bench.latent_space import LatentSpace, Named, named
from latentae.bench.speed import count_gmac
from latentae.codec import LatentCodec
from latentae.console import Progress
from latentae.denoisers import Denoiser, create_denoiser, sample, velocity_errors
from latentae.errors import DataError, MissingExtra, MissingWeights, RequestError
from latentae.metrics.diffusion_rate import SpectralGaussian, diffusion_nats, gaussian_nats
from latentae.metrics.frechet import FrechetInceptionDistance
from latentae.metrics.sliced_wasserstein import SlicedWasserstein

DENOISER = {"preset": "dit-probe"}  # 4.6 M parameters
LEARNING_RATE = 1e-3
WARM_UP = 0.1  # of the steps
LARGEST_GRADIENT = 1.0
EMA = 0.999
BATCH = 64  # of what is not trained on
RATED = 128  # held-out images for the rate and for the loss by time
BITS = 1 / 0.6931471805599453  # of a nat


@dataclass(frozen=True)
class ProbeSettings:
    """What is fixed in a probe; figures of different settings do not compare.

    Args:
        steps: of training.
        tokens_per_step: a batch is as many images as have these many latent positions.
        samples: images to generate.
        sampling_steps: Euler's steps for each.
        seeds: how often to train, each time with other weights, batches and noise.

    Raises:
        RequestError: one of them is less than 1.
    """

    steps: int = 500
    tokens_per_step: int = 1024
    samples: int = 256
    sampling_steps: int = 32
    seeds: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise RequestError(f"{name}={value}: a probe needs at least 1.")

    def describe(self) -> dict[str, Any]:
        """All that the figures depend on, as JSON."""
        return {
            **asdict(self),
            "denoiser": DENOISER["preset"],
            "patch_size": 1,
            "times": "uniform",
            "optimizer": "AdamW, betas 0.9 and 0.999, no weight decay, gradients clipped to norm 1",
            "learning_rate": f"{LEARNING_RATE}, up linearly over {WARM_UP:.0%} of the steps, then down linearly to 0",
            "ema": f"min({EMA}, (1 + step) / (10 + step))",
            "latents": "whitened over channels (PCA)",
            "conditioning": "none",
        }


class Probed(NamedTuple):
    """Figures of one seed, as JSON, and what was generated, uint8 (N, 3, H, W)."""

    figures: dict[str, Any]
    samples: Tensor


def probe(
    codec: LatentCodec,
    train: Tensor | Iterable[Named],
    held_out: Tensor | Iterable[Named],
    settings: ProbeSettings | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Train a small diffusion model on the latents of a codec, and judge what it generates.

    Args:
        codec: an image autoencoder; the denoiser runs on its device.
        train, held_out: uint8 images (N, 3, H, W), square, at least 32 px, or batches of names and such images.
        seed: of weights, batches and noise.

    Returns:
        See `Prober.run`.

    Raises:
        RequestError: an autoencoder or images that cannot be probed.
        DataError: latents with NaN or infinity.
    """
    spaces = (
        named(images, what) if isinstance(images, Tensor) else images
        for images, what in ((train, "training image"), (held_out, "held-out image"))
    )
    return Prober(LatentSpace(codec, *spaces), settings or ProbeSettings()).run(seed).figures


class Prober:
    """Probes one latent space with several seeds; what does not depend on the seed is measured once."""

    def __init__(self, space: LatentSpace, settings: ProbeSettings, name: str = "probe"):
        self.space, self.settings, self.name = space, settings, name
        self.device = space.codec.device
        self.distance = SlicedWasserstein(space.held_out_images)
        self.frechet, self.without_frechet = _frechet(space)
        self.references = {
            "reconstructions": self._compare(space.reconstructions),
            "train": self._compare(space.seen[: settings.samples]),
        }
        self.rated = space.held_out[:RATED]
        self.tolerated = space.tolerated_noise()
        if self.tolerated["noise"] is not None:
            self.tolerated |= self._gaussian_bits(self.tolerated["noise"] ** -2)

    def run(self, seed: int = 0) -> Probed:
        """Train and measure with one seed.

        Returns:
            ``sliced_wasserstein`` of ``samples``, ``reconstructions`` and as many ``train`` images to the held-out
            ones, and of ``samples_to_reconstructions``, by scale and ``mean``; ``frechet`` of the first three where
            Inception's weights are on this machine, and else why not; ``rate`` in bits per pixel with its standard
            error over images; ``loss_by_time``, the squared error of the velocity on held-out latents by tenths of
            time; ``training`` and ``cost``.
        """
        settings, space = self.settings, self.space
        denoiser, training = self._train(seed)
        with torch.no_grad():
            with FlopCounterMode(display=False) as counter:
                denoiser(torch.zeros(1, *space.shape, device=self.device), torch.ones(1, device=self.device))
            gflop = counter.get_total_flops() / 1e9
            started = time.perf_counter()
            white = self._sample(denoiser, seed)
            sampled = time.perf_counter()
            samples = space.decode(white, [f"sample {i}" for i in range(len(white))], seed)
            decoded = time.perf_counter()
            loss_by_time = self._loss_by_time(denoiser)
            rate = self._rate(denoiser)
        compared = {"samples": self._compare(samples), **self.references}
        distances = {name: row["sliced_wasserstein"] for name, row in compared.items()}
        distances["samples_to_reconstructions"] = self.distance(samples, space.reconstructions)
        decode = count_gmac(space.codec, space.size[0]).get("decode")
        channels, height, width = space.shape
        figures = {
            "seed": seed,
            "latent_shape": [channels, height, width],
            "images": {"train": len(space.train), "held_out": len(space.held_out), "samples": len(samples)},
            "dead_channels": space.whitening.dead,
            "sliced_wasserstein": distances,
            "frechet": {"skipped": self.without_frechet}
            if self.without_frechet
            else {name: row["frechet"] for name, row in compared.items()},
            "rate": rate,
            "loss_by_time": loss_by_time,
            "loss": sum(loss_by_time) / len(loss_by_time),
            "training": training,
            "cost": {
                "denoise_gflop": gflop * settings.sampling_steps,
                "decode_gflop": None if decode is None else 2 * decode,
                "denoise_seconds": (sampled - started) / len(samples),
                "decode_seconds": (decoded - sampled) / len(samples),
            },
        }
        return Probed(figures, samples)

    def _train(self, seed: int) -> tuple[Denoiser, dict[str, Any]]:
        """The averaged denoiser, in eval mode, and what training took."""
        settings, latents = self.settings, self.space.train.to(self.device)
        channels, height, width = self.space.shape
        denoiser = create_denoiser(DENOISER, self.space.shape, seed=seed).to(self.device).train()
        average = copy.deepcopy(denoiser).eval().requires_grad_(False)
        optimizer = torch.optim.AdamW(denoiser.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        generator = torch.Generator().manual_seed(seed)
        images = max(1, settings.tokens_per_step // (height * width))
        losses, flops, shown = [], 0, 0.0
        started = time.perf_counter()
        with Progress(f"{self.name}, seed {seed}: train", settings.steps, unit="steps") as progress:
            for step in range(settings.steps):
                chosen = torch.randint(len(latents), (images,), generator=generator)
                t = torch.rand(images, generator=generator).to(self.device)
                noise = torch.randn(images, channels, height, width, generator=generator).to(self.device)
                clean = latents[chosen.to(self.device)]

                def learn(clean: Tensor = clean, t: Tensor = t, noise: Tensor = noise) -> Tensor:
                    loss = velocity_errors(denoiser, clean, t, noise).mean()
                    loss.backward()
                    return loss.detach()

                loss, counted = _counting_flops(learn) if step == 0 else (learn(), 0)
                flops = flops or counted
                torch.nn.utils.clip_grad_norm_(denoiser.parameters(), LARGEST_GRADIENT)
                for group in optimizer.param_groups:
                    group["lr"] = LEARNING_RATE * _schedule((step + 0.5) / settings.steps)
                optimizer.step()
                optimizer.zero_grad()
                _follow(average, denoiser, min(EMA, (1 + step) / (10 + step)))
                losses.append(loss)
                shown = float(loss) if step % 10 == 0 else shown  # waiting for the device each time would cost
                progress.advance(loss=shown)
        last = torch.stack(losses[-max(1, settings.steps // 10) :]).mean()
        if not last.isfinite():
            raise DataError(f"The loss of the probe's denoiser became {float(last)} with seed {seed}.")
        return average, {
            "parameters": sum(p.numel() for p in denoiser.parameters()),
            "images_per_step": images,
            "tokens_per_image": height * width,
            "gflop_per_step": flops / 1e9,
            "seconds": time.perf_counter() - started,
            "last_loss": float(last),
        }

    def _sample(self, denoiser: Denoiser, seed: int) -> Tensor:
        """Whitened latents on the CPU, (samples, C, h, w)."""
        generator = torch.Generator().manual_seed(seed + 2**32)
        noise = torch.randn(self.settings.samples, *self.space.shape, generator=generator)
        found = []
        with Progress(f"{self.name}, seed {seed}: sample", len(noise)) as progress:
            for part in noise.split(BATCH):
                found.append(sample(denoiser, part.to(self.device), steps=self.settings.sampling_steps).cpu())
                progress.advance(len(part))
        return torch.cat(found)

    def _loss_by_time(self, denoiser: Denoiser) -> list[float]:
        """On held-out latents, with times evenly within each tenth and noise that is the same for all seeds."""
        latents = self.rated
        generator = torch.Generator().manual_seed(0)
        inside = (torch.arange(len(latents)) + 0.5) / len(latents)
        losses = []
        for tenth in range(10):
            noise = torch.randn(latents.shape, generator=generator)
            parts = [x.split(BATCH) for x in (latents, (tenth + inside) / 10, noise)]
            errors = [velocity_errors(denoiser, *(x.to(self.device) for x in part)).cpu() for part in zip(*parts)]
            losses.append(float(torch.cat(errors).double().mean()))
        return losses

    def _rate(self, denoiser: Denoiser) -> dict[str, Any]:
        """Bits per pixel under the denoiser, beside what is known without it."""
        found = self.tolerated
        if found["noise"] is None:
            return {**found, "bits_per_pixel": None}
        nats = diffusion_nats(denoiser, self.rated.to(self.device), found["noise"] ** -2, batch_size=BATCH)
        bits = nats * BITS / self.space.pixels
        return {
            **found,
            "bits_per_pixel": float(bits.mean()),
            "standard_error": float(bits.std() / len(bits) ** 0.5),
            "rated_images": len(bits),
        }

    def _gaussian_bits(self, snr: float) -> dict[str, float]:
        """What denoisers need that know the covariance of the channels only, or that at each spatial frequency."""
        white = gaussian_nats(self.rated.flatten(1), torch.ones(self.rated[0].numel()), snr)
        spectral = SpectralGaussian(self.space.train).nats(self.rated, snr)
        scale = BITS / self.space.pixels
        return {
            "gaussian_bits_per_pixel": scale * float(white.mean()),
            "spectral_gaussian_bits_per_pixel": scale * float(spectral.mean()),
        }

    def _compare(self, images: Tensor) -> dict[str, Any]:
        """With the held-out images."""
        row: dict[str, Any] = {"sliced_wasserstein": self.distance(images)}
        if self.frechet is not None:
            self.frechet.reset()
            for part in images.split(BATCH):
                self.frechet.update(part.to(self.frechet.device), original=False)
            row["frechet"] = float(self.frechet.compute())
        return row


def probe_space(space: LatentSpace, settings: ProbeSettings, name: str = "probe") -> tuple[dict[str, Any], Tensor]:
    """All seeds of one latent space, and what the first generated.

    Returns:
        ``settings``, ``runs`` (of each seed) and ``summary``: see `summarise_runs`.
    """
    prober = Prober(space, settings, name)
    probed = [prober.run(seed) for seed in range(settings.seeds)]
    runs = [one.figures for one in probed]
    return {"settings": settings.describe(), "runs": runs, "summary": summarise_runs(runs)}, probed[0].samples


def summarise_runs(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """``mean`` over seeds and ``spread``, their standard deviation (None of one), of every figure that varies."""
    paths: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "sliced_wasserstein": lambda run: run["sliced_wasserstein"]["samples"]["mean"],
        "to_reconstructions": lambda run: run["sliced_wasserstein"]["samples_to_reconstructions"]["mean"],
        "gfid": lambda run: run["frechet"].get("samples"),
        "bits_per_pixel": lambda run: run["rate"]["bits_per_pixel"],
        "loss": lambda run: run["loss"],
        "denoise_seconds": lambda run: run["cost"]["denoise_seconds"],
        "decode_seconds": lambda run: run["cost"]["decode_seconds"],
    }
    summary = {}
    for name, of in paths.items():
        values = [value for run in runs if (value := of(run)) is not None]
        found = torch.tensor(values, dtype=torch.float64)
        summary[name] = {
            "mean": float(found.mean()) if len(values) else None,
            "spread": float(found.std()) if len(values) > 1 else None,
        }
    return summary


def _frechet(space: LatentSpace) -> tuple[FrechetInceptionDistance | None, str]:
    """The distance to the held-out images, or why there is none."""
    try:
        frechet = FrechetInceptionDistance(keep_originals=True)
    except (MissingWeights, MissingExtra) as error:
        return None, str(error)
    device = torch.device("cpu") if space.codec.device.type == "mps" else space.codec.device  # MPS has no float64
    frechet.to(device)
    for part in space.held_out_images.split(BATCH):
        frechet.update(part.to(device), original=True)
    return frechet, ""


def _schedule(done: float) -> float:
    """The share of the learning rate when this share of the steps is done."""
    return min(done / WARM_UP, (1 - done) / (1 - WARM_UP))


def _counting_flops(work: Callable[[], Tensor]) -> tuple[Tensor, int]:
    with FlopCounterMode(display=False) as counter:
        result = work()
    return result, counter.get_total_flops()


@torch.no_grad()
def _follow(average: Denoiser, denoiser: Denoiser, decay: float) -> None:
    for mine, theirs in zip(average.parameters(), denoiser.parameters()):
        mine.lerp_(theirs, 1 - decay)
