"""What an encode will take: disk by arithmetic, time by encoding a few inputs."""

import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentae.errors import DataError, RequestError
from latentae.store.batch_size import find_batch_size
from latentae.store.configuration import store_fingerprint
from latentae.store.plan import Plan, Shard
from latentae.store.planning import Opened, describe, draft_plan, job_of, list_inputs
from latentae.store.resume import agree_on_store, is_planned, new_inputs, refuse_other_inputs
from latentae.store.shard import Sample, committed_marker
from latentae.store.worker import BatchEncoder

TRIED = 48  # inputs that are encoded to measure
ROW_BYTES = 150  # of an input in the tables of a store, about


@dataclass(frozen=True)
class Estimate:
    """What encoding would take. Rates are of inputs per second in one process on this machine: of reading and decoding
    them, and of the model; the slower one counts, and ``seconds`` is for all."""

    inputs: int
    shards: int
    shapes: int
    bytes: int
    free_bytes: int
    loading_rate: float
    model_rate: float
    seconds: float
    batch_size: int
    unit: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(opened: Opened, batch_size: int | None = None) -> Estimate:
    """Plan in memory, encode a few inputs spread over the plan, and write nothing.

    Raises:
        DataError: none of these can be encoded.
        RequestError: nothing is left to encode.
    """
    plan, shards = _left(opened)
    if not shards:
        raise RequestError(f"Nothing is left to encode: {opened.store} has all of the inputs.")
    job = job_of(opened, plan, batch_size=batch_size)
    loader = job.loader(opened.codec)
    shard = max(shards, key=lambda shard: shard.inputs)
    members = plan.items(shard)
    chosen = [members[int(i)] for i in np.unique(np.linspace(0, len(members) - 1, TRIED).astype(int))]

    started = time.perf_counter()
    with ThreadPoolExecutor(job.workers) as pool:
        samples = list(pool.map(loader.load, chosen))
    loading_rate = len(samples) / (time.perf_counter() - started)
    good = [sample for sample in samples if sample.pixels is not None]
    if not good:
        raise DataError(f"None of {len(samples)} inputs that were tried can be read; the first: {samples[0].message}")
    size = batch_size or find_batch_size(opened.codec, opened.options, shard.shape)
    model_rate = _model_rate(BatchEncoder(opened.codec, opened.options, size), good, size)

    latents = [tensor for sample in good for tensor in (sample.latents, sample.flipped) if tensor is not None]
    bytes_each = sum(tensor.nbytes for tensor in latents) / len(good)
    inputs = sum(s.inputs for s in shards)
    scale = sum(s.inputs * np.prod(s.shape, dtype=float) for s in shards) / np.prod(shard.shape, dtype=float)
    unit = "clips" if opened.clips else "images"
    return Estimate(
        inputs=inputs,
        shards=len(shards),
        shapes=len({s.shape for s in shards}),
        bytes=int(bytes_each * scale + ROW_BYTES * inputs),
        free_bytes=free_bytes(opened.store),
        loading_rate=loading_rate,
        model_rate=model_rate,
        seconds=float(scale / min(loading_rate, model_rate)),
        batch_size=size,
        unit=unit,
    )


def _left(opened: Opened) -> tuple[Plan, list[Shard]]:
    """The plan of a request, and the shards that are not encoded yet."""
    items = None if opened.source is None else list_inputs(opened)
    if not is_planned(opened.store):
        assert items is not None
        plan = Plan([draft_plan(opened, items)])
        return plan, list(plan.shards)
    plan = Plan.load(opened.store)
    extend = opened.request.extend
    fingerprint = store_fingerprint(agree_on_store(opened.store, plan, describe(opened, plan), extend=extend))
    left = [shard for shard in plan.shards if committed_marker(opened.store, shard, fingerprint) is None]
    if items is None:
        return plan, left
    if not extend:
        refuse_other_inputs(opened.store, plan, items)
        return plan.relocated(items), left
    added = new_inputs(opened.store, plan, items)
    if not len(added):
        return plan.relocated(items), left
    draft = draft_plan(opened, added, extends=plan)
    return Plan([*plan.relocated(items).parts, draft]), [*left, *draft.shards]


def _model_rate(encoder: BatchEncoder, samples: Sequence[Sample], batch_size: int) -> float:
    """Inputs per second of the model, after a batch that warms it up."""
    batches = [list(samples[start : start + batch_size]) for start in range(0, len(samples), batch_size)]
    if len(batches) == 1:
        pixels = [sample.pixels for sample in samples]
        encoder.encode(batches[0])
        for sample, kept in zip(samples, pixels):
            sample.pixels = kept
    else:
        encoder.encode(batches.pop(0))
    started = time.perf_counter()
    for batch in batches:
        encoder.encode(batch)
    return sum(map(len, batches)) / (time.perf_counter() - started)


def free_bytes(folder: Path) -> int:
    """What is free on the disk where ``folder`` is or will be."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
