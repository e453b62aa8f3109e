"""Nodes of a Ray cluster die, and come: several raylets on this machine stand for them."""

import os
import signal
import time

import pytest
import ray
from ray.cluster_utils import Cluster
from test_failures import running

from decentral.engines.ray import _none_beforehand
from decentral.nursery import nursery

pytestmark = pytest.mark.slow

NODE = {"num_cpus": 1, "object_store_memory": 128 * 2**20}
SOON_DEAD = {"health_check_period_ms": 500}  # Ray gives a node up after 2.5 s and not 15
LONG = {"steps": 1_000_000, "record": {"every": 50}}
PATIENCE_S = 90.0  # for what takes the time to start a process, or to miss a node


@pytest.fixture(scope="module")
def cluster(alone):
    """A cluster that this process is in; its nodes, of one CPU each, come as tests ask for them."""
    with nursery() as executable, _none_beforehand():
        made = Cluster(True, head_node_args=NODE | {"_system_config": SOON_DEAD})
        forked = {"py_executable": executable} if executable else None
        ray.init(address=made.address, log_to_driver=False, runtime_env=forked)
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


def of_node(run, node):
    """The workers on a node."""
    nodes = run.engine.ask(node_id)
    return [w for w, where in zip(run.engine.members, nodes, strict=True) if where == node.node_id]


def node_id(worker):
    return ray.get_runtime_context().get_node_id()


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
        node = next(node for node in cluster.worker_nodes if of_node(run, node))
        gone = of_node(run, node)
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
