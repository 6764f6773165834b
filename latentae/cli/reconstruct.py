"""Send images or videos through an autoencoder and back.

  latentae reconstruct photos/ reconstructions/ --model runs/my-run

Every image keeps its size and its name: photos/a/b.jpg becomes reconstructions/a/b.png, lossless, to be laid beside the
original. Videos (mp4, m4v, mov, webm, mkv, avi, npy) become a/b.mp4 with their frames, size and rate (H.264; --format
mkv is lossless); with --frames also GIFs and folders of frames are clips, as for encode. An autoencoder of images takes
them frame by frame. Images and clips that cannot be decoded are listed at the end. A decoder that samples (DiTo, SWYCC)
draws the noise of each image from --seed and its name: the same command gives the same images.
"""

import argparse

from latentae.cli.encode import (
    SOURCES,
    add_decoding_arguments,
    add_format,
    add_frames,
    add_max_bad,
    add_model_arguments,
    autocast_dtype,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help=SOURCES)
    parser.add_argument("dst", metavar="DST", help="folder for the reconstructions")
    add_model_arguments(parser, required=True)
    add_decoding_arguments(parser)
    add_format(parser)
    add_frames(parser)
    parser.add_argument(
        "--window", type=int, metavar="N", help="frames of a clip that go through a video model at once (default: all)"
    )
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="images per batch (default 4)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads that read and write (default 2)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    add_max_bad(parser)


def run(args: argparse.Namespace) -> int:
    import json

    from latentae.store.reconstruction import reconstruct

    summary = reconstruct(
        args.src,
        args.dst,
        args.model,
        format=args.format,
        batch_size=args.batch_size,
        max_bad=args.max_bad,
        limit=args.limit,
        workers=args.workers,
        device=args.device,
        autocast=autocast_dtype(args),
        random_weights=args.random_weights,
        seed=args.seed,
        num_inference_steps=args.decode_steps,
        frames=args.frames,
        window=args.window,
    )
    if args.json:
        print(json.dumps(summary.to_dict()))
        return 0
    print(f"{args.dst}: {summary.images} {summary.unit} ({summary.images_per_second:.1f} {summary.unit}/s)")
    return 0
