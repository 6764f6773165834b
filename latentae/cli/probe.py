"""Say how easy the latents of image autoencoders are to model. Experimental.

For each model a small diffusion transformer (4.6 M parameters, unconditional, flow matching) learns the latents of the
images, whitened over their channels, in steps of the same arithmetic whatever the compression ratio. Then it generates
images, which are decoded and compared with held-out ones: sliced Wasserstein distance of patches of a Haar pyramid, and
gFID where Inception's weights are on this machine. Beside it stand the bits per pixel that this denoiser needs for the
latents at the noise level that costs 0.1 dB, the loss by tenths of time, and what one image costs, decoding included.

  latentae probe runs/my-run --data photos/
  latentae probe before=runs/a --model after=runs/b --data photos/ --seeds 3 --out probe/
  latentae probe dc-ae-tiny --data samples

A model is a folder, a run of 'latentae fit', a checkpoint, a hub id or a preset; NAME=MODEL gives it a name. A fifth of
the images, at most 512, are held out, chosen by a hash of their names. Discrete latents are modelled before they are
snapped to codes, which decoding does. Figures compare only with those of the same settings, size and images. 500 steps
take minutes on a CPU and show coarse differences; take several seeds, and on a GPU more steps.
"""

import argparse
import json

from latentae.cli.encode import add_max_bad

SUMMARY = "say how easy a latent space is to model, by a small diffusion model (experimental)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="MODEL", help="the autoencoder to probe")
    parser.add_argument("--model", metavar="MODEL", action="append", default=[], help="another one; repeat for more")
    parser.add_argument(
        "--data",
        metavar="SRC",
        required=True,
        help="images: a folder, a tar or parquet file, a csv, tsv or jsonl; 'samples' draws 2,500 pictures instead",
    )
    parser.add_argument("--out", metavar="DIR", help="write probe.json and probe.png, the samples, there")
    parser.add_argument("--size", type=int, default=64, help="side of the square crop in pixels (default: 64)")
    parser.add_argument(
        "--limit", type=int, default=5000, metavar="N", help="images to train on, at most (default: 5000)"
    )
    parser.add_argument("--steps", type=int, default=500, metavar="N", help="of training (default: 500)")
    parser.add_argument(
        "--tokens-per-step",
        type=int,
        default=1024,
        metavar="N",
        help="latent positions in a batch, which makes its number of images (default: 1024)",
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="train so often (default: 1)")
    parser.add_argument("--samples", type=int, default=256, metavar="N", help="images to generate (default: 256)")
    parser.add_argument(
        "--sampling-steps", type=int, default=32, metavar="N", help="Euler's steps for each (default: 32)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="precision of the autoencoders"
    )
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="threads that read and decode (default: 4)")
    add_max_bad(parser)
    parser.add_argument("--random-weights", action="store_true", help="allow a preset without its published weights")
    parser.add_argument(
        "--weights", metavar="DIR", help="where to look first for Inception's weight file (see the README)"
    )
    parser.add_argument("--json", action="store_true", help="print probe.json instead of the table")


def run(args: argparse.Namespace) -> int:
    from latentae.bench.probe import ProbeSettings
    from latentae.bench.probe_report import summarise_probes
    from latentae.bench.probing import probe_models
    from latentae.cli.bench import name_and_model
    from latentae.console import say
    from latentae.weights import weights_from

    settings = ProbeSettings(args.steps, args.tokens_per_step, args.samples, args.sampling_steps, args.seeds)
    with weights_from(args.weights):
        results = probe_models(
            args.data,
            [name_and_model(text) for text in (args.first, *args.model)],
            out=args.out,
            size=args.size,
            limit=args.limit,
            settings=settings,
            device=args.device,
            dtype=args.dtype,
            max_bad=args.max_bad,
            workers=args.workers,
            random_weights=args.random_weights,
        )
    if args.json:
        print(json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        print(summarise_probes(results["models"]))
    if args.out:
        say(f"{args.out}/probe.png shows samples; {args.out}/probe.json holds every figure.")
    return 0
