"""Our training step against the usual one on the same model, data and losses, in one process.

    python tools/compare_training.py [--full] [--size 128] [--batch 2] [--runs 7] [--threads 2] [--json FILE]

The usual step of latent diffusion's autoencoders, and of those that grew out of it, encodes and decodes every batch
twice: once to train the generator, once more to train the discriminator. Ours does so once; the discriminator learns
from the same, detached reconstruction. The usual step below is written from that description. It is given what
favours it: a bare loop without Lightning, no second perceptual loss, no adaptive weight, networks frozen in the half
step of the other. Ours is timed inside of a Lightning fit, from one batch's start to its end.

Losses: L1, LPIPS on a VGG16 with random weights (the arithmetic is the same), PatchGAN with hinge. Steps alternate; the
speedup is the median of pairwise ratios of seconds, the prediction the ratio of counted multiplications, backward
passes included. Peak memory is that of a fresh process for each step, on CUDA of the allocator; on a CPU glibc is told
to give freed blocks back at once, as its holes, 1 to 3 % of the peak, would hide what the tensors need.
"""

import argparse
import copy
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from latentae.console import format_table
from latentae.data.samples import dead_leaves
from latentae.data.transforms import to_tensor
from latentae.errors import LatentAEError
from latentae.files import write_json
from latentae.nn.pixels import to_float
from latentae.objectives import L1, LPIPS, Adversary, Objective, PatchGAN, Step
from latentae.training.autoencoder import AutoencoderModule
from latentae.training.cli import TRAINER_DEFAULTS, quiet_libraries

WANTED = 0.95  # share of the predicted ratio that the measured one must reach
WIDTHS = {"tiny": (32, 32, 32, 32), "small": (64, 128, 256, 256), "full": (128, 256, 512, 512)}
LAYERS = {"tiny": 1, "small": 2, "full": 2}
LEARNING_RATE, CLIP = 4.5e-6, 1.0


def build_autoencoder(preset: str) -> AutoencoderKL:
    """SD-VAE f8c4, as wide as published (``full``) or narrower, random weights, without its posterior's noise."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=WIDTHS[preset],
        layers_per_block=LAYERS[preset],
        latent_channels=4,
        norm_num_groups=32,
    )


def build_losses() -> tuple[dict[str, Any], Adversary]:
    """The terms and the adversary, the same at every call."""
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "vgg16.pth")
        features = make_layers(cfgs["D"]).state_dict()  # VGG16 without its classifier
        torch.save({f"features.{key}": value for key, value in features.items()}, file)
        terms = {"l1": L1(1.0), "lpips": LPIPS(0.5, net="vgg", path=str(file))}
    return terms, Adversary(PatchGAN(), weight=0.1, lecam=0.0)


def optimizer_of(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=LEARNING_RATE, betas=(0.5, 0.9))


class TwoPassStep:
    """The usual step: a whole forward pass for the generator, another one for the discriminator.

    Args:
        autoencoder, discriminator: networks of its own.
        objective, adversary: the losses; the adversary's own discriminator is left alone.
    """

    def __init__(self, autoencoder: nn.Module, objective: Objective, adversary: Adversary):
        self.autoencoder: Any = autoencoder.train()
        self.objective = objective
        self.adversary = adversary
        self.generator_optimizer = optimizer_of(autoencoder.parameters())
        self.discriminator_optimizer = optimizer_of(adversary.discriminator.parameters())

    def reconstruct(self, pixels: Tensor) -> tuple[Any, Tensor]:
        posterior = self.autoencoder.encode(pixels).latent_dist
        return posterior, self.autoencoder.decode(posterior.sample()).sample

    def __call__(self, batch: Tensor) -> None:
        """Learn from uint8 pixels (B, 3, H, W)."""
        pixels = to_float(batch)
        posterior, reconstruction = self.reconstruct(pixels)
        loss, _ = self.objective(Step(pixels, reconstruction, posterior))
        loss = loss + self.adversary.weight * self.adversary.generator_loss(reconstruction)
        loss.backward()
        clip_grad_norm_(self.autoencoder.parameters(), CLIP)
        self.generator_optimizer.step()
        self.generator_optimizer.zero_grad()

        with torch.no_grad():  # the autoencoder is frozen in this half of the step
            _, reconstruction = self.reconstruct(pixels)
        loss, _ = self.adversary.discriminator_loss(pixels, reconstruction)
        loss.backward()
        clip_grad_norm_(self.adversary.discriminator.parameters(), CLIP)
        self.discriminator_optimizer.step()
        self.discriminator_optimizer.zero_grad()


class Alternate(pl.Callback):
    """Times each of our steps, then runs and times one of the other kind; the first pairs are the warm-up."""

    def __init__(self, other: Callable[[Tensor], None], device: torch.device):
        self.other = other
        self.device = device
        self.started = 0.0
        self.pairs: list[tuple[float, float]] = []  # seconds of the other and of ours

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_train_batch_start(self, *_: Any) -> None:
        self.started = self.now()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        middle = self.now()
        self.other(batch["pixels"])
        self.pairs.append((self.now() - middle, middle - self.started))


class CountStep(pl.Callback):
    """Counts the operations of the first of our steps."""

    def __init__(self) -> None:
        self.counter = FlopCounterMode(display=False)

    def on_train_batch_start(self, *_: Any) -> None:
        self.counter.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self.counter.__exit__(None, None, None)


def our_module(preset: str) -> AutoencoderModule:
    terms, adversary = build_losses()
    autoencoder = build_autoencoder(preset)
    return AutoencoderModule(autoencoder, terms, adversary, ema=None, optimizer=optimizer_of, gradient_clip=CLIP)


def fit(module: AutoencoderModule, batch: Tensor, steps: int, device: torch.device, *callbacks: pl.Callback) -> None:
    """Train on one batch again and again."""
    trainer = pl.Trainer(
        **{**TRAINER_DEFAULTS, "max_steps": steps},
        accelerator="cuda" if device.type == "cuda" else "cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=list(callbacks),
    )
    loader: Any = DataLoader([{"pixels": image} for image in batch] * steps, batch_size=len(batch))
    trainer.fit(module, loader)


def make_batch(size: int, count: int) -> Tensor:
    return torch.stack([to_tensor(dead_leaves(i, size)) for i in range(count)])  # (B, 3, H, W)


def two_pass_step(module: AutoencoderModule, device: torch.device) -> TwoPassStep:
    """The usual step on copies of the module's networks; the frozen perceptual network is shared."""
    adversary = copy.deepcopy(module.adversary)
    assert adversary is not None
    return TwoPassStep(copy.deepcopy(module.autoencoder).to(device), module.objective, adversary.to(device))


def compare(preset: str, size: int, count: int, runs: int, device: torch.device) -> dict[str, Any]:
    """Counted operations of both steps, seconds of alternating runs, and their ratios."""
    batch = make_batch(size, count)
    module = our_module(preset)
    usual = two_pass_step(module, device)

    counting = CountStep()
    fit(module, batch, 1, device, counting)
    with FlopCounterMode(display=False) as counter:
        usual(batch.to(device))
    operations = {"usual": counter.get_total_flops(), "ours": counting.counter.get_total_flops()}

    alternate = Alternate(usual, device)
    fit(module, batch, runs + 1, device, alternate)
    pairs = alternate.pairs[1:]
    speedup = statistics.median(a / b for a, b in pairs)
    predicted = operations["usual"] / operations["ours"]
    return {
        "speedup": speedup,
        "predicted": predicted,
        "share_of_predicted": speedup / predicted,
        "usual": {
            "giga_macs": operations["usual"] / 2e9,
            "seconds": statistics.median(a for a, _ in pairs),
            "peak_mib": peak_memory("usual", preset, size, count, device),
        },
        "ours": {
            "giga_macs": operations["ours"] / 2e9,
            "seconds": statistics.median(b for _, b in pairs),
            "peak_mib": peak_memory("ours", preset, size, count, device),
        },
        "pairs": pairs,
    }


def peak_memory(which: str, preset: str, size: int, count: int, device: torch.device) -> float:
    """Peak memory of two steps in a fresh process, in MiB; the second one has optimizer states."""
    arguments = ["--peak-of", which, preset, str(size), str(count), "--device", device.type]
    command = [sys.executable, __file__, *arguments, "--threads", str(torch.get_num_threads())]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def print_peak(which: str, preset: str, size: int, count: int, device: torch.device) -> None:
    fit(our_module("tiny"), make_batch(32, 1), 1, device)  # both processes hold Lightning's own memory
    batch = make_batch(size, count)
    module = our_module(preset)
    if which == "ours":
        fit(module, batch, 2, device)
    else:
        assert module.adversary is not None
        usual = TwoPassStep(module.autoencoder.to(device), module.objective, module.adversary.to(device))
        for _ in range(2):
            usual(batch.to(device))
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated(device) / 2**20)
        return
    status = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**10)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    width = parser.add_mutually_exclusive_group()
    width.add_argument("--full", action="store_true", help="SD-VAE as wide as published (84 million parameters)")
    width.add_argument("--tiny", action="store_true", help="a smoke test; its figures mean nothing")
    parser.add_argument("--size", type=int, default=128, help="side of the images (default: 128)")
    parser.add_argument("--batch", type=int, default=2, help="images in a batch (default: 2)")
    parser.add_argument("--runs", type=int, default=7, help="pairs of steps after the warm-up (default: 7)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--peak-of", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    device = torch.device(args.device)
    try:
        with quiet_libraries():
            if args.peak_of:
                which, preset, size, count = args.peak_of
                print_peak(which, preset, int(size), int(count), device)
                return 0
            preset = "full" if args.full else "tiny" if args.tiny else "small"
            result = compare(preset, args.size, args.batch, args.runs, device)
    except LatentAEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code

    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {args.threads} threads"
    setting = {"model": f"AutoencoderKL, widths {WIDTHS[preset]}", "size": args.size, "batch": args.batch}
    setting |= {"runs": args.runs, "machine": machine, "torch": torch.__version__}
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    rows = []
    for name, label in [("usual", "two passes (usual)"), ("ours", "one pass (ours)")]:
        values = result[name]
        rows.append([label, values["giga_macs"], values["seconds"], values["peak_mib"]])
    ours, usual = result["ours"], result["usual"]
    rows.append(["ratio", result["predicted"], result["speedup"], usual["peak_mib"] / ours["peak_mib"]])
    print(format_table(["step", "GMAC", "seconds", "peak MiB"], rows))
    print(
        f"speedup {result['speedup']:.3f}x of {result['predicted']:.3f}x predicted by MACs: "
        f"{100 * result['share_of_predicted']:.1f} % of it (wanted: {100 * WANTED:.0f} %); "
        f"memory {ours['peak_mib'] / usual['peak_mib']:.3f}x"
    )
    if args.json:
        write_json(args.json, {"setting": setting, **result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
