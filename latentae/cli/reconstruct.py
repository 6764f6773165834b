"""Send images through an autoencoder and back.

  latentae reconstruct photos/ reconstructions/ --model runs/my-run

Every image keeps its size and its name: photos/a/b.jpg becomes reconstructions/a/b.png, lossless, to be laid beside the
original. Images that cannot be decoded are listed at the end. A decoder that samples (DiTo, SWYCC) draws the noise of
each image from --seed and its name: the same command gives the same images.
"""

import argparse

from latentae.cli.encode import add_decoding_arguments, add_max_bad, add_model_arguments, autocast_dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "src", metavar="SRC", help="images: a folder, a tar or parquet file, a csv, tsv or jsonl, or one image"
    )
    parser.add_argument("dst", metavar="DST", help="folder for the reconstructions")
    add_model_arguments(parser, required=True)
    add_decoding_arguments(parser)
    parser.add_argument("--format", default="png", help="png (default) or webp, both lossless")
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
    )
    if args.json:
        print(json.dumps(summary.to_dict()))
        return 0
    print(f"{args.dst}: {summary.images} images ({summary.images_per_second:.1f} images/s)")
    return 0
