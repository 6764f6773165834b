"""What the engines have in common: workers ask for shards, and the driver answers and copes with their deaths.

A worker draws the next shard while it encodes the one before. When it dies, the oldest shard in its hands is blamed,
and each of them is given back as a suspect: to a worker that holds nothing else, after all other shards. Then the blame
is certain, the innocent are cleared, and a shard that has cost too many workers is left for another run.
"""

import pickle
import traceback
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from latentae.errors import RequestError, ResumableError
from latentae.store.job import Advance, Job, Report, ShardWorker

ATTEMPTS = 3

OpenWorker = Callable[[Job, str | None], ShardWorker]


@dataclass(frozen=True)
class Draw:
    """A worker asks for a shard. It is answered with one, or with None: finish those you hold, then ask again."""


@dataclass(frozen=True)
class Advanced:
    """Inputs that a worker has done since it said so last, and how many of them are bad."""

    inputs: int
    bad: int


@dataclass(frozen=True)
class Failed:
    """An exception that ends the run."""

    error: Exception
    traceback: str


@dataclass(frozen=True)
class Died:
    """A worker is gone, as its engine noticed."""

    how: str


Message = Draw | Advanced | Report | Failed | Died


class Worker(ABC):
    """A worker as the driver sees it."""

    def __init__(self) -> None:
        self.held: list[int] = []  # shards that it was given and has not reported, oldest first
        self.asks = False
        self.inputs = self.bad = 0  # what it has advanced by beyond its reports

    @abstractmethod
    def give(self, shard: int | None) -> None:
        """Answer its question; one that has died in the meantime hears nothing."""


class Team(ABC):
    """The workers of an engine; `close` ends them all, at whatever they are."""

    @abstractmethod
    def start(self, number: int) -> Worker:
        """A new worker, the ``number``-th that the team has had."""

    @abstractmethod
    def receive(self) -> Iterator[tuple[Worker, Message]]:
        """What the workers say, after waiting for it; nothing, if it has become late. Last of all a worker's death."""

    @abstractmethod
    def close(self) -> None:
        """End all workers. What they have published stays, what they have begun is as if it had never been."""


def serve(
    job: Job,
    device: str | None,
    open_worker: OpenWorker,
    send: Callable[[Message], None],
    receive: Callable[[], int | None],
) -> None:
    """A worker's whole life: open the model; then draw shards, encode them and report, until the driver ends it."""

    def draw() -> int | None:
        send(Draw())
        return receive()

    try:
        worker = open_worker(job, device)
        while (first := draw()) is not None:
            shards = chain([first], iter(draw, None))
            for report in worker.run(shards, lambda inputs, bad: send(Advanced(inputs, bad))):
                send(report)
    except Exception as error:
        send(Failed(_portable(error), traceback.format_exc()))


def _portable(error: Exception) -> Exception:
    """``error``, or what is nearest to it among those that another process can read."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RequestError(str(error)) if isinstance(error, RequestError) else RuntimeError(f"{_name(error)}: {error}")


def _name(error: Exception) -> str:
    return type(error).__name__


class Driver:
    """Hands ``shards`` to the workers of ``team`` until each is reported, or left after `ATTEMPTS` deaths."""

    def __init__(self, team: Team, shards: Sequence[int], advance: Advance):
        self.team, self.advance = team, advance
        self.unfinished = set(shards)
        self.queue = deque(shards)
        self.suspects: list[int] = []  # given back by workers that died
        self.deaths: Counter[int] = Counter()  # of workers, by shard
        self.deaths_in_a_row = self.deaths_of_idle = 0
        self.any_asked = False
        self.left: list[int] = []
        self.how = ""  # the last one died
        self.patience = 0
        self.workers: list[Worker] = []
        self.started = 0

    def run(self, processes: int) -> Iterator[Report]:
        """Reports in the order in which shards are done.

        Raises:
            ResumableError: shards are left, because too many workers died.
            Exception: whatever a worker raised.
        """
        self.patience = ATTEMPTS * (processes + 1)
        for _ in range(processes):
            self._start()
        while self.unfinished:
            if not self.workers or self.deaths_in_a_row > self.patience:
                raise self._too_many_deaths()
            for worker, message in self.team.receive():
                match message:
                    case Draw():
                        worker.asks = self.any_asked = True
                    case Advanced(inputs, bad):
                        self._advance(worker, inputs, bad)
                    case Report():
                        self._take(worker, message)
                        yield message
                    case Failed(error, text):
                        raise error from RuntimeError(f"in a worker:\n{text}")
                    case Died(how):
                        self._bury(worker, how)
            for worker in self.workers:
                if worker.asks:
                    self._answer(worker)
        if self.left:
            raise self._too_many_deaths()

    def _start(self) -> None:
        self.workers.append(self.team.start(self.started))
        self.started += 1

    def _advance(self, worker: Worker, inputs: int, bad: int) -> None:
        worker.inputs += inputs
        worker.bad += bad
        self.advance(inputs, bad)

    def _take(self, worker: Worker, report: Report) -> None:
        worker.held.remove(report.shard)
        worker.inputs -= report.inputs or report.encoded + report.bad  # the latter, if another process encoded it
        worker.bad -= report.bad
        self.unfinished.discard(report.shard)
        self.deaths_in_a_row = 0

    def _answer(self, worker: Worker) -> None:
        """Give the worker that asks a shard, or a pause; or leave it waiting, if it has nothing to do meanwhile."""
        if worker.held:
            # the last shards are for those who have none, and a suspect is encoded alone
            empty_handed = sum(not other.held for other in self.workers)
            ahead = len(self.queue) > empty_handed and not self.deaths.keys() & set(worker.held)
            shard = self.queue.popleft() if ahead else None
        elif self.queue:
            shard = self.queue.popleft()
        elif self.suspects:
            shard = min(self.suspects, key=lambda suspect: self.deaths[suspect])
            self.suspects.remove(shard)
        else:
            return
        worker.asks = False
        if shard is not None:
            worker.held.append(shard)
        worker.give(shard)

    def _bury(self, worker: Worker, how: str) -> None:
        self.workers.remove(worker)
        self.advance(-worker.inputs, -worker.bad)  # its unreported inputs will be done again
        self.how = how
        if worker.held:
            self.deaths_in_a_row += 1
        else:  # it died of itself, mostly while starting, as another one may do
            self.deaths_of_idle += 1
            if not self.any_asked or self.deaths_of_idle > self.patience:
                return
        for shard in worker.held:
            self.deaths[shard] += shard == worker.held[0]
            if self.deaths[shard] < ATTEMPTS:
                self.suspects.append(shard)
            else:
                self.left.append(shard)
                self.unfinished.discard(shard)
        if len(self.unfinished) > len(self.workers):
            self._start()

    def _too_many_deaths(self) -> ResumableError:
        left = sorted(self.unfinished.union(self.left))
        named = ", ".join(f"{shard:05d}" for shard in left[:10]) + (", …" if len(left) > 10 else "")
        shards = "1 shard is" if len(left) == 1 else f"{len(left)} shards are"
        if not self.any_asked:
            reason = f"no worker came to work (the last one {self.how})"
        elif self.unfinished:
            reason = f"worker after worker died (the last one {self.how})"
        else:
            reason = f"{ATTEMPTS} workers died of each (the last one {self.how})"
        return ResumableError(f"{shards} not encoded, because {reason}: {named}. Run the same command again for them.")
