"""What `decentral compare` prints: how a sweep goes, and what came of it."""

import math
from collections.abc import Hashable, Sequence
from statistics import stdev
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from decentral.progress import PLAIN_LINES, say
from decentral.sweep.driver import Comparison, Observer
from decentral.sweep.spec import Point

FIGURES = {"eval_loss": "eval loss", "eval_accuracy": "accuracy"}
MOST_ROWS = 60


class Terminal(Observer):
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console):
        self._console = console
        self._bar: tuple[Progress, TaskID] | None = None
        self._points, self._next_line = 0, 0

    def begin(self, points: int, done: int) -> None:
        self._points, self._next_line = points, done + 1
        say(self._console, f"{points} points, {done} done before")
        if self._console.is_terminal:
            progress = Progress(
                TextColumn("points"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                console=self._console,
            )
            self._bar = progress, progress.add_task("", total=points, completed=done)
            progress.start()

    def advance(self, done: int, running: int, failed: int, left_s: float | None) -> None:
        line = f"{running} running"
        if failed:
            line += f"  {failed} failed"
        if left_s is not None:
            line += f"  {_time(left_s)} left"
        if self._bar is not None:
            progress, task = self._bar
            progress.update(task, completed=done + failed, description=line)
        elif done + failed >= self._next_line:
            say(self._console, f"{done}/{self._points} points done  {line}")
            self._next_line = done + failed + max(1, self._points // PLAIN_LINES)

    def failure(self, point: Point, error: str) -> None:
        say(self._console, f"failed: {point.label}: {error}")

    def end(self) -> None:
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None


def results_table(comparison: Comparison) -> Table:
    """Mean and standard deviation over seeds of what is best, or of everything: a row a run."""
    sweep = comparison.sweep
    done = [row for row in comparison.best.to_dict("records") if row["status"] == "done"]
    keys = ("method", *sweep.compare.grid)
    groups: dict[tuple[str, ...], list[dict[Hashable, Any]]] = {}
    for row in done:
        groups.setdefault(tuple(_value(row[key]) for key in keys), []).append(row)
    pick = sweep.compare.pick
    table = Table(
        title=f"{sweep.name}: mean and standard deviation over seeds, last step",
        caption=_caption(comparison),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for key in keys:
        chosen = pick is not None and key in pick.keys
        name = key.removesuffix(".name").rpartition(".")[2]
        table.add_column(f"best {name}" if chosen else name, no_wrap=True)
    table.add_column("seeds", justify="right")
    figures = [column for column in FIGURES if any(column in row for row in done)] or ["loss"]
    for column in figures:
        table.add_column(FIGURES.get(column, column), justify="right", no_wrap=True)
    for cells, rows in list(groups.items())[:MOST_ROWS]:
        spreads = [_spread([row[column] for row in rows]) for column in figures]
        table.add_row(*cells, str(len(rows)), *spreads)
    return table


def failures_table(comparison: Comparison) -> Table:
    """The points that are not done, and why."""
    failed = comparison.failed
    table = Table(title=f"{len(failed)} points failed; the same command runs them again")
    table.add_column("point")
    table.add_column("error")
    labels = {str(point.identity): point.label for point in comparison.sweep.points}
    for _, row in failed.iterrows():
        identity = str(row["directory"]).rpartition("-")[2]
        table.add_row(labels[identity], str(row["error"]))
    return table


def _caption(comparison: Comparison) -> str:
    pick = comparison.sweep.compare.pick
    if pick is None:
        return f"all points: {comparison.directory}/table.csv"
    edge = sum(bool(choice.at_edge) for choice in comparison.picked)
    told = f"picked by {pick.by}; all points: {comparison.directory}/table.csv"
    if edge:
        told += f"; {edge} of {len(comparison.picked)} picked the least or greatest value tried"
    return told


def _value(value: Any) -> str:
    return "" if value is None or value != value else str(value)  # NaN where a key has no value


def _spread(values: Sequence[float | None]) -> str:
    numbers = [math.nan if value is None else float(value) for value in values]
    mean = sum(numbers) / len(numbers)
    if len(numbers) == 1 or math.isnan(mean):
        return f"{mean:.4f}"
    return f"{mean:.4f} ±{stdev(numbers):.4f}"


def _time(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
