"""What the `ray` section of a config sets, without a cluster."""

import pytest
import ray
import torch

from decentral import UserError
from decentral.config import RayConfig, load
from decentral.engines.ray import _check_resources
from decentral.engines.worker import Surroundings, Worker


def test_a_worker_takes_its_threads_and_its_timeout_from_the_config(quick):
    before = torch.get_num_threads()
    config = load(quick, {"ray.timeout_s": 7.5, "ray.cpus_per_worker": 2.0})
    worker = Worker()
    try:
        worker.build(config, None, 0, Surroundings.here())
        assert torch.get_num_threads() == 2
        assert worker._timeout.total_seconds() == 7.5
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (RayConfig(cpus_per_worker=2.0), "3 workers x 2 CPU asked, the cluster has 4"),
        (RayConfig(gpus_per_worker=0.5), "3 workers x 0.5 GPU asked, the cluster has 1"),
    ],
)
def test_a_cluster_that_is_too_small_is_refused(config, missing, monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 1.0})
    with pytest.raises(UserError, match=missing):
        _check_resources(config, 3)
    _check_resources(config, 2)
