"""LiteVAE (arXiv 2405.14477): a wavelet front end saves the encoder's cost at little loss.

The cheap version. A small DC-AE, f8 with 4 channels, is trained; every arm takes its decoder, puts another encoder
before it, and trains both on the error of the pixels: no posterior noise, no perceptual loss, no adversary. A decoder
from scratch would take hours to tell encoders apart: after 300 steps all arms stood below the block mean. The encoders:

- SD-VAE's, with about five times the parameters and 3.6 times the multiplications of the LiteVAE beside it, which are
  the ratios of the published SD-VAE and LiteVAE-B;
- SD-VAE's, narrowed to LiteVAE's parameters;
- SD-VAE's, narrowed to LiteVAE's multiplications;
- LiteVAE's of size S;
- LiteVAE's with pixel-unshuffled block means in place of the wavelet bands, the null: at each level they hold the
  same 12 numbers for each 2 x 2 block, and only the fixed Haar rotation is missing.

The paper's own comparable row (ImageNet 128 px, 4 channels): a VAE narrowed to 6.75 M parameters 24.10 dB, LiteVAE-B
24.49 dB, the whole SD-VAE encoder 24.25 dB.
"""

import copy
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Encoder as StableDiffusionEncoder
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from claims.frame import Arm, Outcome, Plan, Threshold, draw_curves, run_arms, train_start
from claims.pictures import block_mean, held_out_pictures, pca, psnr_by_kind, stream, tune_pictures
from latentae.console import format_table, say
from latentae.errors import RequestError
from latentae.families.litevae import Encoder, UNet
from latentae.families.presets import create
from latentae.nn.pixels import to_float

WHOLE, EQUAL_PARAMETERS, EQUAL_MACS = "SD-VAE encoder", "SD-VAE, LiteVAE's parameters", "SD-VAE, LiteVAE's MACs"
HAAR, UNSHUFFLE = "LiteVAE", "LiteVAE, unshuffle for Haar"
METRIC = "psnr"  # mean of the photos' and the dead leaves'

# Written before the first run.
THRESHOLDS = [
    Threshold("LiteVAE beats SD-VAE's encoder of equal parameters", METRIC, HAAR, EQUAL_PARAMETERS, least=0.2),
    Threshold("LiteVAE beats SD-VAE's encoder of equal multiplications", METRIC, HAAR, EQUAL_MACS, least=0.1),
    Threshold("LiteVAE loses less than 0.3 dB to the whole encoder", METRIC, HAAR, WHOLE, least=-0.3),
    Threshold("Haar beats pixel-unshuffle", METRIC, HAAR, UNSHUFFLE, least=0.1),
]

FACTOR, LATENT_CHANNELS = 8, 4
LEVELS, BANDS = 3, 12
LITEVAE_WIDTH, LITEVAE_MULTIPLIERS = 16, (1, 2, 2)  # size S
MULTIPLIERS = (1, 2, 4, 4)  # SD-VAE's
ENCODER_WIDTHS = {WHOLE: 50, EQUAL_PARAMETERS: 22, EQUAL_MACS: 26}  # SD-VAE's own is 128
START_PRESET, START_SEED, START_STEPS, START_RATE, START_BATCH = "dc-ae-f8c16-small", 50, 2000, 2e-3, 8
CROP, BATCH = 64, 4
TEST_CROP = 256

LEARNING_RATES = (5e-4, 1e-3, 2e-3)
STEPS = 300  # about half an hour on two cores
EVALUATIONS, TEST_LEAVES = 5, 8


def sd_vae_encoder(width: int) -> nn.Module:
    return StableDiffusionEncoder(
        in_channels=3,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * len(MULTIPLIERS),
        block_out_channels=tuple(width * m for m in MULTIPLIERS),
        layers_per_block=2,
        norm_num_groups=width // 2,
        double_z=False,
    )


class UnshuffleEncoder(Encoder):
    """LiteVAE's encoder on 2 x 2 blocks as they are, of the block means of the level above."""

    def bands(self, pixels: Tensor) -> Iterator[Tensor]:
        for level in range(len(self.extractors)):
            yield F.pixel_unshuffle(F.avg_pool2d(pixels, 2**level), 2)


def litevae_encoder(cls: type[Encoder]) -> nn.Module:
    shared: Any = dict(width=LITEVAE_WIDTH, multipliers=LITEVAE_MULTIPLIERS, layers=2, dropout=0.0)
    extractor = dict(channels_in=BANDS, channels_out=BANDS, **shared)
    aggregator = UNet(channels_in=LEVELS * BANDS, channels_out=LATENT_CHANNELS, **shared)
    return cls(levels=LEVELS, wavelet="haar", band_scale=0.5, extractor=extractor, aggregator=aggregator)


def build_encoder(name: str) -> nn.Module:
    if name in ENCODER_WIDTHS:
        return sd_vae_encoder(ENCODER_WIDTHS[name])
    return litevae_encoder(Encoder if name == HAAR else UnshuffleEncoder)


class Pair(nn.Module):
    """An arm's encoder, with weights of a seed, and its own copy of the trained decoder."""

    def __init__(self, name: str, decoder: nn.Module, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = build_encoder(name)
        self.decoder = copy.deepcopy(decoder).train()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.decoder(self.encoder(pixels))


def pixels_at(seed: int, step: int, steps: int, batch: int) -> Tensor:
    return to_float(stream(seed, steps * batch, CROP)[step * batch : (step + 1) * batch])


def train_dcae(steps: int) -> Any:
    """The DC-AE whose decoder all arms begin with."""

    def loss(module: Any, seed: int, step: int) -> Tensor:
        pixels = pixels_at(seed, step, steps, START_BATCH)
        return F.mse_loss(module(pixels).sample, pixels)

    def build(seed: int) -> nn.Module:
        return create(START_PRESET, seed=seed, latent_channels=LATENT_CHANNELS).train()

    start = train_start(build, loss, START_SEED, START_RATE, steps)
    stream.cache_clear()
    return start


def loss_of(module: nn.Module, pixels: Tensor) -> Tensor:
    return F.mse_loss(module(pixels), pixels)


def run(tier: str, quick: bool, steps: int | None, figure: Path | None) -> dict[str, Any]:
    """Train and judge all arms; prints two tables and draws the curves. See `claims.py` for the arguments."""
    if tier != "cpu":
        raise RequestError("The claim litevae has only its cpu tier so far: leave --tier out.")
    steps = steps or (2 if quick else STEPS)
    start_steps = 4 if quick else START_STEPS
    leaves, crop = (1, 64) if quick else (TEST_LEAVES, TEST_CROP)
    plan = Plan(steps, max(steps // 4, 1), LEARNING_RATES, evaluations=min(EVALUATIONS, steps))
    test, tune = held_out_pictures(leaves, crop), tune_pictures(leaves, crop)
    names = (WHOLE, EQUAL_PARAMETERS, EQUAL_MACS, HAAR, UNSHUFFLE)
    costs = {name: cost(build_encoder(name), crop) for name in names}
    print_costs(costs)

    def reconstruct(module: nn.Module, pictures: dict[str, Tensor]) -> dict[str, float]:
        made = {kind: torch.cat([module(to_float(one)) for one in x.split(4)]) for kind, x in pictures.items()}
        return psnr_by_kind(made, pictures)

    say(f"training the start, {start_steps} steps")
    start = train_dcae(start_steps)
    with torch.no_grad():
        start_psnr = psnr_by_kind({kind: start(to_float(x)).sample for kind, x in test.items()}, test)
    for seed in plan.seeds:
        stream(seed, plan.steps * BATCH, CROP)  # so that no arm's clock pays for it
    arms = [
        Arm(
            name,
            lambda seed, name=name: Pair(name, start.decoder, seed),  # type: ignore[misc]
            lambda module, seed, step: loss_of(module, pixels_at(seed, step, plan.steps, BATCH)),
        )
        for name in names
    ]
    outcomes = run_arms(
        arms, plan, lambda module: reconstruct(module, tune), lambda module: reconstruct(module, test), METRIC
    )

    references = {
        "the start, DC-AE f8c4": start_psnr,
        "PCA f8c4": pca(stream(plan.seeds[0], plan.steps * BATCH, CROP), test, FACTOR, LATENT_CHANNELS),
        "block mean f8 (3 floats)": block_mean(test, FACTOR),
        "untrained encoder": outcomes[names.index(HAAR)].runs[0].values[0],
    }
    verdicts = [threshold.judge(outcomes) for threshold in THRESHOLDS]
    below = [o.name for o in outcomes if o.mean(METRIC) < references["PCA f8c4"][METRIC]]
    print_table(outcomes, references)
    for name in below:
        print(f"below PCA at its own ratio, so not trained to its end: {name}")
    if figure:
        lines = {name: references[name][METRIC] for name in ("PCA f8c4", "block mean f8 (3 floats)")}
        draw_curves(figure, "f8c4 with one decoder: held-out PSNR by encoder", outcomes, METRIC, "PSNR in dB", lines)
    return {
        "claim": "A wavelet front end saves the encoder's cost at little loss (LiteVAE, arXiv 2405.14477).",
        "setting": {
            "steps": plan.steps,
            "search_steps": plan.search_steps,
            "learning_rates": plan.learning_rates,
            "seeds": plan.seeds,
            "crop": CROP,
            "batch": BATCH,
            "loss": "mean squared error of pixels",
            "encoder_widths": ENCODER_WIDTHS | {"LiteVAE": LITEVAE_WIDTH},
            "start": [START_PRESET, start_steps],
            "test_pictures": {kind: list(images.shape) for kind, images in test.items()},
        },
        "costs": costs,
        "references": references,
        "arms": {outcome.name: outcome.as_json(list(start_psnr)) for outcome in outcomes},
        "below_pca_at_own_ratio": below,
        "thresholds": verdicts,
        "shown": all(verdict["shown"] for verdict in verdicts),
    }


def cost(encoder: nn.Module, size: int) -> dict[str, float]:
    """Parameters in millions, multiplications in billions and CPU seconds (median of 5) of one image."""
    pixels = torch.zeros(1, 3, size, size)
    encoder = encoder.eval()
    seconds = []
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            encoder(pixels)  # also the warm-up
        for _ in range(5):
            started = time.process_time()
            encoder(pixels)
            seconds.append(time.process_time() - started)
    return {
        "millions": sum(p.numel() for p in encoder.parameters()) / 1e6,
        "giga_macs": counter.get_total_flops() / 2e9,
        "cpu_seconds": statistics.median(seconds),
    }


def print_costs(costs: dict[str, dict[str, float]]) -> None:
    rows = [[name, *values.values()] for name, values in costs.items()]
    print(format_table(["encoder, one image", "million parameters", "GMAC", "CPU seconds"], rows))
    print()


def print_table(outcomes: list[Outcome], references: dict[str, dict[str, float]]) -> None:
    rows: list[list[Any]] = []
    for name, values in references.items():
        rows.append([name, None, values["psnr_photos"], values["psnr_leaves"], values["psnr"], None, None])
    for outcome in outcomes:
        means = [outcome.mean(metric) for metric in ("psnr_photos", "psnr_leaves", "psnr")]
        spread = statistics.stdev(outcome.finals(METRIC))
        seconds = statistics.fmean(run.seconds[-1] for run in outcome.runs)
        rows.append([outcome.name, outcome.learning_rate, *means, spread, seconds])
    print(format_table(["held-out PSNR, dB", "rate", "photos", "leaves", "mean", "std of seeds", "seconds"], rows))
