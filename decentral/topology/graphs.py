"""Graphs that need only a number of workers. Each generator is a plain function of n and its own
options, with their defaults in the signature, and one entry in `GENERATORS`; `build` calls it.

A generator returns one graph (static) or a list of graphs, one per step (time-varying); directed
edges (u, v) mean that u sends to v. An edge's `mixing`, where every edge has one, is the weight
that the construction itself gives it. A generator raises UserError, naming the n that do, where no
such graph exists. Time-varying ones are in sequences.py, random ones in random_graphs.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Literal

import networkx as nx

from decentral.errors import UserError
from decentral.signature import choose
from decentral.topology.random_graphs import (
    equi_dynamic,
    equi_static,
    erdos_renyi,
    random_matchings,
    random_regular,
    require_links,
    small_world,
)
from decentral.topology.sequences import (
    base,
    hyper_hypercube,
    log2_ceil,
    one_peer_exponential,
    shifts,
    simple_base,
)

Graphs = nx.Graph | list[nx.Graph]


def ring(n: int) -> nx.Graph:
    """Each worker with the two beside it."""
    return nx.cycle_graph(n) if n > 2 else nx.path_graph(n)


def path(n: int) -> nx.Graph:
    """A ring with one link cut."""
    return nx.path_graph(n)


def star(n: int) -> nx.Graph:
    """Worker 0 with every other."""
    return nx.star_graph(n - 1)


def complete(n: int) -> nx.Graph:
    """Everyone with everyone."""
    require_links("complete", n * (n - 1) // 2, "topology.name")
    return nx.complete_graph(n)


def grid(n: int, rows: int | None = None) -> nx.Graph:
    """A rectangle of `rows` x n/rows workers, as near to a square as n allows unless rows is given.

    Worker i stands in row i // columns, column i % columns.
    """
    rows, columns = _rectangle("grid", n, rows)
    graph = _flat(nx.grid_2d_graph(rows, columns), n)
    for i, data in graph.nodes(data=True):  # for a picture, row 0 at the top
        data.update(x=i % columns, y=-(i // columns))
    return graph


def torus(n: int, rows: int | None = None) -> nx.Graph:
    """A grid whose opposite sides meet: every worker has four neighbours where both sides are >= 3.

    A side of 2 is met already by the grid's own link, a side of 1 has nobody to meet.
    """
    rows, columns = _rectangle("torus", n, rows)
    meets = (rows > 2, columns > 2)
    return _flat(nx.grid_2d_graph(rows, columns, periodic=meets), n)  # pyright: ignore


def hypercube(n: int) -> nx.Graph:
    """i and j are neighbours where their binary numbers differ in one digit; n a power of two."""
    dimension = n.bit_length() - 1
    if n != 2**dimension:
        raise UserError(
            f"hypercube needs a power of two, but n is {n}; "
            f"use workers: {2**dimension} or {2 ** (dimension + 1)}",
            key="workers",
        )
    graph = nx.empty_graph(n)
    graph.add_edges_from((i, i ^ 1 << t) for i in range(n) for t in range(dimension))
    return graph


def exponential(n: int) -> nx.DiGraph:
    """i sends to i + 2^t mod n for every t = 0 .. ceil(log2 n) - 1, all at each step.

    Ying et al., "Exponential graph is provably efficient for decentralized deep training",
    NeurIPS 2021, arXiv 2110.13363.
    """
    return shifts(n, [2**t for t in range(log2_ceil(n))])


def tree(n: int, branching: int = 2) -> nx.Graph:
    """A balanced tree: worker i > 0 hangs under (i - 1) // branching, worker 0 is the root."""
    if branching < 1:
        raise UserError(
            f"tree needs branching >= 1, but branching is {branching}; use branching: 2",
            key="topology.branching",
        )
    graph = nx.empty_graph(n)
    graph.add_edges_from(((i - 1) // branching, i) for i in range(1, n))
    return graph


def groups(
    n: int,
    groups: int | None = None,
    between: str = "ring",
    links: Literal["leaders", "everyone"] = "leaders",
    inside: int | None = None,
) -> Graphs:
    """Two levels: everyone with everyone inside a group, and links between the groups.

    groups   how many, as equal as n allows; by default about sqrt(n)
    between  the static, undirected topology whose workers the groups are, with its own defaults
    links    a link between two groups joins their first workers, or each with its counterpart
    inside   left out: both levels at every step; else a sequence, so many steps inside the groups
             and then one between them

    With links: everyone, between: complete and inside: 1 equal groups average exactly in two steps.
    """
    count = max(1, round(math.sqrt(n))) if groups is None else groups
    if not 1 <= count <= n:
        raise UserError(
            f"there are 1 to n groups, but n is {n} and groups is {count}; "
            f"use groups: {min(max(count, 1), n)}",
            key="topology.groups",
        )
    if inside is not None and inside < 1:
        raise UserError(
            f"groups takes at least one step inside, but inside is {inside}; use inside: 1",
            key="topology.inside",
        )
    starts = [g * n // count for g in range(count + 1)]
    members = [range(a, b) for a, b in itertools.pairwise(starts)]
    within, across = nx.empty_graph(n), nx.empty_graph(n)
    for group in members:
        within.add_edges_from(itertools.combinations(group, 2))
    for g, h in static(between, count, "topology.between").edges():
        pairs = list(zip(members[g], members[h], strict=False))
        across.add_edges_from(pairs if links == "everyone" else pairs[:1])
    return nx.compose(within, across) if inside is None else [within] * inside + [across]


GENERATORS: dict[str, Callable[..., Graphs]] = {
    "ring": ring,
    "path": path,
    "star": star,
    "complete": complete,
    "grid": grid,
    "torus": torus,
    "hypercube": hypercube,
    "exponential": exponential,
    "one_peer_exponential": one_peer_exponential,
    "hyper_hypercube": hyper_hypercube,
    "simple_base": simple_base,
    "base": base,
    "tree": tree,
    "groups": groups,
    "random_regular": random_regular,
    "erdos_renyi": erdos_renyi,
    "small_world": small_world,
    "equi_static": equi_static,
    "equi_dynamic": equi_dynamic,
    "random_matchings": random_matchings,
}


def static(name: str, n: int, key: str) -> nx.Graph:
    """The static, undirected graph `name` on n workers, with its own defaults.

    Raises UserError, for `key`, where there is none of that name, or it is no such graph.
    """
    graph = choose(GENERATORS, name, key, "topology")(n)
    if isinstance(graph, list) or graph.is_directed():
        raise UserError(
            f"here a static, undirected topology is needed, but {name} is not; "
            "use complete, ring, torus or another",
            key=key,
        )
    return graph


def _flat(lattice: nx.Graph, n: int) -> nx.Graph:
    """A lattice's nodes (row, column), which networkx lists row by row, numbered 0..n-1."""
    return nx.relabel_nodes(lattice, dict(zip(lattice, range(n), strict=True)))


def _rectangle(name: str, n: int, rows: int | None) -> tuple[int, int]:
    """(rows, columns) with rows * columns = n; both >= 2 unless n is 1 or rows is given."""
    if rows is not None:
        if rows < 1 or n % rows:
            divisors = ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
            raise UserError(
                f"the rows of a {name} must divide n, but n is {n} and rows is {rows}; "
                f"use one of {divisors}",
                key="topology.rows",
            )
        return rows, n // rows
    if n > 1 and _widest(n) == 1:
        below = next(m for m in range(n - 1, 0, -1) if m == 1 or _widest(m) > 1)
        above = next(m for m in range(n + 1, 2 * n + 1) if _widest(m) > 1)
        raise UserError(
            f"{name} needs n = rows x columns with both at least 2, but n is {n}; "
            f"use workers: {below} or {above}, or rows: 1",
            key="workers",
        )
    return _widest(n), n // _widest(n)


def _widest(n: int) -> int:
    """The largest divisor of n that is at most its square root."""
    return next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
