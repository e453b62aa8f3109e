"""Run directories, as a report reads them: data alone, whatever may lie in them.

A directory that is damaged raises UserError, which says how; nothing of it is executed.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decentral import records
from decentral.config import Config, load
from decentral.errors import UserError

MOST_COLUMNS = 200
LARGEST = 1e100  # a run with more than that has diverged, and squares would overflow
STATUSES = ("done", "stopped", "failed")


@dataclass(frozen=True)
class Run:
    """One run directory.

    columns  the numbers of metrics.jsonl by name, float64 [records] each: nan where a record has
             none of that name, inf where it has one that is not finite (null in the file) or
             beyond LARGEST
    status   done, stopped or failed, as summary.json says; unfinished where there is none
    labels   the classes, int [classes], and how many samples of each every worker has, int
             [workers, classes], if the run kept them
    """

    path: Path
    config: Config
    columns: dict[str, np.ndarray]
    status: str
    labels: tuple[np.ndarray, np.ndarray] | None

    @property
    def finished(self) -> bool:
        return self.status == "done"

    @property
    def steps(self) -> int:
        """Steps recorded so far."""
        steps = self.columns["step"]
        return int(steps[-1]) if len(steps) else 0

    def final(self, column: str) -> float:
        """The last value of a column: nan where it has none, inf where the last is not finite."""
        values = self.columns.get(column, np.empty(0))
        known = values[~np.isnan(values)]
        return float(known[-1]) if len(known) else math.nan


def find(directories: Sequence[Path]) -> list[Path]:
    """The run directories at and below these, each once, in order of their names.

    Raises UserError where a directory holds none.
    """
    found: dict[Path, Path] = {}
    for directory in directories:
        if not directory.is_dir():
            raise UserError(f"{directory} is no directory; name one that holds runs", "DIR")
        before = len(found)
        for folder, below, files in os.walk(directory):
            below.sort()
            if "config.yaml" in files:
                below.clear()  # checkpoints, and what else is the run's own
                found.setdefault(Path(folder).resolve(), Path(folder))
        if len(found) == before and directory.resolve() not in found:
            raise UserError(
                f"{directory} holds no run: there is no config.yaml in it or below", "DIR"
            )
    return list(found.values())


def read(path: Path) -> Run:
    """The run in `path`. Raises UserError, in a line, if it is damaged."""
    config = load(path / "config.yaml")
    try:
        columns = _columns(records.read(path / "metrics.jsonl"))
        status = _status(path / "summary.json")
        labels = _labels(path / "split.npz", config.workers)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot read {Path(error.filename or path).name}: {reason}") from None
    run = Run(path, config, columns, status, labels)
    if run.finished and run.steps != config.steps:
        raise UserError(
            f"summary.json says done, but metrics.jsonl ends at step {run.steps} of {config.steps}"
        )
    return run


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    names = {"step": None} | {
        name: None for row in rows for name, value in row.items() if _is_number(value)
    }
    if len(names) > MOST_COLUMNS:
        raise UserError(f"metrics.jsonl has {len(names)} columns, more than {MOST_COLUMNS}")
    columns = {
        name: np.array([_number(row[name]) if name in row else math.nan for row in rows], float)
        for name in names
    }
    steps = columns["step"]
    if len(steps) and not (steps[0] >= 0 and np.all(np.diff(steps) > 0)):
        raise UserError("the steps of metrics.jsonl do not increase")
    return columns


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float:
    try:
        number = float(value) if _is_number(value) else math.inf
    except OverflowError:
        return math.inf
    return number if abs(number) <= LARGEST else math.inf


def _status(summary: Path) -> str:
    try:
        content = json.loads(summary.read_bytes())
        status = content["status"]
    except FileNotFoundError:
        return "unfinished"
    except (ValueError, RecursionError, KeyError, TypeError):
        raise UserError("summary.json is damaged") from None
    if status not in STATUSES:
        raise UserError(f"summary.json has the status {status!s:.40}, not {', '.join(STATUSES)}")
    return status


def _labels(split: Path, workers: int) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        with np.load(split, allow_pickle=False) as content:
            if "label_counts" not in content:
                return None
            classes, counts = content["classes"], content["label_counts"]
    except FileNotFoundError:
        return None
    except OSError:
        raise
    except Exception:  # zipfile and numpy raise whatever they trip over
        raise UserError("split.npz is damaged") from None
    if not (counts.dtype.kind == classes.dtype.kind == "i" and counts.size and counts.min() >= 0):
        raise UserError("split.npz has label counts that are none")
    if counts.shape != (workers, *classes.shape):
        raise UserError(f"split.npz counts labels in the shape {counts.shape}")
    return classes, counts
