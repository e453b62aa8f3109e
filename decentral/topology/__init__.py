"""Topologies: which workers average with which, and with what weights.

`build` makes one from a generator's name or a graph file and checks it; engines take its mixing
matrices, the clock its edges, `describe` its spectral figures and `plot` its picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networkx as nx

from decentral.errors import UserError
from decentral.signature import bind, choose
from decentral.topology.check import (
    check,
    require_column_stochastic,
    require_doubly_stochastic,
    require_static,
    require_symmetric_above,
    require_tree,
    require_undirected,
)
from decentral.topology.core import Topology
from decentral.topology.describe import describe
from decentral.topology.draw import plot
from decentral.topology.files import read
from decentral.topology.graphs import GENERATORS
from decentral.topology.reknit import reknit
from decentral.topology.theory import (
    beta,
    beta_random,
    better_rate,
    c_beta,
    d_beta,
    effective_neighbours,
    step_cost_s,
    transient_steps,
)
from decentral.topology.weights import WEIGHTS, default_weights

__all__ = [
    "GENERATORS",
    "WEIGHTS",
    "Topology",
    "beta",
    "beta_random",
    "better_rate",
    "build",
    "c_beta",
    "check",
    "d_beta",
    "describe",
    "effective_neighbours",
    "plot",
    "read",
    "reknit",
    "require_column_stochastic",
    "require_doubly_stochastic",
    "require_static",
    "require_symmetric_above",
    "require_tree",
    "require_undirected",
    "step_cost_s",
    "transient_steps",
]


def build(
    n: int | None = None,
    name: str | None = None,
    file: str | Path | None = None,
    weights: str | None = None,
    **options: Any,
) -> Topology:
    """The topology of `n` workers from a generator or a graph file, weighed and checked.

    name     a key of `GENERATORS`; `options` are that generator's own
    file     a graph file (see `read`); n may be left out, and must be the file's where given
    weights  a key of `WEIGHTS`; by default what `default_weights` says: metropolis, on
             directed graphs uniform, and their own where the edges bring weights along

    Raises UserError unless exactly one of name and file is given, options fit the generator, a
    graph with n workers exists, it is connected and every row of W sums to 1.
    """
    if (name is None) == (file is None):
        given = "neither" if name is None else "both"
        raise UserError(
            f"a topology is given by name or by file, but {given} came; "
            f"use name: ring (or {', '.join(GENERATORS)}), or file: PATH",
            key="topology",
        )
    if n is not None and n < 1:
        raise UserError(f"a topology needs at least one worker, but n is {n}", key="workers")
    if file is not None:
        graphs, name = [_from_file(file, n, options)], Path(file).name
    else:
        assert name is not None
        graphs = _generate(name, n, options)
    weights = weights or default_weights(graphs)
    rule = choose(WEIGHTS, weights, "topology.weights", "rule for weights")
    topology = Topology(name, tuple(graphs), tuple(rule(graph) for graph in graphs), weights)
    check(topology)
    return topology


def _from_file(file: str | Path, n: int | None, options: dict[str, Any]) -> nx.Graph:
    if options:
        raise UserError(
            f"a topology file takes no options, but {', '.join(options)} came; leave them out",
            key=f"topology.{next(iter(options))}",
        )
    graph = read(file)
    if n not in (None, len(graph)):
        raise UserError(
            f"topology file {Path(file).name} has {len(graph)} nodes, but workers is {n}; "
            f"set workers: {len(graph)}",
            key="workers",
        )
    return graph


def _generate(name: str, n: int | None, options: dict[str, Any]) -> list[nx.Graph]:
    generator = choose(GENERATORS, name, "topology.name", "topology")
    options = bind(generator, options, "topology", given=("n",))
    if n is None:
        raise UserError(f"topology {name} needs a number of workers; set workers", key="workers")
    graphs = generator(n, **options)
    return graphs if isinstance(graphs, list) else [graphs]
