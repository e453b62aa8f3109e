"""Graph files: any format that networkx reads natively, chosen by suffix, GML first.

Known attributes are checked here, so that the clock can trust them: `latency_ms` and
`bandwidth_gbps` on edges, `compute_scale` on nodes, all optional. Other attributes are kept and
ignored (an edge's `weight` too: mixing weights come from the topology's rule).
"""

from __future__ import annotations

import gzip
import inspect
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import networkx as nx
from networkx.readwrite.graph6 import data_to_n

from decentral.errors import UserError

# attribute -> (the rule in words, what a finite number must satisfy)
EDGE_ATTRIBUTES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "latency_ms": ("a number >= 0", lambda value: value >= 0),
    "bandwidth_gbps": ("a number > 0", lambda value: value > 0),
    "mixing": ("a number > 0", lambda value: value > 0),
}
NODE_ATTRIBUTES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "compute_scale": ("a number > 0", lambda value: value > 0),
}

MOST_BYTES = 2**26  # of a file, unpacked: a million links
MOST_NODES = 100_000


def read(path: str | Path, key: str = "topology.file") -> nx.Graph:
    """The graph in a file, nodes renumbered 0..n-1 in the order in which the file lists them.

    A node's old name is kept as its attribute `label`. Self-loops are dropped: a worker's own share
    comes from the weights rule. Edge lists and adjacency lists are read as undirected. `key`
    names the file in messages.

    Raises UserError for a file that is missing, unreadable or empty, a suffix not in `READERS`,
    parallel edges, and known attributes of a wrong type or out of range.
    """
    path = Path(path)
    reader = READERS.get(_suffix(path))
    if reader is None:
        raise UserError(
            f"a topology file ends in one of {', '.join(READERS)} (.gz may follow), "
            f"but this one is {path.name}; convert it, best to .gml",
            key=key,
        )
    if not os.path.isfile(path):
        raise UserError(f"there is no topology file {path}; correct the path", key=key)
    try:
        _check_size(path)
        graph = reader(path)
    except Exception as error:  # each parser raises whatever it trips over
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"cannot read topology file {path.name} as {_suffix(path)}: {reason}; correct the file",
            key=key,
        ) from error
    if len(graph) > MOST_NODES:
        raise UserError(f"{path.name} has {len(graph)} nodes, more than {MOST_NODES}", key=key)
    if len(graph) == 0:
        raise UserError(f"topology file {path.name} has no nodes; it needs at least one", key=key)
    graph = _simple(graph, path, key)
    _check_attributes(graph, path, key)
    numbered = nx.relabel_nodes(graph, dict(zip(graph, range(len(graph)), strict=True)))
    for number, name in enumerate(graph):
        numbered.nodes[number].setdefault("label", name)
    return numbered


def _check_size(path: Path) -> None:
    """Raise ValueError for a file that would unpack to more than anybody's network."""
    with _open(path) as stream:
        size = 0
        while block := stream.read(2**20):
            size += len(block)
            if size > MOST_BYTES:
                raise ValueError(f"it is longer than {MOST_BYTES} bytes, unpacked")


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _read_sparse6(path: Path) -> nx.Graph:
    with _open(path) as stream:
        head = stream.readline().strip().removeprefix(b">>sparse6<<").removeprefix(b":")
    # Eight bytes can tell of 2^36 nodes. networkx makes them all, edges or not.
    nodes, _ = data_to_n([byte - 63 for byte in head[:8]])
    if nodes > MOST_NODES:
        raise ValueError(f"it tells of {nodes} nodes, more than {MOST_NODES}")
    return nx.read_sparse6(path)


def _read_gml(path: Path) -> nx.Graph:
    try:
        return nx.read_gml(path)
    except nx.NetworkXError as error:
        if "has no 'label' attribute" not in str(error):
            raise
        return nx.read_gml(path, label="id")  # labels are optional in GML, ids are not


def _read_edgelist(path: Path) -> nx.Graph:
    return nx.read_edgelist(path, create_using=nx.MultiGraph)  # a plain Graph would merge silently


def _read_json(path: Path) -> nx.Graph:
    with _open(path) as stream:
        data = json.load(stream)
    edges = "edges" if "edges" in data else "links"  # networkx wrote "links" up to 3.5
    renamed = "edges" in inspect.signature(nx.node_link_graph).parameters  # from 3.4 on
    return nx.node_link_graph(
        # as a multigraph, so that parallel edges are seen here and not merged there
        data | {"multigraph": True},
        **{"edges" if renamed else "link": edges},
    )


READERS: dict[str, Callable[[Path], nx.Graph]] = {
    ".gml": _read_gml,
    ".graphml": nx.read_graphml,
    ".gexf": nx.read_gexf,
    ".json": _read_json,
    ".edgelist": _read_edgelist,
    ".adjlist": nx.read_adjlist,
    ".net": nx.read_pajek,
    ".graph6": nx.read_graph6,
    ".sparse6": _read_sparse6,
}


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _simple(graph: nx.Graph, path: Path, key: str) -> nx.Graph:
    """The same graph without self-loops and, if read as a multigraph, as a simple one."""
    if graph.is_multigraph():
        links = set()
        for u, v in graph.edges():
            link = (u, v) if graph.is_directed() else frozenset((u, v))
            if link in links and u != v:
                raise UserError(
                    f"topology file {path.name} has parallel edges {u} -- {v}; two workers share "
                    "at most one link: merge them into one",
                    key=key,
                )
            links.add(link)
        graph = nx.DiGraph(graph) if graph.is_directed() else nx.Graph(graph)
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    return graph


def _check_attributes(graph: nx.Graph, path: Path, key: str) -> None:
    arrow = "->" if graph.is_directed() else "--"
    for u, v, data in graph.edges(data=True):
        _check_numbers(data, EDGE_ATTRIBUTES, f"{path.name}, edge {u} {arrow} {v}", key)
    for name, data in graph.nodes(data=True):
        _check_numbers(data, NODE_ATTRIBUTES, f"{path.name}, node {name}", key)


def _check_numbers(
    data: Mapping[str, Any],
    rules: dict[str, tuple[str, Callable[[float], bool]]],
    where: str,
    key: str,
) -> None:
    for attribute, (rule, holds) in rules.items():
        if attribute not in data:
            continue
        value = data[attribute]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and holds(value)):
            raise UserError(
                f"topology file {where}: {attribute} must be {rule}, but it is {value!r}; "
                "correct the value or leave it out",
                key=key,
            )
