"""The codecs of the claim probe: those of the claim eqvae, and a DC-AE f16c16 trained as its f8c4 was.

f16c16 has as many floats per pixel as f8c4, one for 16 pixels. It is the f8c4 with one stage more at both ends, 64
channels wide, and attention in the deepest, as there. Its start sees the pictures that the start of eqvae saw, for as
many steps at the best of three rates, and is then fine-tuned plainly, for as many steps as the arms of eqvae, with
their three seeds. Models that are there already are not trained again.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from claims import eqvae
from claims.frame import SEARCH_SEED, Arm, Plan, best_rate, run_arms, train, train_start
from claims.pictures import held_out_pictures, psnr_by_kind, stream, tune_pictures
from latentae.console import say
from latentae.families.presets import create
from latentae.files import write_json
from latentae.loading import export
from latentae.nn.pixels import to_float

PLAIN, EQ, SCALE, DEEP = "plain", "EQ", "scale only", "DC-AE f16"
SEEDS = (0, 1, 2)
EQVAE_FOLDERS = {PLAIN: "plain-fine-tuning", EQ: "eq", SCALE: "scale-only"}  # as the claim eqvae names them
MODELS, DEEP_FOLDER = "probe-models", "dc-ae-f16"

WIDTHS, DEEP_CHANNELS = (16, 16, 32, 32, 64), 16
START_RATES, START_SEARCH_STEPS = (2e-3, 4e-3, 8e-3), 500
WEIGHTS = "diffusion_pytorch_model.safetensors"


def folder_of(results: Path, codec: str, seed: int) -> Path:
    """Where a codec of a seed lies; ``results`` is where the claims leave what they find."""
    if codec == DEEP:
        return results / MODELS / f"{DEEP_FOLDER}-seed{seed}"
    return results / "eqvae-models" / f"{EQVAE_FOLDERS[codec]}-seed{seed}"


def deep_model(seed: int) -> Any:
    """The f16c16 with random weights."""
    stages = len(WIDTHS)
    blocks = ("ResBlock",) * (stages - 1) + ("EfficientViTBlock",)
    depths, scales = (0,) + (1,) * (stages - 1), ((),) * stages
    return create(
        eqvae.PRESET,
        seed=seed,
        latent_channels=DEEP_CHANNELS,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=WIDTHS,
        decoder_block_out_channels=WIDTHS,
        encoder_layers_per_block=depths,
        decoder_layers_per_block=depths,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        **eqvae.NETWORK,
    ).train()


def measure(module: Any, pictures: dict[str, Tensor]) -> dict[str, float]:
    made = {kind: torch.cat([module(to_float(one)).sample for one in x.split(4)]) for kind, x in pictures.items()}
    return psnr_by_kind(made, pictures)


def train_deep(results: Path, quick: bool) -> None:
    """Train the f16c16: its start, then three plain fine-tunings, each kept in its folder."""
    start_steps, steps, search_steps = (4, 2, 1) if quick else (eqvae.START_STEPS, eqvae.STEPS, START_SEARCH_STEPS)
    leaves, crop = (1, 64) if quick else (eqvae.TEST_LEAVES, eqvae.TEST_CROP)
    test, tune = held_out_pictures(leaves, crop), tune_pictures(leaves, crop)
    plan = Plan(steps, search_steps, eqvae.LEARNING_RATES, evaluations=1, seeds=SEEDS)

    say(f"the rate of the f16's start, {len(START_RATES)} times {search_steps} steps")
    begin = Arm("start", deep_model, lambda m, seed, step: eqvae.loss_of(m, seed, step, search_steps, None))
    search = {}
    for rate in START_RATES:
        run = train(begin, SEARCH_SEED, rate, search_steps, lambda module: measure(module, tune), evaluations=1)
        search[rate] = None if run.diverged else run.final("psnr")
    stream.cache_clear()

    say(f"the f16's start, {start_steps} steps at {best_rate(search):g}")
    start = train_start(
        deep_model,
        lambda module, seed, step: eqvae.loss_of(module, seed, step, start_steps, None),
        eqvae.START_SEED,
        best_rate(search),
        start_steps,
    )
    stream.cache_clear()
    export(start, results / MODELS / f"{DEEP_FOLDER}-start")
    with torch.no_grad():
        untouched = measure(start, test)

    def keep(module: nn.Module, seed: int) -> None:
        export(module, folder_of(results, DEEP, seed))

    fine = Arm(
        DEEP,
        lambda seed: copy.deepcopy(start).train(),
        lambda module, seed, step: eqvae.loss_of(module, seed, step, plan.steps, None),
        keep,
    )
    [outcome] = run_arms(
        [fine], plan, lambda module: measure(module, tune), lambda module: measure(module, test), "psnr"
    )
    stream.cache_clear()
    result = {
        "start": {"search": {str(rate): value for rate, value in search.items()}, "steps": start_steps, **untouched},
        "fine_tuned": outcome.as_json(list(untouched)),
    }
    write_json(results / MODELS / f"{DEEP_FOLDER}.json", result)


def train_missing(results: Path, quick: bool) -> None:
    """Train what is not there; the claim eqvae as a whole where one of its models is missing."""
    if any(not (folder_of(results, name, seed) / WEIGHTS).exists() for name in EQVAE_FOLDERS for seed in SEEDS):
        eqvae.run("cpu", quick, None, results / "eqvae.png")
    if any(not (folder_of(results, DEEP, seed) / WEIGHTS).exists() for seed in SEEDS):
        train_deep(results, quick)
