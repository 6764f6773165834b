"""``store.json``: all that the latents of a store depend on, written before the first shard and held to ever after."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentae.codec import LatentCodec
from latentae.data.decode import DecodePolicy
from latentae.data.framing import Framing
from latentae.data.video import FrameChoice
from latentae.errors import RequestError
from latentae.files import read_json, sha256_json
from latentae.loading import load_model, weights_hash
from latentae.store.plan import Plan
from latentae.version import __version__

SCHEMA = 1
KINDS = ("mode", "moments", "sample")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def open_codec(
    model: LatentCodec | nn.Module | str | Path,
    *,
    device: str | torch.device | None = None,
    autocast: torch.dtype | None = None,
    random_weights: bool = False,
) -> tuple[LatentCodec, str | None]:
    """A codec of ``model`` and the name under which it can be loaded again, None if it came as an object.

    A codec is taken as it is; anything else runs on ``device``, by default a GPU where there is one.
    """
    if isinstance(model, LatentCodec):
        return model, None
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(model, nn.Module):
        return LatentCodec(model, device=device, autocast=autocast), None
    name = str(Path(model).resolve()) if Path(model).exists() else str(model)
    return LatentCodec(load_model(model, random_weights=random_weights), device=device, autocast=autocast), name


@dataclass(frozen=True)
class Options:
    """What the latents of a store are made of; see `latentae.encode_dataset`. ``clips`` are the frames that are taken
    of each clip, None for a store of images."""

    framing: Framing
    kind: str = "mode"
    dtype: str = "float32"
    seed: int = 0
    flip: bool = False
    clips: FrameChoice | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RequestError(f"kind={self.kind!r}; expected one of {', '.join(KINDS)}.")
        if self.dtype not in DTYPES:
            raise RequestError(f"dtype={self.dtype!r}; expected one of {', '.join(DTYPES)}.")

    @property
    def tensor(self) -> str:
        """What the stored tensor is called."""
        return "moments" if self.kind == "moments" else "latents"


def check_counts(**counts: int | None) -> None:
    """Refuse what must be at least one (or not given), by its name."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise RequestError(f"{name}={value}; expected at least 1.")


def describe_store(
    codec: LatentCodec,
    name: str | None,
    plan: Plan,
    options: Options,
    policy: DecodePolicy,
    *,
    shard_size: int,
    limit: int | None,
) -> dict[str, Any]:
    """The content of ``store.json``. The model's normalisation is recorded for readers: stored latents are raw."""
    return {
        "schema": SCHEMA,
        "latentae_version": __version__,
        "model": {
            "name": name,
            "class": type(codec.autoencoder).__name__,
            "weights_sha256": weights_hash(codec.autoencoder),
            "config": json.loads(codec.autoencoder.to_json_string()),
            "spatial_ratio": codec.spatial_ratio,
            "dtype": _dtype_name(codec.dtype),
            "autocast": None if codec.autocast is None else _dtype_name(codec.autocast),
        },
        "preprocess": {
            **options.framing.describe(),
            "flip": options.flip,
            "decode": policy.describe(),
            **(options.clips.describe() if options.clips else {}),
        },
        "pixel_range": [-1, 1],
        "kind": options.kind,
        "dtype": options.dtype,
        "seed": options.seed if options.kind == "sample" else None,
        "normalisation": codec.normalisation,
        "plan": {
            "shard_size": shard_size,
            "limit": limit,
            "inputs": plan.parts[0].inputs,
            "shards": len(plan.parts[0].shards),
            "fingerprint": plan.parts[0].fingerprint,
        },
    }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_configuration(store: Path) -> dict[str, Any]:
    """``store.json`` of a store.

    Raises:
        RequestError: there is no store, or one that this version does not read.
    """
    path = store / "store.json"
    try:
        configuration = read_json(path)
        schema = configuration["schema"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RequestError(f"{store} is not a store of latents: it has no store.json.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{path} is not the description of a store ({error}): restore it from a copy.") from error
    if schema != SCHEMA:
        raise RequestError(f"{path} has schema {schema}; this version of latentae ({__version__}) reads {SCHEMA}.")
    return configuration


def identity(configuration: dict[str, Any]) -> dict[str, Any]:
    """What makes two runs the same store, as dotted names: all but names, places and versions."""
    values = _flatten(configuration)
    return {
        key: value
        for key, value in values.items()
        if not key.startswith(("latentae_version", "model.name", "model.config._", "plan.inputs", "plan.shards"))
    }


def store_fingerprint(configuration: dict[str, Any]) -> str:
    """The hash that ties a commit marker to its store."""
    return sha256_json(identity(configuration))


def configuration_difference(stored: dict[str, Any], asked: dict[str, Any], *, extend: bool = False) -> list[str]:
    """One line for each value in which a request differs from an existing store, the plan's own hash left out, and for
    an extension also the limit."""
    before, now = identity(stored), identity(asked)
    left_out = {"plan.fingerprint", "plan.limit"} if extend else {"plan.fingerprint"}
    keys = [key for key in {**before, **now} if key not in left_out]
    return [
        f"{key}: {json.dumps(before.get(key))} in the store, {json.dumps(now.get(key))} now"
        for key in keys
        if before.get(key) != now.get(key)
    ]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flatten(inner, f"{prefix}.{key}" if prefix else key))
    return flat
