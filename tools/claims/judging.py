"""How the claim diffusion-decoder judges its arms: on which pictures, and by what figures."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from claims.pictures import TEST_SEED, TUNE_SEED, crops_of, leaves_of, psnr_by_kind
from claims.realism import calibration, haar_distance, held_out_auc
from claims.samplers import GAN, REGRESSION, decode, loss_of
from latentae.nn.pixels import to_float

CROP = 32
CROP_SEEDS = {"test": 10_003, "tune": 10_004, "classifier": 10_005}
FEW_STEPS = (1, 4, 8)
SAMPLES = 4  # of each test picture

Decoder = Callable[[Tensor, int], Tensor]  # of pixels and of a seed


@dataclass(frozen=True)
class Trial:
    """What decoders are judged on and how: pictures in uint8 that no arm trains on.

    Attributes:
        test: of held-out photos, and of leaves; ``curve`` is the first few.
        tune: what learning rates are chosen on.
        classifier: what the classifier learns from, in ``classifier_steps``.
        euler_steps: of the samples.
    """

    test: dict[str, Tensor]
    curve: dict[str, Tensor]
    tune: dict[str, Tensor]
    classifier: Tensor
    classifier_steps: int
    euler_steps: int


def trial(count: int, few: int, classifier: int, classifier_steps: int, euler_steps: int) -> Trial:
    def both(split: Any, number: int, crop_seed: int, leaves_seed: int) -> dict[str, Tensor]:
        return {"photos": crops_of(split, number, CROP, crop_seed), "leaves": leaves_of(leaves_seed, number, CROP)}

    test = both("held_out", count, CROP_SEEDS["test"], TEST_SEED)
    learned = both("train", classifier // 2, CROP_SEEDS["classifier"], CROP_SEEDS["classifier"])
    return Trial(
        test,
        {kind: x[:few] for kind, x in test.items()},
        both("train", few, CROP_SEEDS["tune"], TUNE_SEED),
        torch.cat(list(learned.values())),
        classifier_steps,
        euler_steps,
    )


def measure(module: Any, name: str, pictures: dict[str, Tensor]) -> dict[str, float]:
    """PSNR of one sample by kind of pictures, and ``objective``, by which learning rates are chosen: higher is better.

    It is what the arm is for: PSNR for L2, nearness of Haar details for the GAN, the loss for those that sample.
    """
    autoencoder = module.autoencoder if name == GAN else module
    made = {kind: decode(autoencoder, to_float(x), 0, FEW_STEPS[-1]) for kind, x in pictures.items()}
    figures = psnr_by_kind(made, pictures)
    if name == REGRESSION:
        objective = figures["psnr"]
    elif name == GAN:
        objective = -statistics.fmean(haar_distance(made[kind], to_float(x)) for kind, x in pictures.items())
    else:
        losses = [loss_of(module, to_float(x), seed) for x in pictures.values() for seed in range(4)]
        objective = -torch.stack(losses).mean().item()
    return {**figures, "objective": objective}


def judge(decoder: Decoder, data: Trial, l2_error: float | None, seed: int, samples: int) -> dict[str, float]:
    """All figures of one decoder.

    Args:
        l2_error: the mean squared error of L2 of the same seed; None for L2 itself.
        seed: of the classifier's weights.
        samples: decodings of each test picture; their noise has the seeds from 0 on.
    """
    made = {k: torch.stack([decoder(to_float(x), i) for i in range(samples)]) for k, x in data.test.items()}
    by_kind = {kind: calibration(made[kind], to_float(x)) for kind, x in data.test.items()}
    pooled = {key: statistics.fmean(each[key] for each in by_kind.values()) for key in ("variance", "error_of_mean")}
    error = statistics.fmean(each["error"] for each in by_kind.values())
    figures = psnr_by_kind({kind: x[0] for kind, x in made.items()}, data.test)
    figures |= {f"calibration_{kind}": each["calibration"] for kind, each in by_kind.items()}
    figures |= {**pooled, "calibration": pooled["variance"] / pooled["error_of_mean"], "error": error}
    figures["error_ratio"] = error / (l2_error or error)
    figures["haar"] = statistics.fmean(haar_distance(made[kind][0], to_float(x)) for kind, x in data.test.items())
    seen = to_float(data.classifier)
    unseen = torch.cat([to_float(x) for x in data.test.values()])
    one = torch.cat([x[0] for x in made.values()])
    figures["auc"] = held_out_auc((seen, decoder(seen, 1000)), (unseen, one), seed, data.classifier_steps)
    return figures


def by_steps(module: Any, data: Trial) -> dict[str, dict[str, float]]:
    """PSNR of the sample of seed 0, and calibration, by the number of Euler steps."""
    results = {}
    for steps in FEW_STEPS:
        made = {
            k: torch.stack([decode(module, to_float(x), i, steps) for i in range(SAMPLES)])
            for k, x in data.curve.items()
        }
        spreads = [calibration(made[kind], to_float(x)) for kind, x in data.curve.items()]
        ratio = sum(each["variance"] for each in spreads) / sum(each["error_of_mean"] for each in spreads)
        psnr = psnr_by_kind({kind: x[0] for kind, x in made.items()}, data.curve)["psnr"]
        results[str(steps)] = {"psnr": psnr, "calibration": ratio}
    return results
