"""report.html: one file with all that it shows; it asks no network for anything.

Whatever comes from a run directory is escaped: by Jinja in the page, and in the JSON that the
script draws from. The page's policy allows that script alone to run, by its hash.
"""

import base64
import datetime
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from decentral.report.columns import Axis, written
from decentral.report.curves import Chart
from decentral.report.groups import differing, short
from decentral.report.networks import HISTOGRAM, Picture
from decentral.report.plot import COLOURS, DASHES
from decentral.report.tables import Figures, Table, differences, finals


def html(
    figures: Figures,
    charts: Sequence[Chart],
    axes: Sequence[Axis],
    visible: Sequence[int],
    pictures: Sequence[Picture],
    x: str,
    noted: Sequence[str],
) -> str:
    """The page. `x` is the axis it begins with, `noted` what was left out of the report."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("decentral.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["written"] = written
    files = resources.files("decentral.report")
    script = files.joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    groups = figures.groups
    keys = differing([group.config for group in groups])
    return environment.get_template("page.html").render(
        script=Markup(script),
        script_hash=digest,
        style=Markup(files.joinpath("page.css").read_text(encoding="utf-8")),
        data=Markup(_json(_data(figures, charts, axes, visible, x))),
        figures=figures,
        charts=charts,
        axes=axes,
        x=x,
        runs=sum(len(group.runs) for group in groups),
        unfinished=sum(not run.finished for group in groups for run in group.runs),
        finals=finals(figures),
        differences=_differences(figures),
        pictures=pictures,
        histogram=HISTOGRAM,
        changed=_changed(figures, keys),
        common=[(key, short(value)) for key, value in groups[0].config.items() if key not in keys],
        noted=noted,
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=importlib.metadata.version("decentral"),
        slots=[(i % len(COLOURS), DASHES[i % len(DASHES)]) for i in range(len(groups))],
    )


def _differences(figures: Figures) -> list[Table]:
    """A table for each figure, that of the main one first."""
    if len(figures.groups) < 2:
        return []
    others = [column for column in figures.columns if column is not figures.main]
    return [differences(figures, column) for column in (figures.main, *others)]


def _changed(figures: Figures, keys: Sequence[str]) -> Table:
    rows = [
        [group.label, *(short(group.config[key]) if key in group.config else "–" for key in keys)]
        for group in figures.groups
    ]
    return Table("", ["", *keys], rows)


def _data(
    figures: Figures,
    charts: Sequence[Chart],
    axes: Sequence[Axis],
    visible: Sequence[int],
    x: str,
) -> dict[str, Any]:
    """What the script draws."""
    return {
        "x": x,
        "axes": [{"name": a.name, "title": a.title, "unit": a.unit} for a in axes],
        "groups": [
            {
                "label": group.label,
                "shown": place in visible,
                "colour": place % len(COLOURS),
                "dash": " ".join(map(str, DASHES[place % len(DASHES)])),
            }
            for place, group in enumerate(figures.groups)
        ],
        "charts": [
            {
                "title": chart.title,
                "log": chart.log,
                "steps": chart.steps,
                "curves": [
                    {
                        "group": curve.group,
                        "x": {name: _rounded(along) for name, along in curve.x.items()},
                        "mean": _rounded(curve.mean),
                        "low": _rounded(curve.low),
                        "high": _rounded(curve.high),
                    }
                    for curve in chart.curves
                ],
            }
            for chart in charts
        ],
    }


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def _json(value: Any) -> str:
    """JSON that ends no script element and opens no comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
