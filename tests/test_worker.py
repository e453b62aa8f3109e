"""What the `ray` section of a config sets, without a cluster."""

import pytest
import ray
import torch

from decentral import UserError
from decentral.config import RayConfig, load
from decentral.engines.ray import _check_resources
from decentral.engines.sim import Simulator
from decentral.engines.worker import Group, Surroundings, Worker
from decentral.experiment import build
from decentral.replica import Averaging, Replica, Segment
from decentral.tasks import fetch


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
        (
            RayConfig(gpus_per_worker=1, cpu_workers=1, cpus_per_worker=2),
            "3 workers x 2 CPU asked, the cluster has 4",
        ),
        (RayConfig(gpus_per_worker=0.8, cpu_workers=1), "2 workers x 0.8 GPU asked, the cluster"),
    ],
)
def test_a_cluster_that_is_too_small_is_refused(config, missing, monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 1.0})
    with pytest.raises(UserError, match=missing):
        _check_resources(config, 3)
    _check_resources(config, 2)


def test_a_worker_runs_its_model_compiled_where_it_is_to(quick, monkeypatch):
    calls = []

    def compiled(module):
        return lambda *inputs: calls.append(module) or module(*inputs)

    monkeypatch.setattr(torch, "compile", compiled)
    for compiles in (False, True):
        options = {"workers": 1, "algorithm": {"name": "local_sgd", "period": 1}, "topology": None}
        config = load(quick, options | {"engine": "ray", "ray.compile": compiles})
        worker = Worker()
        worker.build(config, None, 0, Surroundings.here())
        worker.connect("127.0.0.1", worker.listen("127.0.0.1"), "127.0.0.1", Group((0,), None))
        try:
            worker.run(Segment(0, 3, Averaging.NOBODY, True, record=False))
        finally:
            worker.leave()
        assert len(calls) == (3 if compiles else 0)


def test_of_a_large_test_set_each_worker_has_a_part_of_its_own(quick, monkeypatch):
    """By hand, of 360 samples at most 100: every fourth, from the worker's number on; the workers
    of the simulator and those that are processes have the same."""
    monkeypatch.setattr("decentral.evaluation.OWN_SAMPLES", 100)
    config = load(quick, {"workers": 7, "dtype": "float64"})
    simulator = Simulator(build(config))
    simulator.regroup((0, 1, 3, 4, 6))
    assert isinstance(simulator.replica, Replica)
    x = simulator.replica.x
    x += 0.5 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    own = {}
    for row, number in enumerate(simulator.members):
        worker = Worker()
        worker.build(config, None, number, Surroundings.here())
        worker.connect("127.0.0.1", worker.listen("127.0.0.1"), "127.0.0.1", Group((number,), None))
        try:
            worker._joined.x.copy_(x[row])
            own[number] = worker.evaluate()["eval_accuracy_workers"]
        finally:
            worker.leave()
        task, model = worker._experiment.task, worker._model
        assert task.test is not None
        inputs, target = fetch(task.test, torch.arange(number % 4, 360, 4))
        output = model(model.parameters.views(x[row]), {}, [inputs.double()])
        right = (output.argmax(1) == target).double().mean().item()
        assert own[number] == pytest.approx(right, abs=1e-6)
    mean = sum(own.values()) / len(own)
    assert simulator.evaluate()["eval_accuracy_workers"] == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"cpu_workers": 1}, "set ray.gpus_per_worker"),
        ({"cpu_workers": 4, "gpus_per_worker": 1}, "must be below workers, which is 4; got 4"),
        ({"cpu_workers": 1, "gpus_per_worker": 1, "min": 2}, "elastic"),
    ],
)
def test_workers_without_a_gpu_need_some_with_one_beside_them(quick, section, problem):
    workers = {"min": section.pop("min"), "max": 4} if "min" in section else 4
    with pytest.raises(UserError, match=rf"^ray\.cpu_workers: .*{problem}"):
        load(quick, {"ray": section, "workers": workers})


def test_all_workers_choose_one_backend():
    assert RayConfig(gpus_per_worker=1).backend == "nccl"
    assert RayConfig(gpus_per_worker=2).backend == "nccl"
    for shared in (
        RayConfig(),
        RayConfig(gpus_per_worker=0.5),
        RayConfig(gpus_per_worker=1, cpu_workers=1),
    ):
        assert shared.backend == "gloo"
