"""Workers on this machine: this process alone, or several that it starts and that end with it."""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from threading import Lock

import torch

from latentae.store.engines.driver import Died, Driver, Message, OpenWorker, Team, Worker, serve
from latentae.store.job import Advance, Job, Report, ShardWorker

GRACE_SECONDS = 5.0


def run_local(
    job: Job,
    shards: Sequence[int],
    *,
    processes: int,
    devices: Sequence[str | None],
    advance: Advance,
    open_worker: OpenWorker = ShardWorker,
) -> Iterator[Report]:
    """Encode ``shards`` in this process, or in several others; a report for each shard that is done.

    Args:
        devices: of the processes, in turns; the default one where there is none.
        advance: called with the numbers of inputs done and of bad ones among them, since it was called last. Where a
            worker dies, what it had not finished is taken back.

    Raises:
        ResumableError: shards are left, because the processes that encoded them died; all others are done.
        Exception: whatever a worker raises.
    """
    devices = devices or [None]
    # of all that were asked for, also where fewer shards are left: other numbers of threads give other bits
    threads = max(1, min(torch.get_num_threads(), available_cpus() // processes))
    processes = min(processes, len(shards))
    if processes <= 1:
        with _torch_threads(threads):
            yield from open_worker(job, devices[0]).run(shards, advance)
        return
    with closing(Processes(job, devices, threads, open_worker)) as team:
        yield from Driver(team, shards, advance).run(processes)


@contextmanager
def _torch_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def available_cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalWorker(Worker):
    def __init__(self, process: BaseProcess, connection: Connection):
        super().__init__()
        self.process, self.connection = process, connection

    def give(self, shard: int | None) -> None:
        with suppress(OSError):
            self.connection.send(shard)

    def messages(self) -> Iterator[Message]:
        """What it has said; its death after all that it could still say."""
        alive = self.process.is_alive()
        try:
            while self.connection.poll():
                yield self.connection.recv()
        except (EOFError, OSError):
            alive = False
        if not alive:
            self.end(time.monotonic() + GRACE_SECONDS)
            yield Died(_death(self.process.exitcode))

    def end(self, deadline: float) -> None:
        self.process.join(max(0.0, deadline - time.monotonic()))
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        self.connection.close()


class Processes(Team):
    """Spawned processes, each at the other end of a pipe."""

    def __init__(self, job: Job, devices: Sequence[str | None], threads: int, open_worker: OpenWorker):
        self.job, self.devices, self.threads, self.open_worker = job, devices, threads, open_worker
        self.workers: list[LocalWorker] = []

    def start(self, number: int) -> LocalWorker:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        device = self.devices[number % len(self.devices)]
        arguments = (theirs, self.job, device, self.threads, self.open_worker)
        process = context.Process(target=_work, args=arguments, name=f"latentae-worker-{number}", daemon=True)
        with _interrupts_held():
            process.start()
        theirs.close()  # so that its end of the pipe ends with it
        self.workers.append(LocalWorker(process, ours))
        return self.workers[-1]

    def receive(self) -> Iterator[tuple[Worker, Message]]:
        ready = wait([sign for worker in self.workers for sign in (worker.connection, worker.process.sentinel)])
        for worker in list(self.workers):
            if worker.connection in ready or worker.process.sentinel in ready:
                for message in worker.messages():
                    if isinstance(message, Died):
                        self.workers.remove(worker)
                    yield worker, message

    def close(self) -> None:
        for worker in self.workers:
            worker.process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in self.workers:
            worker.end(deadline)


def _work(connection: Connection, job: Job, device: str | None, threads: int, open_worker: OpenWorker) -> None:
    """The main function of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the driver alone answers
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # as in `latentae.cli.main`
    torch.set_num_threads(threads)
    lock = Lock()

    def send(message: Message) -> None:
        with lock:
            connection.send(message)

    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the driver is gone
        serve(job, device, open_worker, send, connection.recv)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold SIGINT back, in a process that is started here for good: until it ignores it by itself, it has a
    traceback to show for it."""
    resource_tracker.ensure_running()  # starting this one would lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _death(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"ended with exit code {exitcode}"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = f"signal {-exitcode}"
    hint = ", as the system does where memory is short" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"
