"""The simulated clock: how long a run takes on a given network, worker by worker.

Each worker has its own time. It computes, then waits for those with whom it exchanges: its
neighbours in a gossip step, everyone in a global average. The coordinator replays on it what the
workers did, so that both engines tell the same time for the same run.
"""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np

from decentral.algorithms import Algorithm
from decentral.comm import Event, consecutive_groups
from decentral.config import Config
from decentral.errors import UserError
from decentral.faults import Faults, MessageFaults
from decentral.jitter import JITTERS, Variation
from decentral.signature import bind, choose
from decentral.timeline import Slice, Timeline
from decentral.topology import Topology, read

Link = tuple[float, float]  # seconds, and bytes a second


@dataclass(frozen=True)
class AllReduce:
    """How a mean over all is taken; `bandwidth`: what it reaches between nodes, None: the links'.

    ring          2 size (n-1)/n / bandwidth + a latency a hop, n hops
    tree          up a binomial tree and down again: 2 ceil(log2 n) (latency + size / bandwidth)
    hierarchical  a ring inside each node, a ring over the nodes, and a broadcast inside
    """

    kind: str = "ring"
    bandwidth: float | None = None


@dataclass(frozen=True)
class Nodes:
    """Which workers share a machine, `of` [n], and the link between two such workers."""

    of: np.ndarray
    link: Link

    def groups(self, members: Sequence[int]) -> list[list[int]]:
        """Those of some workers that are on each node."""
        of, those = self.of[np.asarray(members)], np.asarray(members)
        return [those[of == node].tolist() for node in np.unique(of)]


class Clock:
    """Times of n workers, in seconds, from 0; `now` is [n].

    `compute_s`, [n]: seconds of a local step of each worker, which `variation` multiplies.
    `latency_s` and `bandwidth`, in bytes a second, hold for every link but those whose edge says
    otherwise (`latency_ms`, `bandwidth_gbps` in a graph file) and those inside one of the `nodes`.
    `overlap`: the exchanges of a step start with its computing, not after it. `overhead`: what the
    protocol adds to a message, as a share of it. `groups`: the members of those that average by
    themselves, around a ring. `turn_steps`: the steps that one turn of the topology's
    sequence lasts. `cluster`: all the cables between workers, where the topology is not what is
    cabled; a message between two that share none takes the path of least latency. `faults`: what
    does not come is not sent, and who is slow takes longer.
    """

    def __init__(
        self,
        compute_s: np.ndarray,
        latency_s: float,
        bandwidth: float,
        topology: Topology | None = None,
        *,
        variation: Variation | None = None,
        overlap: bool = False,
        overhead: float = 0.0,
        all_reduce: AllReduce = AllReduce(),
        nodes: Nodes | None = None,
        timeline: Timeline | None = None,
        groups: Sequence[np.ndarray] = (),
        turn_steps: int = 1,
        cluster: nx.Graph | None = None,
        faults: Faults | None = None,
    ):
        self.now = np.zeros(len(compute_s))
        self._members = self._everyone = np.arange(len(compute_s))
        self._here = np.ones(len(compute_s), dtype=bool)  # who is a member
        self.timeline = timeline
        self._compute_s = np.asarray(compute_s, dtype=float)
        self._variation = variation
        self._overlap = overlap
        self._on_wire = 1 + overhead  # bytes on the wire for a byte of a message
        self._faults = faults
        self._messages: dict[int, MessageFaults] = {}  # of the exchanges
        # When the computing of the step began, or the last exchange behind it was over.
        self._behind: np.ndarray | None = None
        self._all_reduce = all_reduce
        self._all_reduces: dict[int, float] = {}  # seconds by size
        self._groups, self._turn_steps = groups, turn_steps
        graphs: Sequence[nx.Graph] = topology.graphs if topology else ()
        # Edges without attributes are no cables: a named topology says who averages with whom,
        # and any two workers reach each other as well as neighbours do.
        if cluster is None and len(graphs) == 1 and _has_link_attributes(graphs[0]):
            cluster = graphs[0]
        self._links = _Links(len(self.now), (latency_s, bandwidth), cluster, nodes)
        self._exchanges = [_Exchange(graph, self._links, self._members) for graph in graphs]

    def regroup(self, members: Sequence[int], topology: Topology | None) -> None:
        """Go on with these of the n workers, over their topology.

        The others' times stand still. Who comes, comes when all the others are where they are now.
        """
        new = sorted(set(members) - set(self._members.tolist()))
        self.now[new] = self.now[self._members].max()
        if self._groups:
            groups = consecutive_groups(len(members), len(self._groups))
            self._groups = [np.asarray(members)[group] for group in groups]
        self._members = np.asarray(members)
        self._here = np.isin(self._everyone, self._members)
        self._all_reduces, self._messages, self._behind = {}, {}, None
        graphs: Sequence[nx.Graph] = topology.graphs if topology else ()
        self._exchanges = [_Exchange(graph, self._links, self._members) for graph in graphs]

    @property
    def time_s(self) -> float:
        """When the last worker is done."""
        return float(self.now.max())

    def compute_s_at(self, step: int) -> np.ndarray:
        """Seconds of each worker's local step `step`, [n]."""
        return self._compute_s * self._factors(self._everyone, step)

    def compute_s_of(self, worker: int, step: int) -> float:
        """Seconds of one worker's local step `step`."""
        return float(self._compute_s[worker] * self._factors(np.array([worker]), step)[0])

    def _factors(self, ids: np.ndarray, step: int) -> np.ndarray:
        """How many times as long as usual the step of each of these takes."""
        factors = np.ones(len(ids))
        if self._variation is not None:
            factors *= self._variation.factors(ids, step)
        if self._faults is not None:
            factors *= self._faults.slowdown(step, ids)
        return factors

    def link_s(self, i: int, j: int, size: int) -> float:
        """Seconds from worker i to worker j for `size` bytes that have the link to themselves."""
        latency_s, bandwidth = self._links.direct(i, j)
        return latency_s + size * self._on_wire / bandwidth

    def all_reduce_s(self, size: int) -> float:
        """Seconds from the last worker's arrival to the mean of `size` bytes at everyone."""
        if size not in self._all_reduces:
            self._all_reduces[size] = self._links.all_reduce_s(
                size * self._on_wire, self._all_reduce, self._members.tolist()
            )
        return self._all_reduces[size]

    def advance(self, event: Event) -> None:
        """Let every worker do what `event` says."""
        now = self.now
        if event.kind == "compute":
            takes = self.compute_s_at(event.step) * event.load
            self.now = now + np.where(self._here, takes, 0.0)
            self._behind = now
            self._draw(event, "compute", now, self.now)
            return
        began = now
        if self._overlap and self._behind is not None:
            began = self._behind
        if event.kind == "neighbours":
            exchange = self._exchange(event.step)
            done = exchange.done(began, event.size * self._on_wire)
        else:
            exchange = None
            done = began.copy()
            for members in self._averaging(event):
                done[members] = began[members].max() + self._mean_s(event, members)
        self.now, self._behind = np.maximum(now, done), done
        if self._draws(event):
            if exchange is not None:
                kind = "exchange"
                started, peer = exchange.last(began, event.size * self._on_wire)
            else:
                kind, started, peer = "all-reduce", began.copy(), np.arange(len(now))
                for members in self._averaging(event):
                    last = members[began[members].argmax()]
                    started[members], peer[members] = began[last], last
            if began is not now:
                self._draw(event, kind, started, done, hidden=True)
            shown = np.clip(started, now, self.now)  # what the worker itself spends on it
            self._draw(event, "wait", now, shown, waits_for=peer)
            self._draw(event, kind, shown, self.now)

    def _exchange(self, step: int) -> "_Exchange":
        """The messages of `step`: those of its graph, less those that are lost."""
        turn = step // self._turn_steps % len(self._exchanges)
        exchange = self._exchanges[turn]
        if self._faults is None or not self._faults.touches_links(step):
            return exchange
        if turn not in self._messages:
            ends = exchange.senders, exchange.receivers
            self._messages[turn] = self._faults.of_messages(*ends)
        lost = self._messages[turn].lost(step)
        return exchange.without(lost) if lost.any() else exchange

    def _averaging(self, event: Event) -> Sequence[np.ndarray]:
        """Who averages with whom: everyone, or the members of each group."""
        return self._groups if event.kind == "group" else [self._members]

    def _mean_s(self, event: Event, members: np.ndarray) -> float:
        """Seconds of a mean over everyone, or over the members of a group."""
        if event.kind == "everyone":
            return self.all_reduce_s(event.size)
        size = event.size * self._on_wire
        return self._links.ring_s(size, members.tolist(), self._all_reduce.bandwidth)

    def _draws(self, event: Event) -> bool:
        return self.timeline is not None and self.timeline.covers(event.step)

    def _draw(
        self,
        event: Event,
        kind: str,
        start: np.ndarray,
        end: np.ndarray,
        hidden: bool = False,
        waits_for: np.ndarray | None = None,
    ) -> None:
        if self.timeline is None or not self.timeline.covers(event.step):
            return
        for i in self._members.tolist():
            facts: dict[str, Any] = {}
            if waits_for is not None:
                facts["waits for worker"] = int(waits_for[i])
            elif kind != "compute":
                facts["bytes a message"] = event.size
            span = float(start[i]), float(end[i])
            self.timeline.add(Slice(i, kind, event.step, *span, facts, hidden))


class _Links:
    """The link between any two of n workers, and all-reduces over them."""

    def __init__(self, n: int, default: Link, cluster: nx.Graph | None, nodes: Nodes | None):
        self.n = n
        self._default = default
        self._nodes = nodes
        self._graph = cluster
        self.cables: dict[tuple[int, int], Link] = {}
        if cluster is not None:
            self.cables = {(u, v): self._edge(cluster, u, v) for u, v in _messages(cluster)}

    def share_node(self, i: int, j: int) -> bool:
        return self._nodes is not None and self._nodes.of[i] == self._nodes.of[j]

    def _edge(self, graph: nx.Graph, u: int, v: int) -> Link:
        """What edge (u, v) says of itself, and where it is silent the network's."""
        edge = graph.edges[u, v]
        latency_s, bandwidth = self._default
        if self._nodes is not None and self.share_node(u, v):
            latency_s, bandwidth = self._nodes.link
        if "latency_ms" in edge:
            latency_s = edge["latency_ms"] * 1e-3
        if "bandwidth_gbps" in edge:
            bandwidth = bytes_per_second(edge["bandwidth_gbps"])
        return latency_s, bandwidth

    def direct(self, i: int, j: int) -> Link:
        """From i to j on their own cable, where the graph has one."""
        return self.cables.get((i, j)) or self.between(i, j)

    def between(self, i: int, j: int) -> Link:
        """From i to j on the path of least latency, where the graph's edges are cables."""
        if self._nodes is not None and self.share_node(i, j):
            return self._nodes.link
        if self._graph is None:
            return self._default
        path = nx.shortest_path(self._graph, i, j, weight=lambda u, v, _: self.cables[u, v][0])
        cables = [self.cables[edge] for edge in itertools.pairwise(path)]
        return sum(latency for latency, _ in cables), min(bandwidth for _, bandwidth in cables)

    def all_reduce_s(self, size: float, chosen: AllReduce, members: list[int]) -> float:
        """Seconds of an all-reduce of `size` bytes over `members`."""
        groups = self._nodes.groups(members) if self._nodes else [[i] for i in members]
        if chosen.kind == "tree":
            return self._tree_s(size, chosen.bandwidth, members)
        if chosen.kind == "ring":
            return self.ring_s(size, list(itertools.chain(*groups)), chosen.bandwidth)
        inside = max(self.ring_s(size, group, None) for group in groups)
        over = self.ring_s(size, [group[0] for group in groups], chosen.bandwidth)
        back = max(self._broadcast_s(size, group) for group in groups)
        return inside + over + back

    def ring_s(self, size: float, ring: list[int], reached: float | None) -> float:
        """2 size (n-1)/n / bandwidth of the slowest hop + the latency of n hops."""
        n = len(ring)
        if n == 1:
            return 0.0
        hops = [self._hop(i, j, reached) for i, j in zip(ring, ring[1:] + ring[:1], strict=True)]
        slowest = min(bandwidth for _, bandwidth in hops)
        return 2 * size * (n - 1) / n / slowest + sum(latency_s for latency_s, _ in hops)

    def _tree_s(self, size: float, reached: float | None, members: list[int]) -> float:
        """Up a binomial tree to the first of them, a round at a time, and down again."""
        seconds, stride = 0.0, 1
        while stride < len(members):
            senders = range(stride, len(members), 2 * stride)
            for pairs in ([(i, i - stride) for i in senders], [(i - stride, i) for i in senders]):
                links = [self._hop(members[i], members[j], reached) for i, j in pairs]
                seconds += max(latency_s + size / bandwidth for latency_s, bandwidth in links)
            stride *= 2
        return seconds

    def _broadcast_s(self, size: float, chain: list[int]) -> float:
        """Down a chain in small pieces: size / bandwidth + the latency of its hops."""
        links = [self.between(i, j) for i, j in itertools.pairwise(chain)]
        if not links:
            return 0.0
        slowest = min(bandwidth for _, bandwidth in links)
        return size / slowest + sum(latency_s for latency_s, _ in links)

    def _hop(self, i: int, j: int, reached: float | None) -> Link:
        """A hop of an all-reduce; `reached` is its bandwidth between nodes, where one is known."""
        latency_s, bandwidth = self.between(i, j)
        if reached is not None and not self.share_node(i, j):
            return latency_s, reached
        return latency_s, bandwidth


class _Exchange:
    """The messages of one gossip step, as arrays.

    A message passes when both ends are there: senders wait too, for they may not touch what they
    send. It takes latency + size / bandwidth, where the bandwidth is the link's, or, if that is
    less, an equal share of the card at either end among what that worker sends, or hears. A card
    works in both directions at once and is as fast as its worker's fastest link, used or not; what
    stays inside a node does not pass it. Cables on the way of several messages are shared by none.
    """

    def __init__(self, graph: nx.Graph, links: "_Links", members: np.ndarray):
        ends = members[np.array(_messages(graph), dtype=np.int64).reshape(-1, 2)]
        messages = [(int(u), int(v)) for u, v in ends]
        self.senders, self.receivers = ends[:, 0], ends[:, 1]
        edges = np.array([links.direct(u, v) for u, v in messages]).reshape(-1, 2)
        self._latency_s, self._bandwidth = edges[:, 0], edges[:, 1]
        inside = np.array([links.share_node(u, v) for u, v in messages], dtype=np.int64)
        self._out, self._into = 2 * self.senders + inside, 2 * self.receivers + inside
        self._card = card = np.zeros(2 * links.n)
        for ends in (self._out, self._into):
            np.maximum.at(card, ends, self._bandwidth)
        for (u, v), (_, reached) in links.cables.items():
            for end in (2 * u, 2 * v):
                card[end + links.share_node(u, v)] = max(
                    card[end + links.share_node(u, v)], reached
                )
        self._share()

    def without(self, lost: np.ndarray) -> "_Exchange":
        """The same less the `lost` messages, bool [k]: the others share the cards."""
        left = copy.copy(self)
        for name in ("senders", "receivers", "_out", "_into", "_latency_s", "_bandwidth"):
            setattr(left, name, getattr(self, name)[~lost])
        left._share()
        return left

    def _share(self) -> None:
        out, into, card = self._out, self._into, self._card
        sent, heard = (np.bincount(ends, minlength=len(card)) for ends in (out, into))
        shares = [self._bandwidth, card[out] / sent[out], card[into] / heard[into]]
        self._seconds_per_byte = 1 / np.minimum.reduce(shares)

    def done(self, began: np.ndarray, size: float) -> np.ndarray:
        """When each worker has sent and heard everything, [n], if it is there at `began`."""
        done = began.copy()
        _, sent, heard = self._times(began, size)
        np.maximum.at(done, self.senders, sent)
        np.maximum.at(done, self.receivers, heard)
        return done

    def last(self, began: np.ndarray, size: float) -> tuple[np.ndarray, np.ndarray]:
        """Of each worker's last message: when it could start, and who is at the other end."""
        start, sent, heard = self._times(began, size)
        worker = np.concatenate([self.senders, self.receivers])
        peer = np.concatenate([self.receivers, self.senders])
        order = np.lexsort((np.tile(start, 2), np.concatenate([sent, heard])))
        started, waits_for = began.copy(), np.arange(len(began))
        started[worker[order]] = np.tile(start, 2)[order]  # the last one stays
        waits_for[worker[order]] = peer[order]
        return started, waits_for

    def _times(self, began: np.ndarray, size: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each message: when both ends are there, when it is out, and when it is heard."""
        start = np.maximum(began[self.senders], began[self.receivers])
        sent = start + size * self._seconds_per_byte
        return start, sent, sent + self._latency_s


def clock_options(
    config: Config, topology: Topology | None, algorithm: Algorithm
) -> dict[str, Any]:
    """What `config.network` and `config.record` ask of the clock: keyword arguments of `Clock`.

    Raises UserError, naming the key, where they do not fit each other or the method.
    """
    network = config.network
    overlaps = getattr(algorithm.rule, "overlaps", False)
    if network.overlap and not overlaps:
        raise UserError(
            f"{config.algorithm.name} sends what it computes in the same step, so the exchange"
            " cannot hide behind the computing; take gossip_cta, or network.overlap=false",
            "network.overlap",
        )
    cluster = cluster_of(config, topology)
    nodes = _nodes(config, cluster)
    if network.all_reduce == "hierarchical" and nodes is None:
        raise UserError(
            "a hierarchical all-reduce goes by which workers share a node; set, for example,"
            " network.nodes={workers_per_node: 8, bandwidth_gbps: 400}",
            "network.all_reduce",
        )
    reached = network.all_reduce_gbps
    if reached is not None:  # was measured on what messages hold
        reached = bytes_per_second(reached) * (1 + network.overhead)
    return {
        "latency_s": network.latency_ms * 1e-3,
        "bandwidth": bytes_per_second(network.bandwidth_gbps),
        "variation": _variation(config),
        "overlap": overlaps if network.overlap is None else network.overlap,
        "overhead": network.overhead,
        "all_reduce": AllReduce(network.all_reduce, reached),
        "nodes": nodes,
        "groups": consecutive_groups(config.workers, algorithm.schedule.groups),
        "faults": Faults(config.faults, config.seed, config.workers) if config.faults else None,
        "turn_steps": algorithm.gossip_period,
        "cluster": cluster if network.file is not None else None,
        "timeline": Timeline(config.record.timeline) if config.record.timeline else None,
    }


def _variation(config: Config) -> Variation | None:
    jitter, stragglers = config.network.jitter, config.network.stragglers
    if jitter is None and stragglers is None:
        return None
    draw = None
    if jitter is not None:
        key = "network.jitter"
        kind = choose(JITTERS, jitter.kind, f"{key}.kind", "jitter")
        draw = kind(**bind(kind, jitter.options, key, name=jitter.kind, beside=("kind",)))
    if stragglers is None:
        return Variation(config.seed, draw)
    return Variation(config.seed, draw, stragglers.probability, stragglers.slowdown)


def _nodes(config: Config, cluster: nx.Graph | None) -> Nodes | None:
    """From `network.nodes`: so many workers after each other, or as the graph's nodes say."""
    nodes = config.network.nodes
    if nodes is None:
        return None
    link = nodes.latency_ms * 1e-3, bytes_per_second(nodes.bandwidth_gbps)
    if nodes.workers_per_node is not None:
        return Nodes(np.arange(config.workers) // nodes.workers_per_node, link)
    said = dict(cluster.nodes(data="node")) if cluster is not None else {}
    missing = [i for i in range(config.workers) if said.get(i) is None]
    if missing:
        raise UserError(
            f"must say how many workers share a node, for no graph file says where worker"
            f" {missing[0]} is; set network.nodes.workers_per_node, or the attribute `node` on"
            " every node of topology.file or network.file",
            "network.nodes",
        )
    names = [str(said[i]) for i in range(config.workers)]
    return Nodes(np.unique(names, return_inverse=True)[1], link)


def cluster_of(config: Config, topology: Topology | None) -> nx.Graph | None:
    """The graph whose nodes and edges say what workers and links are: network.file's if there is
    one, or the topology's own."""
    file = config.network.file
    if file is None:
        return topology.graphs[0] if topology is not None else None
    graph = read(file, "network.file")
    if len(graph) != config.workers:
        raise UserError(
            f"{Path(file).name} has {len(graph)} nodes, but workers is {config.workers}; set"
            f" workers: {len(graph)}",
            "network.file",
        )
    if not nx.is_strongly_connected(graph.to_directed()):
        raise UserError(
            f"not all workers of {Path(file).name} reach each other over its edges; add the"
            " cables that are missing",
            "network.file",
        )
    return graph


def compute_scale(cluster: nx.Graph | None, n: int) -> np.ndarray:
    """How many times slower than usual each worker computes, from the graph's nodes, [n]."""
    if cluster is None:
        return np.ones(n)
    scales = cluster.nodes(data="compute_scale", default=1.0)
    return np.array([float(scale) for _, scale in sorted(scales)])


def _messages(graph: nx.Graph) -> list[tuple[int, int]]:
    """(sender, receiver) of every message of one exchange."""
    edges = list(graph.edges())
    return edges if graph.is_directed() else edges + [(v, u) for u, v in edges]


def _has_link_attributes(graph: nx.Graph) -> bool:
    return any("latency_ms" in e or "bandwidth_gbps" in e for _, _, e in graph.edges(data=True))


def bytes_per_second(bandwidth_gbps: float) -> float:
    """Gbit/s as the wire counts, 1e9 bits, in bytes."""
    return bandwidth_gbps * 1e9 / 8
