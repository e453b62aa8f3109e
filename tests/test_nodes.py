"""Nodes of a Ray cluster die, and come: several raylets on this machine stand for them."""

import os
import signal
import time

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from test_failures import running

pytestmark = pytest.mark.slow

LONG = {"steps": 1_000_000, "record": {"every": 50}}
PATIENCE_S = 90.0  # for what takes the time to start a process, or to miss a node


@pytest.fixture
def nodes():
    """Starts a cluster whose nodes have so many CPUs each, and joins it: the cluster."""
    clusters = []

    def start(*cpus):
        head, *others = ({"num_cpus": n, "object_store_memory": 128 * 2**20} for n in cpus)
        cluster = Cluster(initialize_head=True, head_node_args=head)
        clusters.append(cluster)
        for other in others:
            cluster.add_node(**other)
        ray.init(address=cluster.address, log_to_driver=False)
        return cluster

    yield start
    ray.shutdown()
    for cluster in clusters:
        cluster.shutdown()


def run_until(run, condition):
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, run.lines
        run.until(run.coordinator.step + 1)
    run.until(run.coordinator.step + 50)


def of_node(run, raylet):
    """The workers on the node of a raylet, which has started them."""
    return [w for w in run.engine.members if psutil.Process(run.pid(w)).ppid() == raylet]


@pytest.mark.parametrize("policy", ["replace", "shrink"])
def test_a_node_of_three_dies(nodes, quick, policy):
    cluster = nodes(2, 2, 2)
    with running(None, quick, workers=3, on_worker_failure=policy, **LONG) as run:
        run.until(50)
        raylets = [node.all_processes["raylet"][0].process.pid for node in cluster.worker_nodes]
        raylet = next(raylet for raylet in raylets if of_node(run, raylet))
        gone = of_node(run, raylet)
        pids = [run.pid(worker) for worker in gone]
        os.kill(raylet, signal.SIGKILL)
        run_until(run, lambda: run.coordinator.failures)
        lost = sorted(worker for failure in run.coordinator.failures for worker in failure["lost"])
        assert lost == gone
        left = 3 - len(gone)
        if policy == "replace":
            run_until(run, lambda: len(run.engine.members) == 3)
            assert not set(pids) & {run.pid(worker) for worker in gone}
            left = 3
        assert run.records[-1]["workers"] == left


def test_a_run_takes_as_many_workers_as_there_is_room_for(nodes, quick):
    cluster = nodes(3)
    with running(None, quick, workers={"min": 2, "max": 4}, **LONG) as run:
        run.until(50)
        assert run.records[-1]["workers"] == 3
        cluster.add_node(num_cpus=1, object_store_memory=128 * 2**20)
        run_until(run, lambda: len(run.engine.members) == 4)
        assert run.records[-1]["workers"] == 4
        assert run.engine.members == (0, 1, 2, 3)
        assert not run.coordinator.failures
