"""Shared by all tests."""

import pytest
import torch

# Small tensors gain nothing from threads, and lose much where tests share the cores with others.
torch.set_num_threads(1)


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
