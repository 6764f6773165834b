"""Measure autoencoders by one stated protocol and write a report.

Every image is cropped to a square, sent through each model and back, rounded to bytes and compared with itself: PSNR,
SSIM, MS-SSIM (from 161 px on), GMSD and HaarPSI always; LPIPS, DISTS, rFID, KID, precision and recall where their
weight files are on this machine (never downloaded unless --fetch-weights; a line says which file is missing and how to
get it). Speed, memory and parameters stand beside them, and what the latents are like: their spectrum, effective rank,
intrinsic dimension and KL divergence from N(0, 1).

  latentae bench photos/ --model runs/my-run --model stabilityai/sd-vae-ft-mse --out report/
  latentae bench photos/ --model before=runs/a --model after=runs/b --size 512 --limit 100
  torchrun --nproc_per_node 2 -m latentae bench photos/ --model runs/my-run --out report/
  latentae bench --merge report-a/ report-b/ --out both/
  latentae bench imagenet/val --suite public --out leaderboard/
  latentae bench clips/ --model my-video-vae --model h264:23 --frames 17 --fps 8 --size 128 --out report/

A model is a folder, a run of 'latentae fit', a checkpoint, a hub id or a preset; NAME=MODEL gives it a name. A folder
of images holds reconstructions that something else made, by the names of their originals. jpeg:75, webp:80 and avif:60
are files of that quality, as reference points. The table goes to standard output; --out writes results.json,
report.html (opens offline) and the images that it shows. If it is killed, the same command continues from OUT/progress;
under torchrun several processes share the images.

With --frames N, the first N frames of each clip are measured: videos, animations and folders of frames, as for encode.
A clip that is shorter or broken is left out and counted. Metrics of images are means over frames; difference PSNR and
flicker stand beside them, and rFVD where its weight file is. Models of images go frame by frame; h264:23 is H.264 of
that constant rate factor, for reference.
"""

import argparse
import json
from typing import Any

from latentae.cli.encode import add_max_bad
from latentae.errors import RequestError

SUMMARY = "measure autoencoders by one stated protocol and write a report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "src",
        metavar="SRC",
        nargs="?",
        help="images: a folder, a tar or parquet file, a csv, tsv or jsonl, or one image; with --frames a folder of "
        "clips, or one",
    )
    parser.add_argument(
        "--model", metavar="MODEL", action="append", default=[], help="what to measure; repeat for more"
    )
    parser.add_argument("--out", metavar="DIR", help="write results.json, report.html and samples/ there")
    parser.add_argument("--size", type=int, default=256, help="side of the square crop in pixels (default: 256)")
    parser.add_argument("--frames", type=int, metavar="N", help="measure clips: so many frames of each, from its first")
    parser.add_argument("--fps", metavar="F", help="frames per second of the clips, such as 8 (default: all there are)")
    parser.add_argument("--stride", type=int, default=1, metavar="N", help="of these every N-th frame (default: 1)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images or clips by name")
    parser.add_argument(
        "--metrics",
        metavar="NAMES",
        help="comma-separated, from psnr, ssim, ms_ssim, gmsd, haarpsi, lpips (or lpips_alex, lpips_vgg), dists, rfid, "
        "kid, precision, recall, and of clips difference_psnr, flicker, rfvd; one that is named here and cannot be "
        "measured is an error (default: all that can be)",
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="images at a time (default: 8), or clips (default: 1)"
    )
    parser.add_argument(
        "--equivariance",
        type=int,
        default=0,
        metavar="N",
        help="on the first N images, also measure how latents follow rotations and scalings: EQ-VAE's error, PSNR, and "
        "R-rFID where rFID is measured (default: 0)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="precision of the models"
    )
    parser.add_argument(
        "--protocol",
        default="latentae",
        metavar="NAME",
        help="how to crop, round and compare: latentae (default), or as the papers do: adm, ldm, dc-ae, vavae, eqvae, "
        "litevae (approximate), seed-voken, titok, dito; the foot of the table says what that is",
    )
    parser.add_argument(
        "--fid-reference",
        metavar="NPZ",
        help="also measure FID against the mean and the covariance (mu, sigma) of a reference set in this file",
    )
    parser.add_argument(
        "--sample",
        action="store_true",
        help="encode to a sample of the posterior instead of its mode, as vavae and eqvae do anyway",
    )
    parser.add_argument(
        "--interpolation",
        type=int,
        default=0,
        metavar="N",
        help="also measure iFID on the first N images: how real what is decoded between their latents looks",
    )
    parser.add_argument(
        "--rate-images",
        type=int,
        metavar="N",
        help="measure bits of latents and files on the first N images, and how robust latents are, which decodes each "
        "nine times more; 0 for none (default: 32 on a GPU, 8 elsewhere)",
    )
    parser.add_argument(
        "--probe",
        action="store_true",
        help="also train a small diffusion model on each model's latents, as 'latentae probe' does: on four fifths of "
        "the images, its samples compared with the others (experimental; minutes to hours)",
    )
    parser.add_argument("--probe-steps", type=int, metavar="N", help="of its training (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of --sample and of decoders that draw noise (default: 0)")
    parser.add_argument(
        "--decode-steps",
        metavar="N",
        help="steps of decoders that sample; several, such as 1,4,8, are rows of their own (default: the models')",
    )
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="threads that read and decode (default: 4)")
    add_max_bad(parser)
    parser.add_argument("--no-speed", action="store_true", help="do not time the models")
    parser.add_argument("--speed-sizes", default="", metavar="N,N", help="also time images of these sizes")
    parser.add_argument(
        "--speed-dtypes", default="", metavar="NAME,NAME", help="also time in these: float32, bfloat16, float16"
    )
    parser.add_argument("--speed-compiled", action="store_true", help="also time the models after torch.compile")
    parser.add_argument("--speed-batch-size", type=int, metavar="N", help="(default: --batch-size on a GPU, else 1)")
    parser.add_argument("--report-images", type=int, default=24, metavar="N", help="images in the report (default: 24)")
    parser.add_argument("--random-weights", action="store_true", help="allow a preset without its published weights")
    parser.add_argument(
        "--weights", metavar="DIR", help="where to look first for the weight files of metrics (see the README)"
    )
    parser.add_argument(
        "--fetch-weights",
        action="store_true",
        help="download the weight files that the metrics need and that are nowhere yet, checked by their hashes",
    )
    parser.add_argument(
        "--suite",
        metavar="NAME",
        help="'public': public autoencoders beside what their papers claim, each by its paper's protocol and size; "
        "those that are on this machine are run on SRC, the others are listed; or a JSON file of that form",
    )
    parser.add_argument(
        "--merge",
        metavar="RESULTS",
        nargs="+",
        help="measure nothing: one table and report of the results.json files (or their folders) named here",
    )
    parser.add_argument(
        "--force", action="store_true", help="with --merge: even if they were measured by different protocols"
    )
    parser.add_argument("--json", action="store_true", help="print results.json instead of the table")


def run(args: argparse.Namespace) -> int:
    from latentae.bench.merging import merge_results
    from latentae.bench.probe import ProbeSettings
    from latentae.bench.processes import is_first_process
    from latentae.bench.run import bench
    from latentae.bench.speed import SpeedGrid
    from latentae.bench.suite import run_suite, summarise_suite
    from latentae.store.clips import chosen_frames

    if args.probe_steps is not None and not args.probe:
        raise RequestError("--probe-steps is of the probe: add --probe.")
    if args.merge:
        return _finish(args, merge_results([*args.merge], out=args.out, force=args.force))
    probe = None
    if args.probe:
        probe = ProbeSettings() if args.probe_steps is None else ProbeSettings(steps=args.probe_steps)
    options = dict(
        limit=args.limit,
        metrics=None if args.metrics is None else words(args.metrics),
        fid_reference=args.fid_reference,
        weights=args.weights,
        fetch_weights=args.fetch_weights,
        sample=args.sample or None,
        interpolation=args.interpolation,
        rate_images=args.rate_images,
        probe=probe,
        seed=args.seed,
        batch_size=args.batch_size,
        device=args.device,
        dtype=args.dtype,
        max_bad=args.max_bad,
        workers=args.workers,
        speed=not args.no_speed,
        speed_batch_size=args.speed_batch_size,
        speed_grid=SpeedGrid(numbers("--speed-sizes", args.speed_sizes), words(args.speed_dtypes), args.speed_compiled),
        report_images=args.report_images,
        random_weights=args.random_weights,
        equivariance=args.equivariance,
        decode_steps=numbers("--decode-steps", args.decode_steps or ""),
    )
    choice = chosen_frames(args.frames, args.fps, args.stride)
    if choice and args.frames is None:
        raise RequestError("--fps and --stride choose frames of clips: say how many, --frames N.")
    if args.suite:
        if choice:
            raise RequestError("--suite is a list of autoencoders of images: leave --frames out.")
        if args.model:
            raise RequestError("--suite names its models itself: leave --model out.")
        suite = run_suite(args.suite, args.src, out=args.out, **options)
        if not is_first_process():
            return 0
        print(json.dumps(suite, indent=2, ensure_ascii=False, allow_nan=False) if args.json else summarise_suite(suite))
        return 0
    if args.src is None or not args.model:
        raise RequestError("bench needs images and at least one --model: latentae bench SRC --model MODEL.")
    models = [name_and_model(text) for text in args.model]
    results = bench(args.src, models, out=args.out, size=args.size, frames=choice, protocol=args.protocol, **options)
    return _finish(args, results) if is_first_process() else 0


def _finish(args: argparse.Namespace, results: dict[str, Any]) -> int:
    from latentae.bench.probe_report import summarise_probes
    from latentae.bench.results import summarise

    print(json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) if args.json else summarise(results))
    if not args.json and any(model.get("probe") for model in results["models"]):
        print(f"\n{summarise_probes(results['models'])}")
    if args.out:
        from latentae.console import say

        say(f"{args.out}/report.html shows the images; {args.out}/results.json holds every figure.")
    return 0


def words(text: str) -> list[str]:
    """``a,b`` as a list."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(option: str, text: str) -> list[int]:
    """``1,4,8`` as numbers, each once."""
    from latentae.errors import RequestError

    if not all(word.isdecimal() and int(word) > 0 for word in words(text)):
        raise RequestError(f"{option} {text}: expected whole numbers such as 1,4,8.")
    return list(dict.fromkeys(int(word) for word in words(text)))


def name_and_model(text: str) -> tuple[str, str]:
    """``NAME=MODEL``, or a model that is its own name; an existing path may contain an equals sign."""
    from pathlib import Path

    if "=" in text and not Path(text).exists():
        name, model = text.split("=", 1)
        if name and model:
            return name, model
    return text, text
