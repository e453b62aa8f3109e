"""One Ray cluster for all tests but those that start, or must do without, one of their own.

A start takes seconds, and so does each worker's process: both are there for the whole session, from
the first test that asks.
"""

from contextlib import ExitStack
from typing import Any

CPUS = 10  # logical; what a run's own actors take besides the shared ones


class SharedCluster:
    """Up from the first test that needs it to one that must be without it, or the session's end."""

    def __init__(self) -> None:
        self._actors: list[Any] = []
        self._nursery = ExitStack()

    def up(self) -> "SharedCluster":
        import ray  # not for tests that need none

        from decentral.engines.ray import start_cluster
        from decentral.nursery import nursery

        if not ray.is_initialized():
            start_cluster(CPUS, executable=self._nursery.enter_context(nursery()))
        return self

    def down(self) -> None:
        import ray

        self._actors = []
        if ray.is_initialized():
            ray.shutdown()
        self._nursery.close()

    def forget(self) -> None:
        """End all actors: the next test has new ones."""
        import ray

        while self._actors:
            ray.kill(self._actors.pop())

    def actors(self, workers: int) -> list[Any]:
        """So many actors: those that earlier tests have left alive, and new ones."""
        import ray
        from ray.exceptions import RayError

        from decentral.config import RayConfig
        from decentral.engines.ray import start_actors

        for actor in list(self._actors):
            try:
                ray.get(actor.node.remote(), timeout=60)
            except RayError:
                self._actors.remove(actor)
        self._actors += start_actors(RayConfig(), workers - len(self._actors))
        return self._actors[:workers]
