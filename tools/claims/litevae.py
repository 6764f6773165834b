"""LiteVAE (arXiv 2405.14477): a wavelet front end saves the encoder's cost at little loss.

Every arm trains an encoder with the same small decoder, of equal initial weights, end to end on the error of the
pixels: f8, 4 channels, no posterior noise, no perceptual loss, no adversary. The decoder is DC-AE's, whose shortcuts
learn in minutes what SD-VAE's needs hours for: with that, a first run of 300 steps left all arms below the block mean
(17.2 to 18.4 dB, LiteVAE last) and showed nothing. The encoders:

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

from claims.frame import Arm, Outcome, Plan, Threshold, draw_curves, run_arms
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
DECODER_OF = "dc-ae-f8c16-small"
CROP, BATCH = 64, 4
TEST_CROP = 256

LEARNING_RATES = (5e-4, 1e-3, 2e-3)
STEPS = 1000  # about an hour and a half on two cores
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
    """An arm's encoder and the decoder; equal seeds give all arms equal decoders."""

    def __init__(self, name: str, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.decoder = create(DECODER_OF, seed=seed, latent_channels=LATENT_CHANNELS).decoder.train()
            self.encoder = build_encoder(name)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.decoder(self.encoder(pixels))


def loss_of(module: nn.Module, seed: int, step: int, plan: Plan) -> Tensor:
    pictures = stream(seed, plan.steps * BATCH, CROP)
    pixels = to_float(pictures[step * BATCH : (step + 1) * BATCH])
    return F.mse_loss(module(pixels), pixels)


def run(tier: str, quick: bool, steps: int | None, figure: Path | None) -> dict[str, Any]:
    """Train and judge all arms; prints two tables and draws the curves. See `claims.py` for the arguments."""
    if tier != "cpu":
        raise RequestError("The claim litevae has only its cpu tier so far: leave --tier out.")
    steps = steps or (2 if quick else STEPS)
    leaves, crop = (1, 64) if quick else (TEST_LEAVES, TEST_CROP)
    plan = Plan(steps, max(steps // 4, 1), LEARNING_RATES, evaluations=min(EVALUATIONS, steps))
    test, tune = held_out_pictures(leaves, crop), tune_pictures(leaves, crop)
    names = (WHOLE, EQUAL_PARAMETERS, EQUAL_MACS, HAAR, UNSHUFFLE)
    costs = {name: cost(build_encoder(name), crop) for name in names}
    print_costs(costs)

    def reconstruct(module: nn.Module, pictures: dict[str, Tensor]) -> dict[str, float]:
        made = {kind: torch.cat([module(to_float(one)) for one in x.split(4)]) for kind, x in pictures.items()}
        return psnr_by_kind(made, pictures)

    say("making the training pictures")
    for seed in plan.seeds:
        stream(seed, plan.steps * BATCH, CROP)  # so that no arm's clock pays for it
    arms = [
        Arm(
            name,
            lambda seed, name=name: Pair(name, seed),  # type: ignore[misc]
            lambda module, seed, step: loss_of(module, seed, step, plan),
        )
        for name in names
    ]
    outcomes = run_arms(
        arms, plan, lambda module: reconstruct(module, tune), lambda module: reconstruct(module, test), METRIC
    )

    references = {
        "PCA f8c4": pca(stream(plan.seeds[0], plan.steps * BATCH, CROP), test, FACTOR, LATENT_CHANNELS),
        "block mean f8 (3 floats)": block_mean(test, FACTOR),
        "untrained": outcomes[names.index(HAAR)].runs[0].values[0],
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
            "decoder_of": DECODER_OF,
            "test_pictures": {kind: list(images.shape) for kind, images in test.items()},
        },
        "costs": costs,
        "references": references,
        "arms": {outcome.name: outcome.as_json(list(references["untrained"])) for outcome in outcomes},
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
