"""Random graphs and random sequences of graphs, each a function of (n, its options, seed) alone.

What must be connected is drawn again until it is, at most `DRAWS` times. `GENERATORS` in graphs.py
lists what is here.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable

import networkx as nx
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from decentral.errors import UserError

MOST_LINKS = 5_000_000  # about 2 GB as a networkx graph
DRAWS = 100  # attempts at a connected draw before the options are called unsuitable
ETA = 0.5  # of a one-peer EquiTopo step: how much of the shift, against staying (Song et al. 2022)


def random_regular(n: int, degree: int = 4, seed: int = 0) -> nx.Graph:
    """A connected graph drawn from those where every worker has `degree` neighbours.

    Needs n > degree, n * degree even, and degree >= 2 for more than two workers.
    """
    if n <= degree:
        raise UserError(
            f"random_regular needs n > degree, but n is {n} and degree is {degree}; "
            f"use workers: {degree + 1} or more, or a smaller degree",
            key="topology.degree",
        )
    if n * degree % 2:
        raise UserError(
            f"random_regular needs n * degree even, but n is {n} and degree is {degree}; "
            f"use workers: {n + 1}, or an even degree",
            key="topology.degree",
        )
    least = min(n - 1, 2)
    if degree < least:
        raise UserError(
            f"random_regular on {n} workers is connected only for degree >= {least}, "
            f"but degree is {degree}; use degree: {least} or more",
            key="topology.degree",
        )
    require_links("random_regular", n * degree // 2, "topology.degree")
    return _connected(
        lambda rng: nx.random_regular_graph(degree, n, seed=rng),
        n,
        seed,
        f"random_regular with n {n} and degree {degree}",
        key="topology.degree",
        remedy="use a larger degree or another seed",
    )


def erdos_renyi(n: int, p: float | None = None, seed: int = 0) -> nx.Graph:
    """Each pair is linked with probability p, drawn until the graph is connected.

    p defaults to min(1, 2 ln n / n), twice the threshold of connectedness: a worker is then left
    alone with probability about 1/n^2.
    """
    likely = min(1.0, 2 * math.log(n) / n)
    p = likely if p is None else p
    _require_probability("p", p, likely)
    require_links("erdos_renyi", round(p * n * (n - 1) / 2), "topology.p")
    return _connected(
        lambda rng: nx.fast_gnp_random_graph(n, p, seed=rng),
        n,
        seed,
        f"erdos_renyi with n {n} and p {p:.3g}",
        key="topology.p",
        remedy=f"use p: {likely:.3g} or more",
    )


def small_world(n: int, degree: int = 4, rewire: float = 0.1, seed: int = 0) -> nx.Graph:
    """A ring where each worker knows the `degree` nearest, every link moved at random with
    probability `rewire`; drawn until the graph is connected. n * degree / 2 links.

    Needs n > degree, degree even and >= 2. Watts and Strogatz, "Collective dynamics of
    'small-world' networks", Nature 393 (1998).
    """
    _require_probability("rewire", rewire, 0.1)
    if degree < 2 or degree % 2:
        raise UserError(
            f"small_world needs an even degree >= 2, but degree is {degree}; "
            f"use degree: {max(2, degree + degree % 2)}",
            key="topology.degree",
        )
    if n <= degree:
        raise UserError(
            f"small_world needs n > degree, but n is {n} and degree is {degree}; "
            f"use workers: {degree + 1} or more, or a smaller degree",
            key="topology.degree",
        )
    require_links("small_world", n * degree // 2, "topology.degree")
    return _connected(
        lambda rng: nx.watts_strogatz_graph(n, degree, rewire, seed=rng),
        n,
        seed,
        f"small_world with n {n}, degree {degree} and rewire {rewire:.3g}",
        key="topology.rewire",
        remedy="use a larger degree or a smaller rewire",
    )


def equi_static(
    n: int, shifts: int | None = None, directed: bool = True, seed: int = 0
) -> nx.Graph:
    """i sends to i + s mod n for M = `shifts` random shifts s, all different, at each step.

    W = (1/n) I + (n-1)/n (1/M) sum_s P_s, P_s the shift by s; undirected: with (P_s + P_s') / 2.
    M = ceil(log2 n) by default, the messages of the exponential graph; M = n - 1 gives W = J.
    beta < e with probability >= 1 - p once M >= 8 ln(2n/p) / (3 e^2), whatever n is. EquiStatic of
    Song et al., "Communication-efficient topologies for decentralized learning with O(1) consensus
    rate", NeurIPS 2022, arXiv 2210.07881; they draw with replacement, and such bounds hold without
    as well (Gross and Nesme 2010, arXiv 1001.2738).
    """
    most = max(n - 1, 0)
    count = (n - 1).bit_length() if shifts is None else shifts
    if not min(1, most) <= count <= most:
        raise UserError(
            f"equi_static takes 1 to n - 1 shifts, but n is {n} and shifts is {count}; "
            f"use shifts: {min(max(count, 1), most)}",
            key="topology.shifts",
        )
    require_links("equi_static", n * count, "topology.shifts")
    rng = random.Random(seed)
    for _ in range(DRAWS):
        drawn = rng.sample(range(1, n), count)
        if math.gcd(n, *drawn) == 1 or n == 1:  # else the shifts stay within classes mod the gcd
            break
    else:
        raise UserError(
            f"equi_static with n {n} and {count} shifts must be connected, but no draw of {DRAWS} "
            "was; use more shifts or another seed",
            key="topology.shifts",
        )
    weight: dict[int, float] = defaultdict(float)  # of each shift
    for s in drawn:
        both = (s,) if directed else (s, n - s)
        for shift in both:
            weight[shift] += (n - 1) / n / count / len(both)
    graph = nx.DiGraph() if directed else nx.Graph()
    graph.add_nodes_from(range(n))
    for shift, mixing in weight.items():
        graph.add_edges_from(((i, (i + shift) % n) for i in range(n)), mixing=mixing)
    return graph


def equi_dynamic(n: int, directed: bool = True, rounds: int = 32, seed: int = 0) -> list[nx.Graph]:
    """At each step one random shift s: i sends to i + s mod n alone, or, undirected, pairs (i, i+s)
    exchange. A sequence of `rounds` draws, which then starts again.

    W = (1 - eta) I + eta ((1/n) I + (n-1)/n A), eta = 1/2, A the shift or the swap of the pairs.
    Directed: ||E[W'W] - J|| = (n-1) / (2n) < 1/2 for every n. OD- and OU-EquiDyn of Song et al.
    2022, arXiv 2210.07881. Their pairs are found greedily from a random worker on; here they
    alternate along each cycle of the shift, so that at most one worker a cycle stays alone.
    """
    _require_rounds("equi_dynamic", n, rounds)
    rng = random.Random(seed)
    share = ETA * (n - 1) / n

    def draw() -> nx.Graph:
        s = rng.randrange(1, n) if n > 1 else 0
        graph = nx.DiGraph() if directed else nx.Graph()
        graph.add_nodes_from(range(n))
        if s:
            pairs = [(i, (i + s) % n) for i in range(n)] if directed else _pairs(n, s, rng)
            graph.add_edges_from(pairs, mixing=share)
        return graph

    return _connected_sequence(draw, n, rounds, "equi_dynamic")


def random_matchings(
    n: int, graph: str = "complete", rounds: int = 32, seed: int = 0
) -> list[nx.Graph]:
    """At each step a random maximal matching of `graph`: pairs of neighbours exchange, alone.

    `graph` names a static, undirected topology, taken with its own defaults. A sequence of `rounds`
    draws, which then starts again. On the complete graph of an even n, pairs with weights 1/2 have
    ||E[W'W] - J|| = (n-2) / (2(n-1)). The pairwise gossip of Boyd et al., "Randomized gossip
    algorithms", IEEE Trans. Inf. Theory 52 (2006), all pairs of a matching at once.
    """
    from decentral.topology.graphs import static  # where this function is listed too

    _require_rounds("random_matchings", n, rounds)
    rng = random.Random(seed)
    edges = None if graph == "complete" else list(static(graph, n, "topology.graph").edges())

    def draw() -> nx.Graph:
        matching = nx.empty_graph(n)
        if edges is None:  # a random order, two by two, without listing n^2 pairs
            order = rng.sample(range(n), n)
            matching.add_edges_from(zip(order[::2], order[1::2], strict=False))
            return matching
        taken: set[int] = set()
        for u, v in rng.sample(edges, len(edges)):
            if u not in taken and v not in taken:
                taken |= {u, v}
                matching.add_edge(u, v)
        return matching

    return _connected_sequence(draw, n, rounds, "random_matchings")


def _pairs(n: int, s: int, rng: random.Random) -> list[tuple[int, int]]:
    """Every second link of each cycle i -> i + s mod n, each cycle from a random start on."""
    length = n // math.gcd(n, s)
    pairs = []
    for first in range(n // length):
        start = first + rng.randrange(length) * s
        pairs += [((start + t * s) % n, (start + (t + 1) * s) % n) for t in range(0, length - 1, 2)]
    return pairs


def _connected(
    draw: Callable[[random.Random], nx.Graph], n: int, seed: int, what: str, key: str, remedy: str
) -> nx.Graph:
    """The first connected graph of DRAWS draws from one generator; the same for the same seed."""
    rng = random.Random(seed)
    for _ in range(DRAWS):
        graph = nx.empty_graph(n)  # a draw lists nodes in the order of its edges
        graph.add_edges_from(draw(rng).edges())
        if nx.is_connected(graph):
            return graph
    raise UserError(f"{what} must be connected, but no draw of {DRAWS} was; {remedy}", key=key)


def _connected_sequence(
    draw: Callable[[], nx.Graph], n: int, rounds: int, name: str
) -> list[nx.Graph]:
    """The first of DRAWS / 10 sequences of `rounds` draws whose union is connected."""
    for _ in range(DRAWS // 10):
        graphs = [draw() for _ in range(rounds)]
        edges = np.array([edge for graph in graphs for edge in graph.edges()], np.int64).reshape(
            -1, 2
        )
        union = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(n, n))
        # Shifts go round, so that weakly connected is strongly connected.
        if connected_components(union, directed=False, return_labels=False) == 1:
            return graphs
    raise UserError(
        f"{name} on {n} workers must be connected over its {rounds} rounds, but no draw of "
        f"{DRAWS // 10} was; use rounds: {2 * rounds}",
        key="topology.rounds",
    )


def require_links(name: str, links: int, key: str) -> None:
    """Raise UserError for a graph, or a sequence of graphs, that would fill the memory."""
    if links > MOST_LINKS:
        raise UserError(
            f"{name} would have {links} links, and at most {MOST_LINKS} can be held; use a sparser"
            " topology, such as exponential, or fewer workers",
            key=key,
        )


def _require_rounds(name: str, n: int, rounds: int) -> None:
    if rounds < 1:
        raise UserError(
            f"{name} needs rounds >= 1, but rounds is {rounds}; use rounds: 32",
            key="topology.rounds",
        )
    require_links(name, n * rounds, "topology.rounds")


def _require_probability(option: str, value: float, likely: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(
            f"{option} is a probability, 0 <= {option} <= 1, but it is {value}; "
            f"use {option}: {likely:.3g}",
            key=f"topology.{option}",
        )
