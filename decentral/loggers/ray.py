"""Ray's metrics: gauges that its dashboard, Prometheus and Grafana show (launch/grafana.json).

Ray puts `ray_` before each name. The driver sets those of the records, `decentral_loss` and so on,
with the run's name as a tag; each worker sets its own, `decentral_worker_loss` and so on, with its
rank as a tag too. The node's agent exports them, which takes the packages of `ray[default]`.
"""

import importlib
import math
from pathlib import Path

import numpy as np
import ray
from ray.util.metrics import Gauge

from decentral.config import Config
from decentral.errors import UserError
from decentral.loggers import scalars
from decentral.records import Record
from decentral.replica import Report, Segment

WORKER_GAUGES = {
    "loss": "training loss, mean over the steps since the last record",
    "consensus_distance": "||x_i - mean|| before the averaging",
    "bytes_sent": "bytes sent since the start",
    "step_s": "seconds of a step, mean since the last record",
    "compute_s": "of them in the gradient",
    "wait_s": "of them in exchanges",
}


class RayMetrics:
    """A Logger. For a run on Ray alone."""

    def __init__(self, config: Config, directory: Path):
        if config.engine != "ray":
            raise UserError(
                f"sets metrics of a Ray cluster, and the engine is {config.engine}; set"
                " engine=ray, or take it away",
                "loggers",
            )
        importlib.import_module("prometheus_client")  # the agent exports by it
        self._tags = {"run": config.name}
        self._gauges: dict[str, Gauge] = {}

    def start(self, step: int) -> str:
        ports = {n["NodeManagerAddress"]: n["MetricsExportPort"] for n in ray.nodes() if n["Alive"]}
        silent = sorted(address for address, port in ports.items() if port <= 0)
        if silent:
            raise RuntimeError(
                f"no metrics are exported on {', '.join(silent)}: pip install 'ray[default]' there"
            )
        first = min(ports)
        others = f", and on {len(ports) - 1} other nodes" if len(ports) > 1 else ""
        return f"metrics on http://{first}:{ports[first]}/metrics{others}"

    def log(self, record: Record) -> None:
        for key, value in {"step": record["step"] or 0, **scalars(record)}.items():
            if key not in self._gauges:
                self._gauges[key] = Gauge(f"decentral_{key}", f"{key} of the last record", ("run",))
            self._gauges[key].set(float(value), self._tags)

    def close(self, status: str) -> None:
        """Ray drops the gauges with the process that set them."""


class WorkerGauges:
    """The gauges of one worker, in its own process; set where it records."""

    def __init__(self, run: str, worker: int):
        self._tags = {"run": run, "worker": str(worker)}
        self._gauges = {
            name: Gauge(f"decentral_worker_{name}", f"of a worker: {text}", tuple(self._tags))
            for name, text in WORKER_GAUGES.items()
        }
        self._sums, self._steps = np.zeros(4), 0

    def show(self, segment: Segment, report: Report, seconds: float) -> None:
        """Add a segment that took `seconds`, and set the gauges if it ends with a record."""
        assert report.compute_s is not None, "a worker measures it"
        assert report.wait_s is not None, "and that"
        measured = (report.loss[0], seconds, report.compute_s[0], report.wait_s[0])
        self._sums += measured
        self._steps += report.stop - segment.start
        if report.deviation is None or not self._steps:  # no record, or cut short before it
            return
        loss, step_s, compute_s, wait_s = self._sums / self._steps
        values = {
            "loss": loss,
            "consensus_distance": math.sqrt(report.deviation[0]),
            "bytes_sent": report.bytes_sent,
            "step_s": step_s,
            "compute_s": compute_s,
            "wait_s": wait_s,
        }
        for name, value in values.items():
            self._gauges[name].set(float(value), self._tags)
        self._sums, self._steps = np.zeros(4), 0
