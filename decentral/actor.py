"""What the Ray engine starts for each worker, in a process of its own.

No part of `decentral.engines`, whose package imports torch: a process begins with this module.
"""

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import ray

from decentral.imports import uncollected

with uncollected():
    from decentral.config import Config
    from decentral.engines.worker import Outcome, Surroundings, Worker
    from decentral.loggers.ray import WorkerGauges
    from decentral.replica import Segment
    from decentral.topology import Topology

T = TypeVar("T")


class Actor(Worker):
    """A Worker that knows where Ray put it."""

    def take(self, number: int, shared: tuple[Config, Topology | None, Surroundings]) -> None:
        config, topology, surroundings = shared
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        self.build(config, topology, number, surroundings, device)
        shown = any(logger.name == "ray" for logger in config.loggers)
        self._gauges = WorkerGauges(config.name, number) if shown else None

    def run(self, segment: Segment) -> Outcome:
        started = time.perf_counter()
        outcome = super().run(segment)
        if self._gauges is not None:
            self._gauges.show(segment, outcome.report, time.perf_counter() - started)
        return outcome

    def node(self) -> tuple[str, int]:
        """Address of the Ray node, and process id."""
        return ray.util.get_node_ip_address(), os.getpid()

    def ask(self, function: Callable[..., T], *arguments: Any) -> T:
        """What the function returns of this worker."""
        return function(self, *arguments)
