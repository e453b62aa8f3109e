"""One contract for every method of the table, and a closed form that tells each from its twins."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import D, N, Quadratic, replica_of, ring, run
from test_cli import call

from decentral import topology as topologies
from decentral.algorithms import COMPRESSORS, OUTER, PRESETS, describe
from decentral.algorithms.compression import BFloat16, Int8
from decentral.algorithms.schedules import (
    ConsensusControl,
    Every,
    Hierarchical,
    Never,
    PostLocal,
    QuadraticRule,
)
from decentral.asynchronous import AsynchronousRule
from decentral.draws import hash64
from decentral.replica import Averaging, Segment

# Every preset with options at which it has no momentum of its own, so that its limits are SGD's.
BARE = {
    "parallel_sgd": {},
    "local_sgd": {"period": 3},
    "post_local_sgd": {"period": 3, "start": 2},
    "qsr": {"base_period": 3, "alpha": 0.1},
    "hierarchical_sgd": {"period": 6, "group_period": 2, "groups": 2},
    "slowmo": {"period": 3, "beta": 0.0, "alpha": 1.0},
    "diloco": {"period": 3, "lr": 1.0, "momentum": 0.0},
    "gossip_sgd": {},
    "gossip_pga": {"period": 3},
    "gossip_aga": {},
    "consensus_control": {},
    "gossip_cta": {},
    "gradient_tracking": {},
    "gt_pga": {"period": 3},
    "d2": {},
    "qg_dsgdm": {"beta": 0.0},
    "decentlam": {"beta": 0.0},
    "sgp": {},
    "relay_sgd": {},
    "noloco": {"period": 1, "lr": 1.0, "momentum": 0.0},
    "choco_sgd": {"compression": {"name": "none"}, "consensus_step": 1.0},
}
# These follow no gradient, so what the contract says of gradients does not concern them: limits
# that are SGD, and the mean that moves by the mean gradient. See test_gradient_free.py.
GRADIENT_FREE = {"zo_sgd": {"directions": 2}, "cbo": {}}
ALL = BARE | GRADIENT_FREE
ASYNCHRONOUS = ("ad_psgd", "a2cid2")  # which have no steps in common: see test_asynchronous.py
PLAIN_SGD = ("qg_dsgdm", "decentlam", "cbo")
LOCAL = (
    "parallel_sgd",
    "local_sgd",
    "post_local_sgd",
    "qsr",
    "hierarchical_sgd",
    "slowmo",
    "diloco",
)
DELAYED = ("relay_sgd",)  # news comes late, so the mean moves late; and it takes trees alone
# The last gradient of combine-then-adapt is not averaged, so its replicas differ even under J.
AVERAGED_LAST = [name for name in BARE if name != "gossip_cta"]


def bare(name):
    return PRESETS[name](**ALL[name])


def parallel(steps):
    return run(PRESETS["parallel_sgd"](), Quadratic(), steps).x


def test_the_contract_covers_every_method():
    assert [*ALL, *ASYNCHRONOUS] == list(PRESETS)


@pytest.mark.parametrize("name", BARE)
def test_one_worker_is_sgd(name):
    problem = Quadratic(n=1)
    replica = run(bare(name), problem, 10, topologies.build(1, "ring"))
    decay = (1 - 0.1 * problem.a[0]) ** 10
    np.testing.assert_allclose(replica.x[0], problem.c[0] * (1 - decay), rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in AVERAGED_LAST if name not in LOCAL + DELAYED])
def test_on_the_complete_graph_it_is_parallel_sgd(name):
    replica = run(bare(name), Quadratic(), 10, topologies.build(N, "complete"))
    np.testing.assert_allclose(replica.x, parallel(10), rtol=1e-11)


@pytest.mark.parametrize("name", AVERAGED_LAST)
def test_with_a_global_average_at_every_step_it_is_parallel_sgd(name):
    algorithm = bare(name)
    if name != "parallel_sgd":
        algorithm = replace(algorithm, schedule=Every(1))
    replica = run(algorithm, Quadratic(), 10, ring())
    np.testing.assert_allclose(replica.x, parallel(10), rtol=1e-11)


@pytest.mark.parametrize("name", [name for name in BARE if name not in DELAYED])
def test_the_mean_moves_by_the_mean_gradient(name):
    """Whatever the mixing, which is doubly stochastic here: the mean of x follows -lr mean(g)."""
    algorithm, problem = bare(name), Quadratic()
    replica = replica_of(algorithm, problem, topologies.build(N, "star"))
    for step in range(7):
        before = replica.x.mean(0)
        everyone = algorithm.schedule.next_average(step) == step
        replica.run(Segment(step, step + 1, algorithm.between, everyone, False))
        moved = replica.x.mean(0) - before
        np.testing.assert_allclose(moved, -0.1 * problem.value.mean(0), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ALL)
def test_state_survives_a_checkpoint(name):
    """Four steps, saved, loaded into a fresh replica, three more: as seven at once."""
    optimizer = "sgd" if name in PLAIN_SGD else "adam"
    options = ALL[name] if name not in PLAIN_SGD else {}
    whole = run(PRESETS[name](**options), Quadratic(), 7, ring(), name=optimizer)
    first_algorithm = PRESETS[name](**options)
    first = run(first_algorithm, Quadratic(), 4, ring(), name=optimizer)
    algorithm = PRESETS[name](**options)
    algorithm.schedule.state.update(first_algorithm.schedule.state)
    second = replica_of(algorithm, Quadratic(), ring(), name=optimizer)
    second.load_state_dict(first.state_dict())
    for step in range(4, 7):
        everyone = algorithm.schedule.next_average(step) == step
        second.run(Segment(step, step + 1, algorithm.between, everyone, False))
        if everyone:
            algorithm.schedule.observe(step, 1.0, second.lr)
    np.testing.assert_allclose(second.x, whole.x, rtol=1e-12)
    assert second.comm.bytes_sent == whole.comm.bytes_sent


def floats(state):
    return sum(tensor.numel() for tensor in state.values())


@pytest.mark.parametrize("name", PRESETS)
def test_a_method_holds_what_its_row_says(name):
    path = topologies.build(N, "path")
    if name in ALL:
        held = floats(run(bare(name), Quadratic(), 4, path).state)
    else:
        x, rule = Quadratic().parameters, PRESETS[name]().rule
        assert isinstance(rule, AsynchronousRule)
        held = x.numel() + floats(rule.state(x))  # and where gradients are taken, a copy of x
    counts = {
        "nothing": 0,
        "1": N,
        "D": N * D,
        "2 D": 2 * N * D,
        "2 D + 1": N * (2 * D + 1),
        "D + 1 for each neighbour": 2 * (N - 1) * (D + 1),
    }
    (row,) = [row for row in describe() if row["name"] == name]
    assert held == counts[row["holds"]]


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_says_what_a_method_is(name):
    rule = bare(name).rule if name in ALL else PRESETS[name]().rule
    assert rule.equation
    assert "20" in rule.source  # a year
    assert rule.sends
    assert PRESETS[name].__doc__


@pytest.mark.parametrize("name", ALL)
def test_recording_changes_nothing_and_sends_nothing_that_counts(name):
    algorithm, replicas = bare(name), []
    for record in (False, True):
        replica = replica_of(algorithm, Quadratic(), ring())
        for step in range(4):
            replica.run(Segment(step, step + 1, algorithm.between, step == 2, record))
        replicas.append(replica)
    np.testing.assert_allclose(replicas[0].x, replicas[1].x, rtol=1e-14)
    assert replicas[0].comm.bytes_sent == replicas[1].comm.bytes_sent


@pytest.mark.parametrize("name", ALL)
def test_buffers_are_averaged_with_the_model_or_never_sent(name):
    start = torch.randn(N, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ran = {}
    for average in (True, False, None):
        problem = Quadratic()
        if average is not None:
            problem.buffers = start.clone()
        ran[average] = run(bare(name), problem, 7, ring(), average_buffers=average)
    assert torch.equal(ran[False].buffers, start)
    assert ran[False].comm.bytes_sent == ran[None].comm.bytes_sent < ran[True].comm.bytes_sent
    np.testing.assert_allclose(ran[True].buffers.mean(0), start.mean(0), rtol=1e-12)
    assert (ran[True].buffers - start.mean(0)).norm() < (start - start.mean(0)).norm()
    assert torch.equal(ran[False].x, ran[True].x)


# --- closed forms ---


def optimum(problem):
    return (problem.a * problem.c).sum(0) / problem.a.sum(0)


@pytest.mark.parametrize("topology", ["ring", "star"])
@pytest.mark.parametrize("name", ["gradient_tracking", "d2"])
def test_it_reaches_the_optimum_with_a_constant_step_where_gossip_does_not(name, topology):
    graph = topologies.build(N, topology)
    problem = Quadratic()
    replica = run(bare(name), problem, 3000, graph)
    np.testing.assert_allclose(replica.x, optimum(problem).expand(N, D), rtol=1e-10)
    gossip = run(bare("gossip_sgd"), Quadratic(), 3000, graph)
    assert (gossip.x - optimum(problem)).abs().max() > 1e-2


def test_combine_then_adapt_stops_at_its_own_fixed_point():
    problem = Quadratic()
    replica = run(bare("gossip_cta"), problem, 3000, ring())
    w, a, c = ring().matrix(0).toarray(), problem.a.numpy(), problem.c.numpy()
    for d in range(D):
        fixed = np.linalg.solve(np.eye(N) - w + 0.1 * np.diag(a[:, d]), 0.1 * a[:, d] * c[:, d])
        np.testing.assert_allclose(replica.x[:, d], fixed, rtol=1e-10)


def by_hand(problem, steps, step):
    """`step(k, x, g, state)` -> x, from x = 0, in numpy."""
    a, c, x, state = problem.a.numpy(), problem.c.numpy(), np.zeros((N, D)), {}
    for k in range(steps):
        x = step(k, x, a * (x - c), state)
    return x


W, LR = ring().matrix(0).toarray(), 0.1


def test_gradient_tracking_with_a_period_by_hand():
    def step(k, x, g, state):
        mixing = np.full((N, N), 1 / N) if (k + 1) % 3 == 0 else W
        y = g if k == 0 else state["mixed"] + g - state["g"]
        state.update(mixed=mixing @ y, g=g)
        return mixing @ (x - LR * y)

    problem = Quadratic()
    replica = run(PRESETS["gt_pga"](period=3), problem, 8, ring())
    np.testing.assert_allclose(replica.x, by_hand(problem, 8, step), rtol=1e-12)


def test_d2_by_hand():
    def step(k, x, g, state):
        new = W @ (x - LR * g) if k == 0 else W @ (2 * x - state["x"] - LR * (g - state["g"]))
        state.update(x=x, g=g)
        return new

    problem = Quadratic()
    replica = run(PRESETS["d2"](), problem, 8, ring())
    np.testing.assert_allclose(replica.x, by_hand(problem, 8, step), rtol=1e-12)


def test_quasi_global_momentum_by_hand():
    def step(k, x, g, state):
        m = state.get("m", 0)
        new = W @ (x - LR * (0.8 * m + g))
        state["m"] = 0.7 * m + 0.3 * (x - new) / LR
        return new

    problem = Quadratic()
    replica = run(PRESETS["qg_dsgdm"](beta=0.8, mu=0.7), problem, 8, ring())
    np.testing.assert_allclose(replica.x, by_hand(problem, 8, step), rtol=1e-12)


def test_decentlam_by_hand():
    def step(k, x, g, state):
        state["m"] = 0.8 * state.get("m", 0) + (x - W @ (x - LR * g)) / LR
        return x - LR * state["m"]

    problem = Quadratic()
    replica = run(PRESETS["decentlam"](beta=0.8), problem, 8, ring())
    np.testing.assert_allclose(replica.x, by_hand(problem, 8, step), rtol=1e-12)


def local_steps(problem, x, steps):
    a, c = problem.a.numpy(), problem.c.numpy()
    for _ in range(steps):
        x = x - LR * a * (x - c)
    return x


def test_slowmo_by_hand():
    problem, old, u = Quadratic(), np.zeros((N, D)), 0
    for _ in range(3):
        mean = local_steps(problem, old, 4).mean(0)
        u = 0.6 * u + (old - mean) / LR
        old = old - 0.9 * LR * u
    replica = run(PRESETS["slowmo"](period=4, beta=0.6, alpha=0.9), problem, 12)
    np.testing.assert_allclose(replica.x, old, rtol=1e-12)


def test_diloco_is_torchs_nesterov_on_the_outer_gradient():
    problem = Quadratic()
    x = torch.zeros(D, dtype=torch.float64)
    outer = torch.optim.SGD([x], lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(3):
        x.grad = x - torch.from_numpy(local_steps(problem, x.expand(N, D).numpy(), 4)).mean(0)
        outer.step()
    replica = run(PRESETS["diloco"](period=4), problem, 12)
    np.testing.assert_allclose(replica.x, x.expand(N, D), rtol=1e-12)


@pytest.mark.parametrize("name", ["slowmo", "diloco"])
def test_a_plain_outer_step_is_local_sgd(name):
    local = run(bare("local_sgd"), Quadratic(), 10)
    np.testing.assert_allclose(run(bare(name), Quadratic(), 10).x, local.x, rtol=1e-12)


def directed():
    """0 -> 1, 2, 3; 1 -> 2; 2 -> 0; 3 -> 0: strongly connected, not regular."""
    import networkx as nx

    graph = nx.DiGraph([(0, 1), (0, 2), (0, 3), (1, 2), (2, 0), (3, 0), (4, 0), (3, 4)])
    graph = nx.relabel_nodes(graph, dict(zip(sorted(graph), range(N), strict=True)))
    return {
        rule: topologies.Topology("d", (graph,), (topologies.WEIGHTS[rule](graph),), rule)
        for rule in ("push", "uniform")
    }


def test_push_sum_averages_rightly_where_plain_mixing_is_wrong():
    """With no gradient: push-sum finds the mean, row-stochastic mixing the mean weighted by W's
    left Perron vector."""
    start = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    graphs = directed()
    problem = Quadratic()
    problem.a.zero_()
    problem.parameters.copy_(start)
    pushed = run(PRESETS["sgp"](), problem, 400, graphs["push"])
    np.testing.assert_allclose(pushed.x, start.mean(0).expand(N, D), rtol=1e-10)

    mixing = graphs["uniform"].matrix(0).toarray()
    values, vectors = np.linalg.eig(mixing.T)
    perron = np.real(vectors[:, np.argmax(np.real(values))])
    perron /= perron.sum()
    problem.parameters.copy_(start)
    plain = run(PRESETS["gossip_sgd"](), problem, 400, graphs["uniform"])
    np.testing.assert_allclose(plain.x, np.tile(perron @ start.numpy(), (N, 1)), rtol=1e-10)
    assert (plain.x - start.mean(0)).abs().max() > 0.1


def test_push_sum_by_hand():
    graph = directed()["push"]
    problem, p = Quadratic(), graph.matrix(0).toarray()
    a, c = problem.a.numpy(), problem.c.numpy()
    x, w, z = np.zeros((N, D)), np.ones((N, 1)), np.zeros((N, D))
    for _ in range(6):
        x = p @ (x - LR * a * (z - c))
        w = p @ w
        z = x / w
    replica = run(PRESETS["sgp"](), problem, 6, graph)
    np.testing.assert_allclose(replica.x, z, rtol=1e-12)


def test_choco_without_compression_is_gossip():
    gossip = run(bare("gossip_pga"), Quadratic(), 10, ring())
    choco = replace(bare("choco_sgd"), schedule=Every(3))
    np.testing.assert_allclose(run(choco, Quadratic(), 10, ring()).x, gossip.x, rtol=1e-12)


def test_choco_by_hand_with_top_k():
    def top1(v):
        q = np.zeros_like(v)
        rows, places = np.arange(N), np.abs(v).argmax(1)
        q[rows, places] = v[rows, places]
        return q

    def step(k, x, g, state):
        public = state.get("public", np.zeros((N, D)))
        half = x - LR * g
        public = state["public"] = public + top1(half - public)
        return half + 0.4 * (W @ public - public)

    problem = Quadratic()
    algorithm = PRESETS["choco_sgd"](
        compression={"name": "top_k", "fraction": 0.3}, consensus_step=0.4
    )
    replica = run(algorithm, problem, 9, ring())
    np.testing.assert_allclose(replica.x, by_hand(problem, 9, step), rtol=1e-12)
    assert replica.comm.bytes_sent == 9 * N * 2 * (8 + 4)  # a float64 and where it goes


def relayed(problem, steps, distance):
    """RelaySGD by what it comes to: at distance d, the model of d-1 steps ago, or one's own."""
    a, c, n = problem.a.numpy(), problem.c.numpy(), len(distance)
    x, halves = np.zeros((n, D)), []
    for k in range(steps):
        halves.append(x - LR * a * (x - c))
        x = np.zeros((n, D))
        for i in range(n):
            for j in range(n):
                late = max(0, distance[i][j] - 1)
                x[i] += (halves[k - late][j] if late <= k else halves[k][i]) / n
    return x


@pytest.mark.parametrize("name", ["path", "star"])
def test_relay_averages_each_model_once_as_late_as_it_is_far(name):
    import networkx as nx

    tree = topologies.build(N, name)
    distance = nx.floyd_warshall_numpy(tree.graphs[0]).astype(int)
    problem = Quadratic()
    replica = run(PRESETS["relay_sgd"](), problem, 9, tree)
    np.testing.assert_allclose(replica.x, relayed(problem, 9, distance), rtol=1e-12)
    assert replica.comm.bytes_sent == 9 * 2 * (N - 1) * (D + 1) * 8


def test_relay_sums_a_tree_exactly_once_news_has_crossed_it():
    """Models that stand still: after diameter - 1 further steps each has the mean of all."""
    problem = Quadratic()
    problem.a.zero_()
    start = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    problem.parameters.copy_(start)
    replica = replica_of(PRESETS["relay_sgd"](), problem, topologies.build(N, "path"))
    for step in range(4):
        problem.parameters.copy_(start)
        replica.run(Segment(step, step + 1, Averaging.NEIGHBOURS, False, False))
        exact = (replica.x - start.mean(0)).abs().max() < 1e-15
        assert exact == (step == 3)


def test_relay_starts_anew_after_a_global_average():
    problem = Quadratic()
    replica = replica_of(PRESETS["relay_sgd"](), problem, topologies.build(N, "path"))
    replica.run(Segment(0, 3, Averaging.NEIGHBOURS, True, False))
    assert replica.x.std(0).max() < 1e-15
    after = Quadratic()
    after.parameters.copy_(problem.parameters)
    fresh = replica_of(PRESETS["relay_sgd"](), after, topologies.build(N, "path"))
    replica.run(Segment(3, 7, Averaging.NEIGHBOURS, False, False))
    fresh.run(Segment(0, 4, Averaging.NEIGHBOURS, False, False))
    np.testing.assert_allclose(replica.x, fresh.x, rtol=1e-13)


def test_noloco_by_hand():
    pairs = matching()
    problem, slow, m, x = Quadratic(), np.zeros((N, D)), 0, np.zeros((N, D))
    for turn in range(4):
        w = pairs.matrix(turn).toarray()
        x = local_steps(problem, x, 3)
        m = 0.6 * m + 0.8 * (w @ (x - slow)) + 0.8 * (w @ slow - slow)
        slow = slow + m
        x = slow
    replica = run(PRESETS["noloco"](period=3, lr=0.8, momentum=0.6), problem, 12, pairs)
    np.testing.assert_allclose(replica.x, x, rtol=1e-12)
    assert replica.comm.bytes_sent == 4 * 4 * 2 * D * 8  # four turns, two pairs, two floats each


def matching():
    """Two turns: (0, 1) and (2, 3), then (1, 2) and (3, 4)."""
    import networkx as nx

    graphs = []
    for edges in ([(0, 1), (2, 3)], [(1, 2), (3, 4)]):
        graph = nx.empty_graph(N)
        graph.add_edges_from(edges)
        graphs.append(graph)
    weigh = topologies.WEIGHTS["metropolis"]
    return topologies.Topology("m", tuple(graphs), tuple(map(weigh, graphs)), "metropolis")


def test_gossip_at_every_fourth_step_takes_the_topology_turn_by_turn():
    pairs, x = matching(), np.zeros((N, D))
    for turn in range(3):
        x = pairs.matrix(turn).toarray() @ local_steps(Quadratic(), x, 4)
    x = local_steps(Quadratic(), x, 2)
    algorithm = replace(PRESETS["gossip_sgd"](), gossip_period=4)
    replica = run(algorithm, Quadratic(), 14, pairs)
    np.testing.assert_allclose(replica.x, x, rtol=1e-12)


def test_hierarchical_by_hand():
    groups = np.zeros((N, N))
    groups[:3, :3], groups[3:, 3:] = 1 / 3, 1 / 2  # five workers in two groups
    x = np.zeros((N, D))
    for k in range(13):
        x = local_steps(Quadratic(), x, 1)
        if (k + 1) % 6 == 0:
            x = np.full((N, N), 1 / N) @ x
        elif (k + 1) % 2 == 0:
            x = groups @ x
    algorithm = PRESETS["hierarchical_sgd"](period=6, group_period=2, groups=2)
    replica = run(algorithm, Quadratic(), 13)
    np.testing.assert_allclose(replica.x, x, rtol=1e-12)
    # Two all-reduces of everyone, four of each group: 2 (k-1) messages' worth each.
    assert replica.comm.bytes_sent == (2 * 8 + 4 * (4 + 2)) * D * 8


def test_hierarchical_with_one_group_is_local_sgd():
    algorithm = PRESETS["hierarchical_sgd"](period=12, group_period=3, groups=1)
    local = run(PRESETS["local_sgd"](period=3), Quadratic(), 10)
    np.testing.assert_allclose(run(algorithm, Quadratic(), 10).x, local.x, rtol=1e-13)


def test_groups_may_gossip_in_between():
    mixing, groups, x = ring().matrix(0).toarray(), np.zeros((N, N)), np.zeros((N, D))
    groups[:3, :3], groups[3:, 3:] = 1 / 3, 1 / 2
    for k in range(7):
        x = (groups if (k + 1) % 3 == 0 else mixing) @ local_steps(Quadratic(), x, 1)
    schedule = Hierarchical(period=100, group_period=3, groups=2)
    replica = run(replace(PRESETS["gossip_sgd"](), schedule=schedule), Quadratic(), 7, ring())
    np.testing.assert_allclose(replica.x, x, rtol=1e-12)


def test_consensus_control_averages_when_the_distance_passes_its_fraction():
    schedule = ConsensusControl(fraction=2.0, every=3)
    assert [schedule.next_watch(k) for k in (0, 2, 3)] == [2, 2, 5]
    assert schedule.next_average(0) is None
    schedule.watch(2, consensus_distance=0.39, gradient_norm=2.0, lr=0.1)  # 2 x 0.1 x 2 = 0.4
    assert schedule.next_average(3) is None
    schedule.watch(5, consensus_distance=0.31, gradient_norm=0.0, lr=0.1)  # phi = 1.5: 0.3
    assert schedule.state["gradient_norm"] == 1.5
    assert schedule.next_average(6) == 6
    assert schedule.next_average(7) is None


def test_what_mixing_moved_tells_the_consensus_distance():
    """Exactly on the complete graph, in expectation elsewhere: 4,000 draws, standard error 1%."""
    x = torch.randn(N, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    distance = (x - x.mean(0)).square().sum(1).mean().sqrt()
    for name, tolerance in (("complete", 1e-12), ("ring", 0.02), ("star", 0.02)):
        topology = topologies.build(N, name)
        mixed = torch.from_numpy(topology.matrix(0).toarray()) @ x
        moved = (mixed - x).square().sum(1).mean().sqrt()
        np.testing.assert_allclose(moved * topology.disagreement(0), distance, rtol=tolerance)


def test_a_watched_segment_reports_what_moved_and_the_gradient():
    problem = Quadratic()
    replica = replica_of(PRESETS["gossip_sgd"](), problem, ring())
    replica.run(Segment(0, 4, Averaging.NEIGHBOURS, False, False))
    x = replica.x.numpy().copy()
    report = replica.run(Segment(4, 5, Averaging.NEIGHBOURS, False, False, watch=True))
    half = local_steps(problem, x, 1)
    moved = ((W @ half - half) ** 2).sum(1)
    assert report.moved is not None
    assert report.gradient_square is not None
    np.testing.assert_allclose(report.moved, moved, rtol=1e-9)
    gradient = problem.a.numpy() * (x - problem.c.numpy())
    np.testing.assert_allclose(report.gradient_square, (gradient**2).sum(1), rtol=1e-12)
    silent = replica.run(Segment(5, 6, Averaging.NEIGHBOURS, False, False))
    assert silent.moved is None
    assert silent.gradient_square is None


def test_post_local_starts_when_told_or_when_the_learning_rate_first_decays():
    told = PostLocal(period=4, start=6)
    told.observe(-1, 0.0, 0.1)
    averages = []
    for k in range(16):
        if told.next_average(k) == k:
            averages.append(k)
            told.observe(k, 1.0, 0.1)
    assert averages == [0, 1, 2, 3, 4, 5, 7, 11, 15]
    decayed = PostLocal(period=4)
    decayed.observe(-1, 0.0, 0.1)
    decayed.observe(0, 1.0, 0.1)
    assert decayed.next_average(1) == 1
    decayed.observe(1, 1.0, 0.01)
    assert decayed.next_average(2) == 3


def test_qsr_sets_the_period_from_the_next_learning_rate():
    schedule = QuadraticRule(base_period=4, alpha=0.2, warmup=3)
    schedule.observe(-1, 0.0, 0.01)
    assert schedule.next_average(0) == 3  # warming up: H_base
    schedule.observe(3, 1.0, 0.05)
    assert schedule.period == 16  # (0.2 / 0.05)^2
    assert schedule.next_average(4) == 19
    schedule.observe(19, 1.0, 0.15)
    assert schedule.period == 4  # floor((0.2 / 0.15)^2) = 1 < H_base


# --- what goes over the wire ---

OPTIONS = {"top_k": {"fraction": 0.1}, "random_k": {"fraction": 0.1}}
BYTES = {"none": 800, "bfloat16": 200, "int8": 104, "sign": 17, "top_k": 120, "random_k": 88}


@pytest.mark.parametrize("name", COMPRESSORS)
def test_compressors_keep_their_contraction_and_their_bytes(name):
    compressor = COMPRESSORS[name](**OPTIONS.get(name, {}))
    x = torch.randn(2000, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    message = compressor.encode(x, hash64(torch.arange(2000)))
    assert message.dtype == torch.uint8
    assert message.shape == (2000, BYTES[name])
    decoded = compressor.decode(message, x)
    assert decoded.dtype == x.dtype
    error = ((x - decoded) ** 2).sum(1) / (x**2).sum(1)
    delta = compressor.contraction(100)
    # Random-k holds its bound in expectation: 2,000 rows, standard error 0.001.
    assert error.mean() <= 1 - delta + (0.004 if name == "random_k" else 1e-12)
    if name != "random_k":
        assert error.max() <= 1 - delta + 1e-12
    one = compressor.decode(compressor.encode(x[7], hash64(torch.tensor(7))), x[7])
    assert torch.equal(one, decoded[7])  # a worker by itself as among others


@pytest.mark.parametrize("name", COMPRESSORS)
def test_compressors_take_zeros(name):
    compressor = COMPRESSORS[name](**OPTIONS.get(name, {}))
    x = torch.zeros(3, 50)
    assert torch.equal(compressor.decode(compressor.encode(x, torch.arange(3)), x), x)


def test_int8_has_a_scale_for_each_block_of_1024():
    """The largest of each block are kept, and no element is off by more than half its level."""
    x = torch.randn(3, 2500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x *= torch.cat([torch.full((1024,), 1e-6), torch.full((1024,), 1.0), torch.full((452,), 1e3)])
    message = Int8().encode(x, torch.arange(3))
    assert message.shape == (3, 2500 + 4 * 3)
    decoded = Int8().decode(message, x)
    for block, was in zip(decoded.split(1024, 1), x.split(1024, 1), strict=True):
        largest = was.abs().amax(1, keepdim=True)
        assert ((block - was).abs() <= largest / 254 * (1 + 1e-6)).all()
        torch.testing.assert_close(block.abs().amax(1, keepdim=True), largest, rtol=1e-7, atol=0)
    one = Int8().decode(Int8().encode(x[2], torch.tensor(2)), x[2])
    assert torch.equal(one, decoded[2])


def test_top_k_keeps_the_largest_and_sign_the_scaled_signs():
    x = torch.tensor([[1.0, -5.0, 2.0, 4.0]])
    top = COMPRESSORS["top_k"](fraction=0.5)
    assert top.decode(top.encode(x, torch.zeros(1)), x).tolist() == [[0, -5, 0, 4]]
    sign = COMPRESSORS["sign"]()
    assert sign.decode(sign.encode(x, torch.zeros(1)), x).tolist() == [[3, -3, 3, 3]]


@pytest.mark.parametrize(("wire", "bytes_each"), [(BFloat16(), 6), (Int8(), 7)])
def test_a_wire_format_keeps_the_mean_and_sends_fewer_bytes(wire, bytes_each):
    problem = Quadratic()
    replica = replica_of(replace(PRESETS["gossip_sgd"](), wire=wire), problem, ring())
    for step in range(30):
        before = replica.x.mean(0)
        replica.run(Segment(step, step + 1, Averaging.NEIGHBOURS, False, False))
        expected = before - 0.1 * problem.value.mean(0)
        np.testing.assert_allclose(replica.x.mean(0), expected, atol=1e-14)
    assert replica.comm.bytes_sent == 30 * N * 2 * bytes_each
    exact = run(PRESETS["gossip_sgd"](), Quadratic(), 30, ring())
    assert 0 < (replica.x - exact.x).abs().max() < 0.02  # rounded, and not far off


def test_tables_of_parts_are_complete():
    assert isinstance(PRESETS["gossip_sgd"]().schedule, Never)
    assert set(OUTER) == {"slowmo", "diloco"}


def test_the_page_of_methods_is_the_table(capsys):
    page = call(capsys, "methods", "--markdown")
    assert page == (Path(__file__).parents[1] / "docs/methods.md").read_text()
    assert all(f"## {name}\n" in page for name in PRESETS)
