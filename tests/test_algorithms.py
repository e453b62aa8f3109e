"""Methods against closed forms and hand-written steps, in float64.

Each of these tells a method from its near twins: another order, another weight, a period that is
off by one. All of them still train and still converge, so "it runs" cannot tell.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from harness import D, N, Quadratic, replica_of, ring, run

from decentral import topology as topologies
from decentral.algorithms import (
    gossip_aga,
    gossip_pga,
    gossip_sgd,
    local_sgd,
    parallel_sgd,
)
from decentral.algorithms.schedules import Adaptive, Every, Never
from decentral.comm import StackedComm
from decentral.optimizers import OPTIMIZERS
from decentral.replica import Averaging, Segment


def test_one_period_of_gossip_pga_by_hand():
    lr, momentum, period = 0.1, 0.9, 3
    problem = Quadratic()
    replica = run(gossip_pga(period), problem, 7, ring(), momentum=momentum)

    a, c = problem.a.numpy(), problem.c.numpy()
    w = np.zeros((N, N))
    for i in range(N):
        w[i, i] = w[i, (i + 1) % N] = w[i, (i - 1) % N] = 1 / 3
    x, m = np.zeros((N, D)), np.zeros((N, D))
    for k in range(7):
        m = momentum * m + a * (x - c)
        half = x - lr * m
        everyone = (k + 1) % period == 0  # after steps 2 and 5
        x = np.repeat(half.mean(0, keepdims=True), N, 0) if everyone else w @ half
    np.testing.assert_allclose(replica.x, x, rtol=1e-13)


def test_a_time_varying_topology_mixes_with_the_matrix_of_its_step():
    problem = Quadratic()
    topology = topologies.build(N, "one_peer_exponential")
    replica = run(gossip_pga(3), problem, 5, topology)
    a, c, x = problem.a.numpy(), problem.c.numpy(), np.zeros((N, D))
    for k in range(5):
        half = x - 0.1 * a * (x - c)
        heard = np.roll(half, 2 ** (k % 3), axis=0)  # i sends to i + 2^(k mod 3)
        x = np.tile(half.mean(0), (N, 1)) if k == 2 else (half + heard) / 2
    np.testing.assert_allclose(replica.x, x, rtol=1e-13)


def test_gossip_stops_at_its_biased_fixed_point():
    """x* solves x = W (x - gamma A (x - c)): adapt, then combine. Not the optimum, and not the
    fixed point of the other order, x = W x - gamma A (x - c)."""
    problem, lr = Quadratic(), 0.1
    replica = run(gossip_sgd(), problem, 2000, ring())
    w = ring().matrix(0).toarray()
    a, c = problem.a.numpy(), problem.c.numpy()
    for d in range(D):
        curvature = np.diag(a[:, d])
        eye = np.eye(N)
        adapt_then_combine = np.linalg.solve(
            eye - w @ (eye - lr * curvature), lr * w @ curvature @ c[:, d]
        )
        combine_then_adapt = np.linalg.solve(eye - w + lr * curvature, lr * curvature @ c[:, d])
        optimum = (a[:, d] @ c[:, d]) / a[:, d].sum()
        np.testing.assert_allclose(replica.x[:, d], adapt_then_combine, rtol=1e-11)
        assert np.abs(adapt_then_combine - combine_then_adapt).max() > 1e-2
        assert abs(adapt_then_combine.mean() - optimum) > 1e-4


def test_local_sgd_keeps_replicas_independent_between_averages():
    problem, lr, period = Quadratic(), 0.1, 4
    replica = run(local_sgd(period), problem, period - 1)
    a, c = problem.a.numpy(), problem.c.numpy()
    alone = c - c * (1 - lr * a) ** (period - 1)  # x_k - c = (1 - lr a)^k (0 - c)
    np.testing.assert_allclose(replica.x, alone, rtol=1e-13)

    problem = Quadratic()
    replica = run(local_sgd(period), problem, period)
    mean = (c - c * (1 - lr * a) ** period).mean(0)
    np.testing.assert_allclose(replica.x, np.tile(mean, (N, 1)), rtol=1e-13)


def test_parallel_sgd_steps_on_the_mean_gradient():
    problem = Quadratic()
    replica = run(parallel_sgd(), problem, 3)
    a, c = problem.a.numpy(), problem.c.numpy()
    x = np.zeros(D)
    for _ in range(3):
        x = x - 0.1 * (a * (x - c)).mean(0)
    np.testing.assert_allclose(replica.x, np.tile(x, (N, 1)), rtol=1e-13)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    ("algorithm", "topology"),
    [
        (gossip_sgd, "complete"),
        (lambda: gossip_pga(1), "ring"),
        (lambda: local_sgd(1), "ring"),
        (lambda: gossip_aga(initial_period=1, warmup=100), "ring"),
    ],
    ids=["complete graph", "gossip_pga H=1", "local_sgd H=1", "gossip_aga H=1"],
)
def test_averaging_everyone_at_every_step_is_parallel_sgd(algorithm, topology, momentum):
    parallel = run(parallel_sgd(), Quadratic(), 12, momentum=momentum)
    other = run(algorithm(), Quadratic(), 12, topologies.build(N, topology), momentum=momentum)
    np.testing.assert_allclose(other.x, parallel.x, rtol=1e-12)


def test_adam_after_averaging_models_is_not_adam_on_the_averaged_gradient():
    parallel = run(parallel_sgd(), Quadratic(), 12, name="adam")
    averaged = run(local_sgd(1), Quadratic(), 12, name="adam")
    assert (parallel.x - averaged.x).abs().max() > 1e-3


def test_period_counts_steps_from_one():
    schedule = Every(4)
    assert [k for k in range(13) if schedule.next_average(k) == k] == [3, 7, 11]
    assert schedule.next_average(4) == 7
    assert Never().next_average(0) is None


def test_momentum_stays_local_at_a_global_average():
    problem = Quadratic()
    replica = run(local_sgd(2), problem, 2, momentum=0.9)
    momentum = replica.optimizer.state[replica.x]["momentum_buffer"]
    assert momentum.std(0).min() > 1e-2
    assert replica.x.std(0).max() < 1e-15


@pytest.mark.parametrize("topology", ["ring", "star", "one_peer_exponential", "exponential"])
def test_gossip_moves_the_mean_by_the_mean_gradient(topology):
    problem = Quadratic()
    replica = replica_of(gossip_sgd(), problem, topologies.build(N, topology))
    for step in range(6):
        before, gradient = replica.x.mean(0), None
        replica.run(Segment(step, step + 1, Averaging.NEIGHBOURS, False, False))
        gradient = problem.value.mean(0)
        np.testing.assert_allclose(replica.x.mean(0), before - 0.1 * gradient, rtol=1e-12)


def test_consensus_distance_is_taken_after_the_local_step_and_before_the_average():
    problem = Quadratic()
    for algorithm, everyone in ((local_sgd(1), True), (gossip_sgd(), False)):
        replica = replica_of(algorithm, Quadratic(), ring())
        report = replica.run(Segment(0, 1, algorithm.between, everyone, record=True))
        half = 0.1 * (problem.a * problem.c)  # x - lr a (x - c) at x = 0
        expected = ((half - half.mean(0)) ** 2).sum(-1)
        assert report.deviation is not None
        np.testing.assert_allclose(report.deviation, expected, rtol=1e-12)


def test_consensus_distance_costs_no_message_at_a_global_average(monkeypatch):
    means = []
    mean = StackedComm.mean
    monkeypatch.setattr(
        StackedComm, "mean", lambda *a, **options: means.append(options) or mean(*a, **options)
    )
    replica = replica_of(gossip_pga(2), Quadratic(), ring())
    replica.run(Segment(0, 1, Averaging.NEIGHBOURS, True, record=True))
    assert means == [{"counted": True}]  # the average itself, and it alone
    replica.run(Segment(1, 4, Averaging.NEIGHBOURS, False, record=True))
    assert means[1:] == [{"counted": False}]  # one, at the step that is recorded


def test_recording_sends_nothing_that_counts_and_changes_nothing():
    replicas = []
    for record in (False, True):
        replica = replica_of(gossip_pga(2), Quadratic(), ring())
        for start, everyone in ((0, False), (1, True), (2, False)):
            replica.run(Segment(start, start + 1, Averaging.NEIGHBOURS, everyone, record))
        replicas.append(replica)
    assert torch.equal(replicas[0].x, replicas[1].x)
    assert replicas[0].comm.bytes_sent == replicas[1].comm.bytes_sent


def test_adaptive_period_follows_its_formula():
    schedule = Adaptive(initial_period=4, warmup=8)
    seen = []
    step = -1
    losses = [2.0, 1.0, 1.2, 0.5, 0.1]
    for loss in losses:
        step = schedule.next_average(step + 1)
        schedule.observe(step, loss, 0.1)
        seen.append((step, schedule.period))
    # F_init: 2, then (2+1)/2 = 1.5 at steps 3 and 7 < 8; from then on ceil(1.5 / F * 4).
    assert math.ceil(1.5 / 1.2 * 4) == 5
    assert seen == [(3, 4), (7, 4), (11, 5), (16, 12), (28, 60)]


def test_the_warm_up_ends_with_its_last_step():
    schedule = Adaptive(initial_period=4, warmup=7)
    schedule.observe(3, 2.0, 0.1)
    schedule.observe(7, 1.0, 0.1)  # steps 0 to 6 were the warm-up
    assert schedule.period == 8


def test_adaptive_period_keeps_its_cap_and_survives_a_loss_of_zero():
    schedule = Adaptive(initial_period=4, warmup=4, max_period=10)
    schedule.observe(3, 1.0, 0.1)
    schedule.observe(7, 1e-9, 0.1)
    assert schedule.period == 10
    schedule.observe(17, 0.0, 0.1)
    assert schedule.period == 10


def test_adaptive_schedule_survives_a_checkpoint():
    schedule, other = Adaptive(4, 4), Adaptive(4, 4)
    schedule.observe(3, 1.0, 0.1)
    schedule.observe(7, 0.3, 0.1)
    other.state.update(schedule.state)
    assert other.next_average(8) == schedule.next_average(8) == 7 + 14


@pytest.mark.parametrize(
    "name", [n for n in OPTIMIZERS if n not in ("adafactor", "muon", "lbfgs", "sparseadam")]
)
def test_one_worker_is_the_plain_torch_optimizer(name):
    problem = Quadratic(n=1)
    replica = run(gossip_pga(2), problem, 20, topologies.build(1, "ring"), name=name, lr=0.05)
    x = torch.zeros(D, dtype=torch.float64, requires_grad=True)
    kind: Any = OPTIMIZERS[name]
    stepper = kind([x], lr=0.05)
    for _ in range(20):
        stepper.zero_grad()
        (0.5 * (problem.a[0] * (x - problem.c[0]) ** 2).sum()).backward()
        stepper.step()
    np.testing.assert_allclose(replica.x[0], x.detach(), rtol=1e-12)
