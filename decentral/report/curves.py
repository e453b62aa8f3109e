"""Curves: a column's mean over the seeds of a group, with its range, against each axis."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from decentral.report import columns as names
from decentral.report.groups import Group

MOST_POINTS = 300  # of a curve; more cannot be told apart on a screen
LOG_RATIO = 10.0  # of a curve's greatest value to its least


@dataclass(frozen=True)
class Curve:
    """Of the group at place `group`; arrays [points].

    x           by the name of the axis; the seeds' mean, as theirs may differ
    mean        over seeds, at steps that all of them have recorded
    low, high   the least and the greatest of the seeds
    """

    group: int
    x: dict[str, np.ndarray]
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Chart:
    """A figure: the curves of one column. `steps`: it holds from record to record."""

    column: str
    title: str
    log: bool
    steps: bool
    curves: list[Curve]


def charts(groups: Sequence[Group]) -> list[Chart]:
    """A chart for each column that is measured, and for what changes in the runs."""
    made = []
    for column in (*names.measured(groups), *names.changing(groups)):
        found = [curve(place, group, column) for place, group in enumerate(groups)]
        curves = [one for one in found if one is not None]
        if curves:
            in_force = column in names.IN_FORCE
            log = not in_force and not names.higher_is_better(column) and _spans(curves)
            made.append(Chart(column, names.title(column), log, in_force, curves))
    return made


def curve(place: int, group: Group, column: str) -> Curve | None:
    """The curve of a group; None where its runs have no finite value at a common step."""
    runs = group.shown
    steps: np.ndarray | None = None
    for run in runs:
        there = np.isfinite(run.columns.get(column, np.full(len(run.columns["step"]), np.nan)))
        own = run.columns["step"][there]
        steps = own if steps is None else np.intersect1d(steps, own, assume_unique=True)
    if steps is None or not len(steps):
        return None
    if len(steps) > MOST_POINTS:
        steps = steps[np.unique(np.linspace(0, len(steps) - 1, MOST_POINTS).round().astype(int))]
    rows = [np.searchsorted(run.columns["step"], steps) for run in runs]

    def over_runs(name: str) -> np.ndarray:
        return np.array([run.columns[name][at] for run, at in zip(runs, rows, strict=True)])

    values = over_runs(column)
    x = {
        axis.name: over_runs(axis.column).mean(axis=0)
        for axis in axes([group])
        if all(axis.column in run.columns for run in runs)
    }
    x = {name: along for name, along in x.items() if np.isfinite(along).all()}
    return Curve(place, x, values.mean(axis=0), values.min(axis=0), values.max(axis=0))


def axes(groups: Sequence[Group]) -> list[names.Axis]:
    """What there is to draw against; wall-clock time only of runs that were no simulations."""
    real = any(group.config["engine"] != "sim" for group in groups)
    return [axis for axis in names.AXES if axis.name != "wall" or real]


def _spans(curves: Sequence[Curve]) -> bool:
    """Whether a curve goes over so wide a range that a logarithmic axis shows more.

    Curves that are far from each other do not count: one may be zero but for round-off, as the
    consensus distance of parallel SGD is.
    """
    positive = [one.mean[one.mean > 0] for one in curves]
    return any(len(own) and own.max() > LOG_RATIO * own.min() for own in positive)
