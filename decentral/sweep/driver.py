"""A sweep from beginning to end, and what is on the disk of it.

DIR/compare.yaml is the sweep, DIR/points/ holds a run directory for each point, DIR/table.csv a
row for each, DIR/picked.yaml what was picked, DIR/report/ the report on it. A point that is done is
never run again: the same command goes on with a sweep that was cut short, or that has grown.
"""

import fcntl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decentral.config import to_yaml
from decentral.errors import UserError
from decentral.experiment import build
from decentral.records import write_atomically
from decentral.sweep.job import Job, Runner, summary_of
from decentral.sweep.pick import Picked, pick, rows
from decentral.sweep.processes import Processes
from decentral.sweep.spec import Point, Sweep, read_sweep

if TYPE_CHECKING:
    import pandas

LOOK_S = 1.0  # how often the time left is told anew, where nothing ends


@dataclass(frozen=True)
class Comparison:
    """What a sweep gave.

    `table` has a row per point: method, values of the grid, seed, status (`done` or `failed`), the
    last record, error, directory. `picked` are the best values of the keys to pick, where a sweep
    has some; `best` is the table of their points alone.
    """

    sweep: Sweep
    directory: Path
    table: "pandas.DataFrame"
    picked: list[Picked]

    @property
    def failed(self) -> "pandas.DataFrame":
        """The rows of the points that are not done."""
        return self.table.loc[self.table.status != "done"]

    @property
    def best(self) -> "pandas.DataFrame":
        """The rows of the points that were picked; all, where nothing was to be picked."""
        if self.sweep.compare.pick is None:
            return self.table
        chosen = {point.identity for picked in self.picked for point in picked.points}
        return self.table.loc[[point.identity in chosen for point in self.sweep.points]]

    def report(self, *, figures: bool = True, say: Callable[[str], None] = print) -> Path:
        """Write DIR/report/ on `best`: returns the path of its page. See `decentral report`.

        Others are held to the baseline, of several runs of that method to the first.
        """
        from decentral.report import write  # takes a while to import, and draws

        rows = self.best.to_dict("records")
        done = [row for row in rows if row["status"] == "done"]
        wanted = [row for row in done if row["method"] == self.sweep.compare.baseline]
        baseline = str(wanted[0]["directory"]) if wanted else None
        directories = [Path(row["directory"]) for row in done]
        out = self.directory / "report"
        return write(directories, out, baseline=baseline, figures=figures, say=say)


class Observer:
    """Looks on in silence; what may be told of a sweep."""

    def begin(self, points: int, done: int) -> None:
        """So many points there are, so many of them done before."""

    def advance(self, done: int, running: int, failed: int, left_s: float | None) -> None:
        """How it stands; `left_s`: seconds that are left, where something is known."""

    def failure(self, point: Point, error: str) -> None:
        """A point has failed; the others go on."""

    def end(self) -> None:
        """No point will be run any more."""


def compare(
    config: str | Path | Mapping[str, Any],
    *,
    out: str | Path | None = None,
    observer: Observer | None = None,
    **overrides: Any,
) -> Comparison:
    """Run a sweep: a config with a section `compare`, and overrides of its keys.

    `out` is the directory of the sweep, by default runs/NAME; what is done there is not run again.
    Raises UserError, before anything starts, if the input is wrong. Points that fail do not: they
    are in the result.
    """
    sweep = read_sweep(config, overrides)
    directory = Path(out) if out is not None else Path("runs") / sweep.name
    return conduct(sweep, directory, observer or Observer())


def conduct(sweep: Sweep, directory: Path, observer: Observer) -> Comparison:
    """Check all points, run those that are not done, and say what came of it."""
    places = _places(sweep, directory)
    _check(_left(sweep, places))
    directory.mkdir(parents=True, exist_ok=True)
    with _alone(directory):
        write_atomically(directory / "compare.yaml", sweep.dump().encode())
        jobs = [Job(point, places[point.identity]) for point in _left(sweep, places)]
        if jobs:
            observer.begin(len(sweep.points), len(sweep.points) - len(jobs))
            runner = _runner(sweep)
            try:
                _run(runner, jobs, len(sweep.points), observer)
            finally:
                runner.close()
                observer.end()
        return _result(sweep, directory, places)


def _left(sweep: Sweep, places: Mapping[str, Path]) -> list[Point]:
    """The points that are not done."""
    return [p for p in sweep.points if summary_of(places[p.identity]).get("status") != "done"]


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Raise UserError where another driver is at work: each would run what the other is running.

    The lock goes with the process that holds it, whatever becomes of that.
    """
    with open(directory / ".lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is at work on the sweep in {directory}; wait for it, or take"
                " another directory",
                "--out",
            ) from None
        yield


def _places(sweep: Sweep, directory: Path) -> dict[str, Path]:
    """The run directory of each point, by its identity, also if it was made under another name.

    Raises UserError if the directory holds points of another sweep.
    """
    folder = directory / "points"
    if not directory.is_dir() and directory.exists():
        raise UserError(f"{directory} is a file; take another name", "--out")
    if (directory / "config.yaml").exists():
        raise UserError(f"{directory} is the directory of a run; take another name", "--out")
    there = {path.name.rpartition("-")[2]: path for path in sorted(folder.glob("*-*"))}
    places = {p.identity: there.pop(p.identity, folder / p.name) for p in sweep.points}
    if there:
        raise UserError(
            f"{directory} holds {len(there)} points that are none of this sweep, such as"
            f" {next(iter(there.values())).name}; a sweep may grow, but for another one take"
            " another directory",
            "--out",
        )
    return places


def _check(points: Sequence[Point]) -> None:
    """Build every point, but of those that differ in the seed alone one: UserError if any is wrong.

    The seed chooses among data and models that are otherwise alike.
    """
    seen = set()
    for point in points:
        kind = (point.method, repr(point.config.model_copy(update={"seed": 0})))
        if kind in seen:
            continue
        seen.add(kind)
        try:
            build(point.config)
        except UserError as error:
            raise UserError(f"{error.message}; at the point {point.label}", error.key) from None


def _runner(sweep: Sweep) -> Runner:
    compare = sweep.compare
    if compare.on == "processes":
        return Processes(compare.processes, compare.threads)
    from decentral.sweep.cluster import Cluster  # ray is slow to import, and seldom wanted

    return Cluster(sweep.points[0].config.ray, compare.processes, compare.threads)


def _run(runner: Runner, jobs: Sequence[Job], points: int, observer: Observer) -> None:
    """Run all jobs, as many at a time as there are slots."""
    waiting, running, ended, failed = list(jobs), 0, 0, 0
    before, first_s = points - len(jobs), 0.0
    while waiting or running:
        while waiting and running < runner.slots:
            runner.start(waiting.pop(0))
            running += 1
        left_s = None
        if ended > 1:  # up to the first end processes were starting, too
            left_s = (time.perf_counter() - first_s) / (ended - 1) * (len(jobs) - ended)
        observer.advance(before + ended - failed, running, failed, left_s)
        for outcome in runner.wait(LOOK_S):
            first_s = first_s if ended else time.perf_counter()
            running, ended = running - 1, ended + 1
            if outcome.error is not None:
                failed += 1
                observer.failure(outcome.job.point, outcome.error)
    observer.advance(before + ended - failed, 0, failed, 0.0)


def _result(sweep: Sweep, directory: Path, places: Mapping[str, Path]) -> Comparison:
    import pandas  # slow to import, and of no use before there is a result

    found = rows(sweep.points, list(sweep.compare.grid), places)
    picked = pick(sweep.points, sweep.compare, found)
    table = pandas.DataFrame(found)
    write_atomically(directory / "table.csv", table.to_csv(index=False).encode())
    if sweep.compare.pick is not None:
        told = [
            {
                "method": choice.method,
                **choice.values,
                sweep.compare.pick.by: choice.score,
                "directories": [places[p.identity].name for p in choice.points],
            }
            for choice in picked
        ]
        write_atomically(directory / "picked.yaml", to_yaml({"picked": told}).encode())
    return Comparison(sweep, directory, table, picked)
