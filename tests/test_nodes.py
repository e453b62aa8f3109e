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

NODE = {"num_cpus": 1, "object_store_memory": 128 * 2**20}
LONG = {"steps": 1_000_000, "record": {"every": 50}}
PATIENCE_S = 90.0  # for what takes the time to start a process, or to miss a node


@pytest.fixture(scope="module")
def cluster(alone):
    """A cluster that this process is in; its nodes, of one CPU each, come as tests ask for them."""
    made = Cluster(initialize_head=True, head_node_args=NODE)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def grow(cluster, nodes):
    """Add nodes until so many are alive, of which a run may have just left one."""
    while len(cluster.list_all_nodes()) < nodes:
        cluster.add_node(**NODE)
    end = time.monotonic() + PATIENCE_S
    while ray.available_resources().get("CPU") != nodes:
        assert time.monotonic() < end, ray.available_resources()
        time.sleep(0.05)


def run_until(run, condition):
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, run.lines
        run.until(run.coordinator.step + 1)
    run.until(run.coordinator.step + 50)


def raylet_of(node):
    return node.all_processes["raylet"][0].process.pid


def of_node(run, raylet):
    """The workers on the node of a raylet, which has started them."""
    return [w for w in run.engine.members if psutil.Process(run.pid(w)).ppid() == raylet]


def test_a_run_takes_as_many_workers_as_there_is_room_for(cluster, quick):
    grow(cluster, 3)
    with running(None, quick, workers={"min": 2, "max": 4}, **LONG) as run:
        run.until(50)
        assert run.records[-1]["workers"] == 3
        cluster.add_node(**NODE)
        run_until(run, lambda: len(run.engine.members) == 4)
        assert run.records[-1]["workers"] == 4
        assert run.engine.members == (0, 1, 2, 3)
        assert not run.coordinator.failures


@pytest.mark.parametrize("policy", ["shrink", "replace"])
def test_a_node_dies(cluster, quick, policy):
    """Of four, three of which have a worker; replaced is who was there, on the fourth."""
    grow(cluster, 4)
    with running(None, quick, workers=3, on_worker_failure=policy, **LONG) as run:
        run.until(50)
        node = next(node for node in cluster.worker_nodes if of_node(run, raylet_of(node)))
        gone = of_node(run, raylet_of(node))
        pids = [run.pid(worker) for worker in gone]
        os.kill(raylet_of(node), signal.SIGKILL)
        run_until(run, lambda: run.coordinator.failures)
        lost = sorted(worker for failure in run.coordinator.failures for worker in failure["lost"])
        assert lost == gone
        left = 2
        if policy == "replace":
            run_until(run, lambda: len(run.engine.members) == 3)
            assert not set(pids) & {run.pid(worker) for worker in gone}
            left = 3
        assert run.records[-1]["workers"] == left
    cluster.remove_node(node, allow_graceful=False)  # what is left of it
