"""Which method stands skewed data? Ten of them on digits, from mild to extreme heterogeneity.

16 workers, Dirichlet alpha 1, 0.1 and 0.01; each method with the learning rate of a small grid that
is best for it at that alpha (mean over seeds of the averaged model's final accuracy, on the test
set: the grid is small and the same for all, but the figures are slightly flattered by it).

    python benchmarks/heterogeneity.py --out benchmarks/results/heterogeneity.json

After the table of Vogels et al. 2021 (RelaySGD, arXiv 2110.04175), on a smaller task.
"""

import os
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import digits
import machine
import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

ALPHAS = (1.0, 0.1, 0.01)
LEARNING_RATES = (0.1, 0.3, 1.0, 3.0)
MOMENTUM = {"name": "sgd", "momentum": 0.9, "nesterov": True}
PLAIN = {"name": "sgd"}
RING, EXPONENTIAL = {"name": "ring"}, {"name": "exponential"}
METHODS: dict[str, dict[str, Any]] = {
    "all-reduce": {"algorithm": {"name": "parallel_sgd"}, "optimizer": PLAIN},
    "gossip, ring": {"algorithm": {"name": "gossip_sgd"}, "optimizer": PLAIN},
    "gossip, ring, momentum": {"algorithm": {"name": "gossip_sgd"}, "optimizer": MOMENTUM},
    "QG momentum, ring": {"algorithm": {"name": "qg_dsgdm"}, "optimizer": PLAIN},
    # On a ring of even size W has the eigenvalue -1/3, which D2 does not stand.
    "D2, lazy ring": {
        "algorithm": {"name": "d2"},
        "optimizer": PLAIN,
        "topology": {"name": "ring", "weights": "lazy"},
    },
    "gradient tracking, ring": {"algorithm": {"name": "gradient_tracking"}, "optimizer": PLAIN},
    "SGP, exponential": {
        "algorithm": {"name": "sgp"},
        "optimizer": PLAIN,
        "topology": EXPONENTIAL,
    },
    "Relay, binary tree": {
        "algorithm": {"name": "relay_sgd"},
        "optimizer": PLAIN,
        "topology": {"name": "tree"},
    },
    "CHOCO, ring, top 10%": {
        "algorithm": {
            "name": "choco_sgd",
            "compression": {"name": "top_k", "fraction": 0.1},
            "consensus_step": 0.3,
        },
        "optimizer": PLAIN,
    },
    "Gossip-PGA, ring, H = 8": {
        "algorithm": {"name": "gossip_pga", "period": 8},
        "optimizer": PLAIN,
    },
}


def accuracy(method: str, alpha: float, lr: float, seed: int, steps: int, workers: int) -> float:
    """Final test accuracy of the averaged model."""
    parts = {"topology": RING} | METHODS[method]
    parts |= {"optimizer": parts["optimizer"] | {"lr": lr}}
    return digits.last_record(parts, alpha, seed, steps, workers)["eval_accuracy"]


def best(method: str, alpha: float, seeds: int, steps: int, workers: int) -> dict[str, Any]:
    """The learning rate with the best mean over seeds, and what it gave."""
    runs = {
        lr: [accuracy(method, alpha, lr, seed, steps, workers) for seed in range(seeds)]
        for lr in LEARNING_RATES
    }
    lr = max(runs, key=lambda lr: statistics.mean(runs[lr]))
    return {
        "lr": lr,
        "mean": statistics.mean(runs[lr]),
        "std": statistics.stdev(runs[lr]) if seeds > 1 else 0.0,
        "mean_by_lr": {str(lr): statistics.mean(found) for lr, found in runs.items()},
    }


def main(
    steps: Annotated[int, typer.Option(help="Steps of every run.")] = 400,
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ...")] = 3,
    workers: Annotated[int, typer.Option(help="Workers.")] = 16,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Run all methods at all alphas and print the table."""
    torch.set_num_threads(1)  # small tensors: threads would wait for each other
    load, started = os.getloadavg()[0], time.perf_counter()
    console = Console(width=100)
    points = [(method, alpha) for method in METHODS for alpha in ALPHAS]
    methods: dict[str, dict[str, Any]] = {method: {} for method in METHODS}
    for method, alpha in track(points, "running", console=Console(stderr=True)):
        methods[method][str(alpha)] = best(method, alpha, seeds, steps, workers)
    table = Table(
        title=f"digits, {workers} workers: accuracy of the averaged model", box=box.SIMPLE
    )
    table.add_column("method", no_wrap=True)
    for alpha in ALPHAS:
        table.add_column(f"alpha {alpha:g}  (lr)", justify="right", no_wrap=True)
    for method, found in methods.items():
        table.add_row(
            method,
            *(f"{f['mean']:.3f} ± {f['std']:.3f} ({f['lr']:g})" for f in found.values()),
        )
    console.print(table)
    if out is not None:
        figures = {
            "benchmark": "heterogeneity",
            "settings": {
                "steps": steps,
                "seeds": seeds,
                "workers": workers,
                "learning_rates": list(LEARNING_RATES),
                "methods": METHODS,
            },
            "methods": methods,
            "seconds": time.perf_counter() - started,
            "machine": machine.describe(load),
        }
        machine.write(figures, out)


if __name__ == "__main__":
    typer.run(main)
