"""Shared by all tests."""

import compileall
import os
import signal
from pathlib import Path

import pytest
import torch
from sharing import SharedCluster

import decentral

# Where the environment forbids that modules are compiled to files, each process that a test starts
# would compile them all again, which takes a second.
compileall.compile_dir(Path(decentral.__file__).parent, quiet=2)

# Ray's own is 15: workers would yield to whatever else the machine does, while tests wait.
os.environ.setdefault("RAY_worker_niceness", str(os.nice(0)))

# A shell's background jobs ignore Ctrl-C, and so would the processes that tests send it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Small tensors gain nothing from threads, and lose much where tests share the cores with others.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What goes to which of the processes of `pytest -n 2`, and in which order.

    A module stays together, and so do all tests that share a cluster. They come first, so that it
    starts once, and next the modules that take longest; what must be without it comes last.
    First of all such hooks: pytest-xdist's own reads the groups.
    """
    groups = {}
    for item in items:
        needs = item.fixturenames
        shares = "shared_cluster" in needs and "alone" not in needs
        groups[item] = "cluster" if shares else item.path.stem
        item.add_marker(pytest.mark.xdist_group(groups[item]))
    first = ["cluster", "test_benchmarks", "test_launch"]
    order = {group: place for place, group in enumerate(first)}
    items.sort(key=lambda item: ("alone" in item.fixturenames, order.get(groups[item], len(first))))


@pytest.fixture(scope="session")
def shared_cluster():
    shared = SharedCluster()
    yield shared
    shared.down()


@pytest.fixture
def cluster(shared_cluster):
    """The cluster that tests share: a run on Ray joins it."""
    return shared_cluster.up()


@pytest.fixture
def on_shared_actors(cluster, monkeypatch):
    """A run on Ray takes the workers' processes that tests share, too."""
    from decentral.engines import ray as ray_engine

    whole = ray_engine.RayEngine

    def engine(experiment, say):
        return whole(experiment, say, cluster.actors(experiment.config.workers))

    monkeypatch.setattr(ray_engine, "RayEngine", engine)


@pytest.fixture(scope="module")
def alone(shared_cluster):
    """This process is in no Ray cluster, unless a test starts one of its own."""
    shared_cluster.down()


@pytest.fixture
def quick():
    """A small run of every part, in float64, that takes a second: override what a test is about."""
    return {
        "name": "quick",
        "workers": 4,
        "steps": 24,
        "engine": "sim",
        "dtype": "float64",
        "task": {
            "name": "digits",
            "batch_size": 8,
            "model": {"name": "mlp", "hidden": [8]},
            "partition": {"kind": "dirichlet", "alpha": 0.3},
        },
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "algorithm": {"name": "gossip_pga", "period": 4},
        "topology": {"name": "ring"},
        "network": {"latency_ms": 0.1, "bandwidth_gbps": 10, "compute_ms": 2},
        "record": {"every": 3, "evaluate_every": 12},
    }
