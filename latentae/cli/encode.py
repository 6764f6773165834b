"""Turn images or videos into a store of latents.

  latentae encode photos/ latents/ --model runs/my-run --size 256
  latentae encode 'train-{000..099}.tar' latents/ --model runs/my-run
  latentae encode s3://bucket/photos latents/ --model runs/my-run --processes 4
  latentae encode clips/ latents/ --model my-video-vae --frames 17 --fps 8

SRC is a folder (with all folders below it), a tar as WebDataset and img2dataset write them, a parquet file of images as
on the Hugging Face hub, a folder that datasets saved, a folder or a {000..099} pattern of these, a csv, tsv, jsonl or
parquet with a column path (relative to it), or one image; here, or behind s3://, gs://, hf://, https:// and the like.
Labels (folders, .cls or .json members, the column label), captions and the other columns of a table go into the rows.

Videos (mp4, m4v, mov, webm, mkv, avi, npy of uint8 frames) go into autoencoders of videos, whole, one row each; with
--frames N the first N frames of each, and a shorter one is a bad input. Where --frames (a number, or 'all'), --fps or
--stride is given, animated GIF, WebP and PNG are clips too, and so is a folder of images: its frames, in the natural
order of their names, 24 a second as those of npy. Frame k at --fps F is the one on show at k / F seconds, where a frame
counts as on show from half a frame interval before its time: the nearest at constant rates. Clips of unlike lengths or,
with --size native, sizes go into shards of their own. A broken clip is a bad input, never a shorter or a black one.

Kill it and run the same command again: it goes on where it was, and the result is the same to the byte. Every image
ends as a row: encoded, or listed with its reason in latents/quarantine.parquet. A store is only continued with the
model, the options and the images that it was begun with; where something changed, the command says what and stops.
Latents are stored raw: latents/store.json records the model's scaling, and latentae.LatentStore applies it on request.

More than one worker: --processes on this machine (one for each GPU by default); --shard-index I --shard-count N as one
of N jobs of any scheduler, on nodes that share DST, which may all start at once; --engine ray on a Ray cluster. Lost
workers and nodes are replaced. 'latentae plan' lists SRC once beforehand, 'latentae info DST' shows how far it got.
"""

import argparse
import contextlib
import sys
from typing import Any

SOURCES = "images: a folder, a tar or parquet file, a table, or one image; or videos: a folder, or one; also URLs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_planning_arguments(parser)
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="images per batch (default: found by trying on a GPU, 16 on a CPU)"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="that encode (default: one for each device)")
    parser.add_argument("--engine", default="local", choices=["local", "ray"], help="who encodes (default local)")
    parser.add_argument("--ray-address", metavar="A", help="of a Ray cluster, such as auto (default: this machine)")
    parser.add_argument("--shard-index", type=int, metavar="I", help="which of --shard-count jobs this is, from 0")
    parser.add_argument("--shard-count", type=int, metavar="N", help="share the shards among N jobs")
    add_max_bad(parser)
    parser.add_argument("--retry-failed", action="store_true", help="try bad images of earlier runs again")


def add_planning_arguments(parser: argparse.ArgumentParser) -> None:
    """All that a plan, and so a store, depends on."""
    parser.add_argument("src", metavar="SRC", help=SOURCES)
    parser.add_argument("dst", metavar="DST", help="the store: a new folder, or the one to go on with")
    add_model_arguments(parser, required=True)
    parser.add_argument(
        "--size",
        default="256",
        help="side of the crop, a multiple of the model's ratio; several, as in 256,512,1024, of which each image gets "
        "the largest that it fills; 'native' keeps whole images (default 256)",
    )
    parser.add_argument(
        "--crop",
        default="adm",
        help="adm: centre crop as in evaluation (default); center: as torchvision's Resize and CenterCrop; squash: the "
        "whole image as a square; buckets: rectangles of about size x size pixels, by aspect ratio",
    )
    parser.add_argument("--flip", action="store_true", help="also store the latents of the mirrored image")
    add_frames(parser)
    parser.add_argument("--fps", metavar="F", help="frames per second of the clips, such as 8 or 30000/1001")
    parser.add_argument("--stride", type=int, default=1, metavar="N", help="take every Nth frame of a clip")
    parser.add_argument("--kind", default="mode", help="mode (default), moments, or sample, drawn once per image")
    parser.add_argument("--dtype", default="float32", help="of the stored latents: float32, float16 or bfloat16")
    parser.add_argument("--seed", type=int, default=0, help="of --kind sample")
    parser.add_argument("--shard-size", type=int, default=1000, metavar="N", help="images per shard (default 1000)")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="threads that read and decode (default: on a GPU all CPUs, else 2)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="plan only the first N images; part of the plan")
    parser.add_argument("--columns", metavar="A,B", help="of a table that go into the rows; 'none' (default: all)")
    parser.add_argument("--extend", action="store_true", help="add inputs that are not in the plan as new shards")
    parser.add_argument("--as-planned", action="store_true", help="take the inputs from the plan, not from SRC")
    parser.add_argument("--dry-run", action="store_true", help="say what disk and time it will take, and write nothing")


def planning_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_planning_arguments` as `latentae.encode_dataset` takes them."""
    columns = args.columns and [] if args.columns == "none" else args.columns and args.columns.split(",")
    return {
        "size": sizes(args.size),
        "crop": args.crop,
        "flip": args.flip,
        "frames": args.frames,
        "fps": args.fps,
        "stride": args.stride,
        "kind": args.kind,
        "dtype": args.dtype,
        "seed": args.seed,
        "shard_size": args.shard_size,
        "workers": args.workers,
        "limit": args.limit,
        "columns": columns,
        "extend": args.extend,
        "as_planned": args.as_planned,
        "autocast": autocast_dtype(args),
        "random_weights": args.random_weights,
    }


def sizes(text: str) -> int | str | list[int]:
    """``native``, one size or several."""
    from latentae.errors import RequestError

    if text == "native":
        return text
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise RequestError(f"--size {text}: expected a number of pixels, several, or 'native'.")
    return int(text) if len(parts) == 1 else [int(part) for part in parts]


def add_model_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Options that encode, decode and reconstruct share."""
    parser.add_argument("--model", required=required, help="folder, run, checkpoint, hub id or tiny preset")
    parser.add_argument("--random-weights", action="store_true", help="allow a preset without its published weights")
    parser.add_argument(
        "--device",
        help="such as cuda:1 or cpu; by default a GPU where there is one; encode takes several, as in cuda:0,cuda:1",
    )
    parser.add_argument("--autocast", choices=["bfloat16", "float16"], help="run the model under autocast")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of decoders that sample, which decode and reconstruct share."""
    parser.add_argument(
        "--decode-steps", type=int, metavar="N", help="of a decoder that samples (default: the model's)"
    )
    parser.add_argument("--seed", type=int, default=0, help="with an image's name, of a sampling decoder's noise")


def add_format(parser: argparse.ArgumentParser) -> None:
    """What decode and reconstruct write."""
    parser.add_argument(
        "--format", help="png (default) or webp, both lossless; of clips mp4 (default, H.264) or mkv (FFV1, lossless)"
    )


def add_frames(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--frames", type=number_or_all, metavar="N", help="of each clip, from its first; or 'all' (default for videos)"
    )


def number_or_all(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def add_max_bad(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-bad",
        type=share_or_number,
        default=0.01,
        metavar="N",
        help="bad images that are tolerated: a share such as 0.01 (default) or a number such as 5; beyond: exit code 3",
    )


def share_or_number(text: str) -> float:
    """``0.01`` is a share and ``5`` a number."""
    return int(text) if text.isdecimal() else float(text)


def autocast_dtype(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    import torch

    return args.autocast and getattr(torch, args.autocast)


def run(args: argparse.Namespace) -> int:
    import json

    from latentae.console import say
    from latentae.errors import RequestError
    from latentae.store.encode import encode_dataset

    if (args.shard_index is None) != (args.shard_count is None):
        raise RequestError(
            "--shard-index and --shard-count belong together: give both, as in 0 and 64 for one of 64 jobs."
        )
    devices = args.device.split(",") if args.device else None
    if args.dry_run:
        from latentae.cli.plan import dry_run
        from latentae.store.planning import Request

        request = Request(
            args.src,
            args.dst,
            args.model,
            device=devices and devices[0],
            **{**planning_options(args), "workers": args.workers or 2},
        )
        processes = args.processes or len(devices or [""])
        return dry_run(request, args.batch_size, as_json=args.json, processes=processes * (args.shard_count or 1))
    with contextlib.redirect_stdout(sys.stderr):  # where Ray tells of nodes that it has lost
        summary = encode_dataset(
            args.src,
            args.dst,
            args.model,
            batch_size=args.batch_size,
            processes=args.processes,
            device=devices,
            engine=args.engine,
            ray_address=args.ray_address,
            shard_index=args.shard_index or 0,
            shard_count=1 if args.shard_count is None else args.shard_count,
            max_bad=args.max_bad,
            retry_failed=args.retry_failed,
            **planning_options(args),
        )
    if args.json:
        print(json.dumps(summary.to_dict()))
        return 0
    if summary.bad:
        reasons = ", ".join(f"{count} {reason}" for reason, count in summary.reasons.items())
        say(f"bad: {reasons}" + ("" if summary.shards_left else f"; see {args.dst}/quarantine.parquet"))
    unit = summary.unit
    now = f"{summary.encoded_now} now, {summary.images_per_second:.1f} {unit}/s" if summary.encoded_now else "none new"
    shards = "1 shard" if summary.shards == 1 else f"{summary.shards} shards"
    left = f"; {summary.shards_left} shards are left to other jobs" if summary.shards_left else ""
    print(f"{args.dst}: {summary.encoded} of {summary.inputs} {unit} in {shards} ({now}){left}")
    return 0
