"""Mixing weights: from a graph to its matrix W, self weights included: row-stochastic, but `push`.

A rule is one function and one entry in `WEIGHTS`; `build` looks it up. All are vectorised over the
edges, for graphs of tens of thousands of workers.
"""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
import numpy as np
from scipy.sparse import coo_array, csr_array, identity

from decentral.errors import UserError


def uniform(graph: nx.Graph) -> csr_array:
    """W_ij = 1 / (d_i + 1) for i itself and each neighbour j that it hears from.

    d_i is the degree of i, the in-degree in a directed graph. Doubly stochastic when in- and
    out-degrees are all the same, as on a ring or the exponential graph.
    """
    receiver, sender = _links(graph)
    n = len(graph)
    share = 1 / (1 + np.bincount(receiver, minlength=n))
    return _matrix(receiver, sender, share[receiver], share)


def metropolis(graph: nx.Graph) -> csr_array:
    """W_ij = 1 / (1 + max(d_i, d_j)) for neighbours i, j; W_ii is what is left of 1.

    Symmetric and doubly stochastic on every undirected graph; on a regular one the same as
    `uniform`. Xiao, Boyd and Kim, "Distributed average consensus with least-mean-square
    deviation", J. Parallel Distrib. Comput. 67 (2007), after Metropolis and Hastings.

    Raises UserError for a directed graph, where i's neighbours need not hear from i.
    """
    if graph.is_directed():
        raise UserError(
            "metropolis weights need an undirected graph, but this one is directed; "
            "use weights: uniform",
            key="topology.weights",
        )
    receiver, sender = _links(graph)
    degree = np.bincount(receiver, minlength=len(graph))
    share = 1 / (1 + np.maximum(degree[receiver], degree[sender]))
    kept = 1 - np.bincount(receiver, weights=share, minlength=len(graph))
    return _matrix(receiver, sender, share, kept)


def lazy(graph: nx.Graph) -> csr_array:
    """(I + W) / 2 of the default weights: half of each worker stays, no eigenvalue is below 0."""
    W = uniform(graph) if graph.is_directed() else metropolis(graph)
    half = csr_array(0.5 * (W + identity(len(graph), format="csr")))
    half.sort_indices()
    return half


def push(graph: nx.Graph) -> csr_array:
    """W_ij = 1 / (d_j + 1) for j = i and each j that i hears from: a column-stochastic matrix.

    d_j is the degree of j, the out-degree in a directed graph: each worker splits its mass evenly
    among itself and those that hear it. For push-sum (Kempe, Dobra and Gehrke 2003).
    """
    receiver, sender = _links(graph)
    share = 1 / (1 + np.bincount(sender, minlength=len(graph)))
    return _matrix(receiver, sender, share[sender], share)


WEIGHTS: dict[str, Callable[[nx.Graph], csr_array]] = {
    "uniform": uniform,
    "metropolis": metropolis,
    "lazy": lazy,
    "push": push,
}


def default_weights(graphs: list[nx.Graph]) -> str:
    """The rule taken when the user names none: metropolis, or uniform if any graph is directed."""
    return "uniform" if any(graph.is_directed() for graph in graphs) else "metropolis"


def _links(graph: nx.Graph) -> tuple[np.ndarray, np.ndarray]:
    """(receiver, sender) of every message of one step: two int arrays, one entry a message."""
    edges = np.array(graph.edges(), dtype=np.int64).reshape(-1, 2)
    sender, receiver = edges[:, 0], edges[:, 1]
    if graph.is_directed():
        return receiver, sender
    return np.concatenate([receiver, sender]), np.concatenate([sender, receiver])


def _matrix(
    receiver: np.ndarray, sender: np.ndarray, share: np.ndarray, kept: np.ndarray
) -> csr_array:
    """W with W[receiver, sender] = share and diagonal `kept`."""
    n = len(kept)
    workers = np.arange(n)
    rows = np.concatenate([receiver, workers])
    columns = np.concatenate([sender, workers])
    W = csr_array(coo_array((np.concatenate([share, kept]), (rows, columns)), shape=(n, n)))
    W.sort_indices()
    return W
