"""Scripted faults: what they do to W, the clock and the members, and that both engines agree."""

import time
from types import SimpleNamespace

import harness
import networkx as nx
import numpy as np
import pandas
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_on_ranks
from pydantic import TypeAdapter

import decentral
from decentral import UserError, gradients
from decentral import topology as topologies
from decentral.algorithms import PRESETS
from decentral.clock import Clock
from decentral.comm import Event, StackedComm
from decentral.config import Fault, dump, load
from decentral.experiment import build
from decentral.faults import Changes, Faults
from decentral.gradients import FlatModel, ModuleGradient
from decentral.mixing import Mixing
from decentral.peer import PeerComm
from decentral.progress import Watcher
from decentral.topology import GENERATORS, WEIGHTS, Topology

SIZES = [1, 2, 3, 5, 7, 8, 16]
MANY = 20_000


def faults(*script, workers=8, seed=0):
    return Faults([TypeAdapter(Fault).validate_python(fault) for fault in script], seed, workers)


def lose(probability, of="exchanges", **window):
    return {"kind": "lose", "probability": probability, "of": of, **window}


def cut(*link, **window):
    return {"kind": "cut", "link": list(link), **window}


def delay(probability, steps, **window):
    return {"kind": "delay", "probability": probability, "steps": steps, **window}


def churn(leave, back, **window):
    return {"kind": "churn", "leave": leave, "return": back, **window}


def kill(worker, step):
    return {"kind": "kill", "worker": worker, "step": step}


def join(worker, step):
    return {"kind": "join", "worker": worker, "step": step}


def lost(script, step, senders, receivers):
    return script.of_messages(senders, receivers).lost(step)


def of(graph, weights):
    return Topology("by hand", (graph,), (WEIGHTS[weights](graph),), weights)


def dense(mixing, step):
    return mixing.matrix(step).toarray()


# What is drawn.


def test_an_exchange_is_lost_both_ways_and_a_message_one_way():
    low, high = np.zeros(MANY, dtype=np.int64), np.arange(1, MANY + 1)
    both = faults(lose(0.3), workers=MANY + 1)
    there, back = lost(both, 5, low, high), lost(both, 5, high, low)
    np.testing.assert_array_equal(there, back)
    each = faults(lose(0.3, "messages"), workers=MANY + 1)
    there, back = lost(each, 5, low, high), lost(each, 5, high, low)
    # Standard deviation sqrt(p (1-p) / 20,000), four of them.
    assert there.mean() == pytest.approx(0.3, abs=0.013)
    assert (there & back).mean() == pytest.approx(0.09, abs=0.0081)


def test_draws_are_of_the_seed_the_step_and_the_link_alone():
    senders, receivers = np.divmod(np.arange(64), 8)

    loses = lose(0.4, "messages")

    def drawn(*script, step=3, seed=1):
        return lost(faults(*(script or [loses]), seed=seed), step, senders, receivers)

    one = drawn()
    np.testing.assert_array_equal(one, drawn(kill(0, 2), cut(0, 1, stop=1), loses))
    alone = faults(loses, seed=1)
    for at in range(64):
        assert lost(alone, 3, senders[at : at + 1], receivers[at : at + 1])[0] == one[at]
    for other in (drawn(step=4), drawn(seed=2)):
        assert 10 < (one != other).sum() < 54
    twice = drawn(loses, loses)
    assert (one <= twice).all()
    assert twice.sum() > one.sum()


def test_probability_one_loses_all_and_zero_nothing():
    ends = np.arange(8), (np.arange(8) + 1) % 8
    assert lost(faults(lose(1.0)), 0, *ends).all()
    assert not lost(faults(lose(0.0)), 0, *ends).any()


def test_windows_begin_with_start_and_end_before_stop():
    ends = np.array([2, 1]), np.array([1, 2])
    script = faults(
        cut(2, 1, start=5, stop=7), {"kind": "slow", "worker": 3, "factor": 4, "start": 6}
    )
    assert [bool(lost(script, step, *ends).all()) for step in range(4, 9)] == [0, 1, 1, 0, 0]
    assert [script.touches_links(step) for step in range(4, 9)] == [0, 1, 1, 0, 0]
    assert [script.slowdown(step, np.array([3, 2])).tolist() for step in (5, 6)] == [[1, 1], [4, 1]]
    assert script.slowdown_of(2) is None
    slowdown = script.slowdown_of(3)
    assert slowdown is not None
    assert (slowdown(5), slowdown(6)) == (1, 4)


# What it does to W.


def test_a_cut_link_of_a_ring_by_hand():
    """Four in a ring, a third each: 0 and 1 keep the third that they gave each other."""
    mixing = Mixing(topologies.build(4, "ring"), faults(cut(0, 1, start=2, stop=4)))
    t = 1 / 3
    expected = [[2 * t, 0, 0, t], [0, 2 * t, t, 0], [0, t, t, t], [t, 0, t, t]]
    np.testing.assert_allclose(dense(mixing, 2), expected, atol=1e-15)


def test_a_cut_link_of_a_star_whose_weights_are_not_equal_by_hand():
    """Metropolis on a star of four: 1/4 on each link, the hub keeps 1/4 and a leaf 3/4."""
    mixing = Mixing(topologies.build(4, "star"), faults(cut(2, 0)))
    q = 0.25
    expected = [[2 * q, q, 0, q], [q, 3 * q, 0, 0], [0, 0, 1, 0], [q, 0, 0, 3 * q]]
    np.testing.assert_allclose(dense(mixing, 0), expected, atol=1e-15)


@pytest.mark.parametrize("sender_keeps", [False, True])
def test_a_directed_link_is_kept_by_the_receiver_or_by_the_sender(sender_keeps):
    """0 -> 1 -> 2 -> 0 and 0 -> 2; 0 -> 2 is cut. Columns sum to 1 by `push`, rows by `uniform`."""
    graph = nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2)])
    mixing = Mixing(
        of(graph, "push" if sender_keeps else "uniform"), faults(cut(2, 0)), None, 1, sender_keeps
    )
    # The cut is of both directions, so 2 -> 0 is out as well.
    by_rows = [[1, 0, 0], [1 / 2, 1 / 2, 0], [0, 1 / 3, 2 / 3]]
    by_columns = [[2 / 3, 0, 0], [1 / 3, 1 / 2, 0], [0, 1 / 2, 1]]
    expected = by_columns if sender_keeps else by_rows
    np.testing.assert_allclose(dense(mixing, 0), expected, atol=1e-15)


def test_members_are_known_by_their_ids():
    """Workers 1, 4, 6 in a ring of three: the link of 4 and 6 is that of rows 1 and 2."""
    mixing = Mixing(topologies.build(3, "ring"), faults(cut(6, 4)), [1, 4, 6])
    t = 1 / 3
    expected = [[t, t, t], [t, 2 * t, 0], [t, 0, 2 * t]]
    np.testing.assert_allclose(dense(mixing, 9), expected, atol=1e-15)


def test_the_matrix_is_the_same_object_while_the_same_links_are_out():
    topology = topologies.build(8, "one_peer_exponential")
    mixing = Mixing(topology, faults(cut(0, 1, start=6), cut(4, 5, start=100)), turn_steps=2)
    for step in range(6):
        assert mixing.matrix(step) is topology.matrices[step // 2 % 3]
    assert mixing.matrix(6) is not topology.matrices[0]
    assert mixing.matrix(6) is mixing.matrix(7) is mixing.matrix(12)
    assert mixing.matrix(8) is topology.matrices[1]  # shifts by 2: no such link
    assert mixing.matrix(102) is not mixing.matrix(6)
    plain = Mixing(topology)
    assert plain.matrix(4) is topology.matrices[1]


@settings(max_examples=8, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", GENERATORS)
def test_sums_are_those_of_a_mixing_matrix_whatever_is_out(name, n, data):
    try:
        topology = topologies.build(n, name)
    except UserError:
        pytest.skip(f"there is no {name} of {n}")
    workers = st.integers(0, n - 1)
    script = [
        lose(data.draw(st.floats(0, 1)), data.draw(st.sampled_from(["exchanges", "messages"])))
    ]
    if n > 1:
        link = data.draw(st.tuples(workers, workers).filter(lambda ends: ends[0] != ends[1]))
        script.append(cut(*link))
    drawn = faults(*script, workers=n, seed=data.draw(st.integers(0, 99)))
    kept = all(fault.get("of") != "messages" for fault in script)
    for sender_keeps in (False, True):
        mixing = Mixing(topology, drawn, None, 1, sender_keeps)
        for step in range(topology.period):
            W, whole = dense(mixing, step), topology.matrix(step).toarray()
            assert (W >= 0).all()
            np.testing.assert_allclose(W.sum(axis=0 if sender_keeps else 1), 1, atol=1e-12)
            if kept and not topology.graph(step).is_directed():
                np.testing.assert_allclose(W.sum(axis=1 if sender_keeps else 0), 1, atol=1e-12)
                np.testing.assert_allclose(W, W.T, atol=1e-12)
            off = ~np.eye(n, dtype=bool)
            assert ((whole == W) | (W == 0))[off].all()


@pytest.mark.parametrize("name", ["ring", "star", "random_matchings"])
def test_lossy_gossip_keeps_the_mean_for_a_thousand_steps(name):
    """1e-12: a thousand steps of rounding, 1e-16 of x each."""
    topology = topologies.build(8, name)
    mixing = Mixing(topology, faults(lose(0.3), cut(0, 1, start=100, stop=300)))
    comm = StackedComm(8, mixing, torch.float64)
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = x.mean(0)
    for step in range(1000):
        x = comm.mix(x, step)
    np.testing.assert_allclose(x.mean(0), mean, atol=1e-12)
    np.testing.assert_allclose(x, mean.expand(8, 5), atol=1e-12)  # and they agreed on it


@pytest.mark.parametrize("name", ["ring", "exponential"])
def test_single_messages_lost_keep_the_mean_in_expectation_alone(name):
    """E[W'] = (1 - p) W + p I; on one way the mean moves."""
    topology = topologies.build(5, name)
    mixing = Mixing(topology, faults(lose(0.25, "messages"), workers=5))
    draws = 4000
    mean = sum(dense(mixing, step) for step in range(draws)) / draws
    expected = 0.75 * topology.matrices[0].toarray() + 0.25 * np.eye(5)
    # An entry is W_ij times a coin, or for W_ii a sum of two to three: at most 0.0055 of deviation.
    np.testing.assert_allclose(mean, expected, atol=0.02)
    assert abs(dense(mixing, 0).sum(axis=0) - 1).max() > 0.1


@pytest.mark.parametrize("of_what", ["exchanges", "messages"])
def test_push_sum_finds_the_mean_under_losses(of_what):
    graph = nx.DiGraph([(0, 1), (1, 2), (2, 3), (3, 4), (4, 0), (0, 3), (1, 4)])
    mixing = Mixing(of(graph, "push"), faults(lose(0.2, of_what)), sender_keeps=True)
    comm = StackedComm(5, mixing, torch.float64)
    mass = torch.arange(15, dtype=torch.float64).view(5, 3)
    mass = torch.cat([mass, torch.ones(5, 1, dtype=torch.float64)], dim=1)
    total = mass.sum(0)
    for step in range(300):
        mass = comm.mix(mass, step)
    np.testing.assert_allclose(mass.sum(0), total, rtol=1e-13)
    np.testing.assert_allclose(mass[:, :3] / mass[:, 3:], (total[:3] / 5).expand(5, 3), rtol=1e-12)


def test_push_sum_takes_statistics_for_means_too():
    """Running statistics are no mass: on a star, P alone would give the hub more than all."""
    problem = harness.Quadratic()
    problem.buffers = torch.arange(10, dtype=torch.float64).view(5, 2)
    mean = problem.buffers.mean(0)
    star = topologies.build(5, "star", weights="push")
    replica = harness.run(PRESETS["sgp"](), problem, 200, star)
    np.testing.assert_allclose(replica.buffers, mean.expand(5, 2), rtol=1e-12)


def test_experiments_let_the_sender_keep_for_push_sum_alone(quick):
    quick |= {"faults": [lose(0.5, "messages")], "topology": {"name": "exponential"}}
    for method, axis in (({"name": "sgp"}, 0), ({"name": "gossip_sgd"}, 1)):
        mixing = build(load(quick | {"algorithm": method})).mixing()
        assert mixing is not None
        sums = np.array([mixing.matrix(step).sum(axis=axis) for step in range(9)])
        np.testing.assert_allclose(sums, 1, atol=1e-15)
        others = np.array([mixing.matrix(step).sum(axis=1 - axis) for step in range(9)])
        assert abs(others - 1).max() > 0.1


def test_bytes_are_those_of_what_was_sent():
    mixing = Mixing(topologies.build(6, "ring"), faults(cut(0, 1, stop=1), lose(1.0, start=2)))
    comm = StackedComm(6, mixing, torch.float64)
    x = torch.zeros(6, 10, dtype=torch.float64)
    sent = []
    for step in range(3):
        before = comm.bytes_sent
        comm.mix(x, step)
        sent.append(comm.bytes_sent - before)
    assert sent == [10 * 80, 12 * 80, 0]


# Late messages.


def late_by_hand(W, drawn, start, steps):
    """x_i <- sum_j W_ij x_j, with x_j of d steps ago where the message is late, and x_i where it
    is lost or there is no older one; message by message."""
    n, x, past = len(W), start.copy(), []
    for step in range(steps):
        past.append(x.copy())
        mixed = np.zeros_like(x)
        for i in range(n):
            for j in range(n):
                ends = np.array([j]), np.array([i])
                heard = x[j]
                if i != j:
                    message = drawn.of_messages(*ends)
                    d = int(message.late(step)[0])
                    heard = x[i] if d > step else past[step - d][j]
                    if message.lost(step)[0]:
                        heard = x[i]
                mixed[i] += W[i, j] * heard
        x = mixed
    return x


def test_late_messages_are_heard_as_they_were_by_a_hand_written_loop():
    drawn = faults(delay(0.3, 2), delay(0.3, 3, start=4), lose(0.1, "messages"))
    topology = topologies.build(5, "star")
    start = np.random.default_rng(0).standard_normal((5, 3))
    comm = StackedComm(5, Mixing(topology, drawn), torch.float64)
    x, other = torch.from_numpy(start), torch.from_numpy(start[:, :2]) ** 2
    for step in range(20):
        x = comm.mix(x, step)  # two mixings a step, each with a history of its own
        other = comm.mix(other, step)
    W = topology.matrices[0].toarray()
    np.testing.assert_allclose(x, late_by_hand(W, drawn, start, 20), atol=1e-14)
    np.testing.assert_allclose(other, late_by_hand(W, drawn, start[:, :2] ** 2, 20), atol=1e-14)
    assert sorted(comm.history) == [0, 1]
    assert len(comm.history[0]) == 3


def test_a_late_message_is_the_newest_old_enough_where_neighbours_meet_now_and_then():
    """Two workers, halves, exchanges at steps 0, 4 and 8, all messages three steps late: at 4 each
    hears the other as at 0, at 8 as at 4; at 0 there is nothing to hear."""
    mixing = Mixing(topologies.build(2, "ring"), faults(delay(1.0, 3), workers=2))
    comm = StackedComm(2, mixing, torch.float64)
    x = torch.tensor([[0.0], [16.0]], dtype=torch.float64)
    x = comm.mix(x, 0)
    assert x.flatten().tolist() == [0, 16]
    x = comm.mix(x, 4)
    assert x.flatten().tolist() == [8, 8]  # (0 + 16) / 2 and (16 + 0) / 2
    x = comm.mix(x + torch.tensor([[0.0], [8.0]]), 8)
    assert x.flatten().tolist() == [(8 + 16) / 2, (16 + 0) / 2]


class CrashAt(Watcher):
    def __init__(self, step):
        self._step = step

    def advance(self, step, record):
        if step >= self._step:
            raise InterruptedError


@pytest.mark.parametrize("script", [[lose(0.3), delay(0.4, 3)], [lose(0.3, "messages"), cut(0, 1)]])
def test_a_resumed_run_has_the_same_faults(quick, tmp_path, script):
    slow = {"kind": "slow", "worker": 1, "factor": 3.0, "start": 5}
    quick |= {"faults": [*script, slow], "checkpoint": {"every": 7}}
    quick["algorithm"] = {"name": "gradient_tracking"}
    whole = decentral.run(quick)
    with pytest.raises(InterruptedError):
        decentral.run(quick, out=tmp_path, watcher=CrashAt(16))
    resumed = decentral.resume(tmp_path)
    one, other = (result.metrics.drop(columns="time_s") for result in (whole, resumed))
    pandas.testing.assert_frame_equal(one, other, check_exact=True)
    assert not np.allclose(whole.metrics.loss, decentral.run(quick, faults=[]).metrics.loss)


# Who is there.


def test_changes_by_script():
    script = faults(kill(3, 10), kill(5, 10), join(3, 20), join(6, 10), kill(1, 30))
    everyone = range(8)
    assert script.changes_members
    assert not faults(lose(0.1), cut(0, 1)).changes_members
    assert script.next_change(0, everyone) == 10
    assert script.changes(10, everyone) == Changes(killed=(3, 5))  # worker 6 is there already
    assert script.changes(9, everyone) == Changes()
    left = [0, 1, 2, 4, 6, 7]
    assert script.next_change(10, [*left, 5]) == 10  # unless it is done
    assert script.next_change(11, left) == 20
    assert script.changes(20, left) == Changes(joined=(3,))
    assert script.next_change(21, [0, 1, 2, 3]) == 30
    assert script.next_change(31, [0, 1, 2, 3]) is None
    assert faults().next_change(0, [0]) is None


def members_by_search(script, members, steps):
    """(step, members after its changes), by next_change."""
    story, step, now = [], 0, set(members)
    while (step := script.next_change(step, now)) is not None and step < steps:
        changes = script.changes(step, now)
        now = now - set(changes.killed) - set(changes.left) | set(changes.joined)
        story.append((step, tuple(sorted(now))))
        step += 1
    return story


def members_step_by_step(script, members, steps):
    story, now = [], set(members)
    for step in range(steps):
        changes = script.changes(step, now)
        if changes != Changes():
            now = now - set(changes.killed) - set(changes.left) | set(changes.joined)
            story.append((step, tuple(sorted(now))))
    return story


@pytest.mark.parametrize(
    "script",
    [
        [churn(0.02, 0.05)],
        [churn(0.3, 0.1, start=50, stop=400), kill(0, 60), join(0, 300)],
        [churn(0.001, 0.0), churn(0.5, 0.5, start=1200, stop=1210)],
        [churn(0.9, 0.0), kill(1, 900), join(4, 950)],
        [churn(0.0, 0.5), kill(2, 700)],
    ],
)
def test_the_search_ahead_finds_every_change_of_churn(script):
    """And it never comes to nobody."""
    script = faults(*script, workers=5, seed=4)
    story = members_by_search(script, range(5), 1500)
    assert story == members_step_by_step(script, range(5), 1500)
    assert story
    assert all(members for _, members in story)


def test_churn_comes_and_goes_as_often_as_it_says():
    script = faults(churn(0.1, 0.3), workers=2000, seed=3)
    half = range(1000)
    changes = script.changes(7, half)
    # Standard deviations sqrt(1000 p (1-p)): 9.5 and 14.5, four of each.
    assert len(changes.left) == pytest.approx(100, abs=38)
    assert len(changes.joined) == pytest.approx(300, abs=58)
    assert set(changes.left) <= set(half)
    assert not set(changes.joined) & set(half)


def test_the_last_live_worker_stays_and_a_killed_one_is_not_drawn_for():
    script = faults(churn(1.0, 0.0), workers=4)
    assert script.next_change(3, [2]) is None
    changes = script.changes(3, range(4))
    assert len(changes.left) == 3
    script = faults(churn(1.0, 1.0), kill(0, 5), kill(1, 5), kill(2, 5), workers=4)
    assert script.changes(5, range(4)) == Changes(killed=(0, 1, 2))


def test_churn_that_cannot_change_anybody_is_not_searched_for_ever():
    began = time.perf_counter()
    assert faults(churn(0.0, 0.5)).next_change(0, range(8)) is None
    assert faults(churn(0.5, 0.5, stop=10)).next_change(10, range(8)) is None
    far = faults(churn(1e-12, 0.0)).next_change(100, range(8))
    assert far is not None  # as far as it looked
    assert far > 100_000
    assert time.perf_counter() - began < 5


# The clock.


def test_what_is_not_sent_takes_no_time_and_shares_no_card():
    """A star of four, a millisecond of latency and one a message: the hub's card is shared by
    three, or by two once a link is cut, whose leaf then waits for nobody."""
    topology = topologies.build(4, "star")
    clock = Clock(np.zeros(4), 1e-3, 1e6, topology, faults=faults(cut(0, 3, start=1)))
    clock.advance(Event("neighbours", 0, 1000))
    np.testing.assert_allclose(clock.now, np.full(4, 4e-3))
    clock.advance(Event("neighbours", 1, 1000))
    np.testing.assert_allclose(clock.now, [7e-3, 7e-3, 7e-3, 4e-3])


def test_a_card_stays_as_fast_as_its_fastest_link_that_is_out():
    graph = nx.path_graph(3)
    graph.edges[0, 1]["bandwidth_gbps"], graph.edges[1, 2]["bandwidth_gbps"] = 0.016, 0.008
    drawn = faults(cut(0, 1))
    clock = Clock(np.zeros(3), 0.0, 1e9, of(graph, "metropolis"), faults=drawn)
    clock.advance(Event("neighbours", 0, 1000))
    np.testing.assert_allclose(clock.now, [0, 1e-3, 1e-3])  # 0.008 Gbit/s are a byte a microsecond


def test_a_slow_worker_takes_its_time_on_the_clock_and_members_keep_their_ids():
    drawn = faults({"kind": "slow", "worker": 5, "factor": 3.0, "start": 1, "stop": 2})
    clock = Clock(np.array([9.0, 9, 1, 9, 9, 2]), 0.0, np.inf, faults=drawn)
    clock.regroup([2, 5], None)
    times = []
    for step in range(3):
        clock.advance(Event("compute", step, 0))
        times.append(clock.now[[2, 5]].tolist())
    assert times == [[1, 2], [2, 8], [3, 10]]
    assert clock.compute_s_of(5, 1) == 6
    assert clock.now.tolist() == [0, 0, 3, 0, 0, 10]


# Both engines.


def test_a_slow_worker_waits_for_what_its_step_is_to_last(quick, monkeypatch):
    """A gradient that took 2 s by this clock, made three times as long: it sleeps for 4."""
    ticks, slept = iter(range(0, 100, 2)), []
    fake = SimpleNamespace(perf_counter=lambda: next(ticks), sleep=slept.append)
    monkeypatch.setattr(gradients, "time", fake)
    experiment = build(load(quick))
    model = FlatModel(experiment.task.model, experiment.dtype)
    gradient = ModuleGradient(model, experiment.task, experiment.sampler([0]))
    gradient(0)
    assert slept == []
    gradient.slowdown = {1: 3.0, 2: 1.0}.__getitem__
    gradient(1)
    gradient(2)
    gradient.losses(1)
    assert slept == [4, 4]


SCRIPTS = {
    "cut": ("star", [cut(0, 2, start=1, stop=3)]),
    "exchanges": ("complete", [lose(0.4)]),
    "messages": ("exponential", [lose(0.4, "messages"), cut(0, 1, start=2)]),
}


def mix_on_peer(rank, n):
    seen = {}
    for name, (graph, script) in SCRIPTS.items():
        comm = PeerComm(Mixing(topologies.build(n, graph), faults(*script)))
        x = torch.arange(n * 3, dtype=torch.float64).view(n, 3)[rank].clone()
        for step in range(6):
            x = comm.mix(x, step)
            x = comm.mix(x, step)
        seen[name] = x.numpy(), comm.bytes_sent
    return seen


@pytest.mark.slow
def test_a_peer_mixes_and_sends_what_the_stacked_side_does():
    n = 4
    seen = run_on_ranks(n, mix_on_peer, n)
    for name, (graph, script) in SCRIPTS.items():
        topology = topologies.build(n, graph)
        comm = StackedComm(n, Mixing(topology, faults(*script)), torch.float64)
        x = torch.arange(n * 3, dtype=torch.float64).view(n, 3)
        for step in range(6):
            x = comm.mix(comm.mix(x, step), step)
        for rank in range(n):
            np.testing.assert_allclose(seen[rank][name][0], x[rank], atol=1e-13)
        assert sum(seen[rank][name][1] for rank in range(n)) == comm.bytes_sent
        messages = int(sum(W.nnz for W in topology.matrices)) - n
        assert comm.bytes_sent < 12 * messages * 24


# Bad input.


WRONG = {
    "no kind": ({"worker": 1}, {}, "faults.0.kind: is required"),
    "unknown kind": ({"kind": "kil"}, {}, "faults.0.kind: must be one of 'kill', 'join', 'cut'"),
    "unknown key": (cut(0, 1, strat=3), {}, "faults.0.cut.strat: is not a known key"),
    "no fault": (3, {}, "faults.0: "),
    "one end": ({"kind": "cut", "link": [1]}, {}, "faults.0.cut.link: list should have at least 2"),
    "no step": ({"kind": "kill", "worker": 1}, {}, "faults.0.kill.step: is required"),
    "step before the first": (kill(1, -1), {}, "faults.0.kill.step: "),
    "empty window": (cut(0, 1, start=3, stop=3), {}, "stop must be above start; stop is 3 and"),
    "probability above 1": (lose(1.5), {}, "faults.0.lose.probability: "),
    "lost what": (lose(0.5, "bits"), {}, "faults.0.lose.of: input should be 'exchanges' or"),
    "faster": ({"kind": "slow", "worker": 0, "factor": 0.5}, {}, "faults.0.slow.factor: "),
    "late by nothing": (delay(0.5, 0), {}, "faults.0.delay.steps: "),
    "no worker of that id": (kill(4, 2), {}, "faults.0.worker: the workers are 0 to 3; got 4"),
    "slow worker that is not there": (
        {"kind": "slow", "worker": 9, "factor": 2.0},
        {},
        "faults.0.worker: the workers are 0 to 3; got 9",
    ),
    "link out of range": (cut(0, 7), {}, "faults.0.link: the workers are 0 to 3; got 7"),
    "link to itself": (cut(2, 2), {}, "faults.0.link: a link joins two workers; got [2, 2]"),
    "link of no graph": (
        cut(0, 2),
        {},
        "faults.0.link: topology ring has no link between 0 and 2; name one that it has",
    ),
    "no neighbours": (
        lose(0.1),
        {"algorithm": {"name": "local_sgd", "period": 4}},
        "faults.0: lose is of messages between neighbours, and local_sgd sends none",
    ),
    "running copies": (
        lose(0.1),
        {
            "algorithm": {
                "name": "choco_sgd",
                "consensus_step": 0.4,
                "compression": {"name": "top_k", "fraction": 0.5},
            }
        },
        "faults.0: choco_sgd builds on every message before, so no link can be out",
    ),
    "relay": (
        lose(0.1),
        {"algorithm": {"name": "relay_sgd"}, "topology": {"name": "path"}},
        "faults.0: relay_sgd builds on every message before",
    ),
    "asynchronous": (
        cut(0, 1),
        {"algorithm": {"name": "ad_psgd"}},
        "faults.0: ad_psgd exchanges in pairs, not along W",
    ),
    "asynchronous, killed": (
        kill(1, 4),
        {"algorithm": {"name": "ad_psgd"}},
        "faults.0: the workers of ad_psgd have no common step before which one could go or come;"
        " got kill",
    ),
    "asynchronous, joined": (
        join(1, 4),
        {"algorithm": {"name": "ad_psgd"}},
        "faults.0: the workers of ad_psgd have no common step",
    ),
    "asynchronous, churned": (
        churn(0.1, 0.2),
        {"algorithm": {"name": "a2cid2"}},
        "faults.0: the workers of a2cid2 have no common step",
    ),
    "asynchronous, elastic": (
        {"kind": "slow", "worker": 0, "factor": 2.0},
        {"algorithm": {"name": "ad_psgd"}, "workers": {"min": 2, "max": 4}},
        "workers: the workers of ad_psgd have no common step before which others could come; got"
        " min 2. Set workers=4",
    ),
    "late mass": (
        delay(0.1, 2),
        {"algorithm": {"name": "sgp"}},
        "faults.0: sgp sends mass",
    ),
    "late on ray": (
        delay(0.1, 2),
        {"engine": "ray"},
        "faults.0: delay is for the simulator alone; set engine=sim",
    ),
    "churn on ray": (
        churn(0.1, 0.2),
        {"engine": "ray"},
        "faults.0: churn is for the simulator alone; set engine=sim",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_script_is_refused(case, quick):
    fault, change, message = WRONG[case]
    with pytest.raises(UserError) as refused:
        build(load(quick | change | {"faults": [fault]}))
    assert message in str(refused.value)


def test_two_changes_of_a_worker_before_one_step_are_refused():
    with pytest.raises(UserError, match=r"faults\.2: worker 3 goes or comes once .* faults\.0 has"):
        faults(kill(3, 5), kill(2, 5), join(3, 5))


def test_a_script_survives_its_file(quick):
    script = [kill(1, 2), join(1, 4), churn(0.1, 0.25, start=3), cut(0, 1, stop=9), delay(0.1, 2)]
    config = load(quick | {"faults": [*script, {"kind": "slow", "worker": 0, "factor": 2}]})
    assert load(yaml.safe_load(dump(config))) == config
    assert load(config.model_dump()) == config
    assert getattr(config.faults[2], "return") == 0.25
