"""BatchNorm's statistics: averaged with the model, each worker's own, or taken anew."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import decentral
from decentral import evaluation
from decentral.config import load
from decentral.coordinator import Coordinator
from decentral.engines.sim import Simulator
from decentral.evaluation import recalibrated, recalibration_batches
from decentral.experiment import build
from decentral.gradients import FlatModel
from decentral.tasks import Task, fetch, length

N, SAMPLES, D = 3, 60, 6 * 5 + 5 + 5 + 5 + 5 * 3 + 3 + 3 + 3


class Normed(nn.Module):
    """Two norms, and a float buffer of another kind that every pass in training moves."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5, momentum=0.3)
        self.last, self.last_norm = nn.Linear(5, 3), nn.BatchNorm1d(3)
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.tensor(0.0))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return self.last_norm(self.last(self.norm(self.first(x))))


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64) * 2 + 0.5
    return x, torch.randint(3, (SAMPLES,), generator=generator)


def task_of(workers=N, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Task(Normed(), nn.functional.cross_entropy, data(), data())


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr("decentral.experiment.TASKS", {"normed": task_of})
    return {
        "workers": N,
        "steps": 9,
        "dtype": "float64",
        "task": {"name": "normed", "batch_size": 8},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "algorithm": {"name": "gossip_pga", "period": 3},
        "topology": {"name": "path"},
        "network": {"compute_ms": 1},
        "record": {"every": 3, "evaluate_every": 3},
    }


def finished(config, **changes):
    """The simulator at the end of a run, and its records."""
    experiment = build(load(config | changes))
    simulator = Simulator(experiment)
    return simulator, list(Coordinator(experiment, simulator).run())


def statistics(state, x):
    """Mean and variance of the inputs of both norms over batches x [batches, batch, 6], by hand."""
    h = x @ state["first.weight"].T + state["first.bias"]
    mean, var = h.mean(1, keepdim=True), h.var(1, correction=0, keepdim=True)
    out = (h - mean) / (var + 1e-5).sqrt() * state["norm.weight"] + state["norm.bias"]
    deep = out @ state["last.weight"].T + state["last.bias"]
    return {
        "norm.running_mean": h.flatten(0, 1).mean(0),
        "norm.running_var": h.var(1).mean(0),
        "last_norm.running_mean": deep.flatten(0, 1).mean(0),
        "last_norm.running_var": deep.var(1).mean(0),
    }


def test_recalibrated_statistics_are_those_of_the_samples_at_the_given_parameters(monkeypatch):
    monkeypatch.setattr(evaluation, "RECALIBRATION", (4, 12))
    task = task_of()
    model = FlatModel(task.model, torch.float64)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(D, generator=generator, dtype=torch.float64)
    buffers = torch.randn(len(model.b), generator=generator, dtype=torch.float64)
    for counter in model.counters().values():
        counter.fill_(5)  # as after training in place
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    shards = [torch.arange(10, 40), torch.arange(40, 60)]
    batches = recalibration_batches(shards, seed=7)
    assert batches.shape == (4, 12)
    assert len(batches.unique()) == 48  # each sample once
    assert batches.min() >= 10
    result = recalibrated(model, task, x, buffers, batches)

    state = model.state_dict(x, result, {})
    for name, expected in statistics(state, data()[0][batches]).items():
        np.testing.assert_allclose(state[name], expected, rtol=1e-12, err_msg=name)
    assert state["calls"] == model.buffers.views(buffers)["calls"]
    norm = task.model.get_submodule("norm")
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.momentum == 0.3
    for name, value in task.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_model_that_is_evaluated_and_saved_is_recalibrated(config, monkeypatch):
    monkeypatch.setattr(evaluation, "RECALIBRATION", (3, 16))
    simulator, records = finished(config, buffers="recalibrate")
    local, local_records = finished(config, buffers="local")
    state = simulator.average_model()
    x, y = data()
    batches = recalibration_batches(simulator._experiment.shards, 0)
    for name, expected in statistics(state, x[batches]).items():
        np.testing.assert_allclose(state[name], expected, rtol=1e-10, err_msg=name)
    module = Normed().double().eval()
    module.load_state_dict(state)
    loss = nn.functional.cross_entropy(module(x), y).item()
    assert records[-1] is not None
    assert local_records[-1] is not None
    assert records[-1]["eval_loss"] == pytest.approx(loss, rel=1e-12)
    # While training it is local: the same workers, statistics and all.
    assert torch.equal(simulator.replica.x, local.replica.x)
    assert torch.equal(simulator.replica.buffers, local.replica.buffers)
    assert local_records[-1]["eval_loss"] != pytest.approx(loss, rel=1e-3)


def test_local_statistics_are_never_sent_and_differ(config):
    local, _ = finished(config, buffers="local")
    averaged, _ = finished(config)
    buffers = len(averaged.replica.buffers[0])
    # A path of three sends 4 messages at each of 6 gossip steps; 3 global averages beside.
    exchanged = (6 * 4 + 3 * 2 * (N - 1)) * 8
    assert local.replica.comm.bytes_sent == exchanged * D
    assert averaged.replica.comm.bytes_sent == exchanged * (D + buffers)
    # Nine steps end with a global average.
    assert torch.equal(averaged.replica.buffers, averaged.replica.buffers[:1].expand(N, -1))
    means = local._model.buffers.views(local.replica.buffers)["norm.running_mean"]
    assert means.std(0).min() > 1e-3
    saved = local.average_model()["norm.running_mean"]
    np.testing.assert_allclose(saved, means.mean(0), rtol=1e-12)


def test_without_batch_norm_recalibrate_is_local():
    task = task_of()
    task.model = nn.Sequential(nn.Linear(6, 3), nn.InstanceNorm1d(3, track_running_stats=True))
    model = FlatModel(task.model, torch.float64)
    buffers = torch.randn(len(model.b), dtype=torch.float64)
    batches = recalibration_batches([torch.arange(SAMPLES)], 0)
    assert len(buffers) == 6
    assert torch.equal(recalibrated(model, task, model.x, buffers, batches), buffers)


def test_a_wrong_value_of_buffers_is_refused(config):
    with pytest.raises(decentral.UserError, match=r"buffers: .*average.*local.*recalibrate"):
        decentral.run(config | {"buffers": "mine"})


@pytest.mark.parametrize("at_once", [1, 100])
def test_models_are_evaluated_each_on_every_sample_in_any_passes(quick, monkeypatch, at_once):
    """Against a plain loop: a model alone, or two, and 37 of the 360 samples a pass."""
    experiment = build(load(quick))
    task, flat = experiment.task, FlatModel(copy.deepcopy(experiment.task.model), torch.float64)
    for name, value in {"LEAST": at_once, "MOST": at_once, "BATCH": 37}.items():
        monkeypatch.setattr(evaluation, name, value)
    x = torch.randn(5, len(flat.x), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    buffers = flat.b.repeat(5, 1)
    assert task.test is not None
    inputs, target = fetch(task.test, torch.arange(length(task.test)))
    flat.takes_vmap, flat.sample_bytes = True, 1
    found = evaluation.accuracies(flat, task, x, buffers, [0, 1, 2, 3, 4])
    for row in range(5):
        state = flat.state_dict(x[row], buffers[row], {})
        flat.module.load_state_dict(state)
        with torch.no_grad():
            output = flat.module(inputs.double())
        right = (output.argmax(1) == target).double().mean().item()
        assert found[row].item() == pytest.approx(right, abs=1e-6)
        one = evaluation.evaluate(flat, task, x[row], buffers[row])
        assert one.accuracy == pytest.approx(found[row].item(), abs=1e-6)
        assert one.loss == pytest.approx(task.loss(output, target).item(), rel=1e-12)
