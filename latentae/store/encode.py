"""Encode a data set into a store of latents, or go on with one: the driver.

    inputs -> plan -> store.json -> for each shard that has no marker: load, encode, publish -> quarantine.parquet

The files are the truth. A run that was killed, or that found the disk full, is continued by running it again: shards
with a marker are left alone. A store is only ever continued with the plan and the configuration that it began with.
"""

import contextlib
import json
import math
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentae.codec import LatentCodec
from latentae.console import Progress
from latentae.data.clips import ClipSource, open_inputs
from latentae.data.decode import DecodePolicy
from latentae.data.sources import Item, Source, refuse_output_in_input
from latentae.data.video import FrameChoice
from latentae.errors import RequestError, ResumableError
from latentae.files import remove_stale_temporaries
from latentae.store.clips import ClipLoader, chosen_frames
from latentae.store.configuration import (
    NATIVE,
    Options,
    check_counts,
    describe_store,
    open_codec,
    store_fingerprint,
)
from latentae.store.plan import Plan, Shard, make_plan
from latentae.store.resume import begin_store, check_folder, continue_store, refuse_changed_inputs
from latentae.store.shard import committed_marker, publish, read_rows, read_samples, row_columns
from latentae.store.tables import write_table
from latentae.store.worker import (
    PREFETCH_BYTES,
    BatchEncoder,
    Loader,
    check_max_bad,
    prefetch,
    raw_posterior,
    refuse_too_many_bad,
)


@dataclass(frozen=True)
class EncodeSummary:
    """What a run of `encode_dataset` leaves behind.

    ``encoded``, ``bad`` and ``reasons`` (how many inputs are bad for which reason) are of the whole store;
    ``encoded_now`` inputs were encoded by this run, in ``seconds``; ``unit`` says whether they are images or clips.
    """

    store: str
    inputs: int
    shards: int
    encoded: int
    bad: int
    reasons: dict[str, int]
    encoded_now: int
    seconds: float
    unit: str = "images"

    @property
    def images_per_second(self) -> float:
        return self.encoded_now / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "images_per_second": self.images_per_second}


def encode_dataset(
    src: str | Path | Source | ClipSource,
    dst: str | Path,
    model: LatentCodec | nn.Module | str | Path,
    *,
    size: int | str = 256,
    shard_size: int = 1000,
    batch_size: int = 16,
    kind: str = "mode",
    dtype: str = "float32",
    seed: int = 0,
    max_bad: float = 0.01,
    limit: int | None = None,
    workers: int = 2,
    device: str | torch.device | None = None,
    autocast: torch.dtype | None = None,
    random_weights: bool = False,
    retry_failed: bool = False,
    policy: DecodePolicy | None = None,
    frames: int | str | None = None,
    fps: Fraction | float | str | None = None,
    stride: int = 1,
) -> EncodeSummary:
    """Encode every image, or every clip, of ``src`` into the store ``dst``; run again, finish what is missing.

    Every input ends as a row: encoded, or bad with a reason and listed in ``quarantine.parquet``. Latents are stored
    raw, as the encoder gives them. Two runs of one command on one machine give the same bytes.

    Args:
        src: a folder, an image file, or a source.
        model: a codec, an autoencoder, or what `latentae.load` opens.
        size: side of the ADM centre crop, a multiple of the model's ratio; ``"native"`` keeps whole images at their own
            sizes, padded to a multiple of the ratio, and gives a shard for each padded shape.
        kind: ``mode``; ``moments`` (mean and log-variance, twice the channels); or ``sample``, drawn once for each
            input by a hash of ``seed`` and its key.
        dtype: of the stored latents, ``float32``, ``float16`` or ``bfloat16``.
        max_bad: how many inputs may be bad, as a share of all (float) or as a number (int).
        limit: plan only the first ``limit`` inputs, in the order of their keys.
        workers: threads that read and decode.
        device, autocast, random_weights: how a model that is not yet a codec is opened.
        retry_failed: try again the inputs that were bad in earlier runs; what is encoded stays as it is.
        frames: of each clip, from its first on: a number, which shorter clips do not have (they are bad inputs), or
            ``"all"``, which gives a shard for each padded shape as ``"native"`` does. Where it is given, also images in
            a folder are the frames of a clip and GIFs move; else only videos are clips (`open_inputs`), and whole.
        fps, stride: which frames of a clip those are; see `latentae.data.video.frame_numbers`.

    Raises:
        RequestError: an argument cannot be met, or the store was begun with another plan or configuration.
        DataError: more inputs than ``max_bad`` are bad. All others are encoded by then.
        ResumableError: out of memory. (A full disk raises OSError; in both cases the next run goes on.)
    """
    if size != NATIVE and not isinstance(size, int):
        raise RequestError(f"size={size!r}; expected a number of pixels or 'native'.")
    choice = chosen_frames(frames, fps, stride)
    check_counts(batch_size=batch_size, workers=workers)
    check_max_bad(max_bad)
    source = open_inputs(src, clips=choice is not None) if isinstance(src, (str, Path)) else src
    clips = choice or FrameChoice() if isinstance(source, ClipSource) else None
    options = Options(None if size == NATIVE else int(size), kind, dtype, seed, shard_size, limit, clips)
    store = Path(dst)
    check_folder(store)
    refuse_output_in_input(src, store)
    items = list(islice(source.items(), limit))
    if not items:
        raise RequestError(f"{src} has no inputs to encode.")

    codec, name = open_codec(model, device=device, autocast=autocast, random_weights=random_weights)
    _check_model(codec, options)
    policy = policy or DecodePolicy()
    if clips is None:
        loader = Loader(source, options.size, codec.spatial_ratio, policy)
    else:
        loader = ClipLoader(source, options.size, codec.spatial_ratio, policy, codec.padded_frames, clips)

    begun = (store / "store.json").exists()
    planned = Plan.load(store / "plan.parquet") if begun else _plan(items, loader, shard_size, workers)
    configuration = describe_store(codec, name, planned, options, policy)
    if begun:
        configuration = continue_store(store, planned, items, configuration)
    else:
        begin_store(store, planned, configuration)
    plan = planned.with_items(items)
    fingerprint = store_fingerprint(configuration)
    (store / "shards").mkdir(exist_ok=True)
    for folder in (store, store / "shards"):
        remove_stale_temporaries(folder)

    committed = {shard.index for shard in plan.shards if committed_marker(store, shard, fingerprint)}
    if begun:
        refuse_changed_inputs(store, planned, plan, committed)
    encoder = BatchEncoder(codec, options, batch_size)
    work = list(_find_work(store, plan, committed, fingerprint, retry_failed))
    started = time.monotonic()
    encoded_now = _encode(store, work, loader, encoder, fingerprint, workers, plan.inputs)
    return _finish(store, plan, fingerprint, max_bad, encoded_now, time.monotonic() - started)


def _check_model(codec: LatentCodec, options: Options) -> None:
    """Make sure that the model takes the size and gives the kind of latents that are asked for.

    Raises:
        RequestError: it does not.
    """
    size, ratio = options.size, codec.spatial_ratio
    if options.clips and not codec.is_video:
        raise RequestError(
            f"{type(codec.autoencoder).__name__} is an autoencoder of images, and the inputs are clips: give a model "
            "of videos (its latents would be those of single frames)."
        )
    if size and size % ratio:
        nearest = [multiple for multiple in (size - size % ratio, size + -size % ratio) if multiple]
        raise RequestError(
            f"size={size} is not a multiple of {ratio}, the model's ratio: use {' or '.join(map(str, nearest))}."
        )
    if options.kind != "mode":
        side = size or 8 * ratio
        with torch.no_grad():
            posterior = raw_posterior(codec, torch.zeros(1, 3, side, side, device=codec.device))
        if not hasattr(posterior, "logvar"):
            raise RequestError(
                f"kind={options.kind!r} needs an encoder with a distribution, and {type(codec.autoencoder).__name__} "
                "is deterministic: use kind='mode'."
            )


def _plan(items: Sequence[Item], loader: Loader, shard_size: int, workers: int) -> Plan:
    if loader.fixed_shape is not None:
        return make_plan(items, [loader.fixed_shape] * len(items), shard_size)
    shapes = []
    with ThreadPoolExecutor(workers) as pool, Progress("read sizes", len(items)) as progress:
        for shape in pool.map(loader.shape, items):
            shapes.append(shape)
            progress.advance()
    return make_plan(items, shapes, shard_size)


@dataclass(frozen=True)
class _Work:
    """A shard to be published, and those of its inputs that are not encoded yet."""

    shard: Shard
    items: tuple[Item, ...]


def _find_work(store: Path, plan: Plan, committed: set[int], fingerprint: str, retry_failed: bool) -> Iterator[_Work]:
    for shard in plan.shards:
        if shard.index not in committed:
            yield _Work(shard, shard.items)
        elif retry_failed and _marker(store, shard, fingerprint)["bad"]:
            statuses = read_rows(store, shard, ["status"])["status"]
            yield _Work(shard, tuple(i for i, status in zip(shard.items, statuses) if status == "bad"))


def _encode(
    store: Path,
    work: Sequence[_Work],
    loader: Loader,
    encoder: BatchEncoder,
    fingerprint: str,
    workers: int,
    inputs: int,
) -> int:
    """Encode and publish all ``work``; a thread publishes one shard while the next is being encoded."""
    to_do = sum(len(part.items) for part in work)
    loaded = prefetch(
        lambda task: loader.load_for(*task),
        ((part.shard, item) for part in work for item in part.items),
        workers=workers,
        cost=lambda task: 3 * math.prod(task[0].shape),
        budget=PREFETCH_BYTES,
    )
    with (
        contextlib.closing(loaded),
        ThreadPoolExecutor(1, thread_name_prefix="latentae-publish") as publisher,
        Progress("encode", inputs, "clips" if encoder.options.clips else "images", inputs - to_do) as progress,
    ):
        publishing: Future[None] | None = None
        for part in work:
            started = time.monotonic()
            inputs_of_shard = islice(loaded, len(part.items))
            samples, batch_size = encoder.encode_shard(
                part.shard, inputs_of_shard, lambda count: progress.advance(count, bad=encoder.bad)
            )
            if len(samples) < len(part.shard.items):  # a retry: the others come from the shard as it is
                new = {sample.item.key: sample for sample in samples}
                samples = [new.get(s.item.key, s) for s in read_samples(store, part.shard, encoder.options.kind)]
            if publishing is not None:
                publishing.result()
            publishing = publisher.submit(
                publish,
                store,
                part.shard,
                samples,
                kind=encoder.options.kind,
                fingerprint=fingerprint,
                batch_size=batch_size,
            )
            _log_timing(store, part, time.monotonic() - started)
        if publishing is not None:
            publishing.result()
    return to_do


def _log_timing(store: Path, part: _Work, seconds: float) -> None:
    """Append to ``STORE.log``, beside the store, because its own files hold nothing that differs from run to run."""
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "process": os.getpid(),
        "shard": part.shard.index,
        "inputs": len(part.items),
        "seconds": round(seconds, 3),
    }
    path = store.resolve()
    with contextlib.suppress(OSError), path.with_name(f"{path.name}.log").open("a", encoding="utf-8") as stream:
        print(json.dumps(entry), file=stream)  # a log that cannot be written stops no work


def _marker(store: Path, shard: Shard, fingerprint: str) -> dict[str, Any]:
    marker = committed_marker(store, shard, fingerprint)
    if marker is None:
        raise ResumableError(f"Shard {shard.name} of {store} was changed by another process: run the command again.")
    return marker


def _finish(
    store: Path, plan: Plan, fingerprint: str, max_bad: float, encoded_now: int, seconds: float
) -> EncodeSummary:
    """Write the quarantine, and count what is in the store against what is allowed to be missing."""
    types = {"shard": "int32", **{name: kind for name, kind in row_columns(plan.shards[0]).items() if name != "row"}}
    quarantine: dict[str, list[Any]] = {name: [] for name in types}
    encoded = 0
    for shard in plan.shards:
        marker = _marker(store, shard, fingerprint)
        encoded += marker["encoded"]
        if not marker["bad"]:
            continue
        rows = read_rows(store, shard)
        bad_ones = [i for i, status in enumerate(rows["status"]) if status == "bad"]
        quarantine["shard"] += [shard.index] * len(bad_ones)
        for name in rows.keys() & types.keys():
            quarantine[name] += [rows[name][i] for i in bad_ones]
    write_table(store / "quarantine.parquet", types, quarantine)

    bad = len(quarantine["key"])
    remedy = (
        f"All others are in the store, and {store / 'quarantine.parquet'} lists the bad ones: repair them and run "
        "again with --retry-failed, or accept them with a larger --max-bad."
    )
    refuse_too_many_bad(quarantine["reason"], plan.inputs, max_bad, remedy)
    reasons = dict(Counter(quarantine["reason"]).most_common())
    unit = "clips" if len(plan.shards[0].shape) == 3 else "images"
    return EncodeSummary(str(store), plan.inputs, len(plan.shards), encoded, bad, reasons, encoded_now, seconds, unit)
