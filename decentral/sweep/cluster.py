"""Points of a sweep as tasks of a Ray cluster: one that is there, or a local one of its own.

A task runs a point in a scratch directory of its node, and the driver writes what came of it to
the sweep's. Ray is imported by the caller's wish alone.
"""

import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from decentral.config import Config, RayConfig
from decentral.engines.ray import connect
from decentral.engines.worker import Surroundings
from decentral.records import write_atomically
from decentral.sweep.job import Job, Outcome, record_failure, run

LAST = "summary.json"  # of the files of a run: it says that the others are there


class Cluster:
    """A Runner."""

    def __init__(self, config: RayConfig, processes: int | None, threads: int):
        self._processes, self._threads = processes, threads
        self._cluster = connect(config, (processes or 1) * threads)
        self._run = ray.remote(_run).options(num_cpus=threads, max_retries=0)
        self._surroundings = Surroundings.here()
        self._busy: dict[Any, tuple[Job, float]] = {}  # by what the task will have given

    @property
    def slots(self) -> int:
        cores = int(ray.cluster_resources().get("CPU", 0) / self._threads)
        return max(1, cores if self._processes is None else self._processes)

    def start(self, job: Job) -> None:
        task = self._run.remote(self._surroundings, job.point.config, self._threads)
        self._busy[task] = job, time.perf_counter()

    def wait(self, timeout_s: float) -> list[Outcome]:
        done, _ = ray.wait(list(self._busy), timeout=timeout_s)
        return [self._outcome(task, *self._busy.pop(task)) for task in done]

    def _outcome(self, task: Any, job: Job, started: float) -> Outcome:
        try:
            error, files = ray.get(task)
        except RayError as failure:  # its process or its node died
            error = " ".join(str(failure).split())
            record_failure(job.point.config, job.directory, error, time.perf_counter() - started)
        else:
            _write(job.directory, files)
        return Outcome(job, error)

    def close(self) -> None:
        for task in self._busy:
            ray.cancel(task, force=True)
        self._busy = {}
        self._cluster.close()


def _run(
    surroundings: Surroundings, config: Config, threads: int
) -> tuple[str | None, dict[str, bytes]]:
    """Run a point: what went wrong, if anything, and the files of its run directory by path."""
    surroundings.enter()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "point"
        error = run(config, directory, threads)
        paths = [path for path in directory.rglob("*") if path.is_file()]
        files = {str(path.relative_to(directory)): path.read_bytes() for path in paths}
    return error, files


def _write(directory: Path, files: Mapping[str, bytes]) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    for name in sorted(files, key=lambda name: name == LAST):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, files[name])
