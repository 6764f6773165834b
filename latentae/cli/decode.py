"""Turn a store of latents back into images or videos.

  latentae decode latents/ images/

The image that was encoded as a/b.jpg becomes images/a/b.png, lossless, and the clip a/b.webm becomes images/a/b.mp4
with its frames and their rate (H.264; --format mkv is lossless). The store knows its model by name; --model says where
it is now. A model with other weights than those that encoded is refused. A decoder that samples (DiTo, SWYCC) draws the
noise of each image from --seed and its name: the same command gives the same images.
"""

import argparse

from latentae.cli.encode import add_decoding_arguments, add_format, add_model_arguments, autocast_dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder that 'latentae encode' wrote")
    parser.add_argument("dst", metavar="DST", help="folder for the images or clips")
    add_model_arguments(parser, required=False)
    add_decoding_arguments(parser)
    add_format(parser)
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images per batch (default 16)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads that write (default 2)")
    parser.add_argument(
        "--allow-other-model", action="store_true", help="accept other weights, such as a fine-tuned decoder"
    )


def run(args: argparse.Namespace) -> int:
    import json

    from latentae.console import say
    from latentae.store.decode import decode_store

    summary = decode_store(
        args.store,
        args.dst,
        args.model,
        format=args.format,
        batch_size=args.batch_size,
        workers=args.workers,
        device=args.device,
        autocast=autocast_dtype(args),
        random_weights=args.random_weights,
        allow_other_model=args.allow_other_model,
        seed=args.seed,
        num_inference_steps=args.decode_steps,
    )
    if args.json:
        print(json.dumps(summary.to_dict()))
        return 0
    if summary.missing:
        say(f"{summary.missing} inputs of the plan have no latents: bad, or not encoded yet")
    print(f"{args.dst}: {summary.images} {summary.unit} ({summary.images_per_second:.1f} {summary.unit}/s)")
    return 0
