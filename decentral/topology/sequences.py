"""Time-varying topologies: a list of graphs, one per step, after which the list starts again.

The families of Takezawa et al., "Beyond exponential graph: communication-efficient topologies for
decentralized learning via finite-time convergence", NeurIPS 2023, arXiv 2305.11420, average exactly
in one pass over the list: the product of their matrices is J. `GENERATORS` in graphs.py lists them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import networkx as nx

from decentral.errors import UserError

Weighted = list[tuple[int, int, float]]  # edges of one step, with the weight each end gives


def one_peer_exponential(n: int) -> list[nx.Graph]:
    """At step k worker i sends to i + 2^(k mod tau) mod n alone, tau = ceil(log2 n).

    With weights 1/2 the product over tau steps is the exact average iff n is a power of two.
    Assran et al., "Stochastic gradient push", ICML 2019, arXiv 1811.10792; Ying et al., NeurIPS
    2021, arXiv 2110.13363.
    """
    return [shifts(n, [2**t]) for t in range(log2_ceil(n))] or [shifts(n, [])]


def hyper_hypercube(n: int, k: int = 1) -> list[nx.Graph]:
    """n = n_1 n_2 ... n_L, every n_l <= k + 1: at step l the workers whose numbers differ in digit
    l of this mixed radix alone average completely, n_l at a time. Exact after L steps, for an n
    with no prime factor above k + 1. Takezawa et al. 2023.
    """
    _require_degree("hyper_hypercube", k)
    if _rough(n, k) > 1:
        factors = f"prime factors up to {k + 1}"
        below = next(m for m in range(n - 1, 0, -1) if _rough(m, k) == 1)
        above = next(m for m in itertools.count(n + 1) if _rough(m, k) == 1)
        raise UserError(
            f"hyper_hypercube with k {k} needs an n that has only {factors}, but n is {n}; "
            f"use workers: {below} or {above}, a larger k, or topology.name: base",
            key="workers",
        )
    return _graphs(n, _hyper_hypercube(range(n), k))


def simple_base(n: int, k: int = 1) -> list[nx.Graph]:
    """Exact averaging in at most 2 log_{k+1}(n) + 2 steps for any n, with at most k neighbours.

    Simple Base-(k+1) graph, Takezawa et al. 2023.
    """
    _require_degree("simple_base", k)
    return _graphs(n, _simple_base(range(n), k))


def base(n: int, k: int = 1) -> list[nx.Graph]:
    """Exact averaging for any n with at most k neighbours, in no more steps than `simple_base`.

    Base-(k+1) graph: n = p q, p the part of n with prime factors up to k + 1. First the p groups of
    q workers average each by the simple graph, then the q sets of counterparts, p workers each, by
    the hyper-hypercube; or the simple graph on all n, where that is shorter. Takezawa et al. 2023.
    """
    _require_degree("base", k)
    q = _rough(n, k)
    p = n // q
    in_groups = _at_once(_simple_base(range(g * q, (g + 1) * q), k) for g in range(p))
    across = _at_once(_hyper_hypercube(range(j, n, q), k) for j in range(q))
    simple = _simple_base(range(n), k)
    return _graphs(n, min(in_groups + across, simple, key=len))


def _hyper_hypercube(workers: Sequence[int], k: int) -> list[Weighted]:
    """The steps of `hyper_hypercube` on these workers; their number must fit k."""
    steps, stride, rest = [], 1, len(workers)
    while rest > 1:
        factor = next(f for f in range(min(k + 1, rest), 1, -1) if rest % f == 0)
        edges = []
        for block in range(0, len(workers), stride * factor):
            for offset in range(block, block + stride):
                team = [workers[offset + digit * stride] for digit in range(factor)]
                edges += [(i, j, 1 / factor) for i, j in itertools.combinations(team, 2)]
        steps.append(edges)
        stride, rest = stride * factor, rest // factor
    return steps


def _simple_base(workers: Sequence[int], k: int) -> list[Weighted]:
    """The steps of the Simple Base-(k+1) graph on these workers.

    Write n = sum_l a_l b^{p_l} in base b = k + 1, p_1 > p_2 > ..., 1 <= a_l <= k, and cut the
    workers into sets V_l of those sizes. (1) Every V_l averages by its own hyper-hypercube. Then
    for l = 1, 2, ... in turn: (2) V_l, a_l parts of b^{p_l} workers, meets all the later sets at
    once. Each later worker is joined to one of every part, with w / a_l on each link, where w is
    V_l's share of the workers from V_l on. It then holds (1 - w) of its own set's mean and w of
    V_l's, so the later sets together hold the overall mean, and each is still of one mind. As
    the total is kept and the parts are treated alike, the mean of every part is the overall mean
    too: (3) each part averages by its own hyper-hypercube, while the later sets go on with (2).
    There are workers enough to join, as the later sets are smaller than b^{p_l}.
    """
    n, b = len(workers), k + 1
    if _rough(n, k) == 1:
        return _hyper_hypercube(workers, k)
    sets: list[list[Sequence[int]]] = []  # V_l as its parts
    rest = workers
    for power in reversed(range(n.bit_length())):
        parts = len(rest) // b**power
        if parts:
            cuts = [b**power * a for a in range(parts + 1)]
            sets.append([rest[start:end] for start, end in itertools.pairwise(cuts)])
            rest = rest[cuts[-1] :]
    first = _at_once(_hyper_hypercube([i for part in parts for i in part], k) for parts in sets)
    later: list[list[Weighted]] = []
    for turn, parts in enumerate(sets[:-1]):
        others = [i for these in sets[turn + 1 :] for part in these for i in part]
        own = sum(len(part) for part in parts)
        share = own / (own + len(others)) / len(parts)
        meeting = [(i, part[at], share) for at, i in enumerate(others) for part in parts]
        within = _at_once(_hyper_hypercube(part, k) for part in parts)
        later.append([[] for _ in range(turn)] + [meeting] + within)
    return first + _at_once(later)


def _at_once(schedules: Iterable[list[Weighted]]) -> list[Weighted]:
    """Schedules of disjoint workers side by side; who is done early waits."""
    return [
        [edge for edges in step for edge in edges]
        for step in itertools.zip_longest(*schedules, fillvalue=[])
    ]


def _graphs(n: int, steps: list[Weighted]) -> list[nx.Graph]:
    graphs = []
    for edges in steps or [[]]:
        graph = nx.empty_graph(n)
        graph.add_weighted_edges_from(edges, weight="mixing")
        graphs.append(graph)
    return graphs


def _rough(n: int, k: int) -> int:
    """n without its prime factors up to k + 1."""
    for factor in range(2, min(k + 1, n) + 1):
        while n % factor == 0:
            n //= factor
    return n


def _require_degree(name: str, k: int) -> None:
    if k < 1:
        raise UserError(
            f"{name} needs k >= 1, the most neighbours a step, but k is {k}; use k: 1",
            key="topology.k",
        )


def log2_ceil(n: int) -> int:
    """ceil(log2 n), exact where math.log2 rounds."""
    return (n - 1).bit_length()


def shifts(n: int, by: list[int]) -> nx.DiGraph:
    """i sends to i + s mod n for every s in `by`."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from((i, (i + s) % n) for i in range(n) for s in by)
    return graph
