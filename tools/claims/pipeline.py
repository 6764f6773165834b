"""Our own claim: an autoencoder that is fine-tuned in place changes a pipeline's pictures only in detail; with a new
latent space the denoiser must be retrained.

All by the package's own commands, on the five training photos that come with scikit-image:

- A: the autoencoder of the demo's recipe (DC-AE f8c16 small); B the same with another seed, so that its latents have
  the same shape and mean something else;
- A, decoder fine-tuned: A trained on with ``model.trainable: [decoder]``, other crops, and L1 and a discriminator
  beside L2, for sharpness;
- a small DiT on A's latents of the photos, each a class of its own, exported as a `ClassConditionalFlowPipeline`.

The denoiser learns five pictures by heart, and that is all it draws: whether it would draw new ones is not the
question, but what becomes of its pictures in another decoder. Each is drawn from three seeds. The pipeline is then
opened with one ``vae`` after the other, as a user does it: A; A as the stock class AutoencoderDC; A with its fine-tuned
decoder; B; B again with the pipeline's mean and standard deviation of each channel changed to those of B's latents,
because scale alone could have been the trouble; and B in the pipeline of a denoiser that was retrained on its latents.
`latentae export --vae` refuses a fine-tuned decoder, since its weights are not those of the training;
``from_pretrained(…, vae=…)`` trusts who calls it.

PSNR is of each picture to the one that A draws from the same seed and class, and to the photo; what each autoencoder
makes of the photo itself stands beside it, and how near A's pictures of different photos are to each other.
``--steps`` are those of A and B; the fine-tuning takes a third of them.

How the setting was picked, with A alone and after the thresholds: the denoiser's steps by two trials, and the objective
of the fine-tuning by two, of 300 steps, because without a discriminator it hardly changed a picture (42 to 48 dB).

What came of it in one run (tools/results/pipeline.json): six of seven sentences. The fine-tuned decoder's pictures are
at 28.9 to 34.3 dB of A's and show the same, in other detail, which is not better: they have the faint grid that so
short a training with a discriminator leaves, and 2 dB less to the photos. B's are at 6.7 to 11.3 dB, where pictures of
different photos have 4.5 to 12.0. Its own mean and spread bring 9.9 to 15.6, just over the 15 that was allowed, in the
dark picture of the rocket, so that sentence is not shown; coarse shapes come through in B, places being the same in
both. With a retrained denoiser B draws as well as A. Seeds change next to nothing in pictures that are learnt by heart.
"""

import itertools
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderDC
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import latentae
from latentae.cli.main import run_command
from latentae.codec import LatentCodec
from latentae.console import format_table, say
from latentae.data.samples import photos
from latentae.data.transforms import adm_center_crop, to_tensor
from latentae.errors import RequestError
from latentae.metrics.image import psnr
from latentae.nn.pixels import to_uint8
from latentae.pipelines import ClassConditionalFlowPipeline


@dataclass(frozen=True)
class Plan:
    """How much is trained and drawn.

    Attributes:
        steps: of A and of B.
        denoiser_steps: of each of the two denoisers.
        size: of the pictures in pixels.
        seeds: of the noise, for each of the photos.
        euler_steps: of a picture.
    """

    steps: int
    denoiser_steps: int
    size: int
    seeds: tuple[int, ...]
    euler_steps: int

    @property
    def tuning_steps(self) -> int:
        return max(self.steps // 3, 1)


FULL = Plan(steps=1800, denoiser_steps=1500, size=128, seeds=(0, 1, 2), euler_steps=25)
QUICK = Plan(steps=2, denoiser_steps=2, size=64, seeds=(0,), euler_steps=2)
OTHER_SEED, TUNING_SEED = 1, 2  # of B's training, and of the crops that A's decoder is fine-tuned on; A's is 0
TUNING = {  # beside the L2 of the recipe
    "model.trainable": "[decoder]",
    "model.objective.l1": "L1",
    "model.adversary.discriminator": "PatchGAN",
    "model.adversary.discriminator.channels": 32,
    "model.adversary.discriminator.layers": 2,
    "model.adversary.weight": 0.1,
    "model.optimizer.lr": 5e-4,
}
DENOISER = {"model.denoiser.patch_size": 2, "model.label_dropping": 0, "data.val_fraction": 0}

OWN, STOCK, TUNED = "A", "A as AutoencoderDC", "A, decoder fine-tuned"
OTHER, RESCALED, RETRAINED = "B", "B, its own mean and spread", "B, denoiser retrained"
ROWS = {  # of the figure
    OWN: "as trained",
    TUNED: "decoder\nfine-tuned",
    OTHER: "another\nlatent space",
    RETRAINED: "the same,\ndenoiser\nretrained",
}

# Written before the first run.
LARGEST_ROUNDING = 1e-4  # of a stock class's picture in [-1, 1]
LEAST_TUNED, MOST_OTHER = 25.0, 15.0  # dB to A's picture, in every one
EQUAL = 100.0  # dB of equal pictures
MOST_UNLEARNT = 3.0  # dB that a picture may be farther from its photo than the autoencoder's own reconstruction


def fit(run: Path, recipe: str, **options: Any) -> Path:
    named = {"config": recipe, "run_dir": run, "data.workers": 0, **options}
    run_command("fit", [part for name, value in named.items() for part in (f"--{name}", str(value))])
    return run


def train_autoencoders(folder: Path, plan: Plan) -> dict[str, Path]:
    """The runs of A, of A with its fine-tuned decoder and of B."""
    say(f"training A and B, {plan.steps} steps each, and A's decoder again, {plan.tuning_steps}")
    a = fit(folder / "a", "demo", **{"trainer.max_steps": plan.steps})
    b = fit(folder / "b", "demo", **{"trainer.max_steps": plan.steps, "seed_everything": OTHER_SEED})
    start = {"model.autoencoder.init_from": a, "seed_everything": TUNING_SEED, "trainer.max_steps": plan.tuning_steps}
    return {OWN: a, TUNED: fit(folder / "tuned", "demo", **start, **TUNING), OTHER: b}


def train_pipeline(folder: Path, plan: Plan, autoencoder: Path) -> Path:
    """The pipeline of a denoiser that has learnt the photos by heart, each as a class with its name."""
    say(f"training a denoiser on the latents of {autoencoder.name}, {plan.denoiser_steps} steps")
    for name, image in photos("train").items():
        (folder / "photos" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "photos" / name / f"{name}.png")
    store, run, pipeline = (folder / f"{autoencoder.name}-{what}" for what in ("latents", "flow", "pipeline"))
    run_command("encode", [str(folder / "photos"), str(store), "--model", str(autoencoder), "--size", str(plan.size)])
    options = {"model.codec": autoencoder, "data.path": store, "trainer.max_steps": plan.denoiser_steps}
    fit(run, "diffusion/tiny", **options, **DENOISER)
    run_command("export", [str(run), str(pipeline)])
    return pipeline


def draw(pipe: Any, plan: Plan) -> Tensor:
    """Pictures of all classes by name, each from all seeds: (classes * seeds, 3, size, size) in [-1, 1]."""
    pipe.set_progress_bar_config(disable=True)
    names = sorted(pipe.labels)
    images = pipe(
        names,
        num_images=len(plan.seeds),
        guidance_scale=1.0,
        num_inference_steps=plan.euler_steps,
        generator=[torch.Generator().manual_seed(seed) for _ in names for seed in plan.seeds],
        output_type="pt",
    ).images
    return images * 2 - 1


def draw_with_all(folder: Path, plan: Plan, runs: dict[str, Path]) -> dict[str, Tensor]:
    """The pictures of one pipeline with one autoencoder after the other, and of a second one with a new denoiser."""
    pipeline, other_pipeline = (train_pipeline(folder, plan, runs[name]) for name in (OWN, OTHER))
    run_command("export", [str(runs[OWN]), str(folder / "stock")])
    vaes = {name: latentae.load(run) for name, run in runs.items()}
    vaes[STOCK] = AutoencoderDC.from_pretrained(folder / "stock")
    swapped = {name: ClassConditionalFlowPipeline.from_pretrained(pipeline, vae=vae) for name, vae in vaes.items()}
    retrained = ClassConditionalFlowPipeline.from_pretrained(other_pipeline)
    its_own = {key: retrained.config[key] for key in ("latents_mean", "latents_std")}
    rescaled = ClassConditionalFlowPipeline.from_pretrained(pipeline, vae=vaes[OTHER], **its_own)
    pipes = {**swapped, RESCALED: rescaled, RETRAINED: retrained}
    order = (OWN, STOCK, TUNED, OTHER, RESCALED, RETRAINED)
    return {name: draw(pipes[name], plan) for name in order}


def changed(run: Path, other: Path) -> dict[str, list[int]]:
    """Of encoder and decoder, how many tensors of two runs differ in any bit, and how many there are."""
    a, b = (latentae.load(path).state_dict() for path in (run, other))
    counts = {}
    for half in ("encoder", "decoder"):
        differ = [not torch.equal(a[key], b[key]) for key in a if key.startswith(half)]
        counts[half] = [sum(differ), len(differ)]
    return counts


def decibels(a: Tensor, b: Tensor) -> Tensor:
    """PSNR of each picture, `EQUAL` where it is the same."""
    return psnr(a, b).clamp(max=EQUAL)


def measure(pictures: dict[str, Tensor], runs: dict[str, Path], plan: Plan) -> dict[str, Any]:
    """PSNR of every picture to A's and to its photo, and what they are to be compared with."""
    crops = [to_tensor(adm_center_crop(image, plan.size)) for _, image in sorted(photos("train").items())]
    originals = torch.stack(crops)
    of_seeds = originals.repeat_interleave(len(plan.seeds), dim=0)
    rounded = {name: to_uint8(x) for name, x in pictures.items()}
    own = rounded[OWN]
    first = own[:: len(plan.seeds)]
    reconstructions = {}
    for name, run in runs.items():
        codec = LatentCodec(latentae.load(run))
        made = decibels(to_uint8(codec.decode(codec.encode(originals))), originals)
        reconstructions[name] = made.repeat_interleave(len(plan.seeds)).tolist()
    pairs = torch.tensor(list(itertools.combinations(range(len(first)), 2)))
    return {
        "to_a": {name: decibels(x, own).tolist() for name, x in rounded.items() if name != OWN},
        "to_photo": {name: decibels(x, of_seeds).tolist() for name, x in rounded.items()},
        "reconstruction": reconstructions,
        "a_to_a_of_other_photos": decibels(first[pairs[:, 0]], first[pairs[:, 1]]).tolist(),
        "largest_difference_of_stock_class": (pictures[STOCK] - pictures[OWN]).abs().max().item(),
        "changed_tensors": changed(runs[OWN], runs[TUNED]),
    }


def thresholds(figures: dict[str, Any]) -> list[dict[str, Any]]:
    encoder, decoder = (figures["changed_tensors"][half] for half in ("encoder", "decoder"))
    rounding = figures["largest_difference_of_stock_class"]
    tuned, other, rescaled = (figures["to_a"][name] for name in (TUNED, OTHER, RESCALED))
    missing = {  # dB to the photo that pictures have less than the reconstruction has
        name: max(a - b for a, b in zip(figures["reconstruction"][run], figures["to_photo"][name], strict=True))
        for name, run in ((OWN, OWN), (RETRAINED, OTHER))
    }
    rows = [
        (
            "fine-tuning the decoder leaves the encoder bit for bit",
            f"{encoder[0]} of {encoder[1]} tensors differ, of the decoder's {decoder[0]} of {decoder[1]}",
            encoder[0] == 0 < decoder[0],
        ),
        (
            "the denoiser has learnt the photos",
            f"pictures at most {missing[OWN]:.1f} dB below reconstructions, allowed {MOST_UNLEARNT:.1f}",
            missing[OWN] <= MOST_UNLEARNT,
        ),
        (
            "the stock class draws the same",
            f"to {rounding:.0e}, allowed {LARGEST_ROUNDING:.0e}",
            rounding <= LARGEST_ROUNDING,
        ),
        (
            "with the fine-tuned decoder pictures change only in detail",
            f"{min(tuned):.1f} to {max(tuned):.1f} dB, wanted {LEAST_TUNED:.0f} in every one",
            min(tuned) >= LEAST_TUNED,
        ),
        (
            "with another latent space they are lost",
            f"{min(other):.1f} to {max(other):.1f} dB, allowed {MOST_OTHER:.0f} in every one",
            max(other) <= MOST_OTHER,
        ),
        (
            "other statistics do not bring them back",
            f"{min(rescaled):.1f} to {max(rescaled):.1f} dB, allowed {MOST_OTHER:.0f} in every one",
            max(rescaled) <= MOST_OTHER,
        ),
        (
            "a retrained denoiser does",
            f"pictures at most {missing[RETRAINED]:.1f} dB below reconstructions, allowed {MOST_UNLEARNT:.1f}",
            missing[RETRAINED] <= MOST_UNLEARNT,
        ),
    ]
    return [{"sentence": sentence, "found": found, "shown": shown} for sentence, found, shown in rows]


def run(tier: str, quick: bool, steps: int | None, figure: Path | None) -> dict[str, Any]:
    """Train, swap, measure; prints the table. See `claims.py` for the arguments."""
    if tier != "cpu":
        raise RequestError("The claim pipeline has only its cpu tier: leave --tier out.")
    plan = QUICK if quick else FULL
    plan = replace(plan, steps=steps or plan.steps)
    with TemporaryDirectory() as folder:
        runs = train_autoencoders(Path(folder), plan)
        pictures = draw_with_all(Path(folder), plan, runs)
        figures = measure(pictures, runs, plan)
    print_table(figures)
    if figure:
        rows = {label: pictures[name][:: len(plan.seeds)] for name, label in ROWS.items()}
        picture_of(rows).save(figure, quality=88)
    return {
        "claim": "An autoencoder fine-tuned in place keeps a pipeline's pictures; another latent space does not.",
        "setting": {
            **asdict(plan),
            "tuning_steps": plan.tuning_steps,
            "tuning": TUNING,
            "photos": sorted(photos("train")),
            "recipes": ["demo", "diffusion/tiny"],
            "denoiser": DENOISER,
        },
        **figures,
        "thresholds": thresholds(figures),
        "shown": all(verdict["shown"] for verdict in thresholds(figures)),
    }


def print_table(figures: dict[str, Any]) -> None:
    rows = []
    for name, to_photo in figures["to_photo"].items():
        to_a = figures["to_a"].get(name, [])
        made = figures["reconstruction"].get(OTHER if name.startswith(OTHER) else name, [])
        rows.append([name, *map(spread, (to_a, to_photo, made))])
    rows.append(["A, of another photo", spread(figures["a_to_a_of_other_photos"]), "", ""])
    columns = ["PSNR in dB: mean (lowest to highest)", "to A's picture", "to the photo", "reconstruction to the photo"]
    print(format_table(columns, rows))


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.1f} ({min(values):.1f} to {max(values):.1f})" if values else ""


def picture_of(rows: dict[str, Tensor], gap: int = 2, margin: int = 96) -> Image.Image:
    """Rows of pictures in [-1, 1] with their names on the left."""
    count, _, height, width = next(iter(rows.values())).shape
    sheet = Image.new("RGB", (margin + count * (width + gap) - gap, len(rows) * (height + gap) - gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, (label, pictures) in enumerate(rows.items()):
        top = row * (height + gap)
        pen.text((4, top + height / 2), label, fill="black", font=font, anchor="lm")
        for column, picture in enumerate(to_uint8(pictures)):
            sheet.paste(Image.fromarray(picture.permute(1, 2, 0).numpy()), (margin + column * (width + gap), top))
    return sheet
