"""DC-AE (arXiv 2410.10733): parameter-free shortcuts through down- and upsampling make high ratios trainable.

The cheap version. An f8 DC-AE with 2 channels is trained and frozen. Three more stages, down to f64 and back, are
trained between its encoder's last features and its decoder's first ones, on the error of the pixels. Their 128 latent
channels are as many floats per pixel as the f8 model has: 1/96 of the pixels' numbers at either ratio. The arms have
the same convolutions and the same initial weights; only what bypasses the resampling differs:

- none: nothing does, around the latents neither;
- average pooling, nearest upsampling: 2 x 2 means, and channels copied or averaged where their number changes;
- space to channel, channel duplication: DC-AE's, by the family's own layers.

What the f8 model loses by the new stages is the figure. The f8 latents themselves, pixel-unshuffled by 8, are an f64
code of the same size that loses nothing: no arm is worth its training unless it comes near.
"""

import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from claims.frame import Arm, Outcome, Plan, Threshold, draw_curves, run_arms, train_start
from claims.pictures import block_mean, held_out_pictures, pca, psnr_by_kind, stream, tune_pictures
from latentae.console import format_table, say
from latentae.errors import RequestError
from latentae.families.dcae import DCAE, DownBlock, ResBlock, UpBlock
from latentae.nn.pixels import to_float
from latentae.nn.resample import average_groups

NONE, POOL, DCAE_SHORTCUT = "no shortcut", "average pool, nearest", "space to channel, duplicate (DC-AE)"
METRIC = "psnr"  # mean of the photos' and the dead leaves'

# Written before the first run.
THRESHOLDS = [
    Threshold("DC-AE's shortcuts lose less from f8 to f64 than none", METRIC, DCAE_SHORTCUT, NONE, least=0.3),
    Threshold("DC-AE's shortcuts lose less than pooled ones", METRIC, DCAE_SHORTCUT, POOL, least=0.1),
]

SHALLOW = (24, 24, 48, 48)  # widths from full resolution to f8
DEEP = (96, 192, 384)  # f16, f32, f64
LOW_CHANNELS, HIGH_CHANNELS = 2, 128  # of the f8 and of the f64 latents
F8_CROP, F8_BATCH, F8_SEED = 64, 8, 50
CROP, BATCH = 256, 2  # of training and of testing: 4 x 4 latents at f64; smaller ones would be all border

LEARNING_RATES = (6e-5, 1.5e-4, 4e-4)  # at 6e-4 and above the frozen decoder is driven astray within 40 steps
F8_STEPS, STEPS = 1500, 400  # about 15 minutes on two cores
EVALUATIONS, TEST_LEAVES = 8, 12


def f8_model() -> DCAE:
    """The f8c2 autoencoder, residual blocks throughout, with random weights."""
    stages = len(SHALLOW)
    return DCAE(
        latent_channels=LOW_CHANNELS,
        encoder_block_out_channels=SHALLOW,
        decoder_block_out_channels=SHALLOW,
        encoder_layers_per_block=(0, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1),
        encoder_qkv_multiscales=((),) * stages,
        decoder_qkv_multiscales=((),) * stages,
        decoder_conv_act_fn="silu",
    )


def features_of(f8: DCAE, pixels: Tensor) -> Tensor:
    """The encoder's last features before its latents: (B, 3, H, W) to (B, 48, H/8, W/8)."""
    x = f8.encoder.local(pixels)
    for stage in f8.encoder.down_blocks[f8.encoder.local_stages :]:
        x = stage(x)
    return x


def pixels_of(f8: DCAE, features: Tensor) -> Tensor:
    """The decoder from its first features on, the way back."""
    for stage in reversed(f8.decoder.up_blocks[f8.decoder.local_stages :]):
        features = stage(features)
    return f8.decoder.local(features)


class PooledDown(DownBlock):
    """A down block whose shortcut is the mean of 2 x 2 pixels, each channel copied as often as the width grows."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.pixel_unshuffle(self.conv(x), 2)
        return y + F.avg_pool2d(x, 2).repeat_interleave(self.channels_out // x.shape[1], dim=1)


class NearestUp(UpBlock):
    """An up block whose shortcut is nearest upsampling of the channels' group means."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.pixel_shuffle(self.conv(x), 2)
        return y + F.interpolate(average_groups(x, self.channels_out), scale_factor=2.0)


class DeepStages(nn.Module):
    """From f8 features to f64 latents and back: (B, 48, h, w) to (B, 128, h/8, w/8) to (B, 48, h, w)."""

    def __init__(self, shortcut: str):
        super().__init__()
        self.shortcut = shortcut != NONE
        widths = (SHALLOW[-1], *DEEP)
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for shallow, deep in pairwise(widths):
            if shortcut == POOL:
                pair = [PooledDown(shallow, deep, unshuffle=True), NearestUp(deep, shallow, interpolate=False)]
            else:
                pair = [
                    DownBlock(shallow, deep, unshuffle=True, shortcut=self.shortcut),
                    UpBlock(deep, shallow, interpolate=False, shortcut=self.shortcut),
                ]
            down += [pair[0], ResBlock(deep)]
            up += [pair[1], ResBlock(deep)]
        self.down = nn.Sequential(*down)
        self.conv_out = nn.Conv2d(widths[-1], HIGH_CHANNELS, 3, padding=1)
        self.conv_in = nn.Conv2d(HIGH_CHANNELS, widths[-1], 3, padding=1)
        self.up = nn.Sequential(*reversed(up))

    def encode(self, features: Tensor) -> Tensor:
        x = self.down(features)
        z = self.conv_out(x)
        return z + average_groups(x, HIGH_CHANNELS) if self.shortcut else z

    def decode(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        if self.shortcut:
            x = x + z.repeat_interleave(x.shape[1] // HIGH_CHANNELS, dim=1)
        return self.up(x)

    def forward(self, features: Tensor) -> Tensor:
        return self.decode(self.encode(features))


def deep_stages(shortcut: str, seed: int) -> DeepStages:
    """The stages of an arm; equal seeds give all arms equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DeepStages(shortcut)


def train_f8(steps: int) -> DCAE:
    """The frozen start of all arms."""

    def loss(module: Any, seed: int, step: int) -> Tensor:
        pixels = batch_of(stream(seed, steps * F8_BATCH, F8_CROP), step, F8_BATCH)
        return F.mse_loss(module(pixels).sample, pixels)

    f8 = train_start(lambda seed: f8_model(), loss, F8_SEED, 2e-3, steps)
    stream.cache_clear()
    return f8.requires_grad_(False)


def batch_of(pictures: Tensor, step: int, count: int) -> Tensor:
    return to_float(pictures[step * count : (step + 1) * count])


def run(tier: str, quick: bool, steps: int | None, figure: Path | None) -> dict[str, Any]:
    """Train and judge all arms; prints the table and draws the curves. See `claims.py` for the arguments."""
    if tier != "cpu":
        raise RequestError("The claim dcae has only its cpu tier so far: leave --tier out.")
    steps = steps or (2 if quick else STEPS)
    f8_steps = 6 if quick else F8_STEPS
    leaves, crop = (1, 64) if quick else (TEST_LEAVES, CROP)
    plan = Plan(steps, steps // 2, LEARNING_RATES, evaluations=min(EVALUATIONS, steps))
    test, tune = held_out_pictures(leaves, crop), tune_pictures(leaves, crop)

    say(f"training the f8 model, {f8_steps} steps")
    f8 = train_f8(f8_steps)

    def reconstruct(module: nn.Module, pictures: dict[str, Tensor]) -> dict[str, float]:
        made = {k: pixels_of(f8, module(features_of(f8, to_float(v)))) for k, v in pictures.items()}
        return psnr_by_kind(made, pictures)

    def loss(module: nn.Module, seed: int, step: int) -> Tensor:
        pixels = batch_of(stream(seed, plan.steps * BATCH, crop), step, BATCH)
        with torch.no_grad():
            features = features_of(f8, pixels)
        return F.mse_loss(pixels_of(f8, module(features)), pixels)

    def arm(shortcut: str) -> Arm:
        return Arm(shortcut, lambda seed: deep_stages(shortcut, seed), loss)

    for seed in plan.seeds:
        stream(seed, plan.steps * BATCH, crop)  # so that no arm's clock pays for making pictures
    outcomes = run_arms(
        [arm(name) for name in (NONE, POOL, DCAE_SHORTCUT)],
        plan,
        lambda module: reconstruct(module, tune),
        lambda module: reconstruct(module, test),
        METRIC,
    )

    with torch.no_grad():
        free = psnr_by_kind({kind: f8(to_float(images)).sample for kind, images in test.items()}, test)
    crops = stream(plan.seeds[0], plan.steps * BATCH, crop)
    references = {
        "f8c2, pixel-unshuffled to f64c128 (free)": free,
        "PCA f8c2": pca(crops, test, 8, LOW_CHANNELS),
        "PCA f64c128": pca(crops, test, 64, HIGH_CHANNELS),
        "block mean f8 (3 floats)": block_mean(test, 8),
        "block mean f64 (3 floats)": block_mean(test, 64),
        "untrained f64c128 (DC-AE's shortcuts)": outcomes[-1].runs[0].values[0],
    }
    verdicts = [threshold.judge(outcomes) for threshold in THRESHOLDS]
    below = below_pca(outcomes, references, free[METRIC])
    print_table(outcomes, references, free[METRIC])
    for name in below:
        print(f"below PCA at its own ratio, so not trained to its end: {name}")
    if figure:
        lines = {name: values[METRIC] for name, values in list(references.items())[:3]}
        title = "From a frozen f8c2 to f64c128: held-out PSNR by shortcut"
        draw_curves(figure, title, outcomes, METRIC, "PSNR in dB", lines)

    metrics = list(free)
    return {
        "claim": "Residual shortcuts make high compression ratios trainable (DC-AE, arXiv 2410.10733).",
        "setting": {
            "f8_steps": f8_steps,
            "f8_crop": F8_CROP,
            "steps": plan.steps,
            "search_steps": plan.search_steps,
            "learning_rates": plan.learning_rates,
            "seeds": plan.seeds,
            "crop": crop,
            "batch": BATCH,
            "loss": "mean squared error of pixels",
            "widths": [*SHALLOW, *DEEP],
            "test_pictures": {kind: len(images) for kind, images in test.items()},
        },
        "references": references,
        "arms": {outcome.name: outcome.as_json(metrics) for outcome in outcomes},
        "psnr_lost_from_f8_to_f64": {outcome.name: lost(outcome, free[METRIC]) for outcome in outcomes},
        "below_pca_at_own_ratio": below,
        "thresholds": verdicts,
        "shown": all(verdict["shown"] for verdict in verdicts),
    }


def lost(outcome: Outcome, f8_psnr: float) -> float | None:
    """Mean over seeds of the PSNR lost from f8 to f64; None if a run diverged."""
    return None if any(run.diverged for run in outcome.runs) else f8_psnr - outcome.mean(METRIC)


def below_pca(outcomes: list[Outcome], references: dict[str, dict[str, float]], f8_psnr: float) -> list[str]:
    """Names of the models that are worse than the linear code of their own ratio and size."""
    low = ["f8c2"] if f8_psnr < references["PCA f8c2"][METRIC] else []
    return low + [o.name for o in outcomes if o.mean(METRIC) < references["PCA f64c128"][METRIC]]


def print_table(outcomes: list[Outcome], references: dict[str, dict[str, float]], f8_psnr: float) -> None:
    rows: list[list[Any]] = []
    for name, values in references.items():
        rows.append([name, None, values["psnr_photos"], values["psnr_leaves"], values["psnr"], None, None, None])
    for outcome in outcomes:
        means = [outcome.mean(metric) for metric in ("psnr_photos", "psnr_leaves", "psnr")]
        spread = statistics.stdev(outcome.finals(METRIC))
        seconds = statistics.fmean(run.seconds[-1] for run in outcome.runs)
        rows.append([outcome.name, outcome.learning_rate, *means, lost(outcome, f8_psnr), spread, seconds])
    header = ["held-out PSNR, dB", "rate", "photos", "leaves", "mean", "lost from f8", "std of seeds", "seconds"]
    print(format_table(header, rows))
