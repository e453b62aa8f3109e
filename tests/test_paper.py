"""Trials that are stacked in one simulator, and what transient stages are made of."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import decentral
from decentral.config import load

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from transients import (
    Comparison,
    Setting,
    critical_lr,
    exponents,
    order,
    slope,
    transient,
    with_interval,
)
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


def made_up(setting, stages=10, stage=10):
    """Distances of 8 trials, as theory has them: a variance of lr / n, and 1e-6 lr^2 S^4 beyond it
    with S = H, or 24 where nobody averages globally; the rate halves from stage to stage."""
    lr = 0.2 * 0.5 ** np.repeat(np.arange(stages), stage)
    spread = (setting.period or 24) if setting.method != "parallel" else 0
    noise = 1 + 0.01 * np.random.default_rng(setting.workers).standard_normal((8, 1))
    return lr / setting.workers * noise + 1e-6 * lr**2 * spread**4


@pytest.fixture
def comparison():
    sweep = {(n, 16) for n in (20, 50, 100)} | {(20, 8), (20, 32)}
    methods = {"local": sweep, "pga-ring": sweep, "pga-exponential": sweep, "pga-grid": sweep}
    settings = [
        *(Setting(n, False, m, H) for m, pairs in methods.items() for n, H in sorted(pairs)),
        *(Setting(n, False, m, None) for n in (20, 50, 100) for m in ("parallel", "gossip-ring")),
    ]
    return Comparison({s: made_up(s) for s in settings}, window=10, factor=1.05, lr_every=100)


def test_the_exponents_at_constant_rates_are_those_of_the_law_that_was_put_in(comparison):
    """The critical rate is 0.05 / (1e-6 n S^4) there, and n / lr^2 grows as n^3 S^8."""
    found = {(row["method"], row["in"]): row for row in exponents(comparison, 0.2, 20)}
    local = found["local", "period"]
    assert local["values"] == [8, 16, 32]
    assert local["theory"] == pytest.approx(4)
    assert found["local", "workers"]["theory"] == pytest.approx(3)
    assert found["local", "workers"]["constant_lr"]["estimate"] == pytest.approx(3, abs=0.02)
    low, high = (found["local", "workers"]["constant_lr"][end] for end in ("low", "high"))
    assert low <= found["local", "workers"]["constant_lr"]["estimate"] <= high


def test_the_order_is_of_differences_between_transient_stages(comparison):
    rows = order(comparison, 50, iid=False)
    assert [row["method"] for row in rows][-2:] == ["local", "gossip-ring"]
    assert rows[0]["after"] == "parallel"
    assert rows[-1]["steps"]["estimate"] > 0  # S is 24 there, and 16 in all others
    assert [row["steps"]["estimate"] for row in rows[1:-1]] == [0, 0, 0]
