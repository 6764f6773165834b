"""The processes that share a benchmark: one, or as many as ``torchrun`` started."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def is_alone() -> bool:
    """Whether nobody shares the work."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def is_first_process() -> bool:
    """Whether this process speaks for all."""
    return is_alone() or os.environ.get("RANK", "0") == "0"


class Processes:
    """This process among all; with one only, nothing is sent anywhere.

    Use as a context manager: the group that it makes ends with it.
    """

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0")) if self.count > 1 else 0
        self.made_group = False
        if self.count == 1:
            return
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        if not dist.is_initialized():  # gloo: what is sent are bytes, and one process may wait long for another
            dist.init_process_group("gloo", timeout=timedelta(days=7))
            self.made_group = True

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: bytes) -> list[bytes]:
        """The values of all processes in order, in the first process; nothing in the others."""
        if self.count == 1:
            return [value]
        values: list[Any] | None = [None] * self.count if self.is_first else None
        dist.gather_object(value, values)
        return values or []

    def share(self, value: Any) -> Any:
        """What the first process has."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.made_group:
            dist.destroy_process_group()
