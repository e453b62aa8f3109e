"""`decentral report`: tables and figures of finished runs.

From Python: `from decentral.report import write`. Runs are read (runs.py) and grouped by what
their configs have in common (groups.py); from groups come figures to compare (tables.py,
comparison.py), curves (curves.py) and pictures of topologies (networks.py), as data. page.py and
plot.py show them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from decentral.errors import UserError
from decentral.records import write_atomically
from decentral.report import columns, curves, groups, networks, page, plot, runs, tables

__all__ = ["write"]

MOST_CURVES = 8  # that a figure begins with


def write(
    directories: Sequence[str | Path],
    out: str | Path,
    *,
    baseline: str | None = None,
    x: str = "step",
    targets: Sequence[str] = (),
    figures: bool = True,
    say: Callable[[str], None] = print,
) -> Path:
    """Report on the runs at and below some directories; returns the path of `report.html`.

    out       gets report.html, table.md, table.tex, table.csv, and figures/ with PNG and SVG files
    baseline  label, or a part of one label alone, of the group that others are compared to, or
              the directory of a run in it
    x         the axis the page begins with: step, bytes, time (simulated), or wall
    targets   such as `eval_accuracy=0.95`: steps, bytes and simulated time to it are reported
    figures   whether to draw PNG and SVG files, which takes most of the time
    say       is told of what was left out, and why

    Raises UserError where there is no run that can be read, or an argument fits none.
    """
    noted: list[str] = []

    def note(line: str) -> None:
        noted.append(line)
        say(line)

    read = _read([Path(directory) for directory in directories], note)
    made = tables.ranked(groups.group(read, note))
    against = groups.choose_baseline(made, baseline)
    made.sort(key=lambda group: group is not against)  # it leads, the others stay as they are
    if x not in (known := [axis.name for axis in curves.axes(made)]):
        raise UserError(f"must be {', '.join(known)}; got {x!r}", "--x")
    found = tables.figures(made, against, columns.parse_targets(targets, made))
    charts, axes = curves.charts(made), curves.axes(made)
    visible = range(min(MOST_CURVES, len(made)))  # the baseline and the best others
    drawn = networks.pictures(made, note)
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if figures:
            labels = [group.label for group in made]
            try:
                plot.draw(out / "figures", charts, axes, labels, visible, drawn)
            except UserError as error:
                note(str(error))
        shown = [tables.finals(found), tables.differences(found, found.main)]
        for name, text in (
            ("table.md", tables.markdown(shown)),
            ("table.tex", tables.latex(shown)),
            ("table.csv", tables.comma_separated(found)),
            ("report.html", page.html(found, charts, axes, visible, drawn, x, noted)),
        ):
            write_atomically(out / name, text.encode("utf-8", "replace"))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {out}: {reason}; take another folder", "--out") from None
    return out / "report.html"


def _read(directories: Sequence[Path], note: Callable[[str], None]) -> list[runs.Run]:
    found = []
    for path in runs.find(directories):
        try:
            found.append(runs.read(path))
        except UserError as error:
            note(f"{path}: left out; {error}")
    if not found:
        raise UserError("none of the runs can be read", "DIR")
    return found
