"""DiTo (arXiv 2501.18593) and SWYCC (arXiv 2409.02529): a decoder that samples restores detail that regression
averages away.

All arms decode the same latents: 4 principal components of 8 x 8 blocks, frozen, of 32-pixel crops of photos and of
dead leaves, whose grain nothing at f8 can hold. Their networks are one U-Net:

- L2: it predicts the pixels at once, by squared error;
- L2 + white noise, L2 + unsharp mask: the same, made as rough as the originals: the noise's spread and the mask's
  amount match the mean squared gradient. They are the impostors;
- L2 + GAN: beside the squared error a PatchGAN, weighed by LDM's ratio of gradients;
- DiTo: flow matching, predicting the velocity;
- SWYCC: an initial decoder by squared error, and the U-Net, which sees its image, predicts the pixels themselves;
- SWYCC, residual: as that, but what is diffused is the pixels less the initial image.

PSNR is no judge: a right sampler of the posterior has twice the squared error of its mean, which is what L2 learns.
The judges are calibration, the variance of samples over the squared error of their mean (1 if the original is like one
more sample), the ratio of a sample's squared error to that of L2 (2 for a right sampler), and a small classifier that
learns originals from reconstructions and is tried on pictures that no one has seen: the area under its curve (AUC, 0.5
if it cannot tell) must be below that of L2 + white noise. Neither calibration nor the ratio alone will do: noise of any
look has them if its variance is right. Beside them stands the Wasserstein distance of Haar details to the originals'.

Then one step learns what the sampler does in several, with `StepDistillation`, for the velocity (DiTo) and for the
pixels (SWYCC).

What came of it (tools/results/diffusion-decoder.json, 600 steps): DiTo meets all three, SWYCC one of them, and SWYCC
of the residual only the classifier (AUC 0.61 against 0.96), its samples being a little too much alike. Much of this
is grain rather than texture, as the picture shows. DiTo's calibration of 1.00 pools two that err in opposite ways:
photos get too much variance (1.36), leaves a little less than enough (0.82); and its Haar details are no nearer to
the originals' than those of L2 + white noise, where SWYCC's are. L2 itself is 0.7 dB below the linear decoder of the
same latents, so it is not at its end: against that decoder's error DiTo's ratio is 2.25. All three samplers take the
largest of their rates. One step agrees with the teacher's eight by 7 dB (v) and 9 dB (x0) more than before. Sizes and
SWYCC's two weights were picked after ten trials on other crops of the same held-out photos.
"""

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from claims.frame import SEARCH_SEED, Arm, Outcome, Plan, run_arms
from claims.judging import CROP, SAMPLES, Decoder, Trial, by_steps, judge, measure, trial
from claims.pictures import stream
from claims.realism import matching_amount, matching_noise, unsharp
from claims.samplers import (
    DITO,
    FACTOR,
    GAN,
    INITIAL,
    INITIAL_WEIGHT,
    LATENT_CHANNELS,
    LEAST_TIME,
    NOISE,
    REGRESSION,
    SAMPLERS,
    SWYCC_ARM,
    TEACHER_STEPS,
    TRAINED,
    UNET,
    UNSHARP,
    PrincipalComponents,
    Student,
    build,
    decode,
    loss_of,
    rounded,
)
from latentae.console import format_table, say
from latentae.errors import RequestError
from latentae.nn.pixels import to_float, to_uint8

# Written before the run, from the issue; each must hold on every seed, for each of the three samplers.
CALIBRATED = (0.8, 1.25)  # variance of samples over squared error of their mean
ERROR_RATIO = (1.8, 2.3)  # squared error of a sample over that of L2
# and the classifier's AUC must be below that of L2 + white noise

BATCH, PCA_CROPS = 16, 1000
STEPS, EVALUATIONS = 600, 3  # 35 minutes of one core
LEARNING_RATES = (1.5e-3, 3e-3, 6e-3)
SAMPLE_STEPS = 32  # Euler's method with 8 takes a third of the variance even from a perfect denoiser, with 32 a tenth
TEST_COUNT, CURVE_COUNT = 48, 16  # pictures of each kind
CLASSIFIER_COUNT, CLASSIFIER_STEPS = 384, 200
DISTILLATION_STEPS, DISTILLATION_RATES = 80, (3e-4, 1e-3, 3e-3)
DRAWN = 10  # pictures in the figure
LINEAR = "PCA f8c4"

Figures = dict[str, dict[int, dict[str, float]]]  # by arm and seed


def run(tier: str, quick: bool, steps: int | None, figure: Path | None) -> dict[str, Any]:
    """Train, judge and distil; prints two tables and draws the reconstructions. See `claims.py` for the arguments."""
    if tier != "cpu":
        raise RequestError("The claim diffusion-decoder has only its cpu tier so far: leave --tier out.")
    steps = steps or (2 if quick else STEPS)
    plan = Plan(steps, max(steps // 5, 1), LEARNING_RATES, evaluations=min(EVALUATIONS, steps))
    data = (
        trial(4, 2, 8, 2, 2)
        if quick
        else trial(TEST_COUNT, CURVE_COUNT, CLASSIFIER_COUNT, CLASSIFIER_STEPS, SAMPLE_STEPS)
    )
    encoder = PrincipalComponents(stream(50, 100 if quick else PCA_CROPS, CROP))
    for seed in plan.seeds:
        batch_of(seed, 0, plan)  # so that no arm's clock pays for making pictures

    kept: dict[str, dict[int, Any]] = {name: {} for name in TRAINED}
    outcomes: list[Outcome] = []
    for name in TRAINED:
        say(f"arm: {name}")
        arm = Arm(
            name,
            lambda seed, name=name: build(name, encoder, seed).train(),  # type: ignore[misc]
            lambda module, seed, step: loss_of(module, batch_of(seed, step, plan), seed * 2**32 + step),
            lambda module, seed, name=name: kept[name].update({seed: module}),  # type: ignore[misc]
        )
        outcomes += run_arms(
            [arm],
            plan,
            lambda module, name=name: measure(module, name, data.tune),  # type: ignore[misc]
            lambda module, name=name: measure(module, name, data.curve),  # type: ignore[misc]
            "objective",
        )
    kept[GAN] = {seed: module.autoencoder for seed, module in kept[GAN].items()}

    say("judging")
    with torch.no_grad():
        figures, impostors = judge_all(kept, data)
        references = judge_references(encoder, kept, data)
        few_steps = {name: {seed: by_steps(module, data) for seed, module in kept[name].items()} for name in SAMPLERS}
    verdicts = thresholds(figures)
    print_table(figures, references, outcomes, data.euler_steps)
    below = statistics.fmean(one["psnr"] for one in figures[REGRESSION].values()) < references[LINEAR]["psnr"]
    if below:
        print(f"{REGRESSION} is below {LINEAR}, so not trained to its end: ratios of errors are to a worse mean")
    if figure:
        draw_pictures(figure, decoders_of(kept, data, plan.seeds[0])[0], data)

    say("distilling")
    distilled = distil({name: kept[name] for name in (DITO, SWYCC_ARM)}, plan, 1 if quick else DISTILLATION_STEPS, data)
    print_distillation(distilled)
    return {
        "claim": "A sampling decoder restores detail that regression averages away (DiTo, arXiv 2501.18593; SWYCC, "
        "arXiv 2409.02529).",
        "setting": {
            "steps": plan.steps,
            "search_steps": plan.search_steps,
            "learning_rates": plan.learning_rates,
            "seeds": plan.seeds,
            "crop": CROP,
            "batch": BATCH,
            "latents": f"{LATENT_CHANNELS} principal components of {FACTOR} x {FACTOR} blocks, frozen",
            "unet": UNET,
            "initial_decoder": INITIAL,
            "predictions": SAMPLERS,
            "euler_steps": data.euler_steps,
            "sample_seeds": list(range(SAMPLES)),
            "least_time_of_x0": LEAST_TIME,
            "initial_weight": INITIAL_WEIGHT,
            "classifier": {"pictures": len(data.classifier), "steps": data.classifier_steps},
            "test_pictures": {kind: list(images.shape) for kind, images in data.test.items()},
        },
        "references": references,
        "l2_is_below_pca": below,
        "arms": {o.name: o.as_json(["psnr"]) for o in outcomes},
        "figures": figures,
        "impostors": impostors,
        "by_steps": few_steps,
        "distillation": distilled,
        "thresholds": verdicts,
        "shown": all(verdict["shown"] for verdict in verdicts),
    }


def batch_of(seed: int, step: int, plan: Plan) -> Tensor:
    steps = plan.search_steps if seed == SEARCH_SEED else plan.steps
    return to_float(stream(seed, steps * BATCH, CROP)[step * BATCH : (step + 1) * BATCH])


def decoders_of(kept: dict[str, dict[int, Any]], data: Trial, seed: int) -> tuple[dict[str, Decoder], dict]:
    """What is judged of one seed, and the spread of the noise and the amount of the mask, fitted to training photos."""
    regression = kept[REGRESSION][seed]

    def deterministic(name: str) -> Decoder:
        return lambda pixels, noise_seed: decode(kept[name][seed], pixels, 0, 1)

    seen = to_float(data.classifier)
    smooth = decode(regression, seen, 0, 1)
    spread, amount = matching_noise(smooth, seen), matching_amount(smooth, seen)

    def with_noise(pixels: Tensor, noise_seed: int) -> Tensor:
        noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(noise_seed))
        return rounded(decode(regression, pixels, 0, 1) + spread * noise)

    def sharpened(pixels: Tensor, noise_seed: int) -> Tensor:
        return rounded(unsharp(decode(regression, pixels, 0, 1), amount))

    def sampler(name: str) -> Decoder:
        return lambda pixels, noise_seed: decode(kept[name][seed], pixels, noise_seed, data.euler_steps)

    decoders = {REGRESSION: deterministic(REGRESSION), NOISE: with_noise, UNSHARP: sharpened, GAN: deterministic(GAN)}
    return decoders | {name: sampler(name) for name in SAMPLERS}, {"noise_std": spread, "unsharp_amount": amount}


def judge_all(kept: dict[str, dict[int, Any]], data: Trial) -> tuple[Figures, dict[int, dict[str, float]]]:
    figures: Figures = {}
    impostors = {}
    for seed in set.intersection(*(set(by_seed) for by_seed in kept.values())):  # those that no arm diverged with
        decoders, impostors[seed] = decoders_of(kept, data, seed)
        l2_error = None
        for name, decoder in decoders.items():
            samples = SAMPLES if name in SAMPLERS or name == NOISE else 2
            one = figures.setdefault(name, {})[seed] = judge(decoder, data, l2_error, seed, samples)
            l2_error = l2_error or one["error"]
    return figures, impostors


def judge_references(
    encoder: PrincipalComponents, kept: dict[str, dict[int, Any]], data: Trial
) -> dict[str, dict[str, float]]:
    """The linear decoder of the same latents, and block means, against L2 of one seed."""
    seed = min(kept[REGRESSION])

    def linear(pixels: Tensor, noise_seed: int) -> Tensor:
        return rounded(encoder.invert(encoder(pixels)))

    def means(pixels: Tensor, noise_seed: int) -> Tensor:
        return rounded(F.interpolate(F.avg_pool2d(pixels, FACTOR), scale_factor=float(FACTOR)))

    l2 = judge(decoders_of(kept, data, seed)[0][REGRESSION], data, None, seed, 2)["error"]
    decoders = {LINEAR: linear, "block mean f8 (3 floats)": means}
    return {name: judge(decoder, data, l2, seed, 2) for name, decoder in decoders.items()}


def thresholds(figures: Figures) -> list[dict[str, Any]]:
    """For each sampler: calibration, error ratio, and the classifier against that of L2 + white noise."""
    verdicts = []
    for name in SAMPLERS:
        for figure, (low, high), sentence in (
            ("calibration", CALIBRATED, "is calibrated"),
            ("error_ratio", ERROR_RATIO, "has twice the error of L2"),
        ):
            values = [one[figure] for one in figures[name].values()]
            found = f"{min(values):.2f} to {max(values):.2f}, wanted {low} to {high} on every seed"
            shown = len(values) > 1 and all(low <= value <= high for value in values)
            verdicts.append({"sentence": f"{name} {sentence}", "found": found, "shown": shown})
        values, noisy = ([one["auc"] for one in figures[arm].values()] for arm in (name, NOISE))
        found = f"AUC {statistics.fmean(values):.3f} against {statistics.fmean(noisy):.3f}, wanted below on every seed"
        shown = len(values) > 1 and all(a < b for a, b in zip(values, noisy, strict=True))
        sentence = f"{name} is harder to tell from originals than {NOISE}"
        verdicts.append({"sentence": sentence, "found": found, "shown": shown})
    return verdicts


def distil(teachers: dict[str, dict[int, Any]], plan: Plan, steps: int, data: Trial) -> dict[str, dict[str, Any]]:
    """One step of each sampler against its several, before and after."""
    short = Plan(steps, max(steps // 4, 1), DISTILLATION_RATES, evaluations=1, seeds=plan.seeds)

    def student(by_seed: dict[int, Any], seed: int) -> Student:
        teacher = by_seed.get(seed, by_seed[min(by_seed)])  # the search for rates has none of its own
        return Student(teacher).train()

    def loss(module: Any, seed: int, step: int) -> Tensor:
        return module.loss(batch_of(seed, step, plan), seed * 2**32 + step)

    def agreement(pictures: dict[str, Tensor]) -> Callable[[Any], dict[str, float]]:
        return lambda module: module.agreement(pictures)

    results = {}
    for name, by_seed in teachers.items():
        arm = Arm(name, partial(student, by_seed), loss)
        [outcome] = run_arms([arm], short, agreement(data.tune), agreement(data.curve), "agreement")
        results[name] = {
            "prediction": SAMPLERS[name],
            "teacher_steps": TEACHER_STEPS,
            "steps": steps,
            "before": [run.values[0] for run in outcome.runs],
            "after": [run.values[-1] for run in outcome.runs],
            **outcome.as_json(["agreement", "psnr"]),
        }
    return results


def print_table(
    figures: Figures, references: dict[str, dict[str, float]], outcomes: list[Outcome], euler_steps: int
) -> None:
    columns = ("psnr", "calibration", "calibration_photos", "calibration_leaves", "error_ratio", "haar", "auc")
    rates = {outcome.name: outcome.learning_rate for outcome in outcomes}
    rows: list[list[Any]] = [[name, None, None, None, *(v[c] for c in columns)] for name, v in references.items()]
    for name, by_seed in figures.items():
        means = [statistics.fmean(one[column] for one in by_seed.values()) for column in columns]
        steps = euler_steps if name in SAMPLERS else None
        rows.append([name, SAMPLERS.get(name), steps, rates.get(name), *means])
    header = [
        "held out, sample seed 0",
        "predicts",
        "steps",
        "rate",
        "PSNR, dB",
        "calibration",
        "of photos",
        "of leaves",
    ]
    print(format_table([*header, "error / L2's", "Haar distance", "AUC"], rows))


def print_distillation(distilled: dict[str, dict[str, Any]]) -> None:
    rows: list[list[Any]] = []
    for name, result in distilled.items():
        before, after = (
            [statistics.fmean(one[key] for one in result[when]) for key in ("agreement", "psnr")]
            for when in ("before", "after")
        )
        teacher = statistics.fmean(one["teacher_psnr"] for one in result["before"])
        rows.append([name, result["prediction"], before[0], after[0], before[1], after[1], teacher])
    header = [f"one step against {TEACHER_STEPS}, dB", "predicts", "before", "after", "to originals, before", "after"]
    print()
    print(format_table([*header, "the teacher's"], rows))


def draw_pictures(path: Path, decoders: dict[str, Decoder], data: Trial) -> None:
    """A PNG: a row of originals, then one for each decoder, from the noise of seed 0."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    originals = to_float(torch.cat([x[: DRAWN // len(data.test)] for x in data.test.values()]))
    rows = {"original": originals} | {name: decoder(originals, 0) for name, decoder in decoders.items()}
    figure, axes = pyplot.subplots(len(rows), 1, figsize=(11, 1.1 * len(rows)), layout="constrained")
    for axis, (name, images) in zip(axes, rows.items()):
        axis.imshow(to_uint8(torch.cat(list(images), dim=-1)).permute(1, 2, 0), interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle(f"Held-out crops of {CROP} pixels; samplers with {data.euler_steps} steps")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
