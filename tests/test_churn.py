"""Under churn and losses the live mean stays what the mixing weights promise: see the benchmark.

`benchmarks/churn.py` holds the mean to its closed forms at every mixing and every change of
membership; here it does so for 1,000 steps.
"""

import importlib
from pathlib import Path

import pytest
import torch

from decentral.config import load
from decentral.coordinator import Coordinator
from decentral.experiment import build

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STEPS = 1_000
ROUND_OFF = 1e-12  # 1e-16 of the largest parameter for each of 16 summands, and to spare


@pytest.fixture
def churn(monkeypatch):
    """The benchmark."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("churn")


@pytest.mark.parametrize("topology", ["ring", "random_regular"])
def test_lost_exchanges_and_churn_keep_the_live_mean(churn, topology):
    row = churn.measure(topology, "rare", "exchanges", STEPS)
    assert row["steps"] == STEPS
    assert row["changes"] > 100
    # Away: 5% on average; the time between two changes of a worker is 10 steps away, 200 there, so
    # 16 workers are 16,000 worker-steps of some 75 absences: a deviation of about 0.008.
    assert row["away"] == pytest.approx(0.05, abs=0.025)
    assert 0 < row["mixing_error"] < ROUND_OFF
    assert 0 < row["change_error"] < ROUND_OFF


def test_lost_messages_move_the_mean_as_far_as_their_variance_says(churn):
    """The root mean square of ten coordinates in standard deviations: chi-squared of ten degrees
    of freedom, over ten, is between 0.2 and 2.6 but for one draw in a hundred."""
    row = churn.measure("ring", "rare", "messages", STEPS)
    assert 0.2 < row["drift_deviations"] ** 2 < 2.6
    assert row["drift"] > 1e-3
    assert row["change_error"] < ROUND_OFF


def test_the_check_sees_a_mean_that_moves(churn):
    """Single messages lost move it, and are not taken for round-off."""
    script = [{"kind": "lose", "probability": 0.05, "of": "messages"}]
    config = churn.CONFIG | {"steps": 50, "topology": {"name": "ring"}, "faults": script}
    engine = churn.WatchedSimulator(build(load(config)), 50)
    list(Coordinator(engine._experiment, engine).run())
    assert engine.mixing_error > 1e-6


def test_without_learning_the_live_workers_agree_on_the_mean_that_leavers_left(churn):
    """lr 0, exchanges lost, six workers that die one by one: what remains is a mean of some of the
    starts' differences, in the hull of them, and all who are left agree on it."""
    script = [{"kind": "kill", "worker": w, "step": 3 * w + 2} for w in range(6)]
    script += [{"kind": "lose", "probability": 0.05}]
    config = churn.CONFIG | {
        "steps": 400,
        "topology": {"name": "ring"},
        "optimizer": {"name": "sgd", "lr": 0.0},
        "faults": script,
        "on_worker_failure": "shrink",
    }
    engine = churn.WatchedSimulator(build(load(config)), 400)
    start = torch.randn(16, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    engine.replica.x.copy_(start)
    list(Coordinator(engine._experiment, engine).run())
    assert engine.members == tuple(range(6, 16))
    assert engine.change_error < ROUND_OFF
    assert engine.mixing_error < ROUND_OFF
    assert engine.left == 6
    x = engine.replica.x
    torch.testing.assert_close(x, x.mean(0).expand(10, 10), rtol=0, atol=1e-9)
    assert (x.mean(0) - start.mean(0)).abs().max() > 1e-3  # the leavers took their deviation along
