"""Encode a data set into a store of latents, or go on with one: the driver.

    request -> plan.parquet, store.json -> engine: for each shard that has no marker, load, encode, publish
            -> quarantine.parquet

The files are the truth. A run that was killed, or that found the disk full, is continued by running it again: shards
with a marker are left alone. A store is only ever continued with the plan and the configuration that it began with.
"""

import contextlib
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentae.codec import LatentCodec
from latentae.console import Progress
from latentae.data.clips import ClipSource
from latentae.data.decode import DecodePolicy
from latentae.data.sources import Source
from latentae.errors import RequestError, ResumableError
from latentae.store.batch_size import last_batch_size
from latentae.store.configuration import check_counts
from latentae.store.job import Report
from latentae.store.plan import Shard
from latentae.store.planning import Planned, Request, job_of, open_request, plan_store
from latentae.store.running import choose_engine
from latentae.store.shard import committed_marker, read_rows, row_columns
from latentae.store.tables import write_table
from latentae.store.worker import check_max_bad, refuse_too_many_bad


@dataclass(frozen=True)
class EncodeSummary:
    """What a run of `encode_dataset` leaves behind.

    ``encoded``, ``bad`` and ``reasons`` (how many inputs are bad for which reason) are of the whole store;
    ``encoded_now`` inputs were encoded by this run, in ``seconds``; ``shards_left`` are still to be done, by other
    processes; ``unit`` says whether they are images or clips.
    """

    store: str
    inputs: int
    shards: int
    encoded: int
    bad: int
    reasons: dict[str, int]
    encoded_now: int
    seconds: float
    shards_left: int = 0
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
    size: int | str | Sequence[int] = 256,
    crop: str = "adm",
    flip: bool = False,
    shard_size: int = 1000,
    batch_size: int | None = None,
    kind: str = "mode",
    dtype: str = "float32",
    seed: int = 0,
    max_bad: float = 0.01,
    limit: int | None = None,
    columns: Sequence[str] | None = None,
    workers: int | None = None,
    processes: int | None = None,
    device: str | torch.device | Sequence[str] | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    extend: bool = False,
    as_planned: bool = False,
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
        src: what `latentae.data.sources.open_source` opens, or a source.
        model: a codec, an autoencoder, or what `latentae.load` opens.
        size: side of the crop, a multiple of the model's ratio; several, of which each image gets the largest that it
            fills; ``"native"`` keeps whole images at their own sizes, padded to a multiple of the ratio. Where shapes
            differ, a shard holds one of them.
        crop: ``adm``, ``center``, ``squash`` or ``buckets``; see `latentae.data.framing.Framing`.
        flip: store the latents of the mirrored image beside those of the image.
        batch_size: None to find it by trying on a GPU, and 16 on a CPU.
        kind: ``mode``; ``moments`` (mean and log-variance, twice the channels); or ``sample``, drawn once for each
            input by a hash of ``seed`` and its key.
        dtype: of the stored latents, ``float32``, ``float16`` or ``bfloat16``.
        max_bad: how many inputs may be bad, as a share of all (float) or as a number (int).
        limit: plan only the first ``limit`` inputs, in the order of their keys.
        columns: of a manifest or table, and captions of tars, that go into the rows; None for all.
        workers: threads of each process that read and decode; by default its share of the CPUs where a GPU encodes, and
            2 where they encode themselves.
        processes: that encode; by default one for each device. With ``engine="ray"`` as many actors.
        device: or several; by default all GPUs, or the CPU.
        engine: ``local``, or ``ray`` for a cluster whose nodes share the folder of the store (``ray_address``, by
            default a cluster of this machine).
        shard_index, shard_count: do only every ``shard_count``-th shard, from ``shard_index`` on: one of so many jobs
            of a scheduler, which may start all at once.
        extend: plan inputs that are not in the plan as new shards.
        as_planned: take the inputs of a store that is planned from its plan, and do not list ``src`` again. So do jobs
            of several.
        autocast, random_weights: how a model that is not yet a codec is opened.
        retry_failed: try again the inputs that were bad in earlier runs; what is encoded stays as it is.
        frames: of each clip, from its first on: a number, which shorter clips do not have (they are bad inputs), or
            ``"all"``, which gives a shard for each padded shape as ``"native"`` does. Where it is given, also images in
            a folder are the frames of a clip and GIFs move; else only videos are clips (`open_inputs`), and whole.
        fps, stride: which frames of a clip those are; see `latentae.data.video.frame_numbers`.

    Raises:
        RequestError: an argument cannot be met, or the store was begun with another plan or configuration.
        DataError: more inputs than ``max_bad`` are bad. All others are encoded by then.
        ResumableError: out of memory, or lost workers. (A full disk raises OSError; the next run goes on in each case.)
    """
    check_counts(batch_size=batch_size, workers=workers, processes=processes, shard_count=shard_count)
    check_max_bad(max_bad)
    if not 0 <= shard_index < shard_count:
        raise RequestError(f"shard_index={shard_index}; expected 0 to {shard_count - 1}, of shard_count={shard_count}.")
    chosen = choose_engine(engine, processes, device, ray_address, model)
    request = Request(
        src, dst, model, size=size, crop=crop, flip=flip, shard_size=shard_size, kind=kind, dtype=dtype, seed=seed,
        limit=limit, columns=columns, frames=frames, fps=fps, stride=stride, policy=policy or DecodePolicy(),
        extend=extend, as_planned=as_planned or shard_count > 1,
        workers=workers or chosen.loading_threads,
        device=chosen.devices[0] if chosen.in_process else "cpu", autocast=autocast, random_weights=random_weights,
    )  # fmt: skip
    planned = plan_store(open_request(request))
    own = [shard for shard in planned.plan.shards if shard.index % shard_count == shard_index]
    work = [
        shard.index
        for shard in own
        if shard.index not in planned.committed or (retry_failed and planned.committed[shard.index]["bad"])
    ]
    job = job_of(
        planned.opened, planned.plan, planned.fingerprint, retry_failed=retry_failed, by_name=not chosen.in_process,
        batch_size=batch_size or last_batch_size(list(planned.committed.values())),
    )  # fmt: skip
    started = time.monotonic()
    encoded_now = 0
    if work:
        progress = _Progress(planned, own, work)
        with progress, contextlib.closing(chosen.run(job, work, progress.advance)) as reports:
            for report in reports:
                encoded_now += report.inputs
                _log_timing(planned.opened.store, report)
    return _finish(planned, own, max_bad, encoded_now, time.monotonic() - started)


class _Progress(contextlib.AbstractContextManager):
    """A bar of all inputs of the shards that are this run's, with how many of them are bad."""

    def __init__(self, planned: Planned, own: Sequence[Shard], work: Sequence[int]):
        done = sum(planned.committed[shard.index]["encoded"] for shard in own if shard.index in planned.committed)
        self.bad = sum(m["bad"] for index, m in planned.committed.items() if index not in set(work))
        unit = "clips" if planned.opened.clips else "images"
        self.bar = Progress("encode", sum(shard.inputs for shard in own), unit, done + self.bad)

    def __enter__(self) -> "_Progress":
        self.bar.__enter__()
        return self

    def advance(self, inputs: int, bad: int) -> None:
        self.bad += bad
        self.bar.advance(inputs, bad=self.bad)

    def __exit__(self, *exception: object) -> None:
        self.bar.__exit__(*exception)


def _log_timing(store: Path, report: Report) -> None:
    """Append to ``STORE.log``, beside the store, because its own files hold nothing that differs from run to run."""
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "process": os.getpid(),
        "shard": report.shard,
        "inputs": report.inputs,
        "seconds": round(report.seconds, 3),
    }
    path = store.resolve()
    with contextlib.suppress(OSError), path.with_name(f"{path.name}.log").open("a", encoding="utf-8") as stream:
        print(json.dumps(entry), file=stream)  # a log that cannot be written stops no work


def _finish(planned: Planned, own: Sequence[Shard], max_bad: float, encoded_now: int, seconds: float) -> EncodeSummary:
    """Count what is in the store against what may be missing, and list the bad inputs where no shard is missing."""
    store, plan = planned.opened.store, planned.plan
    markers = {shard: committed_marker(store, shard, planned.fingerprint) for shard in plan.shards}
    lost = [shard.name for shard in own if markers[shard] is None]
    if lost:
        raise ResumableError(f"Shard {lost[0]} of {store} was changed by another process: run the command again.")
    bad_rows = list(_bad_rows(store, [shard for shard, marker in markers.items() if marker and marker["bad"]]))
    left = sum(marker is None for marker in markers.values())
    if not left:
        types = {"shard": "int32", **row_columns(plan.shards[0], plan.carried)}
        types = {name: kind for name, kind in types.items() if name != "row"}
        write_table(store / "quarantine.parquet", types, {name: [row.get(name) for row in bad_rows] for name in types})
    reasons = [row["reason"] for row in bad_rows]
    done = sum(shard.inputs for shard, marker in markers.items() if marker)
    where = f"{store / 'quarantine.parquet'} lists the bad ones" if not left else "their rows say why"
    remedy = (
        f"All others are in the store, and {where}: repair them and run again with --retry-failed, or accept them with "
        "a larger --max-bad."
    )
    refuse_too_many_bad(reasons, done, max_bad, remedy)
    return EncodeSummary(
        str(store), plan.inputs, len(plan.shards), sum(m["encoded"] for m in markers.values() if m), len(reasons),
        dict(Counter(reasons).most_common()), encoded_now, seconds, left, "clips" if planned.opened.clips else "images",
    )  # fmt: skip


def _bad_rows(store: Path, shards: Sequence[Shard]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        rows = read_rows(store, shard)
        for values in zip(*rows.values()):
            row = dict(zip(rows, values))
            if row["status"] == "bad":
                yield {"shard": shard.index, **row}
