"""Batches are a function of (seed, worker, step), whoever reads them, and when."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import decentral
from decentral.config import load
from decentral.engines.sim import Simulator
from decentral.engines.worker import Group, Surroundings, Worker
from decentral.experiment import build
from decentral.replica import Averaging, Segment
from decentral.tasks import Reader, Sampler, read


class Noisy(Dataset):
    """Sample i is i, plus noise of three generators: augmentations as people write them."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        noise = random.random() + np.random.random() + torch.rand(()).item()
        return torch.tensor([index + noise, 1.0]), torch.tensor([float(index)])


def noisy(workers, seed):
    model = nn.Linear(2, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return decentral.Task(model, nn.functional.mse_loss, train=Noisy())


def sampler(workers):
    shards = [torch.arange(start, 24, 3) for start in range(3)]
    return Sampler(shards, 4, seed=5, sampling="shuffle", workers=workers)


def drawn(workers, step):
    own = sampler(workers)
    return read(Noisy(), own.indices(step), lambda: own.sample_seeds(step))


def test_a_worker_reads_what_it_reads_among_all():
    random.seed(1)
    x, y = drawn([0, 1, 2], 7)
    assert x.shape == (3, 4, 2)
    random.seed(2)
    torch.manual_seed(3)
    np.random.seed(4)
    for worker in range(3):
        own_x, own_y = drawn([worker], 7)
        assert torch.equal(own_x[0], x[worker])
        assert torch.equal(own_y[0], y[worker])
    noise = x[..., 0] - y[..., 0]
    assert noise.unique().numel() == 12  # none drawn twice
    assert not torch.equal(drawn([0], 8)[0] - drawn([0], 8)[1], noise[:1])


def test_what_lies_in_memory_asks_for_no_seeds():
    x = torch.arange(6).view(3, 2)
    (taken,) = read((x,), torch.tensor([[2, 0]]), lambda: pytest.fail("nothing draws"))
    assert taken.tolist() == [[[4, 5], [0, 1]]]


@pytest.mark.slow
def test_reading_ahead_gives_the_same_batches():
    """In order, from the middle, again, and with a step left out."""
    ahead = Reader(Noisy(), sampler([1]), processes=1)
    now = Reader(Noisy(), sampler([1]))
    for step in (3, 4, 3, 6):
        for a, b in zip(ahead(step), now(step), strict=True):
            assert torch.equal(a, b), step


@pytest.mark.slow
def test_a_worker_that_reads_ahead_is_the_simulated_one(quick):
    task = {"name": "test_reader:noisy", "batch_size": 4}
    overrides = {"task": task, "workers": 1, "algorithm": {"name": "local_sgd", "period": 4}}
    overrides |= {"topology": None, "optimizer.lr": 0.001, "optimizer.momentum": 0}
    config = load(quick, overrides)
    simulator = Simulator(build(config))
    worker = Worker()
    worker.build(
        load(quick, overrides | {"engine": "ray", "ray": {"readers": 1}}),
        None,
        0,
        Surroundings.here(),
    )
    worker.connect("127.0.0.1", worker.listen("127.0.0.1"), "127.0.0.1", Group((0,), None))
    try:
        for start in (0, 4):
            segment = Segment(start, start + 4, Averaging.NOBODY, True, record=False)
            report = simulator.run(segment)
            np.testing.assert_allclose(worker.run(segment).report.loss, report.loss, rtol=1e-9)
    finally:
        worker.leave()
    x = worker._joined.x
    torch.testing.assert_close(x, simulator.replica.x[0], rtol=1e-9, atol=0)
    assert x.abs().max() > 0.01
