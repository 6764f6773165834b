"""What a higher ratio buys a diffusion model (DC-AE, arXiv 2410.10733): fewer tokens, so less time and memory.

The paper's rows, at 512 px on an H100: UViT-H from SD-VAE f8 with patches of 2 (1,024 tokens) to DC-AE f64 with patches
of 1 (64 tokens), 17.9 times the images per second in training and 19.1 times in inference; DiT-XL from the same to
DC-AE f32 with patches of 1 (256 tokens), 4.5 and 4.7 times. Both rows are measured here with DiT, whose depth and width
at size XL are about UViT-H's: on a CPU training with DiT-S, sampling with DiT-S and DiT-XL; on a GPU all with DiT-XL.

Weights are random, since time does not depend on them. A training step is forward, backward and AdamW at equal
batches; a sampling step is one forward of one image. A whole image is so many evaluations of the denoiser (the paper's
UViT takes 30, its DiT 250; guidance takes each twice) and one decoding, put together from the medians. Denoisers are
`latentae.denoisers`, DC-AE is ours, SD-VAE the stock class: `tools/compare_speed.py dcae` says by how much our decoder
is faster than DC-AE's stock class. Runs alternate; a ratio is the median of pairwise ratios.

Two controls have the tokens without the autoencoder: SD-VAE with patches of 4 and 8. What they lose is quality, which
is not measured here (in the paper's table FID 125 against 67 without guidance, UViT-S, 64 tokens).

On a CPU the seconds are of the CPU with one thread, of the wall clock with more, and the memory is what a process of
its own grows by over what it had before it built the model. ``--steps`` are the rounds of alternating runs.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compare_speed import alternate, pairwise, resident
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from latentae.bench.speed import device_name, stable_diffusion_vae
from latentae.console import format_table, say
from latentae.denoisers import create_denoiser, velocity_errors
from latentae.errors import RequestError
from latentae.families.presets import create


@dataclass(frozen=True)
class Space:
    """A latent space and the patches of the denoiser in it."""

    autoencoder: str
    factor: int
    channels: int
    patch: int

    def shape(self, size: int) -> tuple[int, int, int]:
        return self.channels, size // self.factor, size // self.factor

    def tokens(self, size: int) -> int:
        return (size // self.factor // self.patch) ** 2


BASE, F32, F64 = "SD-VAE f8 p2", "DC-AE f32 p1", "DC-AE f64 p1"
SPACES = {
    BASE: Space("sd-vae", 8, 4, 2),
    F32: Space("dc-ae-f32c32-in-1.0", 32, 32, 1),
    F64: Space("dc-ae-f64c128-in-1.0", 64, 128, 1),
}
CONTROLS = {"SD-VAE f8 p4": Space("sd-vae", 8, 4, 4), "SD-VAE f8 p8": Space("sd-vae", 8, 4, 8)}
PAPER = {F32: {"training": 4.5, "whole image": 4.7}, F64: {"training": 17.9, "whole image": 19.1}}
EVALUATIONS = (30, 250)
CLASSES = 1000


@dataclass(frozen=True)
class Tier:
    """How much is measured, and where.

    Attributes:
        trained: denoiser whose training step is measured, with ``batch`` images.
        sampled: denoisers whose sampling step is measured, with ``images`` images, as those of a decoding.
        narrow: autoencoders of few channels, for a smoke test.
    """

    device: str
    dtype: str
    size: int
    trained: str
    batch: int
    sampled: tuple[str, ...]
    images: int
    rounds: dict[str, int]
    narrow: bool = False


TIERS = {
    "cpu": Tier("cpu", "float32", 512, "dit-s", 4, ("dit-s", "dit-xl"), 1, {"step dit-s": 9, "training": 5}),
    "gpu": Tier("cuda", "bfloat16", 512, "dit-xl", 16, ("dit-xl",), 16, {"step dit-xl": 30, "training": 20}),
}
QUICK = Tier("cpu", "float32", 64, "dit-tiny", 1, ("dit-tiny",), 1, {"training": 1}, narrow=True)
ROUNDS = 3  # of what is not named there

# Written before the first run, from the multiplications: DiT-S needs 22 (f64) and 5.2 (f32) times fewer, DiT-XL 18 and
# 4.4; one image of DiT-XL with decoding 7.5 (f64, 30 evaluations) and 4.3 (f32, 250). Short sequences use a machine
# less well, so about half of that is wanted. An image of DiT-S in 30 evaluations is mostly decoding: 1.5.
LEAST = {  # (figure, space): times faster or smaller than with SD-VAE f8 p2
    ("training", F64): 10.0,
    ("training", F32): 3.0,
    ("training memory", F64): 2.5,
    ("training memory", F32): 2.0,
    ("step of the largest", F64): 9.0,
    ("step of the largest", F32): 3.0,
    ("whole image, 30 evaluations", F64): 4.0,
    ("whole image, 250 evaluations", F32): 3.0,
}
MOST_DECODING = 1.25  # seconds of DC-AE's decoder over those of SD-VAE's: "about as much"


def latent_noise(space: Space, tier: Tier, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *space.shape(tier.size), generator=generator).to(tier.device)


def denoiser_of(preset: str, space: Space, tier: Tier, blocks: nn.Module | None = None) -> Any:
    """A denoiser with random weights, or with the blocks of another, which do not know of patches."""
    description: dict[str, Any] = {"preset": preset, "patch_size": space.patch}
    if blocks is not None:
        description["num_layers"] = 0
    denoiser = create_denoiser(description, space.shape(tier.size), CLASSES)
    if blocks is not None:
        denoiser.transformer.transformer_blocks = blocks
    return denoiser.to(tier.device)


def training_step(space: Space, tier: Tier) -> Callable[[], None]:
    """One step of flow matching with random latents; weights stay in float32 and bfloat16 is autocast."""
    denoiser = denoiser_of(tier.trained, space, tier).train()
    clean, noise = latent_noise(space, tier, 2 * tier.batch).chunk(2)
    t = torch.linspace(0.1, 0.9, tier.batch, device=tier.device)
    labels = torch.arange(tier.batch, device=tier.device)
    return flow_step(denoiser, clean, t, noise, labels, tier)


def flow_step(
    denoiser: Any, clean: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor, tier: Any
) -> Callable[[], None]:
    """Forward, backward and AdamW on the device and in the precision of a tier."""
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-4)
    dtype = getattr(torch, tier.dtype)

    def step() -> None:
        with torch.autocast(tier.device, dtype, enabled=dtype != torch.float32):
            loss = velocity_errors(denoiser, clean, t, noise, labels).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        finish(tier)

    return step


def sampling_step(preset: str, space: Space, tier: Tier, blocks: nn.Module | None = None) -> Callable[[], None]:
    denoiser = denoiser_of(preset, space, tier, blocks).to(getattr(torch, tier.dtype)).eval()
    noise = latent_noise(space, tier, tier.images).to(getattr(torch, tier.dtype))
    t = torch.full((tier.images,), 0.5, device=tier.device, dtype=noise.dtype)
    labels = torch.zeros(tier.images, dtype=torch.long, device=tier.device)

    @torch.no_grad()
    def step() -> None:
        denoiser(noise, t, labels)
        finish(tier)

    return step


def decoding(space: Space, tier: Tier) -> Callable[[], None]:
    """The decoder alone: the encoder's weights are dropped."""
    autoencoder = autoencoder_of(space.autoencoder, tier)
    autoencoder.encoder = None
    gc.collect()
    autoencoder = nn.Module.to(autoencoder, tier.device, getattr(torch, tier.dtype))
    latents = latent_noise(space, tier, tier.images).to(getattr(torch, tier.dtype))

    @torch.no_grad()
    def step() -> None:
        autoencoder.decode(latents)
        finish(tier)

    return step


def autoencoder_of(name: str, tier: Tier) -> Any:
    if name == "sd-vae":
        return stable_diffusion_vae("cpu").eval()
    if not tier.narrow:
        return create(name)
    stages = {"dc-ae-f32c32-in-1.0": 6, "dc-ae-f64c128-in-1.0": 7}[name]
    widths = (32,) * (stages - 1) + (128,)
    return create(name, encoder_block_out_channels=widths, decoder_block_out_channels=widths)


def finish(tier: Tier) -> None:
    if tier.device == "cuda":
        torch.cuda.synchronize()


def measured(ways: dict[str, Callable[[], None]], rounds: int, on_fakes: bool = False) -> dict[str, Any]:
    """Seconds of alternating runs, and billions of multiplications of convolutions, matrix products and attention.

    The run that is counted is the warm-up, unless it is one on tensors without values.
    """
    macs = {}
    for name, way in ways.items():
        mode = FakeTensorMode(allow_non_fake_inputs=True) if on_fakes else contextlib.nullcontext()
        with mode, FlopCounterMode(display=False) as counter:
            way()
        macs[name] = counter.get_total_flops() / 2e9
    return {"giga_macs": macs, "seconds": alternate(ways, rounds)}


def peak_memory(make: Callable[[], Callable[[], None]], tier: Tier) -> int:
    """Bytes that a model and two runs take at most: of a GPU, or of a process of its own."""
    if tier.device == "cuda":
        gc.collect()
        before = torch.cuda.memory_allocated()
        step = make()
        torch.cuda.reset_peak_memory_stats()
        step()
        step()
        return torch.cuda.max_memory_allocated() - before
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(grown_by, make, torch.get_num_threads()).result()


def grown_by(make: Callable[[], Callable[[], None]], threads: int) -> int:
    torch.set_num_threads(threads)
    before = resident("VmRSS")
    step = make()
    with contextlib.suppress(AttributeError, OSError):  # else the peak is that of building, an upper bound
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    step()
    step()
    return resident("VmHWM") - before


def run(tier: str, quick: bool, steps: int | None, figure: Path | None) -> dict[str, Any]:
    """Measure everything; prints the tables and draws the figure. See `claims.py` for the arguments."""
    how = QUICK if quick else TIERS[tier]
    if tier == "gpu" and not torch.cuda.is_available():
        raise RequestError("The tier gpu of the claim dcae-speed needs a CUDA device: leave --tier out.")
    load = os.getloadavg()[0]
    figures = measure(how, steps)
    speedups = {name: ratios_of(figures, name) for name in [*SPACES, *CONTROLS] if name != BASE}
    images = whole_images(figures, how)
    verdicts = thresholds(figures, speedups, images)
    print_tables(figures, images, how)
    if figure:
        draw(figure, figures, images, how)
    return {
        "claim": "A higher ratio makes latent diffusion faster, decoding included (DC-AE, arXiv 2410.10733).",
        "setting": {
            **asdict(how),
            "device": device_name(torch.device(how.device)),
            "threads": torch.get_num_threads(),
            "load_average": load,
            "spaces": {k: asdict(v) | {"tokens": v.tokens(how.size)} for k, v in (SPACES | CONTROLS).items()},
            "seconds_are": "of the CPU" if how.device == "cpu" and torch.get_num_threads() == 1 else "of the clock",
            "memory_is": "grown by a process of its own" if how.device == "cpu" else "allocated on the device",
        },
        "paper": PAPER,
        "figures": figures,
        "speedups": speedups,
        "whole_images": images,
        "thresholds": verdicts,
        "shown": all(verdict["shown"] for verdict in verdicts),
    }


def measure(tier: Tier, rounds: int | None) -> dict[str, dict[str, Any]]:
    """Training, sampling and decoding: ``seconds``, ``giga_macs`` and where measured ``peak_bytes`` by space."""

    def repeats(figure: str) -> int:
        return rounds or tier.rounds.get(figure, ROUNDS)

    figures = {}
    say(f"training steps of {tier.trained}")
    ways = {name: training_step(space, tier) for name, space in SPACES.items()}
    figures["training"] = measured(ways, repeats("training"))
    ways.clear()
    for preset in tier.sampled:
        say(f"sampling steps of {preset}")
        blocks = denoiser_of(preset, SPACES[BASE], tier).transformer.transformer_blocks
        spaces = SPACES | CONTROLS
        ways = {name: sampling_step(preset, space, tier, blocks) for name, space in spaces.items()}
        figures[f"step {preset}"] = measured(ways, repeats(f"step {preset}"))
        ways.clear()
    del blocks
    say("decoding")
    ways = {name: decoding(space, tier) for name, space in SPACES.items()}
    figures["decoding"] = measured(ways, repeats("decoding"), on_fakes=True)
    ways.clear()
    say("memory")
    for name, space in SPACES.items():
        for task, make in (("training", training_step), ("decoding", decoding)):
            peak = peak_memory(partial(make, space, tier), tier)
            figures[task].setdefault("peak_bytes", {})[name] = peak
    return figures


def ratios_of(figures: dict[str, dict[str, Any]], name: str) -> dict[str, dict[str, float]]:
    """By how much SD-VAE f8 p2 costs more than a space, by figure: ``seconds``, ``giga_macs`` and ``peak_bytes``."""
    ratios: dict[str, dict[str, float]] = {}
    for key, values in figures.items():
        if name not in values["seconds"]:
            continue
        ratios[key] = {"seconds": pairwise(values["seconds"][BASE], values["seconds"][name])}
        for other in ("giga_macs", "peak_bytes"):
            if other in values:
                ratios[key][other] = values[other][BASE] / values[other][name]
    return ratios


def whole_images(figures: dict[str, dict[str, Any]], tier: Tier) -> list[dict[str, Any]]:
    """Seconds of one image by denoiser, evaluations and space, and what of them is decoding."""
    rows: list[dict[str, Any]] = []
    decoding = figures["decoding"]
    for preset in tier.sampled:
        step = figures[f"step {preset}"]
        for evaluations in EVALUATIONS:
            for name in [*SPACES, *CONTROLS]:
                decoder = name if name in SPACES else BASE
                seconds = [
                    statistics.median(x) / tier.images for x in (step["seconds"][name], decoding["seconds"][decoder])
                ]
                macs = [step["giga_macs"][name] / tier.images, decoding["giga_macs"][decoder] / tier.images]
                whole, arithmetic = (evaluations * one + last for one, last in (seconds, macs))
                row = {"denoiser": preset, "evaluations": evaluations, "space": name, "seconds": whole}
                row |= {"seconds_of_decoding": seconds[1], "giga_macs": arithmetic}
                base = row if name == BASE else next(r for r in reversed(rows) if r["space"] == BASE)
                row["speedup"] = base["seconds"] / whole
                row["speedup_by_arithmetic"] = base["giga_macs"] / arithmetic
                rows.append(row)
    return rows


def thresholds(
    figures: dict[str, dict[str, Any]], speedups: dict[str, dict[str, dict[str, float]]], images: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    largest = images[-1]["denoiser"]
    found = {}
    for name in (F32, F64):
        found["training", name] = speedups[name]["training"]["seconds"]
        found["training memory", name] = speedups[name]["training"]["peak_bytes"]
        found["step of the largest", name] = speedups[name][f"step {largest}"]["seconds"]
        for row in images:
            if row["denoiser"] == largest and row["space"] == name:
                found[f"whole image, {row['evaluations']} evaluations", name] = row["speedup"]
    verdicts = []
    for (figure, name), least in LEAST.items():
        value = found[figure, name]
        sentence = f"{name} against {BASE}, {figure.replace('of the largest', f'of {largest}')}"
        text = f"{value:.1f}x, wanted {least:g}x"
        verdicts.append({"sentence": sentence, "value": value, "found": text, "shown": value >= least})
    for name in (F32, F64):
        value = 1 / speedups[name]["decoding"]["seconds"]
        text = f"{value:.2f} times its seconds, at most {MOST_DECODING:g}"
        sentence = f"{name} decodes about as fast as SD-VAE"
        verdicts.append({"sentence": sentence, "value": value, "found": text, "shown": value <= MOST_DECODING})
    return verdicts


def print_tables(figures: dict[str, dict[str, Any]], images: list[dict[str, Any]], tier: Tier) -> None:
    rows: list[list[Any]] = []
    for key, values in figures.items():
        for name, seconds in values["seconds"].items():
            ratio = pairwise(values["seconds"][BASE], seconds)
            macs = values["giga_macs"]
            peak = values.get("peak_bytes", {}).get(name)
            gib = peak and peak / 2**30
            tokens = (SPACES | CONTROLS)[name].tokens(tier.size)
            arithmetic = macs[BASE] / macs[name]
            rows.append([key, name, tokens, statistics.median(seconds), ratio, macs[name], arithmetic, gib])
    header = ["one run", "latents", "tokens", "seconds", "times faster", "GMAC", "times fewer", "peak GiB"]
    print(format_table(header, rows))
    print()
    columns = ["denoiser", "evaluations", "space", "seconds", "seconds_of_decoding", "speedup", "speedup_by_arithmetic"]
    header = ["denoiser", "evaluations", "latents", "seconds", "of them decoding", "times faster", "by arithmetic"]
    print("one image, decoding included")
    print(format_table(header, [[row[column] for column in columns] for row in images]))


def draw(path: Path, figures: dict[str, dict[str, Any]], images: list[dict[str, Any]], tier: Tier) -> None:
    """A PNG: how many times faster by space, measured and by arithmetic; and the seconds of one image."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, 1 + len(tier.sampled), figsize=(6 + 4.5 * len(tier.sampled), 4.5), layout="constrained"
    )
    names = [F32, F64]
    keys = [key for key in figures if key != "decoding"] + ["decoding"]
    for number, name in enumerate(names):
        ratios = ratios_of(figures, name)
        x = [i + 0.4 * (number - 0.5) for i in range(len(keys))]
        axes[0].bar(x, [ratios[key]["seconds"] for key in keys], 0.36, color=f"C{number}", label=f"{name}, measured")
        axes[0].plot(
            x, [ratios[key]["giga_macs"] for key in keys], "k_", markersize=14, label=number * "_" + "by arithmetic"
        )
    axes[0].set_yscale("log")
    axes[0].set_xticks(range(len(keys)), keys)
    axes[0].set_ylabel(f"times faster than {BASE}")
    axes[0].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.13), ncols=3)
    for axis, preset in zip(axes[1:], tier.sampled):
        rows = [row for row in images if row["denoiser"] == preset and row["space"] in SPACES]
        labels = [
            f"{row['space'].split()[0]}\n{row['space'].split(maxsplit=1)[1]}\n{row['evaluations']}" for row in rows
        ]
        decoded = [row["seconds_of_decoding"] for row in rows]
        axis.bar(
            labels, [r["seconds"] - d for r, d in zip(rows, decoded)], bottom=decoded, color="C0", label="denoising"
        )
        axis.bar(labels, decoded, color="C1", label="decoding")
        axis.set_title(f"{preset}: one image at {tier.size} px, by evaluations")
        axis.set_ylabel("seconds")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
