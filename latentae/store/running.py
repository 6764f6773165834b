"""Who encodes the shards: this process, several on this machine, or a Ray cluster; they write the same files."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from latentae.codec import LatentCodec, check_device
from latentae.errors import RequestError
from latentae.store.engines.local import available_cpus, run_local
from latentae.store.engines.ray import run_ray
from latentae.store.job import Advance, Job, Report

ENGINES = ("local", "ray")
CPU_LOADING_THREADS = 2  # more would take the CPUs from the model
RAY_LOADING_THREADS = 4
MOST_LOADING_THREADS = 16


@dataclass(frozen=True)
class Engine:
    """An engine and what it runs on; ``devices`` are dealt out to ``processes`` in turn, None where a codec stays."""

    kind: str
    processes: int | None
    devices: tuple[str | None, ...]
    address: str | None = None

    @property
    def in_process(self) -> bool:
        return self.kind == "local" and self.processes == 1

    @property
    def loading_threads(self) -> int:
        """How many threads of each process read and decode, if nobody says."""
        if self.kind == "ray":
            return RAY_LOADING_THREADS  # of nodes that are not known here
        if not (self.devices[0] or "").startswith("cuda"):
            return CPU_LOADING_THREADS
        return min(max(CPU_LOADING_THREADS, available_cpus() // (self.processes or 1)), MOST_LOADING_THREADS)

    def run(self, job: Job, shards: Sequence[int], advance: Advance) -> Generator[Report, None, None]:
        """Encode shards; a report of each as soon as it is done, in any order."""
        if self.kind == "local":
            yield from run_local(job, shards, processes=self.processes or 1, devices=self.devices, advance=advance)
        else:
            yield from run_ray(job, shards, address=self.address, processes=self.processes, advance=advance)


def choose_engine(kind: str, processes: int | None, device: Any, address: str | None, model: Any) -> Engine:
    """The engine for what a user asks for.

    Args:
        device: one, several, or None for all GPUs, else the CPU; a codec stays where it is.

    Raises:
        RequestError: no such engine, or a device that this machine does not have.
    """
    if kind not in ENGINES:
        raise RequestError(f"engine={kind!r}; expected one of {', '.join(ENGINES)}.")
    if address is not None and kind != "ray":
        raise RequestError(f"ray_address={address!r} is of no use with engine={kind!r}: take engine='ray'.")
    if kind == "ray":
        if device is not None:
            raise RequestError("Ray chooses the devices of its actors: leave out device with engine='ray'.")
        return Engine(kind, processes, (None,), address)
    devices: tuple[str | None, ...]
    if device is not None:
        devices = tuple(map(str, device if isinstance(device, (list, tuple)) else [device]))
        for one in devices:
            check_device(one)
    elif isinstance(model, LatentCodec) and (processes or 1) == 1:
        devices = (None,)
    else:
        devices = tuple(f"cuda:{i}" for i in range(torch.cuda.device_count())) or ("cpu",)
    return Engine(kind, processes or len(devices), devices, address)
