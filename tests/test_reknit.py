"""The topology of the survivors: whole, weighed, and with no more new links than it must have."""

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decentral import UserError
from decentral import topology as topologies
from decentral.topology import GENERATORS, WEIGHTS, Topology, reknit
from decentral.topology.reknit import _join_strongly

SIZES = [1, 2, 3, 5, 7, 8, 16]


def of(graph, weights="metropolis"):
    """A topology of one graph, as from a file."""
    return Topology("file.gml", (graph,), (WEIGHTS[weights](graph),), weights)


def made(name, **options):
    """What makes the named topology of so many workers."""
    return lambda m: topologies.build(m, name, **options)


def built(name, n):
    try:
        return topologies.build(n, name)
    except UserError:
        pytest.skip(f"there is no {name} of {n}")


def edges(topology):
    return [sorted(tuple(sorted(e)) for e in graph.edges()) for graph in topology.graphs]


def test_a_ring_of_the_survivors_is_a_ring_in_their_order():
    knit = reknit(topologies.build(6, "ring"), [0, 2, 3, 5], made("ring"))
    third = 1 / 3
    expected = [[third, third, 0, third], [third, third, third, 0]]
    np.testing.assert_allclose(knit.matrices[0].toarray()[:2], expected, atol=1e-15)
    assert edges(knit) == [[(0, 1), (0, 3), (1, 2), (2, 3)]]


def test_where_the_generator_has_no_such_graph_the_links_among_the_survivors_stay():
    """A cube less corner 5, whose neighbours were 4, 7 and 1: no hypercube has seven workers."""
    knit = reknit(topologies.build(8, "hypercube"), [0, 1, 2, 3, 4, 6, 7], made("hypercube"))
    assert edges(knit) == [[(0, 1), (0, 2), (0, 4), (1, 3), (2, 3), (2, 5), (3, 6), (4, 5), (5, 6)]]
    # Worker 4, of degree 2 now, and worker 6, of degree 3: 1 / (1 + 3) on their link.
    row = [0.25, 0, 0, 0, 0.5, 0.25, 0]
    np.testing.assert_allclose(knit.matrices[0].toarray()[4], row, atol=1e-15)


def test_a_file_whose_hub_dies_becomes_a_path_and_kept_links_their_attributes():
    graph = nx.star_graph(4)
    graph.add_edge(1, 2, latency_ms=7.0)
    graph.graph["compute_ms"], graph.nodes[4]["compute_scale"] = 3.0, 2.0
    knit = reknit(of(graph), [1, 2, 3, 4])
    # Rows 0 and 1 share the link that stays; rows 2 and 3 are alone, and hang on its ends.
    assert edges(knit) == [[(0, 1), (0, 2), (1, 3)]]
    assert knit.graphs[0].edges[0, 1] == {"latency_ms": 7.0}
    assert knit.graphs[0].edges[0, 2] == {}
    assert knit.graphs[0].nodes[3] == {"compute_scale": 2.0}
    assert knit.graphs[0].graph == {"compute_ms": 3.0}
    assert (knit.name, knit.weights) == ("file.gml", "metropolis")


def test_the_members_own_order_is_that_of_the_rows():
    graph = nx.path_graph(4)
    graph.add_edge(0, 1, latency_ms=1.0)
    knit = reknit(of(graph), [1, 0, 3, 2])
    assert knit.graphs[0].edges[1, 0] == {"latency_ms": 1.0}
    assert edges(knit) == [[(0, 1), (0, 3), (2, 3)]]


def test_the_last_worker_keeps_to_itself():
    for topology in (topologies.build(4, "ring"), topologies.build(4, "exponential")):
        for remake in (made(topology.name), None):
            assert reknit(topology, [2], remake).matrices[0].toarray() == [[1.0]]


def test_own_weights_stay_while_all_links_have_one_and_then_it_is_metropolis():
    graph = nx.empty_graph(4)
    graph.add_edges_from([(0, 1), (1, 2), (2, 3)], mixing=0.2)
    W = reknit(of(graph, "own"), [0, 1, 2]).matrices[0].toarray()
    np.testing.assert_allclose(W, [[0.8, 0.2, 0], [0.2, 0.6, 0.2], [0, 0.2, 0.8]], atol=1e-15)
    parted = reknit(of(graph, "own"), [0, 1, 3])
    assert parted.weights == "metropolis"
    assert edges(parted) == [[(0, 1), (0, 2)]]


def test_weights_that_lose_the_mean_on_the_survivors_are_replaced():
    """Uniform weights are doubly stochastic on a ring, and not on a path of three."""
    uniform = topologies.build(4, "ring", weights="uniform")
    assert uniform.is_doubly_stochastic
    for remake in (None, made("path", weights="uniform")):
        knit = reknit(uniform, [0, 1, 2], remake)
        assert knit.weights == "metropolis"
        assert knit.is_doubly_stochastic
    pushed = topologies.build(5, "star", weights="push")
    knit = reknit(pushed, [0, 1, 3], made("star", weights="push"))
    np.testing.assert_allclose(knit.matrices[0].toarray()[:, 0], [1 / 3] * 3)
    assert knit.weights == "push"


def test_a_directed_graph_from_a_file_is_strongly_connected_again_and_doubly_stochastic():
    """A directed ring of five less one worker is a path: one link closes it."""
    ring = nx.cycle_graph(5, create_using=nx.DiGraph)
    knit = reknit(of(ring, "uniform"), [0, 1, 2, 4])
    assert sorted(knit.graphs[0].edges()) == [(0, 1), (1, 2), (2, 3), (3, 0)]
    assert knit.weights == "uniform"
    # With a chord the degrees differ, so that uniform weights would move the mean.
    both = nx.compose(ring, nx.DiGraph([(1, 0)]))
    assert reknit(of(both, "sinkhorn"), [0, 1, 2, 4]).weights == "sinkhorn"


def test_a_directed_sequence_drops_what_no_doubly_stochastic_matrix_can_use():
    """Shifts by 1 and by 2 of four workers, without worker 3: 0 -> 2 -> 0 is left of them."""
    sequence = topologies.build(4, "one_peer_exponential")
    knit = reknit(sequence, [0, 1, 2])
    assert knit.is_doubly_stochastic
    assert sorted(knit.graphs[1].edges()) == [(0, 2), (2, 0)]
    assert sorted(knit.graphs[0].edges()) == [(0, 1), (1, 0)]


@settings(max_examples=10, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", GENERATORS)
def test_any_survivors_of_any_topology_mix_to_their_mean(name, n, data):
    topology = built(name, n)
    members = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    remake = data.draw(st.sampled_from([made(name), None]))
    knit = reknit(topology, members, remake)
    topologies.check(knit)
    assert knit.n == len(members)
    assert knit.is_doubly_stochastic or not topology.is_doubly_stochastic
    again = reknit(topology, members, remake)
    for one, other in zip(knit.matrices, again.matrices, strict=True):
        np.testing.assert_array_equal(one.toarray(), other.toarray())
    for graph in knit.graphs:
        assert list(graph) == list(range(len(members)))


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 12),
    links=st.sets(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=25),
)
def test_parts_are_joined_by_the_fewest_links(n, links):
    graph = nx.empty_graph(n)
    graph.add_edges_from((u, v) for u, v in links if u < v < n)
    parts = nx.number_connected_components(graph)
    most = max(dict(graph.degree()).values())
    (knit,) = reknit(of(graph), range(n)).graphs
    assert nx.is_connected(knit)
    assert knit.number_of_edges() == graph.number_of_edges() + parts - 1
    # A new link goes to the worker with fewest, so nobody's load grows beyond what a path asks for.
    assert max(dict(knit.degree()).values()) <= max(most + 2, 2)
    assert all(knit.has_edge(u, v) for u, v in graph.edges())


@settings(max_examples=300, deadline=None)
@given(
    n=st.integers(1, 9),
    links=st.sets(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=20),
)
def test_strong_connection_takes_the_fewest_links(n, links):
    """max(sources, sinks) + isolated parts: Eswaran and Tarjan's bound, which is reached."""
    graph = nx.empty_graph(n, create_using=nx.DiGraph)
    graph.add_edges_from((u, v) for u, v in links if u != v and max(u, v) < n)
    parts = nx.condensation(graph)
    alone = sum(parts.degree(p) == 0 for p in parts)
    sources = sum(parts.in_degree(p) == 0 for p in parts) - alone
    sinks = sum(parts.out_degree(p) == 0 for p in parts) - alone
    before = graph.number_of_edges()
    _join_strongly(graph)
    assert nx.is_strongly_connected(graph)
    needed = max(sources, sinks) + alone if len(parts) > 1 else 0
    assert graph.number_of_edges() == before + needed
