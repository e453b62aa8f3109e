"""Final figures of each group and how they differ from the baseline; as Markdown, LaTeX and CSV."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from decentral.report import columns as names
from decentral.report.comparison import MOST_SEEDS, Comparison, compare, holm
from decentral.report.groups import Group
from decentral.report.runs import Run

MAIN = ("eval_accuracy", "eval_loss", "loss")  # the first that there is decides


@dataclass(frozen=True)
class Column:
    """A figure of a run. `value` is nan where a run has none, inf where it is not finite.

    missing: what a run lacks that has no finite value.
    """

    name: str
    title: str
    unit: str
    higher: bool
    value: Callable[[Run], float]
    missing: str = "finite"


@dataclass(frozen=True)
class Cell:
    """A figure of a group: of its finished runs by seed, compared to the baseline's.

    holm: the p-value corrected for the number of groups that are compared.
    """

    values: dict[int, float]
    comparison: Comparison | None = None
    holm: float | None = None

    @property
    def mean(self) -> float:
        """nan without values; inf if one is not finite."""
        return float(np.mean(list(self.values.values()))) if self.values else math.nan


@dataclass(frozen=True)
class Table:
    """Text in rows; `best` are the (row, column) that stand out."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    best: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class Figures:
    """Cells by column and by the group's place in `groups`."""

    groups: Sequence[Group]
    baseline: Group
    columns: list[Column]
    cells: list[list[Cell]]  # [column][group]
    main: Column


def ranked(groups: Sequence[Group]) -> list[Group]:
    """By their mean of the main column, the best first; at the end those without one, as none of
    their runs has finished, or one has diverged."""
    known = names.measured(groups)
    main = next((name for name in MAIN if name in known), None)
    sign = -1 if main is not None and names.higher_is_better(main) else 1

    def place(group: Group) -> tuple[bool, float, str]:
        finals = [run.final(main) for run in group.finished] if main is not None else []
        mean = float(np.mean(finals)) if finals else math.nan
        bad = not math.isfinite(mean)
        return bad, 0.0 if bad else sign * mean, group.label

    return sorted(groups, key=place)


def figures(groups: Sequence[Group], baseline: Group, targets: Mapping[str, float]) -> Figures:
    """All final figures, and steps, bytes and simulated time to each target."""
    columns = [
        Column(
            column,
            names.title(column),
            "number",
            names.higher_is_better(column),
            lambda run, column=column: run.final(column),
        )
        for column in names.measured(groups)
    ]
    known = {column.name: column for column in columns}
    main = next((known[name] for name in MAIN if name in known), None)
    for axis in names.AXES[1:3]:
        columns.append(
            Column(
                axis.column,
                axis.title,
                axis.unit,
                False,
                lambda run, axis=axis: run.final(axis.column),
            )
        )
    for column, target in targets.items():
        sign = "≥" if names.higher_is_better(column) else "≤"
        for axis in names.AXES[:3]:
            columns.append(
                Column(
                    f"{axis.column} to {column} {target:g}",
                    f"{axis.title} to {names.title(column)} {sign} {target:g}",
                    axis.unit,
                    False,
                    lambda run, of=(column, target, axis.column): first_at(run, *of),
                    "reach it",
                )
            )
    cells = [_compared(column, groups, baseline) for column in columns]
    return Figures(groups, baseline, columns, cells, main or columns[0])


def first_at(run: Run, column: str, target: float, axis: str) -> float:
    """Where on the axis a run's column first is as good as the target; inf where it never is."""
    values = run.columns.get(column, np.empty(0))
    reached = values >= target if names.higher_is_better(column) else values <= target
    reached &= np.isfinite(values)
    return float(run.columns[axis][np.argmax(reached)]) if reached.any() else math.inf


def _compared(column: Column, groups: Sequence[Group], baseline: Group) -> list[Cell]:
    """The column of every group; Holm's correction is over the groups that could be compared."""
    values = []
    for group in groups:
        found = {run.config.seed: column.value(run) for run in group.finished}
        values.append({seed: value for seed, value in found.items() if not math.isnan(value)})
    against = values[[group is baseline for group in groups].index(True)]
    comparisons = [
        None if group is baseline else compare(own, against)
        for group, own in zip(groups, values, strict=True)
    ]
    corrected = iter(holm([c.p for c in comparisons if c is not None]))
    return [
        Cell(own, comparison, None if comparison is None else next(corrected))
        for own, comparison in zip(values, comparisons, strict=True)
    ]


def finals(figures: Figures) -> Table:
    """A row per group: mean and standard deviation over seeds of each figure."""
    shown = [
        (column, cells)
        for column, cells in zip(figures.columns, figures.cells, strict=True)
        if any(cell.values for cell in cells)
    ]
    rows, best = [], set()
    for place, group in enumerate(figures.groups):
        rows.append([group.label, group.status, *(_cell(c, cells[place]) for c, cells in shown)])
    for number, (column, cells) in enumerate(shown):
        means = [cell.mean for cell in cells if math.isfinite(cell.mean)]
        if len(means) > 1 and min(means) < max(means):
            top = max(means) if column.higher else min(means)
            best |= {(row, number + 2) for row, cell in enumerate(cells) if cell.mean == top}
    return Table(
        "Final figures: mean ± standard deviation over seeds. The best mean is bold.",
        ["", "runs", *(column.title for column, _ in shown)],
        rows,
        frozenset(best),
    )


def _cell(column: Column, cell: Cell) -> str:
    values = list(cell.values.values())
    finite = [value for value in values if math.isfinite(value)]
    if not values:
        return "–"
    if len(finite) < len(values):
        return f"{len(finite)} of {len(values)} {column.missing}"
    return names.written_with_spread(values, column.unit)


def differences(figures: Figures, column: Column) -> Table:
    """A row per group but the baseline: how its mean differs, and whether by more than chance."""
    cells = figures.cells[figures.columns.index(column)]
    rows = []
    for group, cell in zip(figures.groups, cells, strict=True):
        if group is not figures.baseline:
            rows.append([group.label, *_difference(cell, column.unit)])
    return Table(
        f"{column.title[0].upper()}{column.title[1:]}: difference to {figures.baseline.label}.",
        ["", "difference", "95% interval", "p", "p (Holm)", "test", "seeds needed"],
        rows,
    )


def _difference(cell: Cell, unit: str) -> list[str]:
    found = cell.comparison
    if found is None:
        return ["–"] * 6
    factor, name = names.scale(max(abs(found.low), abs(found.high)), unit)
    low, middle, high = (f"{v / factor:+.3g}" for v in (found.low, found.difference, found.high))
    return [
        f"{middle} {name}".strip(),
        f"{low} to {high} {name}".strip(),
        _p(found.p),
        _p(cell.holm if cell.holm is not None else found.p),
        "paired" if found.paired else "Welch",
        f"> {MOST_SEEDS}" if found.needed is None else str(found.needed),
    ]


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def markdown(tables: Sequence[Table]) -> str:
    """As GitHub shows them."""
    lines: list[str] = []
    for table in tables:
        lines += [_plain(table.caption), ""]
        lines.append(_markdown_row(table.head))
        lines.append("|" + "|".join(["---"] + ["---:"] * (len(table.head) - 1)) + "|")
        for number, row in enumerate(table.rows):
            bold = [(number, place) in table.best for place in range(len(row))]
            lines.append(_markdown_row(row, bold))
        lines.append("")
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str], bold: Sequence[bool] = ()) -> str:
    texts = [_plain(cell) for cell in cells]
    for place, stands_out in enumerate(bold):
        if stands_out:
            texts[place] = f"**{texts[place]}**"
    return "| " + " | ".join(texts) + " |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, HTML in it too."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for character in "\\`*_[]|#~$!":
        text = text.replace(character, "\\" + character)
    return text


LATEX = {
    "\\": r"\textbackslash{}",
    **{character: "\\" + character for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "–": "--",
    "…": r"\ldots{}",
}


def latex(tables: Sequence[Table]) -> str:
    r"""For \input; needs \usepackage{booktabs}."""
    lines = [r"% \usepackage{booktabs}"]
    for table in tables:
        lines += [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(table.caption)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}",
            r"\toprule",
            " & ".join(map(_latex, table.head)) + r" \\",
            r"\midrule",
        ]
        for number, row in enumerate(table.rows):
            cells = [_latex(cell) for cell in row]
            for place in range(len(row)):
                if (number, place) in table.best:
                    cells[place] = rf"\textbf{{{cells[place]}}}"
            lines.append(" & ".join(cells) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join(lines)


def _latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in " ".join(text.split()))


HEAD = (
    *("group", "figure", "runs", "finite", "mean", "sd", "baseline"),
    *("difference", "low", "high", "p", "p_holm", "test", "seeds_needed"),
)


def comma_separated(figures: Figures) -> str:
    """Everything, to go on with: a row per group and figure, numbers in full."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEAD)
    for column, cells in zip(figures.columns, figures.cells, strict=True):
        for group, cell in zip(figures.groups, cells, strict=True):
            values = [value for value in cell.values.values() if math.isfinite(value)]
            found = cell.comparison
            writer.writerow(
                [
                    group.label,
                    column.name,
                    len(cell.values),
                    len(values),
                    np.mean(values) if values else "",
                    np.std(values, ddof=1) if len(values) > 1 else "",
                    figures.baseline.label,
                    *(
                        [""] * 7
                        if found is None
                        else [
                            found.difference,
                            found.low,
                            found.high,
                            found.p,
                            cell.holm,
                            "paired" if found.paired else "welch",
                            found.needed or f">{MOST_SEEDS}",
                        ]
                    ),
                ]
            )
    return text.getvalue()
