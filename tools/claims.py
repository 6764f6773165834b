"""What each family promises, shown small and fairly.

    python tools/claims.py NAME [--tier cpu|gpu] [--threads 2] [--steps N] [--json FILE] [--figure FILE]

Experiments, not tests: a claim that does not show is reported with its numbers. The learning rate of each arm is the
best of three, three seeds are trained on frozen orders of data, trivial references stand in every table, and what
counts as shown is written in the script. Prints a table, then one summary line. The cpu tier takes minutes.

claims: dcae (residual shortcuts make high ratios trainable), dcae-speed (what a high ratio saves a diffusion
model: time, memory and arithmetic, nothing is trained), litevae (wavelets save the encoder's cost), eqvae (fine-tuning
makes latents equivariant; keeps its models beside the figure), probe (whether a small diffusion model finds them
easier; keeps what is done, and shares the rest with other processes), diffusion-decoder (a decoder that samples
restores detail), fourplane (planes of latents keep a clip and save tokens; keeps what is done, as probe does), pipeline
(a decoder fine-tuned in place keeps a pipeline's pictures, another latent space does not; the figure is of pictures)
"""

import argparse
import importlib
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from latentae.console import say
from latentae.errors import LatentAEError
from latentae.files import write_json
from latentae.version import __version__

CLAIMS = ("dcae", "dcae-speed", "litevae", "eqvae", "probe", "diffusion-decoder", "fourplane", "pipeline")


def summary(name: str, result: dict) -> str:
    """One line: what was found, with numbers, and whether that is enough."""
    parts = []
    for verdict in result["thresholds"]:
        parts.append(f"{verdict['sentence']}: {'shown' if verdict['shown'] else 'not shown'} ({verdict['found']})")
    return f"{name}: " + "; ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CLAIMS)
    parser.add_argument("--tier", choices=["cpu", "gpu"], default="cpu", help="minutes, or the full sweep")
    parser.add_argument("--quick", action="store_true", help="a smoke test in seconds; its figures mean nothing")
    parser.add_argument("--steps", type=int, metavar="N", help="of a reported run (default: the claim's own)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--clips", metavar="FOLDER", help="real clips that fourplane is tested on as well")
    parser.add_argument("--json", metavar="FILE", help="write everything measured; the curves go beside it as a PNG")
    parser.add_argument("--figure", metavar="FILE", help="where the PNG goes instead")
    args = parser.parse_args(arguments)
    if args.clips and args.name != "fourplane":
        parser.error("--clips is for the claim fourplane")
    torch.set_num_threads(args.threads)
    figure = args.figure or (args.json and Path(args.json).with_suffix(".png"))
    for file in filter(None, [args.json, figure]):
        Path(file).parent.mkdir(parents=True, exist_ok=True)  # before the run, not after it
    started = time.monotonic()
    try:
        claim = importlib.import_module(f"claims.{args.name.replace('-', '_')}")
        further = {"clips": Path(args.clips)} if args.clips else {}
        result = claim.run(args.tier, args.quick, args.steps, Path(figure) if figure else None, **further)
    except LatentAEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    result |= {
        "tier": args.tier,
        "quick": args.quick,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "machine": f"{platform.machine()}, {args.threads} threads",
        "versions": {"latentae": __version__, "torch": torch.__version__},
    }
    print(summary(args.name, result))
    if args.json:
        write_json(args.json, {args.name: result})
        say(f"wrote {args.json}" + (f" and {figure}" if figure else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
