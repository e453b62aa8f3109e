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
CURVES = ("loss", "eval_loss", "eval_accuracy", "gradient_square_full", "sharpness")


def sweep(name: str, runs: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Run a sweep: of each method the means over seeds of its last records, and its curves."""
    done = decentral.compare(CONFIGS / f"{name}.yaml", out=runs / name, **changes)
    if len(done.failed):
        raise SystemExit(f"{name}: {len(done.failed)} points failed; see {done.directory}")
    baseline = done.sweep.compare.baseline
    columns = [c for c in done.table.columns if c not in NO_RESULTS and "." not in c]
    methods = {}
    for method, rows in done.table.groupby("method", sort=False):
        others = done.table[done.table.method == baseline] if baseline != method else None
        metrics = [
            pandas.DataFrame(read(done.directory / "points" / Path(at).name / "metrics.jsonl"))
            for at in rows.directory
        ]
        methods[method] = {
            "final": {
                column: figure(rows, others, column)
                for column in columns
                if rows[column].notna().all()
            },
            "curves": {
                column: curve(metrics, column) for column in CURVES if column in metrics[0].columns
            },
        }
    config = done.sweep.points[0].config
    return {
        "steps": config.steps,
        "workers": config.workers,
        "seeds": len(done.sweep.compare.seeds),
        "baseline": baseline,
        "methods": methods,
    }
