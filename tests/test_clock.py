"""The simulated clock, to the microsecond by hand, and against step times that were measured."""

import numpy as np
import pytest

import decentral
from decentral import topology as topologies
from decentral.clock import AllReduce, Clock, Nodes, bytes_per_second, clock_options, compute_scale
from decentral.comm import Event
from decentral.config import load
from decentral.experiment import build
from decentral.jitter import Variation, exponential, lognormal, pareto, uniform

LATENCY_S = 1e-3
BANDWIDTH = 1e6  # bytes a second
SIZE = 1000  # bytes: a millisecond on such a link


def compute(step=0):
    return Event("compute", step, 0)


def neighbours(step=0, size=SIZE):
    return Event("neighbours", step, size)


def everyone(step=0, size=SIZE):
    return Event("everyone", step, size)


def group(step=0, size=SIZE):
    return Event("group", step, size)


def clock_of(topology, compute_s=0.0, latency_s=LATENCY_S, bandwidth=BANDWIDTH):
    return Clock(np.full(topology.n, compute_s), latency_s, bandwidth, topology)


def after(clock, *events):
    """Every worker's time after the events."""
    for event in events:
        clock.advance(event)
    return clock.now


def test_groups_wait_for_their_own_members_alone():
    members = [np.array([0, 1, 2]), np.array([3])]
    clock = Clock(np.array([1.0, 2.0, 3.0, 4.0]), LATENCY_S, BANDWIDTH, groups=members)
    # A ring of three: 2 (2/3) of a millisecond and three hops; nobody to wait for in one of one.
    three = 3.0 + 2 * (2 / 3) * 1e-3 + 3 * LATENCY_S
    np.testing.assert_allclose(after(clock, compute(), group()), [three, three, three, 4.0])


def file_graph(folder, text):
    (folder / "graph.gml").write_text(text)
    return topologies.build(file=folder / "graph.gml")


def test_an_exchange_costs_the_latency_and_a_message_from_each_neighbour():
    ring = after(clock_of(topologies.build(5, "ring")), neighbours())
    np.testing.assert_allclose(ring, np.full(5, 3e-3))
    # A leaf has one neighbour, but the card of that one is shared by all.
    star = after(clock_of(topologies.build(4, "star")), neighbours())
    np.testing.assert_allclose(star, np.full(4, 4e-3))
    path = after(clock_of(topologies.build(6, "path")), neighbours())
    np.testing.assert_allclose(path, np.full(6, 3e-3))


def test_a_directed_exchange_is_paid_by_who_hears():
    clock = clock_of(topologies.build(8, "exponential"))
    np.testing.assert_allclose(after(clock, neighbours()), np.full(8, 4e-3))  # hears from three
    clock = clock_of(topologies.build(8, "one_peer_exponential"))
    np.testing.assert_allclose(after(clock, neighbours()), np.full(8, 2e-3))


def test_links_of_a_file_cost_what_their_edges_say():
    """house5: a megabyte takes 8 ms at the floor's 1 Gbit/s, whatever else goes on. The roof's
    card, of 2.5 Gbit/s, takes 3.2 ms for each of two; the other links are done long before."""
    clock = clock_of(topologies.build(file="topologies/house5.gml"))
    ms = [20 + 8, 20 + 8, 5 + 2 * 3.2, 5 + 2 * 3.2, 5 + 2 * 3.2]
    np.testing.assert_allclose(after(clock, neighbours(size=10**6)), np.array(ms) * 1e-3)


def test_an_attribute_that_an_edge_lacks_is_the_networks(tmp_path):
    topology = file_graph(
        tmp_path,
        """graph [ node [ id 0 ] node [ id 1 ] node [ id 2 ] node [ id 3 ]
        edge [ source 0 target 1 latency_ms 7 ]
        edge [ source 1 target 2 bandwidth_gbps 0.004 ]
        edge [ source 2 target 3 ] ]""",
    )
    # 0.004 Gbit/s are half a megabyte a second, 2 ms for the message; that is also what is left
    # of the cards of 1 and 2, a megabyte a second, for either of their two messages.
    expected = np.array([7 + 2, 7 + 2, 1 + 2, 1 + 2]) * 1e-3
    np.testing.assert_allclose(after(clock_of(topology), neighbours()), expected)


def test_links_of_a_directed_file_are_paid_by_who_hears(tmp_path):
    topology = file_graph(
        tmp_path,
        """graph [ directed 1 node [ id 0 ] node [ id 1 ] node [ id 2 ]
        edge [ source 0 target 1 latency_ms 5 ]
        edge [ source 1 target 2 latency_ms 3 ]
        edge [ source 2 target 0 latency_ms 9 ] ]""",
    )
    np.testing.assert_allclose(after(clock_of(topology), neighbours()), [10e-3, 6e-3, 4e-3])


def test_compute_scale_is_read_from_the_nodes():
    house = topologies.build(file="topologies/house5.gml")
    np.testing.assert_array_equal(compute_scale(house.graphs[0], 5), [1.0, 1.0, 1.2, 0.8, 2.0])
    np.testing.assert_array_equal(
        compute_scale(topologies.build(3, "ring").graphs[0], 3), np.ones(3)
    )
    np.testing.assert_array_equal(compute_scale(None, 2), np.ones(2))


def test_a_worker_computes_at_its_own_speed():
    clock = Clock(np.array([0.5, 1.0, 2.0]), LATENCY_S, BANDWIDTH)
    np.testing.assert_allclose(after(clock, compute(0), compute(1)), [1.0, 2.0, 4.0])
    assert clock.time_s == 4.0


def test_a_slow_worker_delays_its_neighbours_alone_one_hop_a_step():
    path = topologies.build(5, "path")
    clock = Clock(np.array([10.0, 1, 1, 1, 1]), 0.0, np.inf, path)
    for step, expected in enumerate([[10, 10, 1, 1, 1], [20, 20, 11, 2, 2], [30, 30, 21, 12, 3]]):
        np.testing.assert_array_equal(after(clock, compute(step), neighbours(step)), expected)


def test_everyone_waits_for_the_slowest_at_a_global_average():
    path = topologies.build(5, "path")
    clock = Clock(np.array([10.0, 1, 1, 1, 1]), 0.0, np.inf, path)
    np.testing.assert_array_equal(after(clock, compute(), everyone()), np.full(5, 10.0))


def test_a_time_varying_topology_waits_for_the_peer_of_the_step():
    """Worker i hears from i-1, then from i-2. Who sends waits too: 3 sends to 0, then 2 does."""
    one_peer = topologies.build(4, "one_peer_exponential")
    for step, expected in ((0, [10, 10, 1, 10]), (1, [10, 1, 10, 1]), (2, [10, 10, 1, 10])):
        clock = Clock(np.array([10.0, 1, 1, 1]), 0.0, np.inf, one_peer)
        np.testing.assert_array_equal(after(clock, compute(step), neighbours(step)), expected)


@pytest.mark.parametrize("topology", [None, "ring", "star"])
def test_an_all_reduce_is_two_rounds_of_the_ring(topology):
    chosen = topologies.build(4, topology) if topology else None
    clock = Clock(np.zeros(4), LATENCY_S, BANDWIDTH, chosen)
    assert clock.all_reduce_s(SIZE) == pytest.approx(2 * 1e-3 * 3 / 4 + 4 * 1e-3)


def test_one_worker_communicates_for_free():
    clock = clock_of(topologies.build(1, "ring"), compute_s=1.0)
    np.testing.assert_array_equal(after(clock, compute(), neighbours(), everyone()), [1.0])


def test_an_all_reduce_over_a_file_goes_by_the_paths_of_least_latency():
    """house5, ring 0-1-2-3-4-0: 0 to 1 goes 0-3-2-1, around the floor of 20 ms, and 4 to 0 goes
    4-3-0. The links of 2.5 Gbit/s to the roof set the pace; the floor's 1 Gbit/s would not."""
    clock = clock_of(topologies.build(file="topologies/house5.gml"))
    latency_ms = (1 + 0.5 + 1) + 1 + 0.5 + 5 + (5 + 1)
    size = 10**6
    expected = 2 * size * 4 / 5 / bytes_per_second(2.5) + latency_ms * 1e-3
    assert clock.all_reduce_s(size) == pytest.approx(expected)


def test_an_all_reduce_over_a_directed_file_follows_its_arrows(tmp_path):
    """The ring 0-1-2-0 against arrows that run 0-2-1-0: each of three hops takes two links."""
    topology = file_graph(
        tmp_path,
        """graph [ directed 1 node [ id 0 ] node [ id 1 ] node [ id 2 ]
        edge [ source 0 target 2 latency_ms 1 ]
        edge [ source 2 target 1 latency_ms 2 ]
        edge [ source 1 target 0 latency_ms 4 ] ]""",
    )
    expected = 2 * 1e-3 * 2 / 3 + 2 * (1 + 2 + 4) * 1e-3
    assert clock_of(topology).all_reduce_s(SIZE) == pytest.approx(expected)


def test_gigabits_are_of_ten_to_the_nine_and_bytes_of_eight():
    assert bytes_per_second(10) == 1.25e9


def test_a_run_tells_the_time_of_its_events():
    """Gossip-PGA, H=3, on a ring of 4, float64 [2]: 16 bytes a message, 1 ms at 128 kbit/s."""
    result = decentral.run(
        quadratic(workers=4, steps=7, dim=2),
        algorithm={"name": "gossip_pga", "period": 3},
        topology={"name": "ring"},
        network={"latency_ms": 0.5, "bandwidth_gbps": 128e-6, "compute_ms": 10},
    )
    gossip, everyone = 0.5 + 2 * 1, 2 * 1 * 3 / 4 + 4 * 0.5
    each = np.array([10 + (everyone if k in (3, 6) else gossip) for k in range(1, 8)])
    np.testing.assert_allclose(result.metrics.sim_time_s, each.cumsum() * 1e-3)


def test_a_run_computes_as_fast_as_the_nodes_of_its_file():
    """Local SGD on house5, three steps alone: the roof, half as fast as usual, is the last."""
    result = decentral.run(
        quadratic(workers=5, steps=3, dim=2),
        algorithm={"name": "local_sgd", "period": 9},
        topology={"file": "topologies/house5.gml"},
        network={"compute_ms": 10},
    )
    np.testing.assert_allclose(result.metrics.sim_time_s, [20e-3, 40e-3, 60e-3])


def test_compute_is_measured_where_the_config_gives_none():
    result = decentral.run(
        quadratic(workers=2, steps=4, dim=2),
        algorithm={"name": "local_sgd", "period": 2},
        topology={"name": "ring"},
        network={"latency_ms": 0, "bandwidth_gbps": 1e9},
    )
    seconds = result.metrics.sim_time_s
    assert 1e-6 < seconds[0] < 1
    np.testing.assert_allclose(seconds, seconds[0] * np.arange(1, 5), rtol=1e-6)


# ResNet-50 on ImageNet, 256 GPUs, one-peer exponential graph, H=6 (Chen et al. 2021): epochs and
# hours to 76% top-1, and milliseconds of a step's compute, all-reduce and one-peer exchange.
WORKERS, PERIOD, COMPUTE_MS, ALL_REDUCE_MS, ONE_PEER_MS = 256, 6, 146, 278, 150
EPOCHS_AND_HOURS = {
    "parallel_sgd": (94, 1.74),
    "gossip_sgd": (198, 2.55),
    "gossip_pga": (109, 1.50),
    "gossip_aga": (91, 1.20),
}
IMAGES, BATCH = 1_281_167, 8192  # 32 a GPU; see the test of the batch below
GLOBAL_SHARE = 0.09  # of Gossip-AGA's steps, as published
MEASURED_MS = {
    "parallel_sgd": COMPUTE_MS + ALL_REDUCE_MS,
    "gossip_sgd": COMPUTE_MS + ONE_PEER_MS,
    "gossip_pga": COMPUTE_MS + (ALL_REDUCE_MS + (PERIOD - 1) * ONE_PEER_MS) / PERIOD,
    "gossip_aga": COMPUTE_MS + GLOBAL_SHARE * ALL_REDUCE_MS + (1 - GLOBAL_SHARE) * ONE_PEER_MS,
}


def hours(epochs, step_ms):
    return epochs * IMAGES / BATCH * step_ms * 1e-3 / 3600


def test_a_measured_step_is_the_sum_of_computing_and_sending_not_the_longer_of_both():
    """The published hours tell: in their ratio neither images nor batch matter."""
    (p_epochs, p_hours), (g_epochs, g_hours) = (
        EPOCHS_AND_HOURS[name] for name in ("parallel_sgd", "gossip_sgd")
    )
    published = p_hours / g_hours
    summed = p_epochs * (COMPUTE_MS + ALL_REDUCE_MS) / (g_epochs * (COMPUTE_MS + ONE_PEER_MS))
    longer = p_epochs * max(COMPUTE_MS, ALL_REDUCE_MS) / (g_epochs * max(COMPUTE_MS, ONE_PEER_MS))
    assert summed == pytest.approx(published, rel=0.01)
    assert longer > 1.25 * published


@pytest.mark.parametrize("name", EPOCHS_AND_HOURS)
def test_measured_steps_account_for_the_published_hours_at_a_batch_of_8192(name):
    epochs, published = EPOCHS_AND_HOURS[name]
    assert hours(epochs, MEASURED_MS[name]) == pytest.approx(published, rel=0.02)
    batch = epochs * IMAGES * MEASURED_MS[name] * 1e-3 / 3600 / published
    assert batch == pytest.approx(BATCH, rel=0.02)


@pytest.mark.parametrize("name", ["parallel_sgd", "gossip_sgd", "gossip_pga"])
def test_the_clock_tells_the_published_hours_from_the_measured_bandwidths(name):
    """An all-reduce moves 2 (n-1)/n = 1.992 messages; 278 ms are 1.853 times the 150 of one. So
    the all-reduce reaches a bandwidth of its own, 1.075 times the exchange's."""
    message = 8  # bytes: the model is one float64, and bandwidth is all that matters
    all_reduced = 2 * message * (WORKERS - 1) / WORKERS
    result = decentral.run(
        quadratic(workers=WORKERS, steps=2 * PERIOD, dim=1),
        algorithm={"name": name, **({"period": PERIOD} if name == "gossip_pga" else {})},
        topology={"name": "one_peer_exponential"},
        network={
            "latency_ms": 0,
            "bandwidth_gbps": message * 8e-6 / ONE_PEER_MS,
            "all_reduce_gbps": all_reduced * 8e-6 / ALL_REDUCE_MS,
            "compute_ms": COMPUTE_MS,
        },
    )
    step_ms = result.summary["final"]["sim_time_s"] * 1e3 / (2 * PERIOD)
    assert step_ms == pytest.approx(MEASURED_MS[name], rel=1e-9)
    epochs, published = EPOCHS_AND_HOURS[name]
    assert hours(epochs, step_ms) == pytest.approx(published, rel=0.02)


# 10 MB over gloo between hosts on cards of so many Gbit/s, measured before this clock knew of
# overhead: milliseconds.
@pytest.mark.parametrize(
    ("event", "topology", "n", "gbps", "measured_ms"),
    [
        (neighbours, "ring", 2, 0.2, 424),
        (neighbours, "one_peer_exponential", 4, 0.2, 424),
        (neighbours, "ring", 4, 0.2, 898),
        (neighbours, "ring", 2, 1.0, 84),
        (everyone, "ring", 4, 0.2, 667),
    ],
)
def test_the_clock_tells_measured_exchanges_within_six_percent(
    event, topology, n, gbps, measured_ms
):
    graph = topologies.build(n, topology)
    clock = Clock(np.zeros(n), 1e-4, bytes_per_second(gbps), graph, overhead=0.068)
    times = after(clock, event(size=10**7))
    np.testing.assert_allclose(times * 1e3, measured_ms, rtol=0.06)


# How compute times vary.


DRAWS = np.arange(200_000)


@pytest.mark.parametrize(
    ("jitter", "deviation", "probe", "below"),
    [
        # P(factor <= probe), by each distribution's own formula
        (lognormal(0.5), np.sqrt(np.exp(0.25) - 1), np.exp(-0.125), 0.5),
        (exponential(0.4), 0.4, 0.6 + 0.4 * np.log(2), 0.5),
        (uniform(0.3), 0.3 / np.sqrt(3), 1.15, 0.75),
        (pareto(4.0), np.sqrt(1 / (4 * 2)), 0.75 * 10**0.25, 0.9),
    ],
)
def test_jitter_has_mean_one_and_the_distribution_of_its_name(jitter, deviation, probe, below):
    factors = Variation(0, jitter).factors(DRAWS, 3)
    error = 4 / np.sqrt(len(DRAWS))  # four standard errors
    assert factors.mean() == pytest.approx(1, abs=error * deviation)
    assert factors.std() == pytest.approx(deviation, rel=0.06)  # Pareto's fourth moment is infinite
    assert (factors <= probe).mean() == pytest.approx(below, abs=error / 2)


def test_stragglers_come_with_their_probability_and_independently_of_jitter():
    slow = Variation(0, None, 0.1, 5.0).factors(DRAWS, 0)
    assert set(slow) == {1.0, 5.0}
    assert (slow == 5).mean() == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / len(DRAWS)))
    jittered = Variation(0, uniform(0.5)).factors(DRAWS, 0)
    both = Variation(0, uniform(0.5), 0.1, 5.0).factors(DRAWS, 0)
    np.testing.assert_array_equal(both, jittered * slow)
    assert jittered[slow == 5].mean() == pytest.approx(1, abs=4 * 0.29 / np.sqrt(20_000))


def test_draws_depend_on_seed_worker_and_step_alone():
    variation = Variation(7, lognormal(0.3))
    clock = Clock(np.array([1.0, 2, 3]), 0.0, np.inf, variation=variation)
    at = [clock.compute_s_at(step) for step in (4, 5)]
    assert len({*at[0] / [1, 2, 3], *at[1] / [1, 2, 3]}) == 6
    assert clock.compute_s_of(2, 5) == at[1][2]
    other = Clock(np.array([1.0, 2, 3]), 0.0, np.inf, variation=Variation(8, lognormal(0.3)))
    assert not np.any(other.compute_s_at(4) == at[0])
    np.testing.assert_allclose(after(clock, compute(4), compute(5)), at[0] + at[1])


def test_a_run_computes_with_the_jitter_and_the_stragglers_of_its_config():
    network = {
        "compute_ms": 10,
        "jitter": {"kind": "uniform", "spread": 0.5},
        "stragglers": {"probability": 0.3, "slowdown": 4},
    }
    config = quadratic(workers=3, steps=6, dim=1)
    algorithm = {"name": "local_sgd", "period": 9}
    seconds = decentral.run(config, network=network, algorithm=algorithm).metrics.sim_time_s
    variation = Variation(0, uniform(0.5), 0.3, 4.0)
    each = np.array([variation.factors(np.arange(3), step) for step in range(6)]) * 10e-3
    np.testing.assert_allclose(seconds, each.cumsum(axis=0).max(axis=1))


def test_a_resumed_run_tells_the_time_of_one_that_was_not_stopped(tmp_path):
    config = quadratic(workers=3, steps=12, dim=1) | {
        "algorithm": {"name": "gossip_pga", "period": 4},
        "topology": {"name": "path"},
        "network": {"compute_ms": 10, "jitter": {"kind": "lognormal", "sigma": 0.5}},
        "checkpoint": {"every": 5},
    }
    whole = decentral.run(config).metrics.sim_time_s
    decentral.run(config, steps=7, out=tmp_path / "run")
    resumed = decentral.resume(tmp_path / "run", steps=12).metrics.sim_time_s
    np.testing.assert_array_equal(resumed, whole)


# Exchanges behind the computing.


def overlapping(compute_s):
    path = topologies.build(3, "path")
    return Clock(np.array(compute_s), LATENCY_S, BANDWIDTH, path, overlap=True)


def test_an_exchange_behind_the_computing_costs_what_is_longer():
    """The exchange takes 1 + 2 ms, for all: the middle's card is shared by two messages."""
    expected = np.array([3, 3, 4]) * 1e-3
    clock = overlapping([1e-3, 2e-3, 4e-3])
    np.testing.assert_allclose(after(clock, compute(), neighbours()), expected)
    # Next: the middle waits for 2, of the 4 ms; 0 for nobody but the middle, of the 3.
    expected = np.array([3 + 3, 4 + 3, 4 + 4]) * 1e-3
    np.testing.assert_allclose(after(clock, compute(1), neighbours(1)), expected)


@pytest.mark.parametrize(("computing", "takes"), [(5e-3, 6e-3), (9e-3, 9e-3)])
def test_exchanges_behind_the_computing_go_one_after_the_other(computing, takes):
    """Each takes 3 ms; those of the next step start when this step is over."""
    clock = overlapping([computing] * 3)
    times = after(clock, compute(), neighbours(), neighbours())
    np.testing.assert_allclose(times, np.full(3, takes))
    times = after(clock, compute(1), neighbours(1))
    np.testing.assert_allclose(times, np.full(3, takes + computing))


def test_a_global_average_hides_behind_the_computing_too():
    all_reduce = 2 * 1e-3 * 2 / 3 + 3 * 1e-3
    np.testing.assert_allclose(
        after(overlapping([9e-3, 1e-3, 1e-3]), compute(), everyone()),
        [9e-3, all_reduce, all_reduce],
    )


def test_overlap_is_for_methods_whose_messages_need_no_gradient():
    config = quadratic(workers=3, steps=2, dim=2) | {
        "topology": {"name": "path"},
        "network": {"overlap": True, "compute_ms": 1, "latency_ms": 3},
    }
    seconds = decentral.run(config, algorithm={"name": "gossip_cta"}).metrics.sim_time_s
    np.testing.assert_allclose(seconds, [3e-3, 6e-3], rtol=1e-4)
    for name in ("gossip_sgd", "gradient_tracking", "parallel_sgd", "d2"):
        with pytest.raises(decentral.UserError, match=rf"network\.overlap: {name} sends what"):
            build(load(config, {"algorithm": {"name": name}}))


def test_the_clock_goes_by_what_the_engines_do_unless_it_is_told():
    config = quadratic(workers=3, steps=1, dim=2) | {"topology": {"name": "path"}}
    for name, overlap, takes_s in (
        ("gossip_cta", None, 3e-3),
        ("gossip_cta", False, 4e-3),
        ("gossip_sgd", None, 4e-3),
        ("gossip_sgd", False, 4e-3),
    ):
        network = {"overlap": overlap, "compute_ms": 1, "latency_ms": 3}
        result = decentral.run(config, algorithm={"name": name}, network=network)
        np.testing.assert_allclose(result.metrics.sim_time_s, takes_s, rtol=1e-4)


# All-reduces of other kinds, and where workers share a node.


def reduced(n, kind, nodes=None, bandwidth=None):
    clock = Clock(
        np.zeros(n), LATENCY_S, BANDWIDTH, all_reduce=AllReduce(kind, bandwidth), nodes=nodes
    )
    return clock.all_reduce_s(SIZE)


FAST = Nodes(np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2]), (1e-4, 1e7))  # .1 ms, and .1 ms a message


@pytest.mark.parametrize(("n", "rounds"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4)])
def test_a_tree_goes_up_and_down_in_log_n_rounds(n, rounds):
    assert reduced(n, "tree") == pytest.approx(2 * rounds * (1 + 1) * 1e-3)


def test_a_hierarchical_all_reduce_is_a_ring_inside_a_ring_over_and_a_broadcast_inside():
    inside = 2 * 0.1 * 3 / 4 + 4 * 0.1  # of the nodes of four
    over = 2 * 1 * 2 / 3 + 3 * 1
    back = 0.1 + 3 * 0.1
    assert reduced(10, "hierarchical", FAST) == pytest.approx((inside + over + back) * 1e-3)


def test_a_ring_over_nodes_goes_through_each_of_them_once():
    """However the workers are numbered: three hops between nodes, and seven inside."""
    ring = (2 * 1 * 9 / 10 + 3 * 1 + 7 * 0.1) * 1e-3
    assert reduced(10, "ring", FAST) == pytest.approx(ring)
    scattered = Nodes(np.array([0, 1, 0, 1, 0, 1, 0, 1, 2, 2]), FAST.link)
    assert reduced(10, "ring", scattered) == pytest.approx(ring)


def test_a_measured_bandwidth_of_all_reduces_holds_between_nodes():
    assert reduced(4, "ring", bandwidth=BANDWIDTH / 2) == pytest.approx((4 * 3 / 4 + 4) * 1e-3)
    inside, back = 2 * 0.1 * 3 / 4 + 4 * 0.1, 0.1 + 3 * 0.1
    over = 2 * 2 * 2 / 3 + 3 * 1
    slower = reduced(10, "hierarchical", FAST, bandwidth=BANDWIDTH / 2)
    assert slower == pytest.approx((inside + over + back) * 1e-3)


def test_messages_inside_a_node_do_not_pass_its_card():
    """A path 0-1-2-3, two workers a node: between 1 and 2 one message has the card to itself."""
    nodes = Nodes(np.array([0, 0, 1, 1]), (1e-4, 1e7))
    path = topologies.build(4, "path")
    clock = Clock(np.zeros(4), LATENCY_S, BANDWIDTH, path, nodes=nodes)
    expected = [0.1 + 0.1, 1 + 1, 1 + 1, 0.1 + 0.1]
    np.testing.assert_allclose(after(clock, neighbours()), np.array(expected) * 1e-3)


def test_nodes_come_from_the_config_or_from_the_graph_file(tmp_path):
    text = """graph [ node [ id 0 node "b" ] node [ id 1 node "a" ] node [ id 2 node "b" ]
        edge [ source 0 target 1 ] edge [ source 1 target 2 ] ]"""
    (tmp_path / "graph.gml").write_text(text)
    config = quadratic(workers=3, steps=1, dim=1) | {
        "algorithm": {"name": "gossip_sgd"},
        "topology": {"file": str(tmp_path / "graph.gml")},
        "network": {"all_reduce": "hierarchical", "nodes": {"bandwidth_gbps": 100}},
    }

    def groups(**changes):
        experiment = build(load(config, changes))
        algorithm = experiment.algorithm
        return clock_options(experiment.config, experiment.topology, algorithm)["nodes"].groups(
            range(experiment.config.workers)
        )

    assert groups() == [[1], [0, 2]]
    assert groups(**{"network.nodes.workers_per_node": 2}) == [[0, 1], [2]]
    with pytest.raises(decentral.UserError, match=r"network\.nodes: .*worker 0.*workers_per_node"):
        groups(topology={"name": "path"})
    with pytest.raises(decentral.UserError, match=r"network\.all_reduce: .*workers_per_node: 8"):
        groups(**{"network.nodes": None})


def test_a_link_alone_costs_its_latency_and_its_message():
    clock = clock_of(topologies.build(file="topologies/house5.gml"))
    assert clock.link_s(0, 1, 10**6) == pytest.approx(20e-3 + 8e-3)  # its own, not the way around
    assert clock.link_s(4, 0, 10**6) == pytest.approx((5 + 1) * 1e-3 + 3.2e-3)  # no edge: 4-3-0
    assert clock_of(topologies.build(3, "path")).link_s(0, 2, SIZE) == pytest.approx(2e-3)


def test_the_protocols_overhead_is_on_every_message():
    path = topologies.build(3, "path")
    clock = Clock(np.zeros(3), LATENCY_S, BANDWIDTH, path, overhead=0.5)
    assert clock.link_s(0, 1, SIZE) == pytest.approx(1e-3 + 1.5e-3)
    assert clock.all_reduce_s(SIZE) == pytest.approx(2 * 1.5e-3 * 2 / 3 + 3e-3)
    np.testing.assert_allclose(after(clock, neighbours()), np.full(3, 1e-3 + 2 * 1.5e-3))
    network = {"overhead": 0.5, "all_reduce_gbps": 8e-3, "latency_ms": 0}
    config = load(quadratic(3, 1, 1) | {"algorithm": {"name": "parallel_sgd"}, "network": network})
    measured = Clock(np.zeros(3), **clock_options(config, None, build(config).algorithm))
    assert measured.all_reduce_s(SIZE) == pytest.approx(2 * 1e-3 * 2 / 3)  # a measurement holds it


@pytest.mark.parametrize(
    ("network", "says"),
    [
        ({"jitter": {"kind": "normal"}}, r"network\.jitter\.kind: .*lognormal"),
        ({"jitter": {"kind": "pareto", "tail": 1.0}}, r"network\.jitter\.tail: .*greater than 1"),
        ({"jitter": {"kind": "uniform"}}, r"network\.jitter\.spread"),
        ({"jitter": {"kind": "uniform", "sigma": 1.0}}, "takes no option 'sigma'"),
        ({"stragglers": {"probability": 2, "slowdown": 2}}, r"network\.stragglers\.probability"),
        ({"stragglers": {"probability": 0.1, "slowdown": 0.5}}, "slowdown"),
        ({"all_reduce": "butterfly"}, r"network\.all_reduce"),
        ({"nodes": {"workers_per_node": 2}}, r"network\.nodes\.bandwidth_gbps"),
    ],
)
def test_impossible_networks_are_refused_by_key(network, says):
    config = quadratic(workers=3, steps=1, dim=1) | {"algorithm": {"name": "parallel_sgd"}}
    with pytest.raises(decentral.UserError, match=says):
        build(load(config, {"network": network}))


def quadratic(workers, steps, dim):
    return {
        "workers": workers,
        "steps": steps,
        "dtype": "float64",
        "task": {"name": "quadratic", "dim": dim, "samples_per_worker": 2, "batch_size": 1},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "record": {"every": 1},
    }
