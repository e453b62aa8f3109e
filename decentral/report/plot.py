"""The figures of a report as PNG and SVG files, for papers and slides."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from decentral.errors import UserError
from decentral.report.columns import SCALES, Axis
from decentral.report.curves import Chart, Curve
from decentral.report.networks import HISTOGRAM, Picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Told apart by those who see no red or no green too: "vibrant" of Paul Tol's technical note
# SRON/EPS/TN/09-002, and his indigo in place of its grey. The page has them in style.css too.
COLOURS = ("#0077bb", "#ee7733", "#009988", "#cc3377", "#33bbee", "#882255", "#777777")
DASHES = ((), (7, 2.5), (2, 2), (7, 2, 2, 2))
INK, FAINT = "#1f2430", "#d5d9e0"
DPI = 200
STYLE = {
    "font.size": 9,
    "axes.edgecolor": "#8a92a0",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": "#555d6b",
    "ytick.color": "#555d6b",
    "lines.scale_dashes": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "decentral",
    "text.parse_math": False,  # a label is text, dollars and all
}


def draw(
    folder: Path,
    charts: Sequence[Chart],
    axes: Sequence[Axis],
    labels: Sequence[str],
    visible: Sequence[int],
    pictures: Sequence[Picture],
) -> list[Path]:
    """Write COLUMN-AXIS.png and .svg of each chart, of the `visible` groups, and topology-N.*.

    Raises UserError where matplotlib is missing or cannot write.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            "figures as files need matplotlib, which is not installed;"
            " pip install 'decentral[plot]'"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):  # pyright: ignore
        for name, figure in _figures(charts, axes, labels, visible, pictures):
            for suffix in ("png", "svg"):
                path = folder / f"{name}.{suffix}"
                metadata = {"Date": None} if suffix == "svg" else None
                figure.savefig(path, dpi=DPI, metadata=metadata)
                figure.set_layout_engine("none")  # laid out once, which takes half the time
                written.append(path)
    return written


def _figures(
    charts: Sequence[Chart],
    axes: Sequence[Axis],
    labels: Sequence[str],
    visible: Sequence[int],
    pictures: Sequence[Picture],
) -> Iterator[tuple[str, "Figure"]]:
    for chart in charts:
        for axis in axes:
            curves = [c for c in chart.curves if axis.name in c.x and c.group in visible]
            if curves:
                name = "".join(c if c.isalnum() or c == "_" else "-" for c in chart.column)[:80]
                yield f"{name}-{axis.name}", _chart(chart, axis, curves, labels)
    for number, picture in enumerate(pictures):
        yield f"topology-{number + 1}", _picture(picture)


def _chart(chart: Chart, axis: Axis, curves: Sequence[Curve], labels: Sequence[str]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 3.1 + 0.16 * len(curves)), layout="constrained")
    area = figure.add_subplot()
    most = max(float(curve.x[axis.name].max()) for curve in curves)
    scales = SCALES.get(axis.unit, [(1.0, "")])
    factor, unit = next((s for s in scales if most >= s[0]), scales[-1])
    for curve in curves:
        x, colour = curve.x[axis.name] / factor, COLOURS[curve.group % len(COLOURS)]
        dashes = DASHES[curve.group % len(DASHES)]
        style = "steps-post" if chart.steps else "default"
        area.plot(
            x,
            curve.mean,
            color=colour,
            linewidth=1.5,
            dashes=dashes or (None, None),
            drawstyle=style,
            label=labels[curve.group],
        )
        fill = "post" if chart.steps else None
        area.fill_between(x, curve.low, curve.high, color=colour, alpha=0.15, lw=0, step=fill)
    if chart.log:
        area.set_yscale("log", nonpositive="mask")
    area.set_xlabel(f"{axis.title} ({unit})" if unit else axis.title)
    area.set_ylabel(chart.title)
    area.spines[["top", "right"]].set_visible(False)
    area.grid(color=FAINT, linewidth=0.5)
    area.set_axisbelow(True)
    area.margins(x=0)
    area.set_xlim(left=0)
    columns = 2 if max(len(labels[curve.group]) for curve in curves) <= 24 else 1
    figure.legend(
        loc="outside lower center", ncols=columns, frameon=False, fontsize=8, handlelength=3.2
    )
    return figure


def _picture(picture: Picture) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

    figure = Figure(figsize=(picture.width / 100, picture.height / 100))
    area = figure.add_axes((0, 0, 1, 1))
    area.set_xlim(0, picture.width)
    area.set_ylim(picture.height, 0)
    area.set_axis_off()
    for link in picture.links:
        area.add_patch(
            FancyArrowPatch(
                (link.x1, link.y1),
                (link.x2, link.y2),
                arrowstyle="-|>" if link.arrow else "-",
                mutation_scale=10,
                shrinkA=0,
                shrinkB=0,
                color="#9aa3b2",
                linewidth=link.thickness * 0.72,
            )
        )
        if link.label:
            area.text(
                link.x,
                link.y,
                link.label,
                fontsize=7,
                ha="center",
                va="center",
                bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none"},
            )
    for worker in picture.workers:
        if worker.bars:
            width, height = HISTOGRAM
            corner = worker.x - width / 2 - 4, worker.y - height / 2 - 4
            box = FancyBboxPatch(
                corner, width + 8, height + 8, "round,pad=0", fc="white", ec="#8a92a0", lw=0.8
            )
            area.add_patch(box)
            for x, y, wide, tall in worker.bars:
                area.add_patch(Rectangle((x, y), wide, tall, fc=COLOURS[0], lw=0))
            below = worker.y + height / 2 + 15
            area.text(worker.x, below, worker.name, fontsize=7, ha="center", va="center")
        else:
            dot = Circle((worker.x, worker.y), worker.radius, fc=COLOURS[0], ec="white", zorder=3)
            area.add_patch(dot)
            area.text(
                worker.x,
                worker.y + worker.radius + 8,
                worker.name,
                fontsize=7 if len(picture.workers) <= 64 else 4,
                ha="center",
                va="center",
                zorder=4,
            )
    return figure
