"""Measure a cluster: how fast its workers compute, and what the links between them are like.

The workers of a config are started as for a run, and exchange as in a run: through PeerComm, in
both directions at once. What comes out is a graph whose file `topology.file` and the clock read.
"""

import datetime
import importlib.metadata
import itertools
import logging
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import torch
import torch.distributed as dist

from decentral.config import Config
from decentral.engines.worker import Worker
from decentral.errors import UserError
from decentral.experiment import build
from decentral.peer import PeerComm
from decentral.topology import Topology

log = logging.getLogger(__name__)

Pairs = list[tuple[int, int]]

ROUND_S = 2.0  # at most, for a round of pairs, on links that are not too slow for FIRST
COMPUTE_S = 1.0  # so long all workers take steps
LATENCIES = 20  # small messages a pair, at most
FIRST, LARGEST = 2**18, 2**26  # bytes of a large message, doubled until it takes long enough


def measure(config: Config, say: Callable[[str], None] = log.info, seconds: float = 60) -> nx.Graph:
    """The cluster that `config.ray` means, as a complete graph of the config's workers.

    seconds   for all links together, about; slow links take longer, see `link`

    Nodes: `compute_scale`, of a step of the config's task while all workers compute, as a multiple
    of the fastest worker's; `node`, the machine. Edges: `latency_ms`, `bandwidth_gbps`. Graph:
    `compute_ms`, the fastest worker's step; `all_reduce_gbps`, as network.all_reduce_gbps means it;
    what was measured with what. Links between two machines have the figures of one pair.

    Raises UserError if the config has one worker, or is wrong; WorkerError if a worker fails.
    """
    from decentral.engines.ray import RayEngine  # ray is slow to import: not for reading files

    n = config.workers
    if n < 2:
        raise UserError("links have two ends, and there is 1 worker; set workers=2", "workers")
    experiment = build(config)
    engine = RayEngine(experiment, say)
    try:
        nodes = engine.addresses
        rounds = rounds_of(nodes)
        each = min(ROUND_S, seconds / (len(rounds) + 1))
        say(f"measuring {math.comb(n, 2)} links in {len(rounds)} rounds of {each:.2g} s at most")
        began = time.monotonic()
        seen: list[_Seen] = engine.ask(_look, rounds, each)
        say(f"measured in {time.monotonic() - began:.0f} s")
    finally:
        engine.close()
    fastest = min(s.step_s for s in seen)
    graph = nx.complete_graph(n)
    graph.graph.update(
        compute_ms=_rounded(fastest * 1e3),
        all_reduce_gbps=_rounded(_gbps(statistics.median(s.all_reduce for s in seen))),
        parameters=sum(p.numel() for p in experiment.task.model.parameters() if p.requires_grad),
        task=config.task.name,
        batch_size=config.task.batch_size,
        backend=seen[0].backend,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        versions={
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("decentral", "torch", "ray")},
        },
    )
    for worker, (node, s) in enumerate(zip(nodes, seen, strict=True)):
        graph.nodes[worker].update(node=node, compute_scale=_rounded(s.step_s / fastest))
    of_pair = {pair: link for s in seen for pair, link in s.links.items()}
    first = {node: nodes.index(node) for node in nodes}
    for u, v in graph.edges():
        ends = (u, v) if nodes[u] == nodes[v] else (first[nodes[u]], first[nodes[v]])
        latency_s, bandwidth = of_pair[min(ends), max(ends)]
        graph.edges[u, v]["latency_ms"] = _rounded(latency_s * 1e3)
        graph.edges[u, v]["bandwidth_gbps"] = _rounded(_gbps(bandwidth))
    return graph


def thin(cluster: nx.Graph, topology: Topology) -> nx.Graph:
    """The cluster with those links alone that the topology uses at some step."""
    used = {frozenset(edge) for graph in topology.graphs for edge in graph.edges()}
    thinned = cluster.copy()
    thinned.remove_edges_from([e for e in cluster.edges() if frozenset(e) not in used])
    return thinned


def measure_command(
    config: Config,
    out: Path,
    say: Callable[[str], None] = log.info,
    seconds: float = 60,
    used: bool = False,
) -> nx.Graph:
    """Measure, and write it to `out`, a GML file; with `used` only what the config's topology uses.

    Raises UserError, before measuring, where that cannot be.
    """
    if out.suffix != ".gml":
        raise UserError(f"a measured cluster is a GML file; got {out.name}, end it in .gml", "out")
    if not out.parent.is_dir():
        raise UserError(f"there is no folder {out.parent}; make it first", "out")
    topology = build(config).topology if used else None
    if used and topology is None:
        raise UserError("no topology says which links are used; take --used away", "topology")
    cluster = measure(config, say, seconds)
    if topology is not None:
        cluster = thin(cluster, topology)
    nx.write_gml(cluster, out)
    return cluster


def overrides(cluster: nx.Graph, out: Path) -> list[str]:
    """What has a run's clock reckon with a measured cluster, and the run gossip along its links."""
    keys = ("compute_ms", "all_reduce_gbps")
    measured = [f"network.{key}={cluster.graph[key]}" for key in keys]
    return ["topology.name=null", f"topology.file={out}", *measured]


def rounds_of(nodes: Sequence[str]) -> list[Pairs]:
    """Which pairs measure at the same time, where worker i is on `nodes[i]`.

    First all pairs that share a node, each node by itself; then one worker of every node, so that
    a pair has both its network cards to itself.
    """
    members: dict[str, list[int]] = {}
    for worker, node in enumerate(nodes):
        members.setdefault(node, []).append(worker)
    inside = itertools.zip_longest(*map(tournament, members.values()), fillvalue=[])
    together = [list(itertools.chain(*rounds)) for rounds in inside]
    across = tournament([group[0] for group in members.values()])
    return [pairs for pairs in together + across if pairs]


def tournament(players: Sequence[int]) -> list[Pairs]:
    """Every two meet once, and nobody twice in a round: n - 1 rounds, n if n is odd.

    The circle method: one stays, the others move on by a seat, who sit opposite meet.
    """
    empty = -1
    seats = [*players, *([empty] if len(players) % 2 else [])]
    rounds = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        opposite = zip(seats[:half], reversed(seats[half:]), strict=True)
        rounds.append([(min(pair), max(pair)) for pair in opposite if empty not in pair])
        seats[1:] = [seats[-1], *seats[1:-1]]
    return rounds


@dataclass(frozen=True)
class _Seen:
    """What one worker measured: seconds of a step; of each pair whose lower rank it is, seconds of
    latency and bytes a second; bytes a second of the all-reduce."""

    backend: str
    step_s: float
    links: dict[tuple[int, int], tuple[float, float]]
    all_reduce: float


def _look(worker: Worker, rounds: list[Pairs], seconds: float) -> _Seen:
    """Measure as one worker of all, which all do it at the same time."""
    backend, device = dist.get_backend(), worker.device
    comm = PeerComm(None, device=device)
    _meet(comm, device)
    steps, began = [worker.step_seconds()], time.perf_counter()
    while time.perf_counter() - began < COMPUTE_S:
        steps.append(worker.step_seconds())
    links = {}
    for pairs in rounds:
        _meet(comm, device)
        for u, v in pairs:
            if comm.rank in (u, v):
                # A door of its own, for it keeps a buffer for each size that it has heard.
                door = PeerComm(None, device=device)
                found = link(door, u + v - comm.rank, device, seconds)
                if comm.rank == u:
                    links[u, v] = found
    _meet(comm, device)
    return _Seen(backend, statistics.median(steps), links, _all_reduce(comm, device, seconds))


def _meet(comm: PeerComm, device: str) -> None:
    """Wait for all."""
    comm.mean(torch.zeros(1, device=device), 0, counted=False)


def link(comm: PeerComm, peer: int, device: str, seconds: float) -> tuple[float, float]:
    """Seconds of latency, and bytes a second each way, of the link to `peer`.

    t(S) = latency + S / bandwidth; latency is the median t of a few bytes. S doubles until t is an
    eighth of `seconds`, or S is LARGEST, and the best of three gives the bandwidth.
    """

    def agreed(value: float) -> float:
        mine = torch.tensor([value], dtype=torch.float64, device=device)
        return (value + comm.trade(mine, peer, 0).item()) / 2

    def trade_s(message: torch.Tensor) -> float:
        return agreed(_seconds(lambda: comm.trade(message, peer, 0), device))

    few = torch.zeros(8, dtype=torch.uint8, device=device)
    trade_s(few)  # opens the connection
    small = [trade_s(few)]
    while len(small) < LATENCIES and 2 * sum(small) < seconds / 4:
        small.append(trade_s(few))
    latency_s = statistics.median(small)
    size, taken_s = _long_enough(trade_s, device, seconds)
    return latency_s, size / max(taken_s - latency_s, 0.01 * taken_s)


def _all_reduce(comm: PeerComm, device: str, seconds: float) -> float:
    """Bytes a second, b, of an all-reduce over all: t(S) = t(0) + 2 S (n-1)/n / b."""

    def mean_s(message: torch.Tensor) -> float:
        took = _seconds(lambda: comm.mean(message, 0, counted=False), device)
        mine = torch.tensor([took], dtype=torch.float64, device=device)
        return comm.mean(mine, 0, counted=False).item()

    few = torch.zeros(2, device=device)
    idle_s = statistics.median(mean_s(few) for _ in range(5))
    size, taken_s = _long_enough(mean_s, device, seconds)
    return 2 * size * (comm.n - 1) / comm.n / max(taken_s - idle_s, 0.01 * taken_s)


def _long_enough(
    exchange_s: Callable[[torch.Tensor], float], device: str, seconds: float
) -> tuple[int, float]:
    """Bytes of a message that takes an eighth of `seconds`, or LARGEST; its best time of three, for
    whatever else runs there only slows it down.

    `exchange_s` gives the same at all ends, so that all go on with the same size.
    """
    size = FIRST
    message = torch.zeros(size // 4, device=device)
    while exchange_s(message) < seconds / 8 and size < LARGEST:
        size *= 2
        message = torch.zeros(size // 4, device=device)
    return size, min(exchange_s(message) for _ in range(3))


def _seconds(do: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    do()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _gbps(bytes_per_second: float) -> float:
    return bytes_per_second * 8 / 1e9


def _rounded(value: float) -> float:
    """Four digits: a measurement has no more."""
    return float(f"{value:.4g}")
