"""Read a store of latents back, for training and for decoding; it may still be growing.

A `LatentStore` is a snapshot: it sees the shards that had their commit marker when it was opened. Latents come raw, as
the encoder gave them; what a diffusion model sees is one call away, `LatentStore.normalise`.
"""

import bisect
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from latentae.errors import DataError, RequestError, ResumableError
from latentae.files import sha256_file
from latentae.store.configuration import read_configuration, store_fingerprint
from latentae.store.plan import Plan, Shard
from latentae.store.shard import committed_marker, read_marker, read_rows, shard_files

OPEN_SHARDS = 64


@dataclass(frozen=True)
class Statistics:
    """Per channel, over every position of every image: mean and standard deviation of the latents, float64 (C,).

    For a store of moments they are those of the modes, and ``sample_std`` is the standard deviation of draws.
    """

    images: int
    mean: Tensor
    std: Tensor
    sample_std: Tensor | None = None


class _OpenShard:
    """A shard with its file mapped into memory."""

    def __init__(self, store: Path, shard: Shard, marker: dict[str, Any], tensor: str, carried: list[str]):
        self.store, self.shard, self.marker, self.carried = store, shard, marker, carried
        path = shard_files(store, shard)[0]
        try:
            file = safetensors.safe_open(path, framework="pt")
            self.latents = file.get_slice(tensor)
            self.flipped = file.get_slice(f"{tensor}_flip") if f"{tensor}_flip" in file.keys() else None  # noqa: SIM118
        except (safetensors.SafetensorError, FileNotFoundError) as error:
            raise DataError(
                f"{path} cannot be read ({error}): delete {path.with_suffix('.json')} and encode again."
            ) from error
        if self.latents.get_shape()[0] != self.marker["encoded"]:
            raise _written_again(path)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """What is known of each encoded input, in the order of the tensors; as slow to read as 50 of these."""
        of_clips = ["frames", "fps"] if len(self.shard.shape) == 3 else []
        names = ["row", "key", "label", "height", "width", *of_clips, *self.carried]
        columns = read_rows(self.store, self.shard, names)
        places = columns.pop("row")  # counted from 0, None for inputs that have no latents
        if sum(place is not None for place in places) != self.marker["encoded"]:
            raise _written_again(shard_files(self.store, self.shard)[1])
        columns |= {name: [None] * len(places) for name in self.carried if name not in columns}  # of an extension
        columns["label"] = [-1 if label is None else label for label in columns["label"]]
        every = (dict(zip(columns, values)) for values in zip(*columns.values()))
        return [row for row, place in zip(every, places) if place is not None]


def _written_again(path: Path) -> ResumableError:
    return ResumableError(f"{path} was written again while its store was open, by a retry: open the store again.")


class LatentStore:
    """The encoded inputs of a store, in the order of its plan.

    ``len(store)`` counts them and ``store[i]`` is a dictionary with ``key``, ``label`` (-1 if there is none),
    ``height`` and ``width`` of the source image, and ``latents``, (C, h, w), (C, t, h, w) from a video autoencoder;
    from a store of moments ``latents`` are the mode, and ``moments``, (2C, h, w), are mean and log-variance. Encoded
    with ``flip``, there are also ``latents_flip``, or ``moments_flip``, of the mirrored image; columns that the source
    carried along, captions say, are there by their names. A store of clips (``holds_clips``) also gives how many
    ``frames`` were encoded, before padding, and their ``fps``. Copies in other processes share nothing but the files,
    so a DataLoader may have workers.

    Raises:
        RequestError: ``path`` is no store.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config: dict[str, Any] = read_configuration(self.path)
        self._tensor = "moments" if self.config["kind"] == "moments" else "latents"
        self.plan = Plan.load(self.path)
        self._carried = list(self.plan.carried)
        self.fingerprint = store_fingerprint(self.config)
        self._committed = [
            (shard, marker)
            for shard in self.plan.shards
            if (marker := committed_marker(self.path, shard, self.fingerprint)) is not None
        ]
        self._filled = [(shard, marker) for shard, marker in self._committed if marker["encoded"]]
        self.shard_ends: list[int] = list(accumulate(marker["encoded"] for _, marker in self._filled))
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self.holds_clips = "frames" in self.config["preprocess"]
        self.holds_flips = bool(self.config["preprocess"].get("flip"))

    @property
    def kind(self) -> str:
        """What is stored: ``mode``, ``moments`` or ``sample``."""
        return self.config["kind"]

    @property
    def classes(self) -> dict[str, int]:
        """Labels by the names of their classes, where the inputs had names for them: folders, or texts."""
        return self.plan.classes

    def __len__(self) -> int:
        return self.shard_ends[-1] if self.shard_ends else 0

    @property
    def complete(self) -> bool:
        """Whether every shard of the plan was there when the store was opened."""
        return len(self._committed) == len(self.plan.shards)

    @property
    def keys(self) -> list[str]:
        """Keys of the encoded inputs: ``keys[i]`` is ``store[i]["key"]``."""
        return self._column("key")

    @property
    def labels(self) -> list[int]:
        """Labels of the encoded inputs in the same order, -1 where there is none."""
        return [-1 if label is None else label for label in self._column("label")]

    def _column(self, name: str) -> list[Any]:
        values = []
        for shard, marker in self._filled:
            rows = read_rows(self.path, shard, [name, "status"])
            encoded = [value for value, status in zip(rows[name], rows["status"]) if status == "ok"]
            if len(encoded) != marker["encoded"]:
                raise _written_again(shard_files(self.path, shard)[1])
            values += encoded
        return values

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of every entry's latents, such as (C, h, w); of moments, that of their mode.

        Raises:
            RequestError: nothing is encoded yet, or the shapes differ, as from images of their own sizes.
        """
        shapes = sorted({tuple(marker["latent_shape"]) for _, marker in self._filled})
        if not shapes:
            raise RequestError(f"{self.path} has no encoded inputs yet.")
        if len(shapes) > 1:
            listed = ", ".join(" x ".join(map(str, shape)) for shape in shapes[:3])
            raise RequestError(
                f"{self.path} holds latents of {len(shapes)} shapes ({listed}{', …' if len(shapes) > 3 else ''}): "
                "encode with --size for one."
            )
        channels, *sides = shapes[0]
        return (channels // 2 if self._tensor == "moments" else channels, *sides)

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, place = self._find(index)
        item, stored = shard.rows[place].copy(), shard.latents[place]
        if shard.flipped is not None:
            item[f"{self._tensor}_flip"] = shard.flipped[place]
        if self._tensor == "moments":
            return {**item, "latents": stored.chunk(2)[0], "moments": stored}
        return {**item, "latents": stored}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def stored(self, index: int, *, flip: bool = False) -> Tensor:
        """The latents of an entry, or its moments from a store of them, alone: quick in any order over many shards.

        Args:
            flip: those of the mirrored image, which a store has that was encoded so (`holds_flips`).
        """
        shard, place = self._find(index)
        tensor = shard.flipped if flip else shard.latents
        if tensor is None:
            raise RequestError(f"{self.path} holds no latents of mirrored images: encode with --flip.")
        return tensor[place]

    def _find(self, index: int) -> tuple[_OpenShard, int]:
        """The shard of an entry and the entry's place in it."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a store of {len(self)}")
        index %= len(self)
        number = bisect.bisect_right(self.shard_ends, index)
        return self._shard(number), index - (self.shard_ends[number - 1] if number else 0)

    def shards(self) -> Iterator[tuple[list[dict[str, Any]], Tensor]]:
        """Shard by shard, the rows of its encoded inputs and their latents, (N, C, h, w)."""
        for number in range(len(self._filled)):
            shard = self._shard(number)
            stored = shard.latents[:]
            yield shard.rows, stored.chunk(2, dim=1)[0] if self._tensor == "moments" else stored

    def _shard(self, number: int) -> _OpenShard:
        if number not in self._open:
            self._open[number] = _OpenShard(self.path, *self._filled[number], self._tensor, self._carried)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def statistics(self) -> Statistics:
        """Mean and standard deviation of each latent channel, merged from the commit markers; no latents are read.

        Raises:
            RequestError: nothing is encoded yet, or other software wrote markers without sums.
        """
        return self._statistics

    @cached_property
    def _statistics(self) -> Statistics:
        if not self._filled:
            raise RequestError(f"{self.path} has no encoded inputs yet, so it has no statistics.")
        markers = [marker for _, marker in self._filled]
        if any(name not in marker for marker in markers for name in self._sums):
            raise RequestError(f"{self.path} has shards without statistics: encode them again with this version.")
        channels = len(markers[0]["sum"])
        count = sum(m["encoded"] * math.prod(m["latent_shape"][1:]) for m in markers)

        def mean_of(name: str) -> Tensor:
            return torch.tensor(
                [math.fsum(m[name][channel] for m in markers) / count for channel in range(channels)],
                dtype=torch.float64,
            )

        mean = mean_of("sum")
        variance = (mean_of("sum_of_squares") - mean**2).clamp(min=0)
        drawn = (variance + mean_of("sum_of_variances")).sqrt() if self._tensor == "moments" else None
        return Statistics(len(self), mean, variance.sqrt(), drawn)

    def normalise(self, latents: Tensor, *, by: str = "model", draws: bool = True) -> Tensor:
        """Raw latents (C, ...) or (B, C, ...) to what a diffusion model sees, in fp32.

        Args:
            by: ``model``: as the model's configuration states, ``(z - shift_factor) * scaling_factor``, or per channel
                ``(z - latents_mean) * scaling_factor / latents_std``; ``data``: by the `statistics` of this store to
                mean 0 and standard deviation 1 in each channel.
            draws: ``latents`` of a store of moments are draws; False for modes, whose standard deviation is smaller.
        """
        if by == "model":
            values = self.config["normalisation"]
            if values["latents_mean"] is None or values["latents_std"] is None:
                return (latents.float() - values["shift_factor"]) * values["scaling_factor"]
            mean, std = torch.tensor(values["latents_mean"]), torch.tensor(values["latents_std"])
            scale = values["scaling_factor"] / std
        elif by == "data":
            statistics = self.statistics()
            std = statistics.sample_std if draws and statistics.sample_std is not None else statistics.std
            mean, scale = statistics.mean.float(), 1 / std.float()
        else:
            raise RequestError(f"by={by!r}; expected 'model' or 'data'.")
        axes = latents.ndim - (1 if latents.ndim == self._stored_dimensions else 2)
        shape = (-1,) + (1,) * axes
        return (latents.float() - mean.view(shape).to(latents.device)) * scale.view(shape).to(latents.device)

    @property
    def _sums(self) -> list[str]:
        """What the statistics are made of, in every marker."""
        return ["sum", "sum_of_squares", *(["sum_of_variances"] if self._tensor == "moments" else [])]

    @property
    def _stored_dimensions(self) -> int:
        return len(self._filled[0][1]["latent_shape"]) if self._filled else 3

    def describe(self) -> dict[str, Any]:
        """What the store is, how far it has got, and its statistics, as plain JSON values."""
        model, markers = self.config["model"], [marker for _, marker in self._committed]
        statistics = self.statistics() if len(self) else None
        return {
            "model": model["name"] or model["class"],
            "weights_sha256": model["weights_sha256"],
            "size": self.config["preprocess"]["size"],
            "kind": self.config["kind"],
            "dtype": self.config["dtype"],
            "latent_shapes": sorted({tuple(marker["latent_shape"]) for _, marker in self._filled}),
            "complete": self.complete,
            "shards": len(self.plan.shards),
            "shards_done": len(markers),
            "inputs": self.plan.inputs,
            "encoded": len(self),
            "bad": sum(marker["bad"] for marker in markers),
            "bytes": sum(marker["data"]["bytes"] for _, marker in self._filled),
            "channel_mean": statistics and [round(value, 4) for value in statistics.mean.tolist()],
            "channel_std": statistics and [round(value, 4) for value in statistics.std.tolist()],
        }

    def verify(self) -> list[str]:
        """Hash the plan and every committed file again.

        Returns:
            One sentence for each file that is not what was committed, none if all are.
        """
        problems = [problem for shard in self.plan.shards for problem in self.damages(shard)]
        return self.damages_of_plan() + problems

    def damages_of_plan(self) -> list[str]:
        """`verify` of the plan."""
        path = self.path / "plan.parquet"
        if self.config["plan"]["fingerprint"] != self.plan.parts[0].fingerprint:
            return [f"{path} is not the plan that {self.path / 'store.json'} was written for: restore it from a copy."]
        changed = [shard.name for shard in self.plan.shards if not self.plan.is_intact(shard)]
        if not changed:
            return []
        return [
            f"{path}, or an extension, lists other inputs of {changed[0]} than were planned: restore it from a copy."
        ]

    def damages(self, shard: Shard) -> list[str]:
        """`verify` of one shard; none of one that is not there yet."""
        data, rows, marker_path = shard_files(self.path, shard)
        if not marker_path.exists():
            return []
        marker = read_marker(self.path, shard, self.fingerprint)
        if marker is None:
            return [
                f"{marker_path} is damaged, or was written for another store.json: restore that, or run the same "
                "encode command again."
            ]
        problems = []
        for path, committed in ((data, marker["data"]), (rows, marker["rows"])):
            if committed is None or (path.is_file() and sha256_file(path) == committed["sha256"]):
                continue
            what = "is not what was written" if path.exists() else "is missing"
            problems.append(f"{path} {what}: delete {marker_path} and run the same encode command again.")
        return problems
