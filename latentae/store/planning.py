"""From a request to the plan of a store: what is to be encoded, how, and in which shards.

    inputs -> shapes -> plan.parquet -> store.json

Everything that the latents depend on is settled here; `latentae.store.encode` then only works the plan off.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentae.codec import LatentCodec
from latentae.console import Progress
from latentae.data.clips import ClipReader, ClipSource, open_inputs
from latentae.data.decode import DecodePolicy
from latentae.data.framing import NATIVE, Framing
from latentae.data.sources import Source, refuse_output_in_input
from latentae.data.sources.reading import UriReader
from latentae.data.sources.table import ItemTable
from latentae.data.video import FrameChoice
from latentae.errors import RequestError
from latentae.files import remove_stale_temporaries
from latentae.loading import weights_hash
from latentae.store.clips import chosen_frames
from latentae.store.configuration import Options, check_counts, describe_store, open_codec, store_fingerprint
from latentae.store.job import Job, Model
from latentae.store.plan import Plan, PlanPart, make_plan
from latentae.store.resume import (
    agree_on_plan,
    agree_on_store,
    check_folder,
    is_planned,
    new_inputs,
    refuse_changed_inputs,
    refuse_other_inputs,
    refuse_other_plan,
)
from latentae.store.shard import committed_marker
from latentae.store.worker import raw_posterior


@dataclass(frozen=True)
class Request:
    """What is asked of a store; see `latentae.encode_dataset` for each."""

    src: Any
    dst: str | Path
    model: Any
    size: int | str | Sequence[int] = 256
    crop: str = "adm"
    flip: bool = False
    shard_size: int = 1000
    kind: str = "mode"
    dtype: str = "float32"
    seed: int = 0
    limit: int | None = None
    columns: Sequence[str] | None = None
    frames: int | str | None = None
    fps: Fraction | float | str | None = None
    stride: int = 1
    policy: DecodePolicy = field(default_factory=DecodePolicy)
    extend: bool = False
    as_planned: bool = False
    workers: int = 2
    device: str | torch.device | None = None
    autocast: torch.dtype | None = None
    random_weights: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sides of the crop, none for whole images."""
        if self.size == NATIVE:
            return ()
        sizes = (self.size,) if isinstance(self.size, int) else self.size
        if isinstance(sizes, str) or not all(isinstance(size, int) for size in sizes):
            raise RequestError(f"size={self.size!r}; expected a number of pixels or 'native', or several numbers.")
        return tuple(sorted(set(sizes)))


@dataclass(frozen=True)
class Opened:
    """A request whose inputs and model are found: all that a plan is made of."""

    request: Request
    store: Path
    source: Source | ClipSource | None
    codec: LatentCodec
    name: str | None
    options: Options

    @property
    def clips(self) -> bool:
        return self.options.clips is not None

    @property
    def reader(self) -> Any:
        """What gives the bytes of inputs: by their URIs alone, if they came from a place and not from an object."""
        if self.source is not None and not isinstance(self.request.src, (str, Path)):
            return self.source
        return ClipReader() if self.clips else UriReader()


def open_request(request: Request) -> Opened:
    """Find the inputs and the model of a request, and make sure that they fit each other.

    Raises:
        RequestError: an argument cannot be met.
    """
    store = Path(request.dst)
    sizes = request.sizes
    check_counts(shard_size=request.shard_size, limit=request.limit, workers=request.workers)
    choice = chosen_frames(request.frames, request.fps, request.stride)
    check_folder(store)
    refuse_output_in_input(request.src, store)
    source: Source | ClipSource | None = request.src
    of_place = isinstance(request.src, str | Path)
    if of_place and request.as_planned and not request.extend and is_planned(store):
        source, of_clips = None, Plan.load(store).holds_clips
    else:
        if not hasattr(request.src, "items") or isinstance(request.src, dict):  # the latter to be refused
            source = open_inputs(request.src, clips=choice is not None, columns=request.columns)
        of_clips = isinstance(source, ClipSource)
    clips = choice or FrameChoice() if of_clips else None
    Framing(sizes, request.crop)  # what is wrong with these is said before a model is opened
    options = Options(Framing(sizes, request.crop), request.kind, request.dtype, request.seed, request.flip, clips)
    codec, name = open_codec(
        request.model, device=request.device, autocast=request.autocast, random_weights=request.random_weights
    )
    check_model(codec, options)
    framing = Framing(sizes, request.crop, codec.spatial_ratio)
    options = Options(framing, request.kind, request.dtype, request.seed, request.flip, clips)
    return Opened(request, store, source, codec, name, options)


def check_model(codec: LatentCodec, options: Options) -> None:
    """Make sure that the model takes the sizes and gives the kind of latents that are asked for.

    Raises:
        RequestError: it does not.
    """
    ratio = codec.spatial_ratio
    if options.clips and not codec.is_video:
        raise RequestError(
            f"{type(codec.autoencoder).__name__} is an autoencoder of images, and the inputs are clips: give a model "
            "of videos (its latents would be those of single frames)."
        )
    for size in options.framing.sizes:
        if size % ratio:
            nearest = [multiple for multiple in (size - size % ratio, size + -size % ratio) if multiple]
            raise RequestError(
                f"size={size} is not a multiple of {ratio}, the model's ratio: use {' or '.join(map(str, nearest))}."
            )
    if options.kind != "mode":
        side = min(options.framing.sizes, default=8 * ratio)
        with torch.no_grad():
            posterior = raw_posterior(codec, torch.zeros(1, 3, side, side, device=codec.device))
        if not hasattr(posterior, "logvar"):
            raise RequestError(
                f"kind={options.kind!r} needs an encoder with a distribution, and {type(codec.autoencoder).__name__} "
                "is deterministic: use kind='mode'."
            )


def list_inputs(opened: Opened) -> ItemTable:
    """The inputs of a request, sorted by key.

    Raises:
        RequestError: there are none.
    """
    assert opened.source is not None
    table = opened.source.items().sorted()[: opened.request.limit]
    if not len(table):
        raise RequestError(f"{opened.request.src} has no inputs to encode.")
    return table


def job_of(
    opened: Opened,
    plan: Plan,
    fingerprint: str = "",
    *,
    batch_size: int | None = None,
    retry_failed: bool = False,
    by_name: bool = False,
) -> Job:
    """The work on a plan.

    Args:
        by_name: let workers open the model themselves, where it has a name, and hold them to its weights.
    """
    request = opened.request
    model = Model(opened.codec)
    if by_name:
        source = opened.name or opened.codec
        weights = weights_hash(opened.codec.autoencoder)
        model = Model(source, request.autocast, request.random_weights, weights)
    return Job(
        opened.store, fingerprint, plan, model, opened.options, opened.reader, request.policy, batch_size,
        request.workers, retry_failed,
    )  # fmt: skip


def draft_plan(opened: Opened, items: ItemTable, extends: Plan | None = None) -> PlanPart:
    """Cut inputs into shards, for which the shapes of images and clips are read where they may differ."""
    request = opened.request
    loader = job_of(opened, Plan(())).loader(opened.codec)
    shapes: np.ndarray | tuple[int, ...] | None = loader.fixed_shape
    if shapes is None:
        read = list[tuple[int, ...]]()
        with ThreadPoolExecutor(request.workers) as pool, Progress("read sizes", len(items)) as progress:
            for start in range(0, len(items), 10_000):  # so that not all of them wait in memory
                for shape in pool.map(loader.shape, items[start : start + 10_000]):
                    read.append(shape)
                    progress.advance()
        shapes = np.array(read, np.int32)
    return make_plan(items, shapes, request.shard_size, extends=extends)


def describe(opened: Opened, plan: Plan) -> dict[str, Any]:
    """The content of ``store.json`` for a request."""
    return describe_store(
        opened.codec, opened.name, plan, opened.options, opened.request.policy,
        shard_size=opened.request.shard_size, limit=opened.request.limit,
    )  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """A store with its plan and its description on disk."""

    opened: Opened
    plan: Plan
    configuration: dict[str, Any]
    committed: dict[int, dict[str, Any]]
    new: int = 0

    @property
    def fingerprint(self) -> str:
        return store_fingerprint(self.configuration)


def plan_store(opened: Opened) -> Planned:
    """Begin the store of a request, extend it, or find it as it was begun.

    Raises:
        RequestError: it was begun with another plan or configuration.
    """
    request, store = opened.request, opened.store
    begun, found = is_planned(store), (store / "plan.parquet").exists()
    items = None if opened.source is None else list_inputs(opened)
    if items is None or begun:
        plan = Plan.load(store)
    else:
        draft = draft_plan(opened, items)
        plan = agree_on_plan(store, draft, 0)
        refuse_other_plan(store, plan, draft, items)
    configuration = agree_on_store(store, plan, describe(opened, plan), extend=request.extend)
    new = 0
    if request.extend and begun and items is not None:
        while len(added := new_inputs(store, plan, items)):
            new = len(added)
            plan = agree_on_plan(store, draft_plan(opened, added, extends=plan), len(plan.parts))
    elif items is not None:
        refuse_other_inputs(store, plan, items)
    (store / "shards").mkdir(exist_ok=True)
    for folder in (store, store / "shards"):
        remove_stale_temporaries(folder)
    fingerprint = store_fingerprint(configuration)
    markers = ((shard.index, committed_marker(store, shard, fingerprint)) for shard in plan.shards)
    committed = {index: marker for index, marker in markers if marker is not None}
    if items is not None and found:
        refuse_changed_inputs(store, plan, items, set(committed))
        plan = plan.relocated(items)
    return Planned(opened, plan, configuration, committed, new)
