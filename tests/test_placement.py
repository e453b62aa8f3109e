"""Which worker on which node: few links between nodes, and the same results."""

import math
import os
from collections import Counter
from dataclasses import replace

import networkx as nx
import numpy as np
import pandas
import pytest
import ray
from scipy.sparse import csr_array

import decentral
from decentral import topology as topologies
from decentral.actor import Actor
from decentral.algorithms import PRESETS
from decentral.config import load
from decentral.coordinator import Coordinator
from decentral.engines.ray import RayEngine
from decentral.experiment import build
from decentral.placement import between, crossing, order, place, ranks, stated, traffic


def links(n, name, **options):
    """The traffic of gossip over a topology."""
    topology = topologies.build(n, name, **options)
    return traffic(n, PRESETS["gossip_sgd"](), topology)


def shuffled(matrix, seed=0):
    """The same graph with its workers renumbered."""
    p = np.random.default_rng(seed).permutation(matrix.shape[0])
    return csr_array(matrix[p][:, p])


# Least numbers of links between nodes. Ring: every node's workers are a path, with two ends. A 3x3
# block of a torus has 12 links inside, and no nine workers have more: 72 - 4 * 12. Four workers of
# a 4x4 torus, which is a hypercube of 16, have at most a square's 4. A star's hub has three with
# it. Eight of a hypercube have at most 12 links, a cube's: 80 - 4 * 12.
LEAST = {
    "ring": (16, [4] * 4, 4),
    "torus": (36, [9] * 4, 24),
    "small torus": (16, [4] * 4, 16),
    "star": (16, [4] * 4, 12),
    "path": (12, [5, 5, 5], 2),
    "hypercube": (32, [8] * 4, 32),
    "complete": (12, [4] * 3, 48),
}


@pytest.mark.parametrize("renumbered", [False, True])
@pytest.mark.parametrize("case", LEAST)
def test_known_least_numbers_of_links_between_nodes(case, renumbered):
    n, slots, least = LEAST[case]
    matrix = links(n, case.split()[-1])
    if renumbered:
        matrix = shuffled(matrix)
    assert between(matrix, place(matrix, dict(enumerate(slots)))) == least


@pytest.mark.parametrize("seed", range(12))
def test_any_placement_fits_is_not_worse_than_the_order_and_comes_again(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 60))
    graph = nx.gnp_random_graph(n, 0.1 + 0.4 * rng.random(), seed=seed)
    for u, v in graph.edges():
        graph.edges[u, v]["weight"] = float(rng.random())
    matrix = csr_array(nx.to_scipy_sparse_array(graph, nodelist=range(n), dtype=float))
    slots: dict[str, int] = {}
    while sum(slots.values()) < n:
        slots[f"10.0.0.{len(slots)}"] = int(rng.integers(1, 9))
    placed = place(matrix, slots)
    assert len(placed) == n
    assert all(count <= slots[node] for node, count in Counter(placed).items())
    in_order = [node for node, count in slots.items() for _ in range(count)][:n]
    assert between(matrix, placed) <= between(matrix, in_order) + 1e-9
    assert place(matrix, slots) == placed


@pytest.mark.parametrize("seed", [50644, 704625])
def test_workers_whose_order_is_best_stay_in_order(seed):
    """Blocks with a few links between them, where halving cuts more than the blocks' order does."""
    blocks, size, rewired = {50644: (7, 6, 0.2562), 704625: (5, 4, 0.2937)}[seed]
    graph = nx.relaxed_caveman_graph(blocks, size, rewired, seed=seed)
    matrix = csr_array(nx.to_scipy_sparse_array(graph, nodelist=range(len(graph)), dtype=float))
    slots = dict.fromkeys(range(blocks), size)
    assert place(matrix, slots) == [worker // size for worker in range(len(graph))]


def test_free_slots_stay_free_where_that_keeps_neighbours_together():
    """Two triangles on nodes of 4, 4 and 4: each has a node to itself, rank order cuts one."""
    matrix = links(6, "complete")
    matrix = csr_array(matrix * np.kron(np.eye(2), np.ones((3, 3))))
    slots = {"a": 4, "b": 4, "c": 4}
    assert between(matrix, ["a"] * 4 + ["b"] * 2) == 2
    assert between(matrix, place(matrix, slots)) == 0


def test_one_node_and_one_worker_a_node_are_left_as_they_are():
    matrix = shuffled(links(9, "ring"))
    assert order(matrix, ["a"] * 9) == list(range(9))
    assert order(matrix, list("abcdefghi")) == list(range(9))


def test_the_ranks_go_to_actors_on_the_nodes_placed():
    """Ray took turns: actors 0, 2, 4, 6 are on a, the others on b."""
    matrix = links(8, "ring")
    actors = order(matrix, list("abababab"))
    assert sorted(actors) == list(range(8))
    nodes = ["ab"[actor % 2] for actor in actors]
    assert between(matrix, nodes) == 2
    assert order(matrix, nodes) == list(range(8))  # as good already


def test_workers_go_where_a_measured_file_says_that_they_are(tmp_path):
    graph = nx.complete_graph(4)
    nx.set_node_attributes(graph, dict(enumerate("abba")), "node")
    nx.write_gml(graph, tmp_path / "cluster.gml")
    topology = topologies.build(file=tmp_path / "cluster.gml")
    placed = stated(topology, list("bbaa"))
    assert placed is not None
    assert placed == list("abba")
    assert ranks(placed, list("bbaa")) == [2, 0, 1, 3]
    assert stated(topology, list("baaa")) is None  # another cluster
    assert stated(topologies.build(4, "ring"), list("abba")) is None


def test_a_link_counts_as_often_as_it_is_used():
    """One-peer exponential on 4: a one-way message to i+1 in one step, to i+2 in the other."""
    got = links(4, "one_peer_exponential").toarray()
    # A pair i, i+1 has one message in two steps, a quarter of a model each way a step; the pair
    # i, i+2 two messages.
    assert got[0].tolist() == [0, 0.25, 0.5, 0.25]
    rare = replace(PRESETS["gossip_sgd"](), gossip_period=4)
    topology = topologies.build(4, "ring")
    assert traffic(4, rare, topology).toarray()[0].tolist() == [0, 0.25, 0, 0.25]


def test_averages_count_as_rings():
    """Hop: 2 (m-1)/m models one way an average, so (m-1)/m each way; every H-th step."""
    everyone = traffic(4, PRESETS["local_sgd"](period=3), None).toarray()
    np.testing.assert_allclose(everyone[0], [0, 0.25, 0, 0.25])
    every_step = traffic(4, PRESETS["parallel_sgd"](), None).toarray()
    np.testing.assert_allclose(every_step[0], [0, 0.75, 0, 0.75])
    grouped = PRESETS["hierarchical_sgd"](period=8, group_period=2, groups=2)
    got = traffic(8, grouped, None).toarray()
    np.testing.assert_allclose(got[0], [0, 3 / 8 + 7 / 64, 0, 3 / 8, 0, 0, 0, 7 / 64])
    pair = traffic(2, PRESETS["local_sgd"](period=1), None).toarray()
    np.testing.assert_allclose(pair, [[0, 1], [1, 0]])  # both hops join the same two


def test_groups_are_kept_together():
    grouped = PRESETS["hierarchical_sgd"](period=8, group_period=2, groups=3)
    nodes = [f"node {i % 3}" for i in range(12)]
    actors = order(traffic(12, grouped, None), nodes)
    for members in (range(4), range(4, 8), range(8, 12)):
        assert len({nodes[actors[rank]] for rank in members}) == 1


def test_an_adaptive_period_counts_as_it_begins():
    algorithm = PRESETS["gossip_aga"](initial_period=4)
    ring = topologies.build(8, "ring")
    np.testing.assert_allclose(traffic(8, algorithm, ring)[0, 1], 1 + 7 / 8 / 4)


def test_links_between_nodes_are_told():
    nodes = list("aaaabbbbccccdddd")
    ring = topologies.build(16, "ring")
    assert crossing(ring, nodes) == "4 of the 16 links of ring cross between nodes"
    # One way, each to i+1, i+2, i+4 or i+8: 4, 8, 16, 16 of 16 leave a block of four.
    peers = topologies.build(16, "one_peer_exponential")
    said = "on average 11 of the 16 links of one_peer_exponential cross between nodes"
    assert crossing(peers, nodes) == said


def test_a_placement_that_is_none_is_refused():
    config = {"ray.placement": "spread"}
    with pytest.raises(decentral.UserError, match=r"ray\.placement.*neighbours"):
        load("configs/quickstart.yaml", config)


@pytest.fixture(scope="module")
def scattered(shared_cluster):
    """Six actors, by turns on three made-up nodes."""

    class Elsewhere(Actor):
        """An actor of this machine that says that it is on another."""

        def __init__(self, node):
            self._said = node

        def node(self):
            return self._said, os.getpid()

        def listen(self, address):
            assert address.startswith("node")
            return super().listen("127.0.0.1")

        def connect(self, address, port, own_address, group, blank=None):
            assert own_address == self._said
            super().connect("127.0.0.1", port, "127.0.0.1", group, blank)

        def number_and_node(self):
            return self._number, self._said

    shared_cluster.up()
    make = ray.remote(Elsewhere).options(num_cpus=0)
    actors = [make.remote(f"node {i % 3}") for i in range(6)]
    yield actors
    for actor in actors:
        ray.kill(actor)  # pyright: ignore[reportArgumentType]: it takes what `remote` gives


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["neighbours", "rank"])
def test_neighbours_share_nodes_and_the_records_are_the_same(quick, scattered, placement):
    config = load(quick, {"workers": 6, "ray.placement": placement})
    said: list[str] = []
    experiment = build(config)
    engine = RayEngine(experiment, said.append, scattered)
    try:
        records = [record for record in Coordinator(experiment, engine).run() if record]
        by_rank = dict(ray.get([actor.number_and_node.remote() for actor in scattered]))
    finally:
        engine.close()
    nodes = [by_rank[rank] for rank in range(6)]
    cut = 3 if placement == "neighbours" else 6
    assert between(links(6, "ring"), nodes) == cut
    line = f"6 workers on 3 nodes of the Ray cluster; {cut} of the 6 links of ring cross"
    assert said == [f"{line} between nodes"]
    launched, simulated = pandas.DataFrame(records), decentral.run(config.model_dump()).metrics
    assert list(launched.bytes_sent) == list(simulated.bytes_sent)
    for column in ("loss", "consensus_distance", "eval_loss", "sim_time_s"):
        a, b = simulated[column].dropna(), launched[column].dropna()
        np.testing.assert_allclose(a, b, rtol=1e-9, err_msg=column)
    assert math.isfinite(launched.loss.iloc[-1])
