"""Trials that are stacked in one simulator, and what transient stages are made of."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import decentral
from decentral.config import load

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from transients import critical_lr, slope, transient, with_interval
from trials import Trials, logistic_optimum

RUN = {
    "workers": 4,
    "steps": 7,
    "task": {
        "name": "logistic",
        "samples_per_worker": 30,
        "batch_size": 2,
        "sampling": "replacement",
    },
    "optimizer": {"name": "sgd", "lr": 0.2},
    "lr_schedule": {"name": "every", "step_size": 3, "gamma": 0.5},
    "algorithm": {"name": "gossip_pga", "period": 3},
    "topology": {"name": "ring"},
    "dtype": "float64",
}
METHODS = {
    "parallel": {"algorithm": {"name": "parallel_sgd"}, "topology": None},
    "local": {"algorithm": {"name": "local_sgd", "period": 3}, "topology": None},
    "gossip": {"algorithm": {"name": "gossip_sgd"}},
    "directed": {"topology": {"name": "exponential"}},
    "gossip_pga": {},
}


@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)
def test_the_first_of_many_trials_is_the_run_itself_and_no_other_is(changes):
    config = load(RUN | changes)
    alone = decentral.run(RUN | changes).model.get_parameter("weight")
    run = Trials(config, 3)
    run.run(4)
    trials = run.run(3)
    torch.testing.assert_close(trials[0], alone.detach(), rtol=1e-12, atol=1e-14)
    assert (trials - trials[0]).norm(dim=1)[1:].min() > 1e-3


def test_the_optimum_has_no_gradient():
    x, sign = Trials(load(RUN), 1).task.train[:]
    optimum = logistic_optimum(x, sign).requires_grad_()
    loss = torch.nn.functional.softplus(-sign * (x @ optimum)).mean()
    (gradient,) = torch.autograd.grad(loss, optimum)
    assert gradient.norm() < 1e-10
    assert optimum.norm() > 0.01


def test_a_transient_stage_ends_with_the_last_window_above_the_factor():
    ratios = np.array(
        [[1.0, 1.0, 1.0, 1.0], [1.3, 1.0, 1.2, 1.05], [1.3, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.3]]
    )
    assert transient(ratios, 1.1, 50).tolist() == [0, 150, 50, np.inf]


def test_the_critical_rate_lies_where_the_excess_passes_what_is_allowed():
    lrs = np.array([0.4, 0.2, 0.1, 0.05])
    excess = np.array([[1.0, 0.3, 0.1, 0.0], [0.1, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.3]])
    found = critical_lr(excess, lrs, 0.2)
    assert found[0] == pytest.approx(0.15)
    assert np.isnan(found[1:]).all()


def test_a_slope_is_the_exponent_and_none_where_a_value_is_missing():
    x = np.array([20.0, 50.0, 100.0])
    found = slope(x, np.stack([7 * x**3, np.array([1.0, np.inf, 2.0]), np.array([0.0, 1.0, 2.0])]))
    assert found[0] == pytest.approx(3)
    assert np.isnan(found[1:]).all()


def test_an_interval_holds_the_estimate_and_leaves_endless_ends_out():
    values = np.concatenate([[5.0], np.linspace(0, 10, 1001)])
    assert with_interval(values) == {"estimate": 5.0, "low": 0.25, "high": 9.75}
    values[600:] = np.inf
    assert with_interval(values)["high"] is None
