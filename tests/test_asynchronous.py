"""Asynchronous methods: whom workers meet and when, what a meeting does, and both engines' runs."""

import copy
import itertools
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from harness import D, N, Quadratic
from processes import run_on_ranks

import decentral
from decentral import topology as topologies
from decentral.algorithms import PRESETS
from decentral.algorithms.a2cid2 import A2CiD2
from decentral.asynchronous import AsynchronousRule, Settings, StackedReplicas
from decentral.comm import StackedComm
from decentral.event_queue import EventQueue, Matchings, acceleration, rounds
from decentral.mixing import Mixing
from decentral.optimizers import lr_schedule, optimizer
from decentral.replica import Averaging, Moment, Segment
from decentral.timeline import Timeline

ASYNCHRONOUS = {"ad_psgd": {}, "a2cid2": {"eta": 0.3, "alpha": 0.7}}
LR = 0.1


class OwnSteps(Quadratic):
    """The quadratic, for workers at steps of their own."""

    def of(self, rows, steps):
        losses = self(0)
        return losses[list(rows)]


def rule_of(name, **options):
    rule = PRESETS[name](**options or ASYNCHRONOUS[name]).rule
    assert isinstance(rule, AsynchronousRule)
    return rule


def replica_of(name, problem, make=None, rule=None):
    rule = rule or rule_of(name)
    comm = StackedComm(len(problem.parameters), None, torch.float64)
    return StackedReplicas(problem, rule, comm, make or optimizer("sgd", {"lr": LR}), None)


def accelerated(name, graph):
    """The method with the paper's options for this graph."""
    rule = rule_of(name, exchanges=1.0)
    if isinstance(rule, A2CiD2):
        rule = rule.accelerated(*acceleration(Matchings(graph, 0).laplacian(1.0)))
    return rule


def segment(start, stop, moments=(), **options):
    plain = Segment(start, stop, Averaging.NEIGHBOURS, False, False, moments=moments)
    return replace(plain, **options)


def queue_of(graph, exchanges=1.0, compute_s: Any = 1.0, link_s=0.1, seed=0):
    times = np.broadcast_to(compute_s, len(graph))
    return EventQueue(
        Matchings(graph, seed), exchanges, lambda i, m: float(times[i]), lambda i, j: link_s
    )


# --- whom workers meet ---


@pytest.mark.parametrize("graph", [nx.cycle_graph(7), nx.star_graph(4), nx.complete_graph(6)])
def test_partners_are_a_maximal_matching_of_neighbours(graph):
    matchings = Matchings(graph, seed=3)
    for turn in range(50):
        partner = matchings.partners(turn)
        assert np.array_equal(partner[partner], np.arange(len(graph)))
        alone = [i for i in graph if partner[i] == i]
        assert all(graph.has_edge(i, partner[i]) for i in graph if partner[i] != i)
        assert not any(graph.has_edge(i, j) for i in alone for j in alone)


def test_partners_are_those_of_taking_edges_in_random_order():
    """On a path of four, the middle edge comes first one time in three; else the outer two meet."""
    matchings = Matchings(nx.path_graph(4), seed=1)
    middle = sum(matchings.partners(turn)[1] == 2 for turn in range(3000))
    assert abs(middle / 3000 - 1 / 3) < 4 * math.sqrt(2 / 9 / 3000)
    again = Matchings(nx.path_graph(4), seed=1)
    assert all(np.array_equal(matchings.partners(turn), again.partners(turn)) for turn in range(20))


def test_one_worker_meets_nobody():
    assert Matchings(nx.empty_graph(1), seed=0).partners(5).tolist() == [0]


def test_acceleration_of_two_workers_and_of_a_ring():
    """Two that meet once a unit: L = [[1, -1], [-1, 1]], lambda_2 = 2, resistance 1."""
    two = Matchings(nx.path_graph(2), seed=0).laplacian(exchanges=1.0)
    np.testing.assert_allclose(two, [[1, -1], [-1, 1]])
    chi1, chi2 = acceleration(two)
    np.testing.assert_allclose([chi1, chi2], [1 / 2, 1 / 2])
    n = 8  # each edge of a ring at rate r: lambda_2 = 2r(1 - cos(2 pi/n)), resistance (n-1)/(n r)
    ring = 0.4 * nx.laplacian_matrix(nx.cycle_graph(n)).toarray().astype(float)
    chi1, chi2 = acceleration(ring)
    np.testing.assert_allclose(chi1, 1 / (0.8 * (1 - math.cos(2 * math.pi / n))))
    np.testing.assert_allclose(chi2, (n - 1) / n / 0.4 / 2)
    # The rates that are counted: with twice the rounds, twice as often.
    matchings = Matchings(nx.cycle_graph(n), seed=0)
    once, twice = matchings.laplacian(1.0), matchings.laplacian(2.0)
    np.testing.assert_allclose(twice, 2 * once)
    np.testing.assert_allclose(once.sum(1), 0, atol=1e-12)
    edges = -once[np.arange(n), (np.arange(n) + 1) % n]
    assert edges.std() < 0.02
    assert 0.4 < edges.mean() < 0.5


# --- when ---


def test_the_queue_by_hand():
    """Two workers, one twice as fast, one round a step, an exchange of 0.5."""
    queue = queue_of(nx.path_graph(2), compute_s=[1.0, 2.0], link_s=0.5)
    told = [(m.kind, m.worker, m.other) for m in queue.run(0, 2)]
    assert told == [
        ("start", 0, 0),  # at 0
        ("start", 1, 1),
        ("meet", 0, 1),  # two gradients have begun: the first round
        ("part", 0, 1),  # at 0.5
        ("finish", 0, 0),  # at 1
        ("start", 0, 2),
        ("finish", 1, 1),  # at 2, as the next: what was planned first comes first
        ("finish", 0, 2),  # all four gradients have begun
        ("start", 1, 3),
        ("meet", 0, 1),
        ("part", 0, 1),  # at 2.5
        ("finish", 1, 3),  # at 4
    ]
    assert queue.time_s == 4.0


def test_a_slow_worker_holds_up_nobody():
    """Seven of speed 1, one of 1/10: the fast do the slow one's share, in n / (sum of speeds)."""
    n, steps = 8, 100
    compute_s = np.ones(n)
    compute_s[3] = 10.0
    queue = queue_of(nx.cycle_graph(n), compute_s=compute_s)
    moments = queue.run(0, steps)
    done = Counter(m.worker for m in moments if m.kind == "finish")
    assert sum(done.values()) == n * steps
    assert done[3] == pytest.approx(n * steps / 71, abs=1)
    assert queue.time_s == pytest.approx(n * steps / 7.1, rel=0.1)
    meetings = Counter(i for m in moments if m.kind == "meet" for i in (m.worker, m.other))
    assert meetings[3] > 0.8 * np.mean(list(meetings.values()))  # and it meets as often as others


@pytest.mark.parametrize("exchanges", [0.3, 1.0, 2.5])
def test_rounds_keep_to_their_rate_whatever_the_segments(exchanges):
    graph = nx.complete_graph(6)
    for cuts in ([0, 40], [0, 7, 8, 40]):
        queue, meetings = queue_of(graph, exchanges), 0
        for start, stop in itertools.pairwise(cuts):
            meetings += sum(m.kind == "meet" for m in queue.run(start, stop))
        assert meetings == 3 * rounds(240, 6, exchanges) == 3 * math.floor(40 * exchanges)


def test_an_exchange_waits_for_the_last_one_of_either_end():
    queue = queue_of(nx.cycle_graph(5), exchanges=3.0, link_s=5.0)
    busy = set()
    for moment in queue.run(0, 10):
        if moment.kind == "meet":
            assert not busy & {moment.worker, moment.other}
            busy |= {moment.worker, moment.other}
        elif moment.kind == "part":
            busy -= {moment.worker, moment.other}


def test_the_timeline_shows_who_computes_and_who_exchanges_behind():
    timeline = Timeline(steps=2)
    queue = EventQueue(
        Matchings(nx.path_graph(2), 0), 1.0, lambda i, m: 1.0 + i, lambda i, j: 0.5, timeline
    )
    queue.run(0, 3)
    seen = [(s.worker, s.kind, s.start_s, s.end_s, s.hidden) for s in timeline.slices]
    assert seen[:4] == [
        (0, "compute", 0.0, 1.0, False),
        (1, "compute", 0.0, 2.0, False),
        (0, "exchange", 0.0, 0.5, True),
        (1, "exchange", 0.0, 0.5, True),
    ]
    assert timeline.slices[2].facts == {"with worker": 1}
    assert max(s.step for s in timeline.slices) == 1


def test_the_queue_goes_on_from_a_checkpoint():
    graph, compute_s = nx.cycle_graph(5), [1.0, 1.1, 0.9, 3.0, 1.0]
    whole = queue_of(graph, compute_s=compute_s)
    first = whole.run(0, 6)
    state = whole.state()
    rest = whole.run(6, 9)
    resumed = queue_of(graph, compute_s=compute_s)
    resumed.restore(state)
    assert resumed.run(6, 9) == rest != first
    assert resumed.time_s == whole.time_s


# --- what workers make of it ---


def test_ad_psgd_by_hand():
    """A gradient is of where the model was when it began, and comes down on where it is now."""
    problem = OwnSteps(n=2)
    a, c = problem.a.numpy(), problem.c.numpy()
    start = np.array([[1.0, 2.0, 3.0], [-1.0, 0.0, 4.0]])
    problem.parameters.copy_(torch.from_numpy(start))
    replica = replica_of("ad_psgd", problem)
    moments = [
        Moment("start", 0, 0, 0.5),
        Moment("start", 1, 1, 1.0),
        Moment("meet", 0, 1, 1.0),
        Moment("finish", 0, 0, 1.0),
        Moment("part", 0, 1, 1.0),
        Moment("finish", 1, 1, 1.0),
    ]
    report = replica.run(segment(0, 1, moments))
    g = a * (start - c)
    expected = start.mean(0) - LR * g  # the mean of the two as they met, whatever came since
    np.testing.assert_allclose(replica.x, expected, rtol=1e-14)
    assert report.bytes_sent == 2 * D * 8
    np.testing.assert_allclose(report.loss, 0.5 * (a * (start - c) ** 2).sum(1), rtol=1e-14)


def test_a2cid2_by_hand():
    eta, alpha = 0.3, 0.7
    problem = OwnSteps(n=2)
    a, c = problem.a.numpy(), problem.c.numpy()
    start = np.array([[1.0, 2.0, 3.0], [-1.0, 0.0, 4.0]])
    problem.parameters.copy_(torch.from_numpy(start))
    replica = replica_of("a2cid2", problem)
    moments = [
        Moment("start", 0, 0, 0.5),
        Moment("start", 1, 1, 1.0),
        Moment("meet", 0, 1, 1.0),
        Moment("part", 0, 1, 1.5),
        Moment("finish", 0, 0, 2.0),
        Moment("finish", 1, 1, 2.25),
    ]
    replica.run(segment(0, 1, moments))

    def flow(x, y, t):
        keep = math.exp(-2 * eta * t)
        return (x + y) / 2 + keep * (x - y) / 2, (x + y) / 2 - keep * (x - y) / 2

    g = a * (start - c)
    for i, (j, finish) in enumerate([(1, 2.0), (0, 2.25)]):
        x, y = flow(start[i], start[i], 1.5)
        x, y = x + (start[j] - start[i]) / 2, y + alpha * (start[j] - start[i])
        x, y = flow(x, y, finish - 1.5)
        np.testing.assert_allclose(replica.x[i], x - LR * g[i], rtol=1e-13)
        np.testing.assert_allclose(replica.state["y"][i], y - LR * g[i], rtol=1e-13)


def test_a2cid2_takes_the_papers_options_unless_they_are_given():
    rule = A2CiD2(1.0).accelerated(chi1=2.0, chi2=0.5)
    assert (rule.eta, rule.alpha) == (0.5, 1.0)  # 1 / (2 sqrt(1)), sqrt(4) / 2
    rule = A2CiD2(1.0, eta=0.1, alpha=0.6).accelerated(chi1=2.0, chi2=0.5)
    assert (rule.eta, rule.alpha) == (0.1, 0.6)


def test_gradients_take_the_learning_rate_of_the_step_that_they_fall_to():
    """Two workers: gradients 0 and 1 are of step 0, 2 and 3 of step 1, whoever takes them."""
    problem = OwnSteps(n=2)
    problem.c.fill_(1.0)
    schedule = lr_schedule("step", {"milestones": [1], "gamma": 0.5}, 10)
    comm = StackedComm(2, None, torch.float64)
    make = optimizer("sgd", {"lr": LR})
    replica = StackedReplicas(problem, rule_of("ad_psgd"), comm, make, schedule)
    moments = [Moment(kind, 0, number, 1.0) for number in range(4) for kind in ("start", "finish")]
    report = replica.run(segment(0, 2, moments))
    a = problem.a[0].numpy()
    left = (1 - LR * a) ** 2 * (1 - LR / 2 * a) ** 2
    np.testing.assert_allclose(replica.x[0], 1 - left, rtol=1e-13)
    assert (report.lr, report.next_lr) == (LR / 2, LR / 2)


def test_the_clock_counts_global_averages_of_asynchronous_workers(quick):
    """Every sixth step all wait for all; otherwise the times are the queue's."""
    times = []
    for period in (6, 1000):
        schedule = {"name": "every", "period": period}
        result = decentral.run(
            quick,
            algorithm={"name": "ad_psgd", "schedule": schedule},
            network={"compute_ms": 2, "latency_ms": 7, "bandwidth_gbps": 1000},
            record={"every": 6},
        )
        times.append(result.metrics.sim_time_s.to_numpy())
    extra = times[0] - times[1]
    np.testing.assert_allclose(extra, 4 * 7e-3 * np.arange(1, 5), rtol=1e-3)  # four hops each


def test_a2cid2_without_its_momentum_is_ad_psgd():
    moments = queue_of(nx.cycle_graph(N), compute_s=[1, 1.3, 0.7, 2, 1]).run(0, 20)
    rule = rule_of("a2cid2", eta=1e-300, alpha=0.5)
    plain, still = replica_of("ad_psgd", OwnSteps()), replica_of("", OwnSteps(), rule=rule)
    for replica in (plain, still):
        replica.run(segment(0, 20, moments))
    np.testing.assert_allclose(plain.x, still.x, rtol=1e-13)


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_meetings_keep_the_mean_and_bring_the_workers_together(name):
    """No gradients (a is 0), models that differ: only exchanges act."""
    problem = OwnSteps()
    problem.a.zero_()
    generator = torch.Generator().manual_seed(2)
    problem.parameters.normal_(generator=generator)
    start = problem.parameters.clone()
    replica = replica_of(name, problem, rule=accelerated(name, nx.cycle_graph(N)))
    queue = queue_of(nx.cycle_graph(N), compute_s=[1, 1.3, 0.7, 2, 1])
    spread = [start.std(0).norm().item()]
    for step in range(0, 60, 20):
        replica.run(segment(step, step + 20, queue.run(step, step + 20)))
        np.testing.assert_allclose(replica.x.mean(0), start.mean(0), rtol=1e-12)
        spread.append(replica.x.std(0).norm().item())
    assert spread[1] < 0.1 * spread[0]
    assert spread[3] < 1e-3 * spread[0]


def test_continuous_momentum_brings_a_ring_together_faster():
    """What A2CiD2 is for: 32 workers on a ring, exchanges alone, the same meetings."""
    n, steps = 32, 120
    graph = nx.cycle_graph(n)
    chi = acceleration(Matchings(graph, 0).laplacian(1.0))
    assert chi[0] > 5 * chi[1]
    left = {}
    for name in ASYNCHRONOUS:
        problem = OwnSteps(n=n)
        problem.a.zero_()
        problem.parameters.normal_(generator=torch.Generator().manual_seed(2))
        replica = replica_of(name, problem, rule=accelerated(name, graph))
        replica.run(segment(0, steps, queue_of(graph).run(0, steps)))
        left[name] = replica.x.std(0).norm().item()
    assert left["a2cid2"] < 0.2 * left["ad_psgd"]


class Counting(OwnSteps):
    """Running statistics that rise by 1 with each gradient, from the worker's number."""

    def __init__(self):
        super().__init__()
        self.buffers = torch.arange(N, dtype=torch.float64).repeat(2, 1).T.contiguous()

    def of(self, rows, steps):
        self.buffers[list(rows)] += 1
        return super().of(rows, steps)


@pytest.mark.parametrize("average_buffers", [True, False])
def test_running_statistics_go_along_with_the_model_or_stay(average_buffers):
    comm = StackedComm(N, None, torch.float64)
    make = optimizer("sgd", {"lr": LR})
    replica = StackedReplicas(
        Counting(), rule_of("ad_psgd"), comm, make, None, average_buffers=average_buffers
    )
    moments = queue_of(nx.cycle_graph(N), compute_s=[1, 1.3, 0.7, 2, 1]).run(0, 30)
    report = replica.run(segment(0, 30, moments))
    meetings = sum(m.kind == "meet" for m in moments)
    assert report.bytes_sent == meetings * 2 * (D + 2 * average_buffers) * 8
    if average_buffers:
        # A meeting keeps their sum, and 30 gradients a worker have come.
        np.testing.assert_allclose(replica.buffers.mean(0), [32.0, 32.0], rtol=1e-13)
        assert replica.buffers.std(0).max() < 3
    else:
        counts = replica._finished.double() + torch.arange(N)
        np.testing.assert_array_equal(replica.buffers, counts[:, None].expand(N, 2))


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_asynchronous_methods_converge(name):
    """Workers that agree on the optimum reach it, whatever their speeds."""
    problem = OwnSteps()
    problem.c.copy_(problem.c[:1].expand(N, D))
    replica = replica_of(name, problem)
    queue = queue_of(nx.cycle_graph(N), compute_s=[1, 1.3, 0.7, 5, 1])
    replica.run(segment(0, 800, queue.run(0, 800)))
    np.testing.assert_allclose(replica.x, problem.c, rtol=1e-10)


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_one_worker_is_sgd(name):
    problem = OwnSteps(n=1)
    replica = replica_of(name, problem)
    replica.run(segment(0, 10, queue_of(nx.empty_graph(1)).run(0, 10)))
    decay = (1 - LR * problem.a[0]) ** 10
    np.testing.assert_allclose(replica.x[0], problem.c[0] * (1 - decay), rtol=1e-12)


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_a_global_average_ends_a_segment(name):
    replica = replica_of(name, OwnSteps())
    queue = queue_of(nx.cycle_graph(N))
    moments = queue.run(0, 4)
    before = replica_of(name, OwnSteps())
    before.run(segment(0, 4, moments))
    report = replica.run(segment(0, 4, moments, global_average=True, record=True))
    mean = before.x.mean(0)
    np.testing.assert_allclose(replica.x, mean.expand(N, D), rtol=1e-13)
    for key, value in replica.state.items():
        np.testing.assert_allclose(value, before.state[key].mean(0).expand_as(value), rtol=1e-13)
    assert report.deviation is not None
    deviation = (before.x - mean).square().sum(1)
    np.testing.assert_allclose(report.deviation, deviation, rtol=1e-10)


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_state_survives_a_checkpoint(name):
    make = optimizer("adam", {"lr": 0.05})
    queue = queue_of(nx.cycle_graph(N), compute_s=[1, 1.3, 0.7, 2, 1])
    first, second = queue.run(0, 5), queue.run(5, 9)
    whole = replica_of(name, OwnSteps(), make)
    whole.run(segment(0, 5, first))
    resumed = replica_of(name, OwnSteps(), make)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for replica in (whole, resumed):
        replica.run(segment(5, 9, second))
    np.testing.assert_allclose(resumed.x, whole.x, rtol=1e-13)
    assert resumed.comm.bytes_sent == whole.comm.bytes_sent


def test_each_gradient_takes_the_learning_rate_of_its_step():
    make = optimizer("sgd", {"lr": 0.1, "momentum": 0.9})
    schedule = lr_schedule("step", {"milestones": [2, 4], "gamma": 0.1}, 10)
    settings = Settings(make, schedule)
    np.testing.assert_allclose([settings.lr(k) for k in (5, 0, 2, 3)], [0.001, 0.1, 0.01, 0.01])
    one_cycle = lr_schedule("one_cycle", {"max_lr": 1.0, "total_steps": 10}, 10)
    settings = Settings(make, one_cycle)
    assert settings.at(9)[0]["momentum"] != settings.at(3)[0]["momentum"]  # it cycles that too


# --- one worker by itself ---

GRAPH = nx.cycle_graph(4)


def run_on_peer(rank, name):
    import torch.distributed as dist

    from decentral.asynchronous_peer import PeerReplica
    from decentral.peer import PeerComm

    problem = OwnSteps(n=4)

    class Own:
        """Worker `rank`'s part of the quadratic."""

        def __init__(self):
            self.parameters = problem.parameters[rank].clone()
            self.buffers = torch.full((2,), float(rank), dtype=torch.float64)
            self.counters = {}
            self.value = torch.zeros(D, dtype=torch.float64)

        def of(self, rows, steps):
            difference = self.parameters - problem.c[rank]
            torch.mul(problem.a[rank], difference, out=self.value)
            return (0.5 * (problem.a[rank] * difference**2).sum()).unsqueeze(0)

    topology = topologies.build(4, "ring")
    replica = PeerReplica(
        Own(),
        rule_of(name),
        PeerComm(Mixing(topology)),
        optimizer("sgd", {"lr": LR}),
        None,
        matchings=Matchings(GRAPH, 0),
        store=dist.distributed_c10d._get_default_store(),
    )
    first = replica.run(segment(0, 30))
    means = [replica.comm.mean(v, 0, counted=False) for v in (replica.x, replica.buffers)]
    second = replica.run(segment(30, 400))
    done = int(replica._finished)
    return replica.x.numpy(), [m.numpy() for m in means], first, second, done


@pytest.mark.slow
@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_peers_share_out_the_gradients_and_send_what_the_simulator_sends(name):
    seen = run_on_ranks(4, run_on_peer, name)
    assert sum(done for *_, done in seen) == 4 * 400
    np.testing.assert_allclose(seen[0][1][1], [1.5, 1.5], rtol=1e-12)  # buffers: mean of ranks
    matchings = Matchings(GRAPH, 0)
    for stop, place in ((30, 2), (400, 3)):
        met = [matchings.partners(turn) for turn in range(rounds(4 * stop, 4, 1.0))]
        for rank in range(4):
            meetings = sum(partner[rank] != rank for partner in met)
            assert seen[rank][place].bytes_sent == meetings * (D + 2) * 8
    problem = OwnSteps(n=4)
    optimum = ((problem.a * problem.c).sum(0) / problem.a.sum(0)).numpy()
    near = np.mean([x for x, *_ in seen], axis=0) - optimum
    assert np.abs(near).max() < 0.5 * np.abs(optimum - problem.c.numpy()).max()
