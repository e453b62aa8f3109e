"""Topologies as pictures: where workers stand, what their links carry, which labels they hold.

A picture is numbers alone, in pixels from the top left; the page and matplotlib draw the same.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np

from decentral import topology as topologies
from decentral.errors import UserError
from decentral.report.groups import Group
from decentral.topology.draw import positions

MOST_WORKERS = 128  # in a picture
MOST_HISTOGRAMS = 32
MOST_CLASSES = 30  # as bars beside a worker
MOST_LINK_LABELS = 48
MOST_PICTURES = 8
WIDTH, TALLEST, LOWEST = 640.0, 640.0, 260.0
TALLER = 420.0  # with histograms, as far as stretching goes
MARGIN = 52.0
HISTOGRAM = (46.0, 26.0)
SPACE = np.array([72.0, 58.0])  # of a histogram with the name below it
RADIUS = 11.0
NO_SPLIT = ("task.batch_size", "task.sampling", "task.model")
LONGEST = 24  # characters of a worker's name


@dataclass(frozen=True)
class Worker:
    """A worker at (x, y). bars: (x, y, width, height) of its histogram; none if not drawn."""

    x: float
    y: float
    radius: float
    name: str
    told: str
    bars: list[tuple[float, float, float, float]]


@dataclass(frozen=True)
class Link:
    """From (x1, y1) to (x2, y2). label: its bandwidth, at (x, y), or empty; arrow: goes one way."""

    x1: float
    y1: float
    x2: float
    y2: float
    thickness: float
    label: str
    x: float
    y: float
    arrow: bool


@dataclass(frozen=True)
class Picture:
    """A topology. groups: labels of those that run on it."""

    title: str
    caption: str
    groups: list[str]
    width: float
    height: float
    workers: list[Worker]
    links: list[Link]


def pictures(groups: Sequence[Group], say: Callable[[str], None]) -> list[Picture]:
    """One for each topology and split that differ; `say` is told what cannot be drawn."""
    kinds: dict[str, list[Group]] = {}
    for group in groups:
        of = {
            key: value
            for key, value in group.config.items()
            if key == "workers"
            or (
                key.startswith(("topology.", "task.", "network.file"))
                and not key.startswith(NO_SPLIT)
            )
        }
        if any(key.startswith("topology.") for key in of):
            kinds.setdefault(repr(sorted(of.items())), []).append(group)
    if len(kinds) > MOST_PICTURES:
        say(f"drawn are {MOST_PICTURES} of {len(kinds)} topologies")
    made = []
    for same in list(kinds.values())[:MOST_PICTURES]:
        try:
            made.append(picture(same))
        except UserError as error:
            say(f"the topology of {same[0].label} is not drawn: {error}")
    return made


def picture(groups: Sequence[Group]) -> Picture:
    """Of groups with one topology and split, as the first seed of the first has it.

    Raises UserError where there are too many workers, or a graph file is gone.
    """
    run = groups[0].shown[0]
    config, n = run.config, run.config.workers
    if n > MOST_WORKERS:
        raise UserError(f"{n} workers are more than {MOST_WORKERS}")
    chosen = config.topology
    assert chosen is not None, "pictures has looked"
    for file in (chosen.file, config.network.file):
        if file is not None and not Path(file).is_file():
            raise UserError(f"{Path(file).name} is not there any more")
    # Links alone are drawn, whatever their weights.
    topology = topologies.build(n, chosen.name, chosen.file, **chosen.options)
    union = topology.graphs[0]
    for graph in topology.graphs[1:]:
        union = nx.compose(union, graph)
    cables = topologies.read(config.network.file) if config.network.file is not None else union
    classes, counts = run.labels if run.labels is not None else ((), None)
    drawn = counts is not None and n <= MOST_HISTOGRAMS and counts.shape[1] <= MOST_CLASSES
    places, height = _places(positions(topology))
    if drawn:
        places, height = _apart(places)
    workers = [
        _worker(
            i,
            places[i],
            union.nodes[i],
            {} if counts is None else dict(zip(map(int, classes), counts[i].tolist(), strict=True)),
            drawn,
            n,
        )
        for i in range(n)
    ]
    captions = []
    if topology.period > 1:
        captions.append(f"all links of its {topology.period} graphs, of which one is used a step")
    if drawn:
        captions.append(f"bars: samples of each class on a worker, seed {config.seed}")
    links = _links(union, cables, places, [worker.radius for worker in workers])
    if any(link.label for link in links):
        captions.append("on links: Gbit/s")
    return Picture(
        f"{topology.name}, {n} workers",
        "; ".join(captions),
        [group.label for group in groups],
        WIDTH,
        height,
        workers,
        links,
    )


def _places(found: dict[int, np.ndarray]) -> tuple[np.ndarray, float]:
    """Pixels [n, 2], and the height of the picture: WIDTH across, in the layout's proportion."""
    places = np.array([found[i] for i in range(len(found))], float)
    if not np.isfinite(places).all() or np.abs(places).max() > 1e9:
        raise UserError("its workers have places that no picture has room for")
    low, spread = places.min(axis=0), np.ptp(places, axis=0)
    spread = np.where(spread > 0, spread, spread.max() or 1.0)
    flat = np.ptp(places, axis=0) == 0
    room = WIDTH - 2 * MARGIN
    height = float(np.clip(2 * MARGIN + room * spread[1] / spread[0], LOWEST, TALLEST))
    if flat[1]:
        height = LOWEST
    factor = min(room / spread[0], (height - 2 * MARGIN) / spread[1])
    size = np.where(flat, 0.0, spread) * factor
    corner = (np.array([WIDTH, height]) - size) / 2
    pixels = corner + (places - low) * factor
    pixels[:, 1] = height - pixels[:, 1]
    return pixels, height


def _apart(places: np.ndarray) -> tuple[np.ndarray, float]:
    """Workers that would lie on each other, as cities of one region may, moved until none does;
    and the height of the picture that has room for them."""
    places = places.copy()
    flat = np.ptp(places[:, 1])
    if flat > 0:  # a map of the world is wide, and its rows would lie on each other
        places[:, 1] *= np.clip((TALLER - 2 * MARGIN) / flat, 1, 1.6)
    one, other = np.triu_indices(len(places), 1)
    for _ in range(200):
        between = places[other] - places[one]
        short = SPACE - np.abs(between)  # by how much they overlap, across and down
        if not (overlaps := (short > 0).all(axis=1)).any():
            break
        down = short[:, 1] <= short[:, 0]  # the shorter way out
        push = np.where(np.stack([~down, down], 1), short, 0) * np.where(between < 0, -0.5, 0.5)
        push[~overlaps] = 0
        np.add.at(places, one, -0.5 * push)
        np.add.at(places, other, 0.5 * push)
        places[:, 0] = places[:, 0].clip(MARGIN, WIDTH - MARGIN)
    low, high = places[:, 1].min(), places[:, 1].max()
    height = max(LOWEST, high - low + 2 * MARGIN)
    places[:, 1] += (height - high - low) / 2
    return places, float(height)


def _worker(
    i: int,
    place: np.ndarray,
    attributes: dict[str, Any],
    counts: dict[int, int],
    histogram: bool,
    n: int,
) -> Worker:
    x, y = float(place[0]), float(place[1])
    label = str(attributes.get("label", i))[:LONGEST]
    name = label if label == str(i) else f"{i} {label}"
    told, bars, radius = f"worker {name}", [], RADIUS if n <= 64 else 5.0
    if counts:
        held = [f"{number} of class {label}" for label, number in counts.items() if number]
        more = [f"{len(held) - MOST_CLASSES} more classes"] if len(held) > MOST_CLASSES else []
        told += f"; {sum(counts.values())} samples: " + ", ".join(held[:MOST_CLASSES] + more)
    if histogram:
        radius = math.hypot(*HISTOGRAM) / 2
        width, height = HISTOGRAM
        step = width / len(counts)
        for c, count in enumerate(counts.values()):
            tall = height * count / max(1, *counts.values())
            bars.append((x - width / 2 + c * step, y + height / 2 - tall, step * 0.8, tall))
    return Worker(x, y, radius, name, told, bars)


def _links(
    graph: nx.Graph, cables: nx.Graph, places: np.ndarray, radii: Sequence[float]
) -> list[Link]:
    bandwidths = {
        (u, v): cables.edges[u, v].get("bandwidth_gbps")
        for u, v in graph.edges()
        if cables.has_edge(u, v)
    }
    known = [value for value in bandwidths.values() if value]
    most = max(known, default=1.0)
    labelled = graph.number_of_edges() <= MOST_LINK_LABELS
    links, taken = [], []
    for u, v in graph.edges():
        both_ways = not graph.is_directed() or graph.has_edge(v, u)
        if both_ways and graph.is_directed() and u > v:
            continue
        bandwidth = bandwidths.get((u, v))
        thin = 1.4 if len(places) <= 40 else 0.7
        thickness = 1.0 + 4.0 * math.sqrt(bandwidth / most) if bandwidth else thin
        start, end = places[u], places[v]
        if not both_ways:  # the arrow's head is outside the worker
            away = (end - start) / max(1e-9, float(np.hypot(*(end - start))))
            end = end - away * radii[v]
        label = f"{bandwidth:g}" if bandwidth and labelled else ""
        x1, y1, x2, y2 = map(float, (*start, *end))
        x, y = _free(start, end, places, taken) if label else ((x1 + x2) / 2, (y1 + y2) / 2)
        links.append(Link(x1, y1, x2, y2, thickness, label, x, y, not both_ways))
    return links


def _free(
    start: np.ndarray, end: np.ndarray, places: np.ndarray, taken: list[np.ndarray]
) -> tuple[float, float]:
    """A place for a link's label, near its middle, apart from others, which it joins, and from
    workers; the middle where there is none."""
    for along in (0.5, 0.42, 0.58, 0.35, 0.65, 0.28, 0.72, 0.5):
        place = start + along * (end - start)
        clear = np.abs(places - place) > np.array([38.0, 27.0])
        apart = all(np.hypot(*(place - other)) > 20 for other in taken)
        if clear.any(axis=1).all() and apart:
            break
    taken.append(place)
    return float(place[0]), float(place[1])
