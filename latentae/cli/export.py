"""Save a trained autoencoder as an ordinary diffusers folder.

DC-AE is written as the stock class AutoencoderDC and stock autoencoders as what they are: the folder opens with
from_pretrained where latentae is not installed. Weights are safetensors.

  latentae export runs/my-run exported/
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="run folder, checkpoint, model folder or hub id")
    parser.add_argument("folder", metavar="DIR", help="where to write; must be new or empty")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is already in DIR")
    parser.add_argument("--random-weights", action="store_true", help="allow a preset without published weights here")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from latentae.errors import RequestError
    from latentae.loading import export, load_model

    folder = Path(args.folder)
    if folder.is_dir() and any(folder.iterdir()) and not args.overwrite:
        raise RequestError(f"{folder} is not empty: choose another folder, or replace what is there with --overwrite.")
    model = load_model(args.model, random_weights=args.random_weights)
    name = export(model, folder)
    print(f"{folder}: diffusers.{name}.from_pretrained({str(folder)!r}) opens it")
    return 0
