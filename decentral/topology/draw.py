"""A picture of a topology, for `decentral topology --plot`.

Only this module draws; matplotlib is an extra, imported when a picture is asked for.
"""

from __future__ import annotations

import math
from pathlib import Path

import networkx as nx
import numpy as np

from decentral.errors import UserError
from decentral.topology.core import Topology
from decentral.topology.theory import beta

PANELS = 6  # of a time-varying sequence, the first so many graphs
COLUMNS = 3
LABELLED = 40  # workers; more labels than this cannot be read
ON_A_CIRCLE = {
    *("ring", "complete", "exponential", "one_peer_exponential", "small_world"),
    *("equi_static", "equi_dynamic", "random_matchings", "base", "simple_base", "hyper_hypercube"),
}

EDGE, NODE, TEXT = "#8a94a6", "#2f6fb0", "#1d2433"


def plot(topology: Topology, path: str | Path) -> None:
    """Draw the graphs of one period, up to `PANELS` of them, to an image file (its suffix decides).

    Nodes stand where the file's `lat`/`lon` or `x`/`y` attributes put them, else where a layout
    with a fixed seed does. Raises UserError where matplotlib is missing or cannot write `path`.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "a picture needs matplotlib, which is not installed; pip install 'decentral[plot]'"
        ) from error

    places = positions(topology)
    panels = min(topology.period, PANELS)
    columns = min(panels, COLUMNS)
    rows = math.ceil(panels / columns)
    width, height = _panel_size(places, panels)
    figure = Figure(figsize=(max(columns * width, 4.5), rows * height + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    for k in range(panels):
        axes = figure.add_subplot(rows, columns, k + 1)
        _draw_graph(topology.graph(k), places, axes)
        if panels > 1:
            axes.set_title(f"step {k}", fontsize=10, color=TEXT)
    shown = f", first {PANELS} of {topology.period} graphs" if topology.period > PANELS else ""
    figure.suptitle(
        f"{topology.name}\nn = {topology.n}, β = {beta(topology):.4g} "
        f"({topology.weights} weights){shown}",
        fontsize=11,
        color=TEXT,
    )
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write a picture to {path}: {error}; name a .png file") from error


def positions(topology: Topology) -> dict[int, np.ndarray]:
    """Where each worker stands: node -> array [2], the same in every panel."""
    nodes = topology.graphs[0].nodes
    for across, up in (("lon", "lat"), ("x", "y")):
        if all(
            isinstance(data.get(key), int | float)
            for _, data in nodes(data=True)
            for key in (across, up)
        ):
            placed = {i: np.array([nodes[i][across], nodes[i][up]], float) for i in nodes}
            if up == "lat":  # one degree of longitude is cos(latitude) of one of latitude
                squeeze = math.cos(math.radians(np.mean([xy[1] for xy in placed.values()])))
                placed = {i: xy * (squeeze, 1) for i, xy in placed.items()}
            return placed
    union = nx.Graph()
    union.add_nodes_from(nodes)
    for graph in topology.graphs:
        union.add_edges_from(graph.edges())
    if topology.name in ON_A_CIRCLE:  # worker 0 at the top, clockwise
        angles = 2 * np.pi * np.arange(topology.n) / topology.n
        return {i: np.array([np.sin(a), np.cos(a)]) for i, a in enumerate(angles)}
    if topology.n > 200:
        return nx.spring_layout(union, seed=0)
    start = nx.spectral_layout(union)  # from its default, a circle, a grid comes out folded
    jitter = 0.01 * np.random.default_rng(0).standard_normal((topology.n, 2))
    return nx.kamada_kawai_layout(union, pos={i: start[i] + jitter[i] for i in union})


def _panel_size(positions: dict[int, np.ndarray], panels: int) -> tuple[float, float]:
    """(width, height) of a panel in inches, in the proportion of what it shows within reason."""
    spread = np.ptp(np.array(list(positions.values())), axis=0)
    ratio = float(np.clip(spread[0] / spread[1], 0.6, 1.8)) if spread.all() else 1.6
    side = 5.0 if panels == 1 else 3.2
    return side * math.sqrt(ratio), side / math.sqrt(ratio)


def _draw_graph(graph: nx.Graph, positions: dict[int, np.ndarray], axes) -> None:
    n = len(graph)
    size = float(np.clip(6000 / n, 4, 320))
    nodes = nx.draw_networkx_nodes(
        graph,
        positions,
        ax=axes,
        node_size=size,  # pyright: ignore
        node_color=NODE,
        edgecolors="white",
        linewidths=0.8 if n <= 200 else 0,
    )
    nodes.set_zorder(3)
    width = 1.4 if n <= LABELLED else 0.5
    if graph.is_directed() and graph.number_of_edges() <= 500:
        nx.draw_networkx_edges(  # bent, so that two that send to each other show as two arrows
            graph,
            positions,
            ax=axes,
            edge_color=EDGE,
            width=width * 0.8,
            node_size=size,  # pyright: ignore
            arrowsize=9,
            connectionstyle="arc3,rad=0.08",
        )
    else:
        nx.draw_networkx_edges(
            graph, positions, ax=axes, edge_color=EDGE, width=width, arrows=False
        )
    if n <= LABELLED:
        _label(graph, positions, axes, size)
    axes.set_axis_off()
    axes.set_aspect("equal")
    places = np.array(list(positions.values()))
    low, high = places.min(axis=0), places.max(axis=0)
    edge = 0.15 * max(high - low) or 1.0  # of the longer side: a straight line has no other
    axes.set_xlim(low[0] - edge, high[0] + edge)
    axes.set_ylim(low[1] - edge, high[1] + edge)


def _label(graph: nx.Graph, positions: dict[int, np.ndarray], axes, size: float) -> None:
    """Numbers inside the nodes; names of a file's nodes beside them."""
    for i, data in graph.nodes(data=True):
        axes.annotate(
            str(i),
            positions[i],
            ha="center",
            va="center",
            fontsize=7 if size > 150 else 5,
            color="white",
            zorder=4,
        )
        name = str(data.get("label", i))
        if name != str(i):
            others = [positions[j] for j in nx.all_neighbors(graph, i)] or [positions[i]]
            across, up = positions[i] - np.mean(others, axis=0)  # away from the links
            sideways = abs(across) > abs(up)
            offset = math.sqrt(size) / 2 + 2
            axes.annotate(
                name,
                positions[i],
                xytext=(math.copysign(offset, across), 0)
                if sideways
                else (0, math.copysign(offset, up)),
                textcoords="offset points",
                ha=("left" if across > 0 else "right") if sideways else "center",
                va="center" if sideways else ("bottom" if up >= 0 else "top"),
                fontsize=8,
                color=TEXT,
                zorder=5,
            )
