"""Shards encoded by several processes of this machine, some of which are killed."""

import errno
import multiprocessing
import os
import signal
from dataclasses import replace

import pytest

from latentae.errors import ResumableError
from latentae.store.engines import run_local


@pytest.fixture
def run():
    """Run all shards of a job on this machine; the reports by shard, and the inputs and bad ones of its progress."""

    def run(job, processes=2, **options):
        done, reports = [0, 0], {}

        def advance(inputs, bad):
            done[0] += inputs
            done[1] += bad

        options = {"devices": ["cpu"], **options}
        for report in run_local(job, range(len(job.plan.shards)), processes=processes, advance=advance, **options):
            assert report.shard not in reports
            reports[report.shard] = report
        return reports, done

    return run


def test_two_processes_write_the_bytes_of_one(job_for, run, whole, published, nothing_left):
    job = job_for("two")
    reports, done = run(job)
    assert published(job.store) == whole
    assert sorted(reports) == list(range(6))
    assert {report.inputs for report in reports.values()} == {3}
    assert done == [18, 1]
    assert nothing_left()


def test_a_worker_killed_inside_a_shard_is_replaced(job_for, run, whole, published, nothing_left, faults, memory):
    job = job_for("killed")
    deadly = faults.Faulty(job.reader, faults.kill_this_process, memory, key="007.png", times=2)
    reports, done = run(replace(job, reader=deadly))
    assert len(list(memory.iterdir())) == 2
    assert sorted(reports) == list(range(6))
    assert done == [18, 1]
    assert published(job.store) == whole
    assert nothing_left()


@pytest.mark.slow
def test_a_shard_that_always_kills_is_named_and_all_others_are_done(
    job_for, run, whole, published, nothing_left, faults, memory
):
    job = job_for("deadly")
    deadly = faults.Faulty(job.reader, faults.kill_this_process, memory, key="007.png")
    with pytest.raises(ResumableError, match=r"1 shard is not encoded.*SIGKILL.*memory.*00002") as error:
        run(replace(job, reader=deadly))
    assert error.value.exit_code == 4
    assert len(list(memory.iterdir())) <= 4
    shards = {path.stem for path in (job.store / "shards").glob("*.json")}
    assert shards == {f"{index:05d}" for index in range(6)} - {"00002"}
    assert nothing_left()

    run(job, processes=1)
    assert published(job.store) == whole


def test_a_full_disk_comes_back_as_it_is(job_for, run, nothing_left, faults):
    job = job_for("full")
    with pytest.raises(OSError, match="No space left") as error:
        run(job, open_worker=faults.FullDisk)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, "somewhere.tmp")
    assert nothing_left()


@pytest.mark.slow
def test_what_keeps_a_worker_from_starting_ends_the_run(job_for, run, nothing_left, faults):
    job = job_for("bad-device")
    with pytest.raises(Exception, match="no-such-device"):
        run(job, devices=["no-such-device"])
    with pytest.raises(ResumableError, match=r"no worker came to work.*SIGKILL"):
        run(job, open_worker=faults.die_while_opening)
    assert list((job.store / "shards").iterdir()) == []
    assert nothing_left()


def test_workers_end_with_a_driver_that_wants_no_more(job_for, nothing_left, faults, memory):
    job = job_for("enough")
    slow = replace(job, reader=faults.Faulty(job.reader, faults.sleeping(0.3), memory))
    reports = run_local(slow, range(6), processes=2, devices=["cpu"], advance=lambda inputs, bad: None)
    next(reports)
    assert len(multiprocessing.active_children()) == 2
    reports.close()
    assert nothing_left()
    assert len(list((job.store / "shards").glob("*.json"))) < 6


@pytest.mark.slow
@pytest.mark.parametrize("when", ["starting", "working"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_driver_that_is_told_to_end_leaves_no_process(job_for, start, faults, memory, number, when):
    job = job_for("told")
    slow = replace(job, reader=faults.Faulty(job.reader, faults.sleeping(0.2), memory))
    run = start(slow)
    assert run.driver.stdout.readline() == "running\n"
    if when == "working":
        run.driver.stdout.readline()
    else:
        run.wait_for(lambda: len(run.alive()) >= 3)
    if number == signal.SIGINT:
        os.killpg(run.driver.pid, number)  # as a terminal does
    else:
        run.driver.send_signal(number)
    _, errors = run.driver.communicate(timeout=30)
    assert run.driver.returncode == 128 + number
    assert errors == ""
    run.wait_for(lambda: run.alive() == [], 5)
    assert len(list((job.store / "shards").glob("*.json"))) < 6


@pytest.mark.slow
def test_a_second_run_beside_the_orphans_of_the_first_writes_the_same_bytes(
    job_for, run, start, whole, published, faults, memory
):
    job = job_for("orphans")
    slow = replace(job, reader=faults.Faulty(job.reader, faults.sleeping(0.2), memory))
    first = start(slow)
    first.driver.stdout.readline()
    first.driver.stdout.readline()
    first.driver.kill()
    first.driver.wait()
    orphans = first.alive()
    assert len(orphans) >= 2
    run(job, processes=1)
    first.wait_for(lambda: first.alive() == [], 20)
    assert published(job.store) == whole
