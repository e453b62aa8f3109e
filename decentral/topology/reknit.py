"""The topology of those who are left when workers go, or come back.

The engines call `reknit` at a change of membership, with the topology of all workers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import networkx as nx

from decentral.errors import UserError
from decentral.topology.check import check
from decentral.topology.core import Topology
from decentral.topology.weights import WEIGHTS


def reknit(
    topology: Topology, members: Sequence[int], remake: Callable[[int], Topology] | None = None
) -> Topology:
    """The topology of `members`, workers of `topology`; row r is worker members[r].

    remake: the topology of so many workers from a generator, whose UserError says that there is
    none. Where there is none, as for a graph file, the links among the members stay, with their
    attributes, and what falls apart is joined: in an undirected graph by one link a part, which is
    the fewest that do, between workers with few links. The same members give the same topology.

    Weights are by the topology's own rule, if that takes the graphs and W stays doubly stochastic
    where it was, else metropolis, or sinkhorn on directed graphs.
    """
    if remake is not None:
        try:
            made = remake(len(members))
            if made.is_doubly_stochastic or not topology.is_doubly_stochastic:
                return made
            return _weighed(topology, made.graphs)
        except UserError:
            pass
    graphs = [_among(graph, members) for graph in topology.graphs]
    directed = [graph for graph in graphs if isinstance(graph, nx.DiGraph)]
    if not directed:
        _join(graphs)
    elif len(graphs) == 1:
        _join_strongly(directed[0])
    else:
        _join_both_ways(directed)
    return _weighed(topology, graphs)


def _weighed(topology: Topology, graphs: Sequence[nx.Graph]) -> Topology:
    """These graphs, weighed by the topology's rule if it does, and checked."""
    directed = any(graph.is_directed() for graph in graphs)
    for weights in (topology.weights, "sinkhorn" if directed else "metropolis"):
        try:
            matrices = tuple(WEIGHTS[weights](graph) for graph in graphs)
        except UserError:
            continue
        knit = Topology(topology.name, tuple(graphs), matrices, weights)
        if knit.is_doubly_stochastic or not topology.is_doubly_stochastic:
            check(knit)
            return knit
    raise UserError(
        f"no weights make W of topology {topology.name} doubly stochastic on {len(graphs[0])} of"
        " its workers; choose another topology",
        key="topology.weights",
    )


def _among(graph: nx.Graph, members: Sequence[int]) -> nx.Graph:
    """The links among members, which become 0 .. m-1 in their order."""
    row = {member: r for r, member in enumerate(members)}
    among = nx.DiGraph() if graph.is_directed() else nx.Graph()
    among.graph.update(graph.graph)
    among.add_nodes_from((r, graph.nodes[member]) for member, r in row.items())
    among.add_edges_from(
        (row[u], row[v], data) for u, v, data in graph.edges(members, data=True) if v in row
    )
    return among


def _join(graphs: Sequence[nx.Graph]) -> None:
    """Link the parts of the union of undirected graphs, one after the other.

    Each new link is between the workers with the fewest links on both sides, in the graph of the
    sequence in which its two ends have the fewest.
    """
    parts = sorted(nx.connected_components(nx.compose_all(graphs)), key=min)
    joined = set(parts[0])
    for part in parts[1:]:
        u, v = _fewest(graphs, joined), _fewest(graphs, part)
        min(graphs, key=lambda graph: graph.degree(u) + graph.degree(v)).add_edge(u, v)
        joined |= part


def _join_both_ways(graphs: Sequence[nx.DiGraph]) -> None:
    """As `_join` for a sequence of directed graphs, by a link each way.

    A link that is on no cycle of its graph goes: no doubly stochastic W can use it. What is left
    is strongly connected wherever it is connected.
    """
    for graph in graphs:
        part_of = {u: at for at, part in enumerate(_strong_parts(graph)) for u in part}
        lost = [(u, v) for u, v in graph.edges() if part_of[u] != part_of[v]]
        graph.remove_edges_from(lost)
    parts = sorted(nx.weakly_connected_components(nx.compose_all(graphs)), key=min)
    joined = set(parts[0])
    for part in parts[1:]:
        u, v = _fewest(graphs, joined), _fewest(graphs, part)
        best = min(graphs, key=lambda graph: graph.degree(u) + graph.degree(v))
        best.add_edges_from([(u, v), (v, u)])
        joined |= part


def _join_strongly(graph: nx.DiGraph) -> None:
    """Make a directed graph strongly connected with the fewest new links.

    With s parts that hear nobody, t that nobody hears, and q that do neither, in the graph of
    strongly connected parts, max(s, t) + q links are needed, and do: Eswaran and Tarjan,
    "Augmentation problems", SIAM J. Comput. 5 (1976).
    """
    parts = nx.condensation(graph, sorted(_strong_parts(graph), key=min))
    if len(parts) == 1:
        return
    alone = [p for p in parts if parts.degree(p) == 0]
    sources = [p for p in parts if parts.in_degree(p) == 0 and parts.out_degree(p)]
    sinks = [p for p in parts if parts.out_degree(p) == 0 and parts.in_degree(p)]
    pairs = _matched(parts, sources, sinks)
    # A ring through the pairs, from each sink to the next source, and through those alone.
    ring = [*pairs, *((p, p) for p in alone)]
    links = [(ring[at - 1][1], ring[at][0]) for at in range(len(ring))]
    # The other sources hear from a sink, and other sinks go to a source: both at once, while
    # there are both, and the rest hang on the ring.
    first = {source for source, _ in pairs}
    last = {sink for _, sink in pairs}
    links += itertools.zip_longest(
        [sink for sink in sinks if sink not in last],
        [source for source in sources if source not in first],
    )
    for sink, source in links:
        sink = ring[0][1] if sink is None else sink
        source = ring[0][0] if source is None else source
        members = parts.nodes(data="members")
        graph.add_edge(
            min(members[sink], key=lambda u: (graph.out_degree(u), u)),
            min(members[source], key=lambda u: (graph.in_degree(u), u)),
        )


def _matched(parts: nx.DiGraph, sources: list[int], sinks: list[int]) -> list[tuple[int, int]]:
    """Pairs of a source and a sink that hears of it, such that every other source reaches a paired
    sink, and every other sink hears of a paired source: searches that share no part."""
    seen: set[int] = set()
    ends = set(sinks)
    pairs = []

    def search(part: int) -> int | None:
        stack = [part]
        while stack:
            at = stack.pop()
            if at in seen:
                continue
            seen.add(at)
            if at in ends:
                return at
            stack.extend(sorted(parts.successors(at), reverse=True))
        return None

    for source in sources:
        sink = search(source)
        if sink is not None:
            pairs.append((source, sink))
    return pairs


def _strong_parts(graph: nx.DiGraph) -> list[set[int]]:
    return list(nx.strongly_connected_components(graph))


def _fewest(graphs: Sequence[nx.Graph], workers: set[int]) -> int:
    """The one of `workers` with the fewest links over the sequence; of several, the first."""
    return min(workers, key=lambda u: (sum(graph.degree(u) for graph in graphs), u))
