"""Shards encoded by a Ray cluster of two nodes, which loses actors, a node, all nodes, and its driver."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from latentae.errors import MissingExtra, RequestError, ResumableError
from latentae.store.engines import run_local, run_ray
from latentae.store.engines.ray import check_store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """A cluster whose head has no CPU to offer; the tests add nodes."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
        patch.setenv("OMP_NUM_THREADS", "1")
        soon = {"health_check_period_ms": 1000, "health_check_failure_threshold": 5}
        head = {"num_cpus": 0, "_system_config": soon}
        cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
        yield cluster
        cluster.shutdown()


@pytest.fixture
def nodes(cluster):
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    yield nodes
    for node in nodes:
        if node in cluster.list_all_nodes():
            cluster.remove_node(node)


@pytest.fixture
def begin(cluster):
    """Start to run all shards of a job; gives its reports."""

    def begin(job):
        return run_ray(job, range(6), address=cluster.address, processes=None, advance=lambda inputs, bad: None)

    return begin


def test_an_actor_that_is_killed_is_replaced(job_for, whole, published, nodes, begin, faults, memory):
    job = job_for("actor")
    deadly = replace(job, reader=faults.Faulty(job.reader, faults.kill_this_process, memory, "007.png", times=2))
    shards = [report.shard for report in begin(deadly)]
    assert sorted(shards) == list(range(6))
    assert published(job.store) == whole


def test_a_node_that_is_lost_takes_no_shard_with_it(job_for, whole, published, cluster, nodes, begin, faults, memory):
    job = job_for("node")
    slow = replace(job, reader=faults.Faulty(job.reader, faults.sleeping(0.2), memory))
    reports = begin(slow)
    shards = [next(reports).shard]
    cluster.remove_node(nodes[0], allow_graceful=False)
    shards += [report.shard for report in reports]
    assert sorted(shards) == list(range(6))
    assert published(job.store) == whole


def test_a_cluster_without_nodes_does_not_hang(job_for, whole, published, cluster, nodes, begin, faults, memory):
    job = job_for("no-node")
    slow = replace(job, reader=faults.Faulty(job.reader, faults.sleeping(1.0), memory))
    reports = begin(slow)
    done = [next(reports).shard]
    for node in nodes:
        cluster.remove_node(node, allow_graceful=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latentae.store.engines.ray.SILENCE_SECONDS", 2)
        with pytest.raises(
            ResumableError,
            match=r"not encoded, because worker after worker died .the last one found no node that has room",
        ):
            done += [report.shard for report in reports]
    assert len(done) < 6
    for _ in run_local(job, range(6), processes=1, devices=["cpu"], advance=lambda inputs, bad: None):
        pass
    assert published(job.store) == whole


def test_a_node_must_see_the_store(job_for, tmp_path):
    job = job_for("elsewhere")
    check_store(job)
    for other in (replace(job, store=tmp_path / "gone"), replace(job, fingerprint="of another one")):
        with pytest.raises(RequestError, match=f"does not see the store at {other.store}"):
            check_store(other)


def test_a_driver_killed_and_one_told_to_end_leave_no_process(job_for, whole, published, start, faults, memory):
    job = job_for("driver")
    slow = replace(job, reader=faults.Faulty(job.reader, faults.sleeping(0.2), memory))
    for number in (signal.SIGKILL, signal.SIGTERM):
        run = start(slow, "ray")
        assert run.driver.stdout.readline() == "running\n"
        run.driver.stdout.readline()  # a report
        run.driver.send_signal(number)
        _, errors = run.driver.communicate(timeout=60)
        assert run.driver.returncode == (-9 if number == signal.SIGKILL else 143)
        assert errors == ""
        run.wait_for(lambda run=run: run.alive(but="Agent") == [], 30)  # Ray's own may outlive a killed driver
    for _ in run_local(job, range(6), processes=1, devices=["cpu"], advance=lambda inputs, bad: None):
        pass
    assert published(job.store) == whole


def test_without_ray_or_a_cluster_one_sentence_says_so(job_for, monkeypatch):
    pytest.importorskip("ray")
    job = job_for("none")
    options = {"processes": None, "advance": lambda inputs, bad: None}
    with pytest.raises(RequestError, match=r"No Ray cluster at '127.0.0.1:1'"):
        list(run_ray(job, [0], address="127.0.0.1:1", **options))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"latentae\[ray\]"):
        list(run_ray(job, [0], address=None, **options))
