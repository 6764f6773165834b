"""How far the tiled result of an autoencoder is from the untiled one, on images of yours.

    python tools/tiling_agreement.py MODEL IMAGE ... [--size 2048] [--tiles 512 1024]

MODEL is a folder, a run, a checkpoint, a hub id or a preset. Each image is resized to a square of --size pixels, which
must fit into memory untiled. PSNR is that of the tiled result to the untiled one over the range of the latter: of
latents, and of pixels decoded from the untiled latents. For a decoder that samples, the untiled picture of another seed
stands beside it: as far from the untiled one as pictures are that are all right.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import latentae
from latentae.console import format_table
from latentae.data.transforms import to_tensor


def psnr(actual: Tensor, reference: Tensor) -> float:
    error = (actual.double() - reference.double()).square().mean().item()
    return 10 * math.log10((reference.max() - reference.min()).item() ** 2 / error) if error else math.inf


@torch.no_grad()
def agreement(model: latentae.Autoencoder, pixels: Tensor, tiles: Sequence[int]) -> list[list[object]]:
    """A row for each tile size: PSNR of tiled latents and pixels, and of another seed's."""
    model.disable_tiling()
    z = model.encode(pixels).latent
    whole = model.decode(z).sample
    other = psnr(model.decode(z, generator=torch.Generator().manual_seed(1)).sample, whole) if model.samples else None
    rows: list[list[object]] = []
    for tile in tiles:
        model.enable_tiling(tile, tile)
        rows.append([tile, psnr(model.encode(pixels).latent, z), psnr(model.decode(z).sample, whole), other])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--size", type=int, default=2048, help="side in pixels (default: %(default)s)")
    parser.add_argument("--tiles", type=int, nargs="+", default=[512, 1024], help="sides (default: 512 1024)")
    args = parser.parse_args(arguments)
    presets = latentae.presets()
    model = latentae.create(args.model) if args.model in presets else latentae.load(args.model)
    rows = []
    for file in args.images:
        image = Image.open(file).convert("RGB").resize((args.size, args.size), Image.Resampling.LANCZOS)
        pixels = to_tensor(np.array(image))[None] / 127.5 - 1
        rows += [[file.name, *row] for row in agreement(model, pixels, args.tiles)]
    print(format_table(["image", "tile", "latents, dB", "pixels, dB", "another seed, dB"], rows))


if __name__ == "__main__":
    main()
