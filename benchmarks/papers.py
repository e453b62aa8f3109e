"""Claims of papers on small real data, each a sweep of configs/paper/ and what came of it.

    python benchmarks/papers.py --text tinyshakespeare.txt --out benchmarks/results/papers.json \
        --pictures docs/paper

deep_digits, deep_text: Gossip-PGA's table of deep learning (Chen et al. 2021, arXiv 2105.09080).
momentum: little benefit at small learning rates (Wang et al. 2023, arXiv 2307.15196).
invariant: the loss settles, the gradient does not (Zhang et al. 2022, arXiv 2110.06256).
generalisation: of Local SGD (Lin et al. 2020, arXiv 1808.07217; Gu et al. 2023, arXiv 2303.01215).

`--runs DIR` keeps the runs, and goes on from those that it holds.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import machine
import numpy as np
import pandas
import typer
from rich import box
from rich.console import Console
from rich.table import Table

import decentral
from decentral.records import read
from decentral.report.comparison import compare as compared

CONFIGS = Path(__file__).parents[1] / "configs" / "paper"
SWEEPS = ("deep_digits", "deep_text", "momentum", "invariant", "generalisation")
NO_RESULTS = ("method", "seed", "status", "directory", "error", "step", "lr", "time_s", "workers")
NORM = "gradient_square_full"
CURVES = ("loss", "eval_loss", "eval_accuracy", NORM, "sharpness")
SHOWN = (*CURVES, "sim_time_s", "hessian_trace", "loss_change", f"{NORM}_change")  # in the table


def sweep(name: str, runs: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Run a sweep: of each method the means over seeds of its last records, and its curves."""
    done = decentral.compare(CONFIGS / f"{name}.yaml", out=runs / name, **changes)
    if len(done.failed):
        raise SystemExit(f"{name}: {len(done.failed)} points failed; see {done.directory}")
    baseline = done.sweep.compare.baseline
    table, records = done.table.dropna(axis="columns"), {}
    for point, at in zip(done.sweep.points, table.directory, strict=True):
        metrics = done.directory / "points" / Path(at).name / "metrics.jsonl"
        records[point.method, point.config.seed] = pandas.DataFrame(read(metrics))
    found = {
        key: {column: metrics[column].iloc[-1] for column in table if column in metrics}
        | (settled(metrics) if NORM in metrics else {})
        for key, metrics in records.items()
    }
    methods = []
    for method in dict.fromkeys(table.method):
        metrics = [of for (which, _), of in records.items() if which == method]
        other = paired_with(method, baseline)
        final = {
            column: figure(found, method, other, column)
            for column in next(iter(found.values()))
            if column not in NO_RESULTS
        }
        curves = {c: curve(metrics, c) for c in CURVES if c in metrics[0]}
        methods.append({"method": method, "final": final, "curves": curves})
    config = done.sweep.points[0].config
    return {
        "sweep": name,
        "steps": config.steps,
        "workers": config.workers,
        "seeds": len(done.sweep.compare.seeds),
        "methods": methods,
    }


def paired_with(method: str, baseline: str | None) -> str | None:
    """What a method is held to: the baseline, or for momentum plain SGD at the same rate."""
    kind, _, rate = method.partition("-")
    other = f"plain-{rate}" if kind == "momentum" else baseline
    return other if other != method else None


def figure(
    found: dict[tuple[str, int], dict[str, float]], method: str, other: str | None, column: str
) -> dict[str, float]:
    """Mean and standard deviation over seeds; the paired difference to `other`'s, 95% interval."""
    values, others = (
        {seed: row[column] for (which, seed), row in found.items() if which == name}
        for name in (method, other)
    )
    numbers = np.array([*values.values()])
    shown = {"mean": float(numbers.mean()), "std": float(numbers.std(ddof=len(numbers) > 1))}
    test = compared(values, others) if others else None
    if test is not None:
        shown |= {"difference": test.difference, "low": test.low, "high": test.high}
    return shown


def curve(metrics: list[pandas.DataFrame], column: str) -> dict[str, list[float]]:
    """The mean over seeds at each record that has the column, at most 60 of them."""
    rows = pandas.concat(metrics)[["step", column]].dropna()
    mean = rows.groupby("step")[column].mean()
    kept = mean.iloc[:: max(1, len(mean) // 60)]
    return {"step": kept.index.tolist(), "value": kept.tolist()}


def settled(metrics: pandas.DataFrame) -> dict[str, float]:
    """Means over the last third of a run, and how they differ from those over the middle third."""
    found = {}
    for column in ("loss", NORM):
        values = metrics[column].dropna().to_numpy()
        third = len(values) // 3
        middle, last = values[third : 2 * third].mean(), values[-third:].mean()
        found |= {f"{column}_last_third": last, f"{column}_change": last / middle - 1}
    return found


def table_of(result: dict[str, Any]) -> Table:
    """Final figures, each with its spread; a star where the difference is beyond chance."""
    columns = [c for c in SHOWN if c in result["methods"][0]["final"]]
    title = f"{result['sweep']}: mean and deviation over {result['seeds']} seeds"
    shown = Table(title=title, box=box.SIMPLE)
    shown.add_column("method", no_wrap=True)
    for column in columns:
        shown.add_column(column, justify="right")
    for found in result["methods"]:
        cells = []
        for column in columns:
            f = found["final"][column]
            star = "*" if "low" in f and f["low"] * f["high"] > 0 else ""
            cells.append(f"{f['mean']:.4g} ± {f['std']:.2g}{star}")
        shown.add_row(found["method"], *cells)
    return shown


def draw(result: dict[str, Any], path: Path) -> None:
    """All curves of a sweep, a panel for each column."""
    import matplotlib.pyplot as plt

    methods = result["methods"]
    columns = list(methods[0]["curves"])
    size = (3.6 * len(columns), 3.2)
    figure, axes = plt.subplots(1, len(columns), figsize=size, layout="constrained", squeeze=False)
    for axis, column in zip(axes[0], columns, strict=True):
        for place, found in enumerate(methods):
            kind = found["method"].split("-")[0]
            pairs = kind in ("plain", "momentum")  # of one colour each
            colour = f"C{place // 2 if pairs else place}"
            line = found["curves"][column]
            style = "--" if kind == "momentum" else "-"
            axis.plot(
                line["step"], line["value"], style, color=colour, lw=1.2, label=found["method"]
            )
        axis.set_title(column.replace("_", " "))
        axis.set_xlabel("step")
        if column != "eval_accuracy":
            axis.set_yscale("log")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0][0].legend(frameon=False, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SWEEPS)}.")] = None,
    text: Annotated[Path | None, typer.Option(help="For deep_text, instead of the README.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of every run, for a try.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Of every sweep.")] = None,
    processes: Annotated[int, typer.Option(help="Runs at a time.")] = 2,
    runs: Annotated[Path | None, typer.Option(help="Keep runs here; go on from them.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="A folder for curves.")] = None,
) -> None:
    """Run the sweeps and print their tables."""
    load, started = os.getloadavg()[0], time.perf_counter()
    changes: dict[str, Any] = {"compare.processes": processes}
    if steps is not None:
        every = max(1, steps // 3)
        changes |= {"steps": steps, "record.every": every, "record.evaluate_every": every}
    if seeds is not None:
        changes["compare.seeds"] = seeds
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in only or SWEEPS:
            own: dict[str, Any] = {}
            if text is not None and name == "deep_text":
                own["task.file"] = str(text)
            if steps is not None and name in ("invariant", "generalisation"):
                own["diagnostics.every"] = max(1, steps // 3)
            results.append(sweep(name, runs or Path(scratch), changes | own))
    for result in results:
        Console(width=160).print(table_of(result))
        if pictures is not None:
            draw(result, pictures / f"{result['sweep']}.png")
    if out is not None:
        figures = {
            "benchmark": "papers",
            "settings": {"text": text.name if text is not None else "README.md"},
            "sweeps": results,
            "seconds": time.perf_counter() - started,
            "machine": machine.describe(load),
        }
        machine.write(figures, out)


if __name__ == "__main__":
    typer.run(main)
