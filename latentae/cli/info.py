"""Say what a model, a run or a store of latents is.

For a model: class, compression, parameters, normalisation, hash of the weights. For a run of latent diffusion: its
denoiser, its classes, and which autoencoder its latents are of. For a store: what is in it, how far an encode has got
(it may still be running), and its statistics.

  latentae info runs/my-run
  latentae info latents/
"""

import argparse
import json
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="WHAT", help="model folder, run folder, checkpoint, hub id, preset or store")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    facts = _store(Path(args.what)) if (Path(args.what) / "store.json").is_file() else _run_or_model(args.what)
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        width = max(map(len, facts))
        for name, value in facts.items():
            print(f"{name.ljust(width)}  {value}")
    return 0


def _store(path: Any) -> dict[str, Any]:
    from latentae.store.reader import LatentStore

    return LatentStore(path).describe()


def _run_or_model(what: str) -> dict[str, Any]:
    from latentae.loading.diffusion import is_diffusion_run, load_diffusion

    return load_diffusion(what).describe() if is_diffusion_run(what) else _model(what)


def _model(what: str) -> dict[str, Any]:
    from latentae.codec import LatentCodec
    from latentae.families.presets import PRESETS, describe
    from latentae.loading import load, weights_hash

    if what in PRESETS:
        return describe(what)
    model = load(what)
    codec = LatentCodec(model)
    return {
        "class": type(model).__name__,
        "compression": f"f{codec.spatial_ratio}" + (f" t{codec.temporal_ratio}" if codec.is_video else ""),
        "latent_channels": codec.latent_channels,
        "parameters": sum(p.numel() for p in model.parameters()),
        **({"decode_steps": codec.num_inference_steps} if codec.samples else {}),
        "dtype": str(codec.dtype).removeprefix("torch."),
        **codec.normalisation,
        "weights_sha256": weights_hash(model),
    }
