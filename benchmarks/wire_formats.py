"""What do fewer bytes cost in accuracy? Wire formats and compressors, on digits with skewed data.

Gossip SGD on a ring of 16 workers, Dirichlet 0.1, an MLP of 4,810 parameters: floats as they are,
two wire formats (`wire`: models are rounded, the mean stays), and CHOCO-SGD, which sends compressed
differences and remembers what it has not sent. All with the same learning rate and steps; CHOCO's
consensus step is the one of a small grid that is best for each compressor (mean over seeds of the
averaged model's accuracy on the test set, so those figures are slightly flattered).

    python benchmarks/wire_formats.py --out benchmarks/results/wire_formats.json

Differences of accuracy are paired: from the same seed's run with floats.
"""

import os
import statistics
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import digits
import machine
import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

LR, ALPHA = 0.3, 0.1
FLOATS = "float32"
FORMATS: dict[str, dict[str, Any]] = {
    FLOATS: {"name": "gossip_sgd"},
    "wire: bfloat16": {"name": "gossip_sgd", "wire": {"name": "bfloat16"}},
    "wire: int8": {"name": "gossip_sgd", "wire": {"name": "int8"}},
    "CHOCO, bfloat16": {"name": "choco_sgd", "compression": {"name": "bfloat16"}},
    "CHOCO, int8": {"name": "choco_sgd", "compression": {"name": "int8"}},
    "CHOCO, top 10%": {"name": "choco_sgd", "compression": {"name": "top_k", "fraction": 0.1}},
    "CHOCO, sign": {"name": "choco_sgd", "compression": {"name": "sign"}},
}
CONSENSUS_STEPS = (1.0, 0.6, 0.3, 0.1)  # CHOCO's gamma_c


class Outcome(NamedTuple):
    """Of a run: accuracy of the averaged model, the mean of the workers' own, consensus distance at
    the end, bytes sent."""

    accuracy: float
    own: float
    distance: float
    sent: int


def outcome(algorithm: dict[str, Any], seed: int, steps: int, workers: int) -> Outcome:
    parts = {
        "topology": {"name": "ring"},
        "algorithm": algorithm,
        "optimizer": {"name": "sgd", "lr": LR},
    }
    final = digits.last_record(parts, ALPHA, seed, steps, workers)
    return Outcome(
        final["eval_accuracy"],
        final["eval_accuracy_workers"],
        final["consensus_distance"],
        final["bytes_sent"],
    )


def best(algorithm: dict[str, Any], seeds: int, steps: int, workers: int) -> dict[str, Any]:
    """With the consensus step that is best, where the method has one: what each seed gave."""
    choices: list[dict[str, Any]] = [{}]
    if algorithm["name"] == "choco_sgd":
        choices = [{"consensus_step": step} for step in CONSENSUS_STEPS]
    found = [
        (choice, [outcome(algorithm | choice, seed, steps, workers) for seed in range(seeds)])
        for choice in choices
    ]
    choice, runs = max(found, key=lambda one: statistics.mean(run.accuracy for run in one[1]))
    return {
        **choice,
        "accuracies": [run.accuracy for run in runs],
        "accuracies_of_workers": [run.own for run in runs],
        "accuracy": statistics.mean(run.accuracy for run in runs),
        "accuracy_of_workers": statistics.mean(run.own for run in runs),
        "consensus_distance": statistics.mean(run.distance for run in runs),
        "bytes_sent": runs[0].sent,
    }


def compared(found: dict[str, Any], floats: dict[str, Any]) -> dict[str, Any]:
    """A format beside floats: bytes, and what it changes of the accuracies."""
    return {
        **found,
        "fewer_bytes": floats["bytes_sent"] / found["bytes_sent"],
        "change": digits.paired(found["accuracies"], floats["accuracies"]),
        "change_of_workers": digits.paired(
            found["accuracies_of_workers"], floats["accuracies_of_workers"]
        ),
    }


def main(
    steps: Annotated[int, typer.Option(help="Steps of every run.")] = 400,
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ...")] = 5,
    workers: Annotated[int, typer.Option(help="Workers.")] = 16,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Run every format, and print what it saves and what it costs."""
    torch.set_num_threads(1)  # small tensors: threads would wait for each other
    load, started = os.getloadavg()[0], time.perf_counter()
    console = Console(width=100)
    found = {
        name: best(algorithm, seeds, steps, workers)
        for name, algorithm in track(FORMATS.items(), "running", console=Console(stderr=True))
    }
    rows = {name: compared(figures, found[FLOATS]) for name, figures in found.items()}
    console.print(table(rows, workers))
    if out is not None:
        figures = {
            "benchmark": "wire_formats",
            "settings": {"steps": steps, "seeds": seeds, "workers": workers, "lr": LR}
            | {"dirichlet": ALPHA, "consensus_steps": list(CONSENSUS_STEPS)},
            "formats": rows,
            "seconds": time.perf_counter() - started,
            "machine": machine.describe(load),
        }
        machine.write(figures, out)
        console.print(f"written to {out}")


def table(rows: dict[str, dict[str, Any]], workers: int) -> Table:
    floats = rows[FLOATS]
    grid = Table(
        title=f"digits, {workers} workers on a ring, Dirichlet {ALPHA}",
        caption=f"float32: accuracy of the averaged model {floats['accuracy']:.4f}, of the workers'"
        f" own {floats['accuracy_of_workers']:.4f}; of the others what changes, and its standard"
        " error. step: CHOCO's consensus step",
        box=box.SIMPLE,
    )
    for column in ("", "step", "fewer bytes", "averaged", "workers' own", "consensus"):
        grid.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, row in rows.items():
        changes = (row["change"], row["change_of_workers"])
        grid.add_row(
            name,
            f"{row['consensus_step']:g}" if "consensus_step" in row else "",
            f"{row['fewer_bytes']:.2f}",
            *(f"{c['mean']:+.4f} ± {c['standard_error']:.4f}" for c in changes),
            f"{row['consensus_distance']:.3g}",
        )
    return grid


if __name__ == "__main__":
    typer.run(main)
