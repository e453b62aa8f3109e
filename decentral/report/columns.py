"""The columns of metrics.jsonl: what they are called, which way is better, how numbers are written.

Any numeric column is reported; those that are known here have a title of their own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from decentral.errors import UserError
from decentral.report.groups import Group

TITLES = {
    "loss": "training loss",
    "eval_loss": "test loss",
    "eval_accuracy": "test accuracy",
    "eval_accuracy_workers": "test accuracy, workers' own",
    "consensus_distance": "consensus distance",
    "period": "period H",
    "lr": "learning rate",
    "workers": "workers",
    "batch_size": "batch size of a worker",
}


@dataclass(frozen=True)
class Axis:
    """What figures are drawn against."""

    name: str
    column: str
    title: str
    unit: str


AXES = (
    Axis("step", "step", "steps", "count"),
    Axis("bytes", "bytes_sent", "bytes sent", "bytes"),
    Axis("time", "sim_time_s", "simulated time", "seconds"),
    Axis("wall", "time_s", "wall-clock time", "seconds"),
)
IN_FORCE = ("period", "lr", "workers", "batch_size")  # worth a figure where they change in a run
NO_FIGURE = {axis.column for axis in AXES}


def title(column: str) -> str:
    """What a column is called in figures and tables."""
    return TITLES.get(column, column.replace("_", " "))


def higher_is_better(column: str) -> bool:
    """Whether more of it is better, as of an accuracy; of a loss less is."""
    return "accuracy" in column


def measured(groups: Sequence[Group]) -> list[str]:
    """The columns that are results, those of TITLES first, then the others by name."""
    names = {
        name
        for group in groups
        for run in group.runs
        for name, values in run.columns.items()
        if name not in NO_FIGURE and name not in IN_FORCE and np.isfinite(values).any()
    }
    return [name for name in TITLES if name in names] + sorted(names - TITLES.keys())


def changing(groups: Sequence[Group]) -> list[str]:
    """Those of IN_FORCE that change in some run."""

    def changes(values: np.ndarray) -> bool:
        known = values[np.isfinite(values)]
        return len(known) > 1 and np.ptp(known) > 0

    return [
        name
        for name in IN_FORCE
        if any(
            name in run.columns and changes(run.columns[name])
            for group in groups
            for run in group.runs
        )
    ]


def parse_targets(words: Sequence[str], groups: Sequence[Group]) -> dict[str, float]:
    """`["eval_accuracy=0.95"]` to `{"eval_accuracy": 0.95}`. Raises UserError for other columns."""
    targets = {}
    known = measured(groups)
    for word in words:
        column, _, number = word.partition("=")
        if column not in known:
            raise UserError(
                f"is COLUMN=NUMBER for a column of the runs: {', '.join(known)}; got {word!r}",
                "--target",
            )
        try:
            targets[column] = float(number)
        except ValueError:
            targets[column] = math.nan
        if not math.isfinite(targets[column]):
            raise UserError(f"is COLUMN=NUMBER, such as {column}=0.9; got {word!r}", "--target")
    return targets


SCALES = {
    "bytes": [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")],
    "seconds": [(3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms")],
}


def scale(size: float, unit: str) -> tuple[float, str]:
    """What to divide numbers of about this size by, and the unit that they then have."""
    scales = SCALES.get(unit, [(1.0, "")])
    for factor, name in scales:
        if abs(size) >= factor:
            return factor, name
    return scales[-1]


def written(value: float, unit: str = "number") -> str:
    """A number in four digits, with its unit."""
    factor, name = scale(value, unit)
    return f"{_digits(value / factor)} {name}".strip()


def written_with_spread(values: Sequence[float], unit: str = "number") -> str:
    """Mean and standard deviation, to two digits of the latter: `0.944 ± 0.012`."""
    mean = float(np.mean(values))
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    if not spread > 1e-12 * abs(mean):
        return written(mean, unit)
    factor, name = scale(mean, unit)
    mean, spread = mean / factor, spread / factor
    places = 1 - math.floor(math.log10(spread))
    if abs(mean) < 1e-3 or max(abs(mean), spread) >= 1e6:
        return f"{mean:.3e} ± {spread:.1e} {name}".strip()
    places = max(0, places)
    return f"{mean:.{places}f} ± {spread:.{places}f} {name}".strip()


def _digits(value: float) -> str:
    if value == round(value) and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.4g}"
