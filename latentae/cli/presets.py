"""List every named configuration: compression, latent channels, parameters of both halves, where it comes from.

With --macs also the arithmetic of both halves, beside that of Stable Diffusion's autoencoder. A decoder that samples
has a number of steps, and its arithmetic is that of all of them.
"""

import argparse
import json
from typing import Any

SIZE = 256  # of the image that --macs counts for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="print the configuration of this preset instead of the list")
    parser.add_argument(
        "--macs",
        action="store_true",
        help=f"count multiply-accumulates for a {SIZE} px image too, and those of SD-VAE; takes seconds longer",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(args: argparse.Namespace) -> int:
    from latentae.console import format_table, three_figures
    from latentae.families.presets import describe, find_preset, presets

    if args.name:
        preset = find_preset(args.name)
        print(
            json.dumps(
                {"name": preset.name, "family": preset.family, "hub_id": preset.hub_id, **preset.config}, indent=2
            )
        )
        return 0
    rows = [describe(name) for name in presets()]
    if args.macs:
        rows = [{**row, **_giga_macs(row["name"])} for row in rows] + [_stable_diffusion()]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    counted = ["encoder_gmac", "decoder_gmac"] if args.macs else []
    table = []
    for r in rows:
        figures = [f"{r[f'{half}_millions']:.2f}" for half in ("encoder", "decoder")]
        figures += [three_figures(r[column]) for column in counted]
        figures.append(r.get("decode_steps") or "")
        table.append([r["name"], r["latents"], *figures, r["source"], r["hub_id"] or ""])
    titles = ["encoder M", "decoder M", *(column.replace("_gmac", " GMAC") for column in counted), "steps"]
    print(format_table(["preset", "latents", *titles, "source", "weights"], table))
    return 0


def _giga_macs(name: str) -> dict[str, float]:
    import torch

    from latentae.families.presets import create

    with torch.device("meta"):
        return _count(create(name))


def _count(autoencoder: Any) -> dict[str, float]:
    from latentae.bench.speed import count_gmac
    from latentae.codec import LatentCodec

    gmac = count_gmac(LatentCodec(autoencoder), SIZE)
    return {f"{half}_gmac": gmac[task] for half, task in (("encoder", "encode"), ("decoder", "decode"))}


def _stable_diffusion() -> dict[str, Any]:
    """The row to compare with: diffusers' AutoencoderKL in the configuration of Stable Diffusion 1 and 2."""
    from latentae.bench.speed import count_parameters, stable_diffusion_vae

    autoencoder = stable_diffusion_vae()
    parameters = count_parameters(autoencoder)
    return {
        "name": "for comparison: SD-VAE",
        "family": "AutoencoderKL",
        "latents": "f8c4",
        **{f"{half}_millions": round(parameters[half] / 1e6, 2) for half in ("encoder", "decoder")},
        **_count(autoencoder),
        "source": "Stable Diffusion (arXiv 2112.10752)",
        "hub_id": "stabilityai/sd-vae-ft-mse",
    }
