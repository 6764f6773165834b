"""Clips to train on: a map-style data set in which a sample is a pure function of its position, as with images.

Finding out when the frames of a video are shown takes reading it through once. A folder on disk remembers it from run
to run, and from worker to worker.
"""

import hashlib
import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from latentae.console import say
from latentae.data.clips import ClipSource
from latentae.data.decode import DEFAULT_POLICY, BadImage, DecodePolicy
from latentae.data.images import epoch_order, refuse_too_many
from latentae.data.sample_clips import moving_picture
from latentae.data.sources import Item
from latentae.data.sources.base import is_url, place_of
from latentae.data.transforms import adm_center_crop, random_resized_crop_flip
from latentae.data.video import ASSUMED_FPS, FrameChoice, Video, VideoInfo, frame_rate
from latentae.errors import RequestError
from latentae.files import read_json, write_json

INFOS_IN_MEMORY = 4096  # of clips, in each process


class ClipDataset(Dataset[dict[str, Any]]):
    """Square crops of ``frames`` frames of a source's clips.

    With ``augment`` (training), position ``p`` of any epoch gives clip ``epoch_order(len, seed, epoch)[p % len]`` with
    ``epoch = p // len``, from a random source frame on, all of its frames cropped alike by `random_resized_crop_flip`.
    Without (evaluation), it gives clip ``p % len`` in key order, from its first frame on, cropped by
    `adm_center_crop`; ``seed`` plays no part.

    Clips of smaller frames are enlarged. A clip that is broken, or shorter than ``frames``, is reported once by each
    process that meets it and replaced by the next good one, in key order. A clip that is broken in the middle is only
    replaced where a damaged frame is wanted, so that the sample stays a pure function of its position.

    Args:
        source: where the clips come from.
        frames: of a sample.
        size: side of the crops in pixels.
        fps: frames per second of a sample; None for those of each clip.
        stride: take every so many-th frame; see `latentae.data.video.frame_numbers`.
        seed: of the order, the starts and the crops, 0 or more.
        augment: random starts and crops in random order, or the centres of the beginnings in order.
        dead_leaves: share of samples that are generated (`moving_picture`) instead of read, in training only.
        cache: folder that remembers the times of the frames, by place, length and time of change of each file.
        policy: how frames become pixels.
        max_bad: share of bad clips from which on the data set is refused; a single one is always let pass.
    """

    noun = "clips"

    def __init__(
        self,
        source: ClipSource,
        *,
        frames: int,
        size: int,
        fps: Fraction | float | None = None,
        stride: int = 1,
        seed: int = 0,
        augment: bool = True,
        dead_leaves: float = 0.0,
        cache: str | Path | None = None,
        policy: DecodePolicy = DEFAULT_POLICY,
        max_bad: float = 0.01,
    ):
        if size < 1:
            raise RequestError(f"size={size}; expected at least 1.")
        if not 0 <= dead_leaves <= 1:
            raise RequestError(f"dead_leaves is a share of samples, from 0 to 1, not {dead_leaves}.")
        self.frames, self.dead_leaves = frames, dead_leaves
        self.source, self.items = source, source.items()
        self.choice = FrameChoice(frames, None if fps is None else frame_rate(fps), stride)
        self.size, self.seed, self.augment, self.policy, self.max_bad = size, seed, augment, policy, max_bad
        self.cache = None if cache is None else Path(cache)
        self.bad: dict[int, str] = {}
        self._infos: dict[int, VideoInfo] = {}

    def __len__(self) -> int:
        """Samples of one epoch; positions go on beyond it."""
        return len(self.items)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The first epoch: without this, a loop would never end."""
        return (self[position] for position in range(len(self)))

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The sample at a position: ``pixels`` uint8 (3, frames, size, size), ``index`` of the clip among the source's
        items, its ``key``, its ``label``, -1 without one, the source frame at which it ``start``s, its ``fps``, and as
        text, separated by spaces, the indices of the bad clips that it ``stands_in_for``.

        Raises:
            DataError: more than the share ``max_bad`` of the clips is bad.
        """
        epoch, place = divmod(position, len(self.items))
        drawn = int(epoch_order(len(self.items), self.seed, epoch)[place]) if self.augment else place
        if self.augment and np.random.default_rng((self.seed, epoch, drawn, 2)).random() < self.dead_leaves:
            return self._generated(position, drawn)
        broken: list[int] = []
        while True:
            index = (drawn + len(broken)) % len(self.items)
            try:
                sample = self._sample(index, (self.seed, epoch, drawn))
                return {**sample, "stands_in_for": " ".join(map(str, broken))}
            except BadImage as error:
                self._note_bad(index, error)
                broken.append(index)
                if len(broken) == len(self.items):
                    self.refuse_too_many(len(broken), index)

    def _generated(self, position: int, drawn: int) -> dict[str, Any]:
        pixels = moving_picture("leaves", position, self.seed, self.frames, self.size)
        made = {"pixels": pixels, "index": drawn, "key": f"dead-leaves/{position}", "label": -1}
        return {**made, "start": 0, "fps": float(self.choice.fps or ASSUMED_FPS), "stands_in_for": ""}

    def _sample(self, index: int, seed: tuple[int, int, int]) -> dict[str, Any]:
        item = self.items[index]
        video = self._open(index)
        start = int(np.random.default_rng(seed).integers(self.choice.starts(video.info))) if self.augment else 0
        frames = video.frames(self.choice.numbers(video.info, start))
        crops = np.stack([self._crop(frame, seed) for frame in frames])  # (T, size, size, 3)
        return {
            "pixels": torch.from_numpy(crops.transpose(3, 0, 1, 2).copy()),  # (3, T, size, size)
            "index": index,
            "key": item.key,
            "label": -1 if item.label is None else item.label,
            "start": start,
            "fps": float(self.choice.rate(video.info)),
        }

    def _crop(self, frame: np.ndarray, seed: tuple[int, int, int]) -> np.ndarray:
        if not self.augment:
            return adm_center_crop(frame, self.size)
        # the same numbers for every frame, and others than for the start
        return random_resized_crop_flip(frame, self.size, np.random.default_rng((*seed, 1)))

    def _open(self, index: int) -> Video:
        item = self.items[index]
        if index not in self._infos:
            if len(self._infos) == INFOS_IN_MEMORY:
                self._infos.pop(next(iter(self._infos)))
            self._infos[index] = remembered_info(self.source, item, self.policy, self.cache)
        return self.source.open(item, self.policy, self._infos[index])

    def _note_bad(self, index: int, error: BadImage) -> None:
        if index in self.bad:
            return
        self.bad[index] = error.reason
        say(f"{self.items[index].key}: {error} The next clip stands in for it.")
        self.refuse_too_many(len(self.bad), index)

    def refuse_too_many(self, bad: int, last: int) -> None:
        """Stop where ``bad`` bad clips, that at index ``last`` the last of them, are too many.

        Raises:
            DataError: they are more than the share ``max_bad``, and more than one; or all.
        """
        refuse_too_many(bad, "clips are broken or too short", len(self.items), self.items[last].key, self.max_bad)


def remembered_info(source: ClipSource, item: Item, policy: DecodePolicy, cache: Path | None) -> VideoInfo:
    """Size and times of a clip, from the folder ``cache`` if they are there, else found out and put there.

    A file that was changed counts as another one. Folders of frames are listed anew each time.

    Raises:
        BadImage: the clip cannot be read, or its frames are larger than the policy lets pass.
    """
    place = place_of(item.uri)  # of a clip in a tar or table, that
    path = Path(place)
    if cache is None or is_url(place) or not path.is_file():
        return source.open(item, policy).info
    status = path.stat()
    identity = json.dumps([1, item.uri, status.st_size, status.st_mtime_ns, policy.max_pixels])
    name = hashlib.sha256(identity.encode()).hexdigest()
    entry = cache / name[:2] / f"{name[2:]}.json"
    try:
        return _from_json(read_json(entry))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        info = source.open(item, policy).info
    entry.parent.mkdir(parents=True, exist_ok=True)
    write_json(entry, _to_json(info))
    return info


def _to_json(info: VideoInfo) -> dict[str, Any]:
    return {
        "height": info.height,
        "width": info.width,
        "pts": list(info.pts),
        "tick": str(info.tick),
        "rate": None if info.rate is None else str(info.rate),
        "by_order": info.by_order,
    }


def _from_json(value: dict[str, Any]) -> VideoInfo:
    rate = None if value["rate"] is None else Fraction(value["rate"])
    pts = tuple(int(time) for time in value["pts"])
    return VideoInfo(value["height"], value["width"], pts, Fraction(value["tick"]), rate, value["by_order"])
