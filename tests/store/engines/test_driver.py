"""The driver with workers that are threads: who gets which shard, and who is blamed when workers die."""

import errno
import queue
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import pytest

from latentae.errors import DataError, MissingExtra, RequestError, ResumableError
from latentae.store.engines import driver
from latentae.store.engines.driver import Died, Driver, Team, Worker, serve
from latentae.store.job import Report


class Death(BaseException):
    """Kills a worker as a signal does: nothing catches it."""


@dataclass
class Work:
    """What the workers below do, and what they did."""

    deadly: dict[int, int] = field(default_factory=dict)  # shard -> how many workers die while they encode it
    deadly_to_load: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.002
    opened: list = field(default_factory=list)  # by worker: None, or what it raises
    loaded: Counter = field(default_factory=Counter)
    encoded: list = field(default_factory=list)  # (worker, shard)

    def dies(self, deaths: dict[int, int], shard: int) -> bool:
        deaths[shard] = deaths.get(shard, 0) - 1
        return deaths[shard] >= 0


class FakeWorker:
    """Loads a shard while it encodes the one before, as the real one does; a shard has ten inputs, one of them bad."""

    def __init__(self, work: Work, device: str | None):
        self.work, self.number = work, len(work.opened)
        work.opened.append(device)

    def run(self, shards, advance):
        shards = iter(shards)
        current = self._load(shards)
        while current is not None:
            advance(5, 1)
            following = self._load(shards)
            time.sleep(self.work.seconds)
            if self.work.dies(self.work.deadly, current):
                raise Death
            advance(5, 0)
            self.work.encoded.append((self.number, current))
            yield Report(current, 10, 9, 1, 0.0, 4)
            current = following

    def _load(self, shards) -> int | None:
        shard = next(shards, None)
        if shard is not None:
            self.work.loaded[shard] += 1
            if self.work.dies(self.work.deadly_to_load, shard):
                raise Death
        return shard


class ThreadWorker(Worker):
    def __init__(self):
        super().__init__()
        self.answers: queue.Queue = queue.Queue()
        self.most_held = 0

    def give(self, shard):
        self.most_held = max(self.most_held, len(self.held))
        self.answers.put(shard)


class Threads(Team):
    def __init__(self, work: Work, open_worker=FakeWorker):
        self.work, self.open_worker = work, open_worker
        self.said: queue.Queue = queue.Queue()
        self.started: list[ThreadWorker] = []

    def start(self, number):
        worker = ThreadWorker()
        self.started.append(worker)
        threading.Thread(target=self._live, args=(worker,), daemon=True).start()
        return worker

    def _live(self, worker):
        def send(message):
            self.said.put((worker, message))

        try:
            serve(self.work, None, self.open_worker, send, worker.answers.get)
        except Death:
            send(Died("was struck"))

    def receive(self):
        yield self.said.get(timeout=10)

    def close(self):
        pass


@pytest.fixture
def drive():
    """Run shards on threads; returns reports, what was advanced in all, the team, and the error if any."""

    def run(work, shards, processes, open_worker=FakeWorker):
        team, done, reports, error = Threads(work, open_worker), [0, 0], [], None

        def advance(inputs, bad):
            done[0] += inputs
            done[1] += bad

        try:
            for report in Driver(team, shards, advance).run(processes):
                reports.append(report.shard)
        except Exception as caught:
            error = caught
        return reports, done, team, error

    return run


def test_every_shard_is_encoded_once_and_no_worker_holds_more_than_two(drive):
    work = Work()
    reports, done, team, error = drive(work, range(5, 45), 3)
    assert error is None
    assert sorted(reports) == list(range(5, 45))
    assert [work.loaded[shard] for shard in range(5, 45)] == [1] * 40
    assert done == [400, 40]
    assert len(team.started) == 3
    assert max(worker.most_held for worker in team.started) == 2


def test_the_first_worker_does_not_take_all_of_a_few_shards(drive):
    class SlowToOpen(FakeWorker):
        def __init__(self, work, device):
            super().__init__(work, device)
            time.sleep(0.1 * self.number)

    work = Work(seconds=0.4)
    _, _, _, error = drive(work, [0, 1], 2, SlowToOpen)
    assert error is None
    assert sorted(worker for worker, _ in work.encoded) == [0, 1]


def test_shards_of_a_worker_that_died_are_encoded_by_others(drive):
    work = Work(deadly={3: 1, 7: 2})
    reports, done, team, error = drive(work, range(12), 2)
    assert error is None
    assert sorted(reports) == list(range(12))
    assert done == [120, 12]  # what the dead had advanced was taken back
    assert len(team.started) <= 2 + 3


@pytest.mark.parametrize("kind", ["deadly", "deadly_to_load"])
def test_a_shard_that_kills_every_worker_is_left_and_its_neighbours_are_done(drive, kind):
    work = Work(**{kind: {4: 100}})
    reports, done, _, error = drive(work, range(12), 2)
    assert sorted(reports) == [shard for shard in range(12) if shard != 4]
    assert done == [110, 11]
    assert isinstance(error, ResumableError)
    assert "1 shard is not encoded" in str(error)
    assert "00004" in str(error)
    assert "was struck" in str(error)
    assert work.loaded[4] <= driver.ATTEMPTS + (kind == "deadly_to_load")  # the first blame may go to the one before


def test_two_deadly_shards_are_both_named_and_the_rest_is_done(drive):
    reports, _, _, error = drive(Work(deadly={0: 100, 11: 100}), range(12), 2)
    assert sorted(reports) == list(range(1, 11))
    assert "2 shards are not encoded" in str(error)
    assert "00000, 00011" in str(error)


def test_workers_that_die_of_everything_are_not_replaced_for_ever(drive):
    reports, _, team, error = drive(Work(deadly=dict.fromkeys(range(1000), 100)), range(1000), 2)
    assert reports == []
    assert isinstance(error, ResumableError)
    assert "1000 shards are not encoded, because worker after worker died" in str(error)
    assert len(team.started) < 15


def test_workers_that_die_while_starting_are_not_replaced(drive):
    class Stillborn(FakeWorker):
        def __init__(self, work, device):
            raise Death

    _, _, team, error = drive(Work(), range(4), 3, Stillborn)
    assert isinstance(error, ResumableError)
    assert "no worker came to work" in str(error)
    assert len(team.started) == 3


def test_the_others_go_on_when_one_dies_while_starting(drive):
    class FirstStillborn(FakeWorker):
        def __init__(self, work, device):
            super().__init__(work, device)
            if self.number == 0:
                raise Death

    reports, _, team, error = drive(Work(), range(9), 2, FirstStillborn)
    assert error is None
    assert sorted(reports) == list(range(9))
    assert 2 <= len(team.started) <= 3


def test_replacements_that_cannot_start_are_not_tried_for_ever(drive):
    class OnlyTheFirst(FakeWorker):
        def __init__(self, work, device):
            super().__init__(work, device)
            if self.number > 1:
                raise Death

    _, _, team, error = drive(Work(deadly={0: 100, 1: 100}), range(30), 2, OnlyTheFirst)
    assert isinstance(error, ResumableError)
    assert "30 shards" in str(error) or "29 shards" in str(error)
    assert 5 < len(team.started) < 20


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RequestError("no"), RequestError),
        (DataError("bad"), DataError),
        (ResumableError("later"), ResumableError),
        (MissingExtra("Reading of clips", "video"), RequestError),
        (OSError(errno.ENOSPC, "No space left on device", "x.tmp"), OSError),
        (Unpicklable("one", "two"), RuntimeError),
        (MemoryError("too much"), MemoryError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
@pytest.mark.parametrize("at", ["start", "work"])
def test_what_a_worker_raises_is_raised_by_the_driver(drive, error, kind, at):
    class Raising(FakeWorker):
        def __init__(self, work, device):
            super().__init__(work, device)
            if at == "start":
                raise error

        def run(self, shards, advance):
            raise error
            yield

    _, _, team, raised = drive(Work(), range(4), 2, Raising)
    assert type(raised) is kind
    assert str(error) in str(raised)
    assert getattr(raised, "errno", None) == getattr(error, "errno", None)
    assert "in a worker" in str(raised.__cause__)
    assert len(team.started) == 2
