"""Workers as actors on the nodes of a Ray cluster, or of a Ray that is started here.

An actor never comes back by itself (Ray would let some wait for ever for the resources of a node that died): the driver
starts another and gives it the shards. That an actor is unavailable does not prove that it is dead, so a shard may be
published twice, which is harmless.
"""

import logging
import os
import platform
import queue
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from latentae.errors import DataError, MissingExtra, RequestError
from latentae.store.configuration import read_configuration, store_fingerprint
from latentae.store.engines.driver import Died, Driver, Message, OpenWorker, Team, Worker, serve
from latentae.store.job import Advance, Job, Report, ShardWorker

CALL_SECONDS = 5.0  # an actor answers at least so often
SILENCE_SECONDS = 30.0


def run_ray(
    job: Job,
    shards: Sequence[int],
    *,
    address: str | None,
    processes: int | None,
    advance: Advance,
    open_worker: OpenWorker = ShardWorker,
) -> Iterator[Report]:
    """Encode ``shards`` in Ray actors, each with a GPU, or with a CPU where the cluster has no GPU.

    Every node must see the store's folder and the inputs under the same paths.

    Args:
        address: of a cluster, ``auto`` for the one that this machine belongs to; None starts Ray on this machine, or
            takes the one that this process is connected to.
        processes: how many actors; None for as many as the cluster has room for.
        advance: as of `run_local`.

    Raises:
        MissingExtra: Ray is not installed.
        RequestError: there is no such cluster, or a node does not see the store.
        ResumableError: shards are left, because the actors that encoded them died; all others are done.
        Exception: whatever a worker raises.
    """
    if not shards:
        return
    with _connected(address) as ray:
        cluster = ray.cluster_resources()
        resource = "GPU" if cluster.get("GPU") else "CPU"
        processes = processes or int(cluster.get(resource, 0))
        if processes < 1:
            raise RequestError("The Ray cluster has neither GPUs nor CPUs to offer: wait until it has nodes.")
        with closing(Actors(ray, resource, job, open_worker)) as team:
            yield from Driver(team, shards, advance).run(min(processes, len(shards)))


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("The engine 'ray'", "ray") from error
    if ray.is_initialized():
        yield ray
        return
    if address not in (None, "auto"):
        _check_address(address)
    in_main_thread = threading.current_thread() is threading.main_thread()
    on_terminate = signal.getsignal(signal.SIGTERM)
    dashboard = None if address else False  # those of others have one or not
    try:
        ray.init(address or "local", include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise _no_cluster(address, error) from error
    except SystemExit:  # by the handler that Ray puts in the place of ours
        raise SystemExit(128 + signal.SIGTERM) from None
    try:
        if in_main_thread:
            signal.signal(signal.SIGTERM, on_terminate)
        yield ray
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Make sure that somebody listens there, which Ray tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CALL_SECONDS).close()
    except (OSError, ValueError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str | None, error: Exception) -> RequestError:
    reason = (str(error).splitlines() or [""])[0].rstrip(".")
    return RequestError(f"No Ray cluster at {address!r} ({reason}): give the address HOST:PORT of a running one.")


def check_store(job: Job) -> None:
    """Make sure that this machine sees the store of ``job``.

    Raises:
        RequestError: it does not, or another one.
    """
    try:
        same = store_fingerprint(read_configuration(job.store)) == job.fingerprint
    except (RequestError, DataError):
        same = False
    if not same:
        raise RequestError(
            f"The node {platform.node()} does not see the store at {job.store}: a Ray cluster encodes into a folder, "
            "with a model and from inputs, that all of its nodes share under the same paths."
        )


class Actor:
    """What runs on a node: a thread encodes, and calls of the driver bring it shards and fetch what it says."""

    def __init__(self, job: Job, folder: Path, open_worker: OpenWorker):
        import ray

        self.node = ray.get_runtime_context().get_node_id()
        self.folder, self.open_worker = folder, open_worker
        self.said: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.given: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        work = (job, None, self._open, self.said.put, self.given.get)
        threading.Thread(target=serve, args=work, daemon=True).start()

    def _open(self, job: Job, device: str | None) -> ShardWorker:
        with suppress(OSError):
            os.chdir(self.folder)  # paths may be relative
        check_store(job)
        return self.open_worker(job, device)

    def give(self, shard: int | None) -> None:
        self.given.put(shard)

    def receive(self, seconds: float) -> tuple[str, list[Message]]:
        """The node, and what was said, after waiting so long for it."""
        messages: list[Message] = []
        with suppress(queue.Empty):
            messages.append(self.said.get(timeout=seconds))
            while True:
                messages.append(self.said.get_nowait())
        return self.node, messages


class RayWorker(Worker):
    def __init__(self, actor: Any):
        super().__init__()
        self.actor = actor
        self.node: str | None = None  # known as soon as it has started
        self.asked_at = 0.0

    def give(self, shard: int | None) -> None:
        self.actor.give.remote(shard)


class Actors(Team):
    """Actors, and for each of them the call whose answer is awaited."""

    def __init__(self, ray: Any, resource: str, job: Job, open_worker: OpenWorker):
        self.ray, self.resource = ray, resource
        needs = {"num_gpus": 1} if resource == "GPU" else {"num_cpus": 1}
        self.actor = ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=2, **needs)(Actor)
        self.arguments = (ray.put(job), Path.cwd(), open_worker)
        self.calls: dict[Any, RayWorker] = {}

    def start(self, number: int) -> RayWorker:
        worker = RayWorker(self.actor.remote(*self.arguments))
        self._call(worker)
        return worker

    def _call(self, worker: RayWorker) -> None:
        worker.asked_at = time.monotonic()
        self.calls[worker.actor.receive.remote(CALL_SECONDS)] = worker

    def receive(self) -> Iterator[tuple[Worker, Message]]:
        answered, _ = self.ray.wait(list(self.calls), timeout=CALL_SECONDS)
        for call in answered:
            worker = self.calls.pop(call)
            try:
                worker.node, messages = self.ray.get(call)
            except self.ray.exceptions.RayError as error:
                yield worker, self._end(worker, _reason(error))
                continue
            self._call(worker)
            yield from ((worker, message) for message in messages)
        yield from self._silent()

    def _silent(self) -> Iterator[tuple[Worker, Message]]:
        """Deaths that no call tells of: of those whose node is gone, or for whom there is no room any more."""
        late = time.monotonic() - SILENCE_SECONDS
        silent = [call for call, worker in self.calls.items() if worker.asked_at < late]
        if not silent:
            return
        nodes = {node["NodeID"] for node in self.ray.nodes() if node["Alive"]}
        room = self.ray.cluster_resources().get(self.resource, 0) >= 1
        for call in silent:
            worker = self.calls[call]
            if not (worker.node in nodes or (worker.node is None and room)):
                del self.calls[call]
                what = "found no node that has room" if worker.node is None else "was on a node that is gone"
                yield worker, self._end(worker, what)

    def _end(self, worker: RayWorker, how: str) -> Died:
        self.ray.kill(worker.actor)
        return Died(how)

    def close(self) -> None:
        for worker in self.calls.values():
            self.ray.kill(worker.actor)


def _reason(error: Exception) -> str:
    """Two sentences of what Ray knows of a death; what it puts before is about the call."""
    told = [line for line in str(error).splitlines() if line.strip() and not line.startswith(("\t", " "))]
    return f"was lost: {'. '.join(told[-1].split('. ')[:2]) if told else type(error).__name__}"
