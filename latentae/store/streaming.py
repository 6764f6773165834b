"""Reading a store for training: in a random order that stays near itself on disk, and resumes where it stopped.

The order of an epoch is a pure function of the seed and the epoch: shards in random order, and the entries of some
shards at a time shuffled together. `ShardShuffle` gives it as a sampler for `LatentStore`; `StreamedLatents` gives the
latents themselves, normalised. Both carry ``state_dict``, so that torchdata's StatefulDataLoader goes on in the middle
of an epoch.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Sampler, get_worker_info

from latentae.errors import RequestError
from latentae.store.draws import draw
from latentae.store.reader import OPEN_SHARDS, LatentStore
from latentae.store.worker import key_generator


class _ShardOrder:
    """The order in which one of ``world_size`` ranks takes entries, epoch by epoch."""

    def __init__(self, store: LatentStore, seed: int, shards_at_once: int, rank: int, world_size: int):
        if shards_at_once < 1:
            raise RequestError(f"shards_at_once={shards_at_once}; expected at least 1.")
        if not 0 <= rank < world_size:
            raise RequestError(f"rank={rank} of world_size={world_size}; expected 0 to {world_size - 1}.")
        self.ends = np.array(store.shard_ends, np.int64)
        self.seed, self.shards_at_once, self.rank, self.world_size = seed, shards_at_once, rank, world_size
        self.length = len(store) // world_size
        if not self.length:
            raise RequestError(f"{store.path} has {len(store)} encoded inputs: too few for {world_size} ranks.")

    def indices(self, epoch: int, start: int, stop: int) -> Iterator[int]:
        """The entries at the places ``start`` to ``stop`` of this rank's part."""
        start, stop = (self.rank * self.length + place for place in (start, stop))
        begins = np.concatenate([[0], self.ends[:-1]])
        shards = np.random.default_rng((self.seed, epoch)).permutation(len(self.ends))
        place = 0
        for first in range(0, len(shards), self.shards_at_once):
            window = shards[first : first + self.shards_at_once]
            count = int((self.ends[window] - begins[window]).sum())
            if place < stop and place + count > start:
                entries = np.concatenate([np.arange(begins[shard], self.ends[shard]) for shard in window])
                np.random.default_rng((self.seed, epoch, first)).shuffle(entries)
                yield from entries[max(start - place, 0) : stop - place].tolist()
            place += count

    def identity(self) -> dict[str, int]:
        """What must be the same where a state is loaded."""
        return {
            "entries": int(self.ends[-1]),
            "shards": len(self.ends),
            "seed": self.seed,
            "shards_at_once": self.shards_at_once,
            "world_size": self.world_size,
        }


def _check_state(state: dict[str, Any], identity: dict[str, int]) -> None:
    for name, value in identity.items():
        if state.get(name) != value:
            raise RequestError(f"The state was saved with {name}={state.get(name)} and this has {name}={value}.")


class ShardShuffle(Sampler[int]):
    """A sampler for `LatentStore` that shuffles near: files are read one window of shards at a time.

    The order is a function of the seed and the epoch alone; call `set_epoch` before each, as for DistributedSampler.
    Each rank takes an equal part, and no entry is taken twice in an epoch: where the ranks do not divide the entries,
    the last ``len(store) % world_size`` of the epoch's order are left out, other ones in every epoch.

    Args:
        shards_at_once: how many shards are shuffled together. Neighbours in a store are often of one class, so few
            shards make batches of few classes; by default as many as a `LatentStore` keeps open.
    """

    def __init__(
        self,
        store: LatentStore,
        *,
        seed: int = 0,
        shards_at_once: int = OPEN_SHARDS,
        rank: int = 0,
        world_size: int = 1,
    ):
        self._order = _ShardOrder(store, seed, shards_at_once, rank, world_size)
        self.epoch = 0
        self._position = self._start = 0

    def __len__(self) -> int:
        return self._order.length

    def __iter__(self) -> Iterator[int]:
        self._position, self._start = self._start, 0
        for index in self._order.indices(self.epoch, self._position, len(self)):
            self._position += 1
            yield index

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration; a loaded position holds in its own epoch only."""
        if epoch != self.epoch:
            self.epoch, self._position, self._start = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands, as plain numbers."""
        return {**self._order.identity(), "epoch": self.epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there with the next iteration.

        Raises:
            RequestError: the state is of another store, seed, window or number of ranks.
        """
        _check_state(state, self._order.identity())
        self.epoch = state["epoch"]
        self._position = self._start = state["position"]


class StreamedLatents(IterableDataset[dict[str, Any]]):
    """The entries of a store as samples to train on, in the order of `ShardShuffle`.

    Each is a dictionary with ``key``, ``label`` (-1 without one), ``latents``, float32 (C, h, w) or (C, t, h, w), and
    the columns that are asked for. The workers of a DataLoader take consecutive pieces of the rank's part and each
    makes batches of its own, so there can be a few more than ``len(loader)`` says. torchdata's StatefulDataLoader, with
    as many workers as before, goes on in the middle of an epoch. Call `set_epoch` before each epoch: it reaches
    persistent workers too.

    Args:
        shuffle: False for the order of the store.
        normalise: ``model`` or ``data``, as in `LatentStore.normalise`; None for raw latents.
        moments: from a store of moments, ``sample``, the default, or ``mode``: a draw, which is a function of the seed,
            the epoch and the key.
        flip: take the latents of the mirrored image for half of the samples, drawn in the same way.
        columns: names of what else to give of each entry, such as a caption.

    Raises:
        RequestError: an option that the store cannot serve.
    """

    def __init__(
        self,
        store: LatentStore,
        *,
        seed: int = 0,
        shuffle: bool = True,
        shards_at_once: int = OPEN_SHARDS,
        rank: int = 0,
        world_size: int = 1,
        normalise: str | None = None,
        moments: str | None = None,
        flip: bool = False,
        columns: Sequence[str] = (),
    ):
        self.store, self.seed, self.shuffle, self.columns = store, seed, shuffle, tuple(columns)
        self.normalise, self.flip = normalise, flip
        self.draws = moments == "sample" or (moments is None and store.kind == "moments")
        self._order = _ShardOrder(store, seed, shards_at_once, rank, world_size)
        self._check(moments)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # one for all workers, however long they live
        self._iterated = (0, 0)  # epoch and position of the iteration in this process
        self._start = 0

    def _check(self, moments: str | None) -> None:
        store, first = self.store, self.store[0]
        if self.normalise not in ("model", "data", None):
            raise RequestError(f"normalise={self.normalise!r}; expected 'model', 'data' or None.")
        if moments not in ("mode", "sample", None):
            raise RequestError(f"moments={moments!r}; expected 'mode' or 'sample'.")
        if self.draws and "moments" not in first:
            raise RequestError(f"{store.path} holds no moments to draw from: encode again with --kind moments.")
        if self.flip and not store.holds_flips:
            raise RequestError(f"{store.path} holds no latents of mirrored images: encode again with --flip.")
        if missing := [name for name in self.columns if name not in first]:
            raise RequestError(f"{store.path} has no column {missing[0]!r}; it has {', '.join(first)}.")

    def __len__(self) -> int:
        return self._order.length

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order, the draws and the flips of the next iteration."""
        if epoch != self.epoch:
            self._epoch.fill_(epoch)
            self._iterated, self._start = (epoch, 0), 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        begin, end = (len(self) * n // workers for n in (number, number + 1))
        epoch = self.epoch
        start, self._start = self._start, 0
        if self.shuffle:
            indices = self._order.indices(epoch, begin + start, end)
        else:
            offset = self._order.rank * len(self)
            indices = iter(range(offset + begin + start, offset + end))
        for position, index in enumerate(indices, start + 1):
            self._iterated = (epoch, position)
            yield self._sample(index, epoch)

    def _sample(self, index: int, epoch: int) -> dict[str, Any]:
        item = self.store[index]
        generator = key_generator(self.seed, item["key"], f"epoch {epoch}") if self.draws or self.flip else None
        end = "_flip" if self.flip and torch.rand((), generator=generator) < 0.5 else ""
        if generator is not None and self.draws:
            latents = draw(item[f"moments{end}"], generator)
        else:
            latents = self._mode(item, end)
        if self.normalise is not None:
            latents = self.store.normalise(latents, by=self.normalise, draws=self.draws)
        carried = {name: item[name] for name in self.columns}
        return {"key": item["key"], "label": item["label"], "latents": latents, **carried}

    def _mode(self, item: dict[str, Any], end: str) -> Tensor:
        stored = f"moments{end}"
        return (item[stored].chunk(2)[0] if stored in item else item[f"latents{end}"]).float()

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration of this process, a worker's or the only one, stands."""
        epoch, position = self._iterated
        return {**self._identity(), "epoch": epoch, "position": position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there with the next iteration of this process.

        Raises:
            RequestError: the state is of another store, order, number of ranks or number of workers.
        """
        _check_state(state, self._identity())
        self._epoch.fill_(state["epoch"])
        self._iterated, self._start = (state["epoch"], state["position"]), state["position"]

    def _identity(self) -> dict[str, Any]:
        worker = get_worker_info()
        return {**self._order.identity(), "shuffle": self.shuffle, "workers": worker.num_workers if worker else 0}
