"""What must hold before anything starts. `build` calls `check`; a method that needs more of W calls
`require_doubly_stochastic`. Each raises a UserError that states the rule, what came, the remedy.
"""

from __future__ import annotations

import networkx as nx
import numpy as np
from scipy.sparse.csgraph import connected_components

from decentral.errors import UserError
from decentral.topology.core import ROUND_OFF, Topology


def check(topology: Topology) -> None:
    """Rows of every W(k) sum to 1, and news from each worker reaches every other.

    A time-varying topology must be connected jointly: the union of its graphs over one period.
    Directed ones must be strongly connected.

    Raises UserError otherwise.
    """
    for k, W in enumerate(topology.matrices):
        sums = W.sum(axis=1)
        worst = int(np.argmax(np.abs(sums - 1)))
        if not abs(sums[worst] - 1) <= ROUND_OFF:
            raise UserError(
                f"every row of a mixing matrix must sum to 1, but in topology {topology.name} at "
                f"step {k} row {worst} sums to {sums[worst]:.6g}; correct the weights rule "
                f"{topology.weights!r}",
                key="topology.weights",
            )
    union = sum(topology.matrices[1:], start=topology.matrices[0])
    directed = any(graph.is_directed() for graph in topology.graphs)
    parts, part_of = connected_components(union, directed=directed, connection="strong")
    if parts > 1:
        smallest = int(np.argmin(np.bincount(part_of)))
        workers = np.flatnonzero(part_of == smallest)
        listed = ", ".join(_label(topology.graphs[0], int(i)) for i in workers[:5])
        raise UserError(
            f"topology {topology.name} must be {'strongly ' if directed else ''}connected"
            f"{' over one period' if topology.period > 1 else ''}, but it falls into {parts} "
            f"parts, one of them {{{listed}{', ...' if len(workers) > 5 else ''}}}; "
            "add links between the parts"
        )


def require_doubly_stochastic(topology: Topology, method: str) -> None:
    """Refuse a topology whose mixing moves the mean of the workers, on behalf of `method`.

    Raises UserError naming the step and the column whose sum is furthest from 1.
    """
    if topology.is_doubly_stochastic:
        return
    sums = np.array([W.sum(axis=0) for W in topology.matrices])
    step, column = np.unravel_index(np.argmax(np.abs(sums - 1)), sums.shape)
    directed = any(graph.is_directed() for graph in topology.graphs)
    remedy = "make the graph undirected" if directed else "use weights: metropolis"
    raise UserError(
        f"{method} needs a doubly stochastic W, but in topology {topology.name} with weights "
        f"{topology.weights} column {column} at step {step} sums to {sums[step, column]:.6g}; "
        f"{remedy}, or choose a method for such weights",
        key="topology.weights",
    )


def _label(graph: nx.Graph, worker: int) -> str:
    return str(graph.nodes[worker].get("label", worker))
