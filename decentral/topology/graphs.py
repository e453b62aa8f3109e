"""Graphs that need only a number of workers. Each generator is a plain function of n and its own
options, with their defaults in the signature, and one entry in `GENERATORS`; `build` calls it.

A generator returns one graph (static) or a list of graphs, one per step (time-varying); directed
edges (u, v) mean that u sends to v. It raises UserError, naming the n that do, where no such graph
exists.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import networkx as nx

from decentral.errors import UserError

Graphs = nx.Graph | list[nx.Graph]

DRAWS = 100  # attempts at a connected random graph before the options are called unsuitable


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
    return _shifts(n, [2**t for t in range(_log2_ceil(n))])


def one_peer_exponential(n: int) -> list[nx.Graph]:
    """At step k worker i sends to i + 2^(k mod tau) mod n alone, tau = ceil(log2 n).

    With weights 1/2 the product over tau steps is the exact average iff n is a power of two.
    Assran et al., "Stochastic gradient push", ICML 2019, arXiv 1811.10792; Ying et al., NeurIPS
    2021, arXiv 2110.13363.
    """
    return [_shifts(n, [2**t]) for t in range(_log2_ceil(n))] or [_shifts(n, [])]


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
    if not 0 <= p <= 1:
        raise UserError(
            f"p is a probability, 0 <= p <= 1, but it is {p}; use p: {likely:.3g}",
            key="topology.p",
        )
    return _connected(
        lambda rng: nx.fast_gnp_random_graph(n, p, seed=rng),
        n,
        seed,
        f"erdos_renyi with n {n} and p {p:.3g}",
        key="topology.p",
        remedy=f"use p: {likely:.3g} or more",
    )


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
    "random_regular": random_regular,
    "erdos_renyi": erdos_renyi,
}


def _log2_ceil(n: int) -> int:
    return (n - 1).bit_length()  # exact, where math.log2 rounds


def _shifts(n: int, shifts: list[int]) -> nx.DiGraph:
    """i sends to i + s mod n for every s in shifts."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from((i, (i + s) % n) for i in range(n) for s in shifts)
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
