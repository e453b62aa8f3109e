"""Who gets a CUDA graph, as far as it can be seen without a GPU; the rest is in test_gpu.py."""

import contextlib
import random

import numpy as np
import pytest
import torch
from torch import nn

from decentral import cuda_graph
from decentral.config import load
from decentral.cuda_graph import CudaGraphs
from decentral.engines import sim
from decentral.experiment import build
from decentral.gradients import StackedGradient


class Counting(nn.Module):
    passes = 0

    def forward(self, x):
        self.passes += 1
        return x


def waits(x):
    raise RuntimeError("called a synchronizing CUDA operation\nand more")


PASSES = {
    "an attribute": (Counting(), "changes an attribute of its own"),
    "Python's draws": (lambda x: x * random.random(), "draws on the host"),
    "NumPy's draws": (lambda x: x * np.random.rand(), "draws on the host"),
    "torch's draws": (lambda x: x * torch.rand(1), "draws on the host"),
}


@pytest.fixture
def graphs(monkeypatch):
    """Of a `modules`, on the CPU: nothing can be recorded there, and nothing watched for waits."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(cuda_graph, "_waiting_forbidden", contextlib.nullcontext)
    monkeypatch.setattr(cuda_graph, "_generator", torch.Generator)
    return CudaGraphs


@pytest.mark.parametrize("name", PASSES)
def test_what_a_graph_would_repeat_gets_none(graphs, name, caplog):
    act, reason = PASSES[name]
    modules = act if isinstance(act, nn.Module) else nn.Identity()
    calls = graphs(modules)
    for _ in range(3):  # none is recorded, which would fail here
        calls(lambda arguments: act(arguments[0]), (torch.ones(2),), "set")
    (said,) = [record.getMessage() for record in caplog.records]
    assert reason in said


def test_a_pass_that_waits_is_taken_again_without_the_watch(graphs, caplog):
    outcomes = iter([waits, torch.neg, torch.neg])
    calls = graphs(nn.Identity())
    for _ in range(2):
        got = calls(lambda arguments: next(outcomes)(arguments[0]), (torch.ones(2),), "set")
        assert got.tolist() == [-1, -1]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.endswith(": called a synchronizing CUDA operation")


def test_what_a_graph_can_repeat_is_recorded_at_its_second_call(graphs, monkeypatch):
    recorded = []
    monkeypatch.setattr(graphs, "_record", lambda self, do, arguments, key: recorded.append(key))
    calls = graphs(nn.Linear(2, 2))
    for size in (2, 2, 3):
        calls(lambda arguments: arguments[0], (torch.ones(size),), "set")
    assert recorded == [("set", ((torch.Size([2]), torch.float32),))]


@pytest.mark.parametrize("by_graph", [True, False])
def test_a_config_says_whether_passes_may_be_graphs(quick, monkeypatch, by_graph):
    seen = []

    class Seen(StackedGradient):
        def __init__(self, *arguments, cuda_graph, **options):
            seen.append(cuda_graph)
            super().__init__(*arguments, cuda_graph=cuda_graph, **options)

    monkeypatch.setattr(sim, "StackedGradient", Seen)
    sim.Simulator(build(load(quick | {"sim": {"cuda_graph": by_graph}})))
    assert seen == [by_graph]
