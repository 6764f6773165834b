"""A store of latents back to image files, or clips, under the paths that their keys give."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentae.codec import LatentCodec, Latents
from latentae.console import Progress
from latentae.data.framing import NATIVE
from latentae.errors import DataError, RequestError
from latentae.loading import weights_hash
from latentae.store.clips import ClipWriter, check_frames
from latentae.store.configuration import check_counts, open_codec
from latentae.store.images import ImageWriter
from latentae.store.memory import BatchRunner, batch_for
from latentae.store.reader import LatentStore
from latentae.store.worker import key_generator


@dataclass(frozen=True)
class DecodeSummary:
    """What a run of `decode_store` wrote; ``missing`` inputs of the plan have no latents (bad, or not encoded yet).

    From a store of clips, ``images`` counts these, and ``unit`` says so.
    """

    folder: str
    images: int
    missing: int
    seconds: float
    unit: str = "images"

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "images_per_second": self.images_per_second}


def decode_store(
    store: LatentStore | str | Path,
    dst: str | Path,
    model: LatentCodec | nn.Module | str | Path | None = None,
    *,
    format: str | None = None,
    batch_size: int = 16,
    workers: int = 2,
    device: str | torch.device | None = None,
    autocast: torch.dtype | None = None,
    random_weights: bool = False,
    allow_other_model: bool = False,
    seed: int = 0,
    num_inference_steps: int | None = None,
) -> DecodeSummary:
    """Decode every encoded input of ``store`` to a lossless image, or to a clip, below ``dst``.

    The key ``a/b.jpg`` becomes ``a/b.png``, and the clip ``a/b.webm`` becomes ``a/b.mp4`` with as many frames and as
    many a second as were encoded; images of a store of native sizes are cropped to their own size again. Files that
    are there already are replaced.

    Args:
        model: what decodes; by default the model that encoded, by the name in ``store.json``.
        format: ``png`` (default) or ``webp``; of clips ``mp4`` (default) or ``mkv``, which is lossless.
        allow_other_model: accept a model whose weights are not those that encoded (a fine-tuned decoder, say).
        seed: with the key of an image, that of its noise, where the decoder samples: the same in any batch or store.
        num_inference_steps: of a decoder that samples; None for the model's own number.

    Raises:
        RequestError: no store, no model, a model with other weights, or steps where the decoder takes none.
        DataError: a shard is not what was written, or a key would lead out of ``dst``.
    """
    check_counts(batch_size=batch_size, workers=workers)
    store = store if isinstance(store, LatentStore) else LatentStore(store)
    if not len(store):
        raise RequestError(f"{store.path} has no encoded inputs yet: nothing to decode.")
    if problems := store.verify():
        raise DataError(f"{len(problems)} files of the store are damaged; the first: {problems[0]}")
    inputs = store.plan.read("uri").column(0).to_pylist()
    clips = store.holds_clips
    kind = ClipWriter if clips else ImageWriter
    format = format or ("mp4" if clips else "png")
    writer: Any = kind(Path(dst), store.keys, inputs, format=format, workers=workers)
    codec = _open_decoder(store, model, device, autocast, random_weights, allow_other_model)
    if num_inference_steps is not None:
        codec = codec.with_inference_steps(num_inference_steps)

    def decode_rows(batch: list[tuple[dict[str, Any], Tensor]]) -> Tensor:
        noise = [noise_generator(seed, row["key"]) for row, _ in batch]
        frames = max(row["frames"] for row, _ in batch) if clips else None
        return decode_raw(codec, torch.stack([latents for _, latents in batch]), noise, frames)

    native = store.config["preprocess"]["size"] == NATIVE
    runner = BatchRunner(batch_size)
    started = time.monotonic()
    unit = "clips" if clips else "images"
    with writer, Progress("decode", len(store), unit) as progress:
        for rows, latents in store.shards():
            step = batch_for(batch_size, _pixel_shape(codec, latents))
            for start in range(0, len(rows), step):
                batch = list(zip(rows[start : start + step], latents[start : start + step]))
                for (row, _), image in zip(batch, runner.run(decode_rows, batch)):
                    crop = image[..., : row["height"], : row["width"]] if native else image
                    if clips:
                        check_frames(codec, crop, row["frames"])
                        writer.write(row["key"], crop[:, : row["frames"]], row["fps"])
                    else:
                        writer.write(row["key"], crop)
                progress.advance(len(batch))
    missing = store.plan.inputs - len(store)
    return DecodeSummary(str(dst), len(store), missing, time.monotonic() - started, unit)


def noise_generator(seed: int, key: str) -> torch.Generator:
    """Of the noise from which a decoder samples the image of one key."""
    return key_generator(seed, key, "decode")


def decode_raw(
    codec: LatentCodec,
    latents: Tensor,
    generators: list[torch.Generator] | None = None,
    frames: int | None = None,
) -> Tensor:
    """Stored latents (B, C, h, w), or (B, C, 1, h, w) of a video autoencoder, to float pixels (B, 3, H, W); with
    ``frames``, the latents (B, C, t, h, w) of clips to so many: (B, 3, T, H, W)."""
    height, width = (side * codec.spatial_ratio for side in latents.shape[-2:])
    normalised = codec.normalise(latents.to(codec.device))
    return codec.decode(Latents(normalised, height, width, frames), generator=generators)


def _pixel_shape(codec: LatentCodec, latents: Tensor) -> tuple[int, ...]:
    """Height and width, of clips also frames before them, that latents (N, C, …) stand for."""
    height, width = (side * codec.spatial_ratio for side in latents.shape[-2:])
    if latents.ndim == 4:
        return height, width
    return 1 + (latents.shape[2] - 1) * codec.temporal_ratio, height, width


def _open_decoder(
    store: LatentStore,
    model: LatentCodec | nn.Module | str | Path | None,
    device: str | torch.device | None,
    autocast: torch.dtype | None,
    random_weights: bool,
    allow_other_model: bool,
) -> LatentCodec:
    recorded = store.config["model"]
    if model is None and recorded["name"] is None:
        raise RequestError(f"{store.path} does not say where its {recorded['class']} is: give a model.")
    # a model found by its recorded name is held to the recorded weights below, random or not
    known = model is None
    codec, _ = open_codec(
        recorded["name"] if model is None else model,
        device=device,
        autocast=autocast,
        random_weights=random_weights or known,
    )
    if not allow_other_model and weights_hash(codec.autoencoder) != recorded["weights_sha256"]:
        raise RequestError(
            f"The model {model or recorded['name']} does not have the weights that encoded {store.path} "
            f"({recorded['class']} {recorded['weights_sha256'][:12]}): give that model, or allow another one."
        )
    return codec
