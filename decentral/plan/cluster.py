"""The cluster that a plan is for, as the `network` section of a config says it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np

from decentral.clock import Clock
from decentral.errors import UserError
from decentral.topology import read


@dataclass(frozen=True)
class Measured:
    """Milliseconds that were measured for a model of this size: an all-reduce over all workers,
    and one message each way between neighbours."""

    all_reduce_ms: float | None = None
    exchange_ms: float | None = None


@dataclass(frozen=True)
class Cluster:
    """`file`: the graph file of its cables, if any; `network`: the rest of the section."""

    workers: int
    network: Mapping[str, Any]
    file: str | None = None

    @property
    def section(self) -> dict[str, Any]:
        """`network` of a config."""
        return {**self.network, **({"file": self.file} if self.file is not None else {})}

    @classmethod
    def build(
        cls,
        file: Path | None = None,
        workers: int | None = None,
        latency_ms: float | None = None,
        bandwidth_gbps: float | None = None,
        all_reduce_gbps: float | None = None,
        compute_ms: float | None = None,
        measured: Measured = Measured(),
        size: int = 0,
    ) -> "Cluster":
        """From the options of the command. `size`, bytes of a model, makes times a bandwidth.

        Of an all-reduce of t seconds and an exchange of e, a model of S bytes and latencies a,

            all_reduce bandwidth = 2 S (n-1)/n / (t - n a),    bandwidth = S / (e - a)

        `compute_ms` and `all_reduce_gbps` are the graph file's own, where it has them, as one that
        was measured does. Raises UserError naming the option where one is missing, or two say the
        same.
        """
        workers = count(file, workers)
        graph = None if file is None else read(file, "--cluster")
        if file is not None and graph is not None:
            if compute_ms is None:
                compute_ms = _said(graph, file, "compute_ms")
            if all_reduce_gbps is None and measured.all_reduce_ms is None:
                all_reduce_gbps = _said(graph, file, "all_reduce_gbps")
        if compute_ms is None:
            raise UserError("say what a local step takes, such as --compute-ms 146", "--compute-ms")
        _exclude("--bandwidth-gbps", bandwidth_gbps, "--exchange-ms", measured.exchange_ms)
        _exclude("--all-reduce-gbps", all_reduce_gbps, "--all-reduce-ms", measured.all_reduce_ms)
        if file is not None and graph is not None:
            _exclude("--cluster", str(file), "--exchange-ms", measured.exchange_ms)
            _require(graph, file, "latency_ms", latency_ms)
            _require(graph, file, "bandwidth_gbps", bandwidth_gbps)
        if file is None and bandwidth_gbps is None and measured.exchange_ms is None:
            raise UserError(
                "say how fast a link is: --bandwidth-gbps 10, or the measured --exchange-ms",
                "--bandwidth-gbps",
            )
        if file is None and latency_ms is None:
            if measured.exchange_ms is None:
                raise UserError("say a link's one-way latency: --latency-ms 0.1", "--latency-ms")
            latency_ms = 0.0  # it is part of the time that was measured
        network: dict[str, Any] = {"compute_ms": compute_ms}
        if latency_ms is not None:
            network["latency_ms"] = latency_ms
        if measured.exchange_ms is not None:
            assert latency_ms is not None
            sending_ms = _positive(measured.exchange_ms - latency_ms, "--exchange-ms")
            bandwidth_gbps = size * 8e-6 / sending_ms
        if bandwidth_gbps is not None:
            network["bandwidth_gbps"] = bandwidth_gbps
        if measured.all_reduce_ms is not None:
            hops_ms = _hops_ms(graph, workers, latency_ms)
            sending_ms = _positive(measured.all_reduce_ms - hops_ms, "--all-reduce-ms")
            all_reduce_gbps = 2 * size * (workers - 1) / workers * 8e-6 / sending_ms
        if all_reduce_gbps is not None:
            network["all_reduce_gbps"] = all_reduce_gbps
        return cls(workers, network, None if file is None else str(file.absolute()))


def count(file: Path | None, workers: int | None) -> int:
    """Of workers, at least 2. Raises UserError unless exactly one of both is given."""
    if (file is None) == (workers is None):
        came = "neither" if file is None else "both"
        raise UserError(
            f"a cluster is a graph file or a number of workers on equal links, and {came} came;"
            " give --cluster FILE, or --workers 16 --bandwidth-gbps 10 --latency-ms 0.1",
            "--cluster",
        )
    if file is not None:
        workers = len(read(file, "--cluster"))
    assert workers is not None
    if workers < 2:
        option = "--workers" if file is None else "--cluster"
        raise UserError(f"a plan is for at least 2 workers; got {workers}", option)
    return workers


def _said(graph: nx.Graph, file: Path, attribute: str) -> float | None:
    """What a graph file says of the cluster as a whole."""
    value = graph.graph.get(attribute)
    if value is None:
        return None
    if not isinstance(value, int | float) or not value > 0:
        raise UserError(
            f"{attribute} of {file.name} must be a positive number; got {value!r}", "--cluster"
        )
    return float(value)


def _hops_ms(graph: nx.Graph | None, n: int, latency_ms: float | None) -> float:
    """Latencies of an all-reduce, as the clock has them: what it takes for no bytes."""
    clock = Clock(np.zeros(n), (latency_ms or 0.0) * 1e-3, np.inf, cluster=graph)
    return clock.all_reduce_s(0) * 1e3


def _positive(ms: float, option: str) -> float:
    if ms <= 0:
        raise UserError("must be longer than the latencies that it includes", option)
    return ms


def _exclude(one: str, value: object, other: str, value_too: object) -> None:
    if value is not None and value_too is not None:
        raise UserError(f"says the same as {other}; leave one of them away", one)


def _require(graph: nx.Graph, file: Path, attribute: str, default: float | None) -> None:
    """Every edge must have the attribute, unless an option says what holds where it is missing."""
    missing = [edge for edge in graph.edges() if attribute not in graph.edges[edge]]
    if missing and default is None:
        u, v = (graph.nodes[i]["label"] for i in missing[0])
        option = f"--{attribute.replace('_', '-')}"
        raise UserError(
            f"{len(missing)} of the {graph.number_of_edges()} edges of {file.name} have no"
            f" {attribute}, the first being {u} -- {v}; add it to the file, or give {option} for"
            " all that have none",
            "--cluster",
        )
