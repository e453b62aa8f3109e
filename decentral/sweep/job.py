"""One point of a sweep, run to its end: in a process of this machine, or of a cluster's."""

import json
import shutil
import time
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from decentral.config import Config
from decentral.progress import Watcher
from decentral.records import read, write_atomically
from decentral.sweep.spec import Point

TRACEBACK = "error.txt"  # in the directory of a point that failed


class Job(NamedTuple):
    """A point, and the run directory that it is to have."""

    point: Point
    directory: Path


class Outcome(NamedTuple):
    """What became of a job: `error` is None, or what went wrong in a line."""

    job: Job
    error: str | None


class Runner(Protocol):
    """Runs jobs beside each other; none that fails or dies takes another with it."""

    @property
    def slots(self) -> int:
        """How many jobs it can have under way, as far as is known now."""
        ...

    def start(self, job: Job) -> None:
        """Begin a job, and return at once. No more than `slots` may be under way."""
        ...

    def wait(self, timeout_s: float) -> Iterable[Outcome]:
        """Those that have ended since the last call: waits for one, but no longer than this."""
        ...

    def close(self) -> None:
        """End what is under way, and let go of everything."""
        ...


def run(config: Config, directory: Path, threads: int) -> str | None:
    """Run a point in a directory of its own, from the start: None, or what went wrong in a line.

    Whatever was there of it before is gone.
    """
    from decentral.api import execute

    torch.set_num_threads(threads)
    shutil.rmtree(directory, ignore_errors=True)
    started = time.perf_counter()
    try:
        execute(config, directory, Watcher())
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        if not summary_of(directory):
            record_failure(config, directory, told, time.perf_counter() - started)
        (directory / TRACEBACK).write_text(traceback.format_exc(), encoding="utf-8")
        return told
    return None


def record_failure(config: Config, directory: Path, error: str, seconds: float) -> None:
    """Write the summary of a point that failed or died, whatever it has left of itself."""
    directory.mkdir(parents=True, exist_ok=True)
    metrics = directory / "metrics.jsonl"
    rows = read(metrics) if metrics.exists() else []
    summary = {
        "name": config.name,
        "status": "failed",
        "engine": config.engine,
        "algorithm": config.algorithm.name,
        "final": rows[-1] if rows else None,
        "seconds": seconds,
        "error": error,
    }
    write_atomically(directory / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())


def summary_of(directory: Path) -> Mapping[str, Any]:
    """The summary of a run, empty where there is none that is whole: it was killed."""
    try:
        summary = json.loads((directory / "summary.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}
