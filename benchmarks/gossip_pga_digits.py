"""Does a periodic global average help gossip? Four methods on skewed digits, several seeds.

Gossip-PGA against Gossip SGD, and beside them Local SGD with the same period and Parallel SGD: the
same steps, learning rate, data and seeds for all, plain SGD, nothing tuned for any one. The seed
sets the split, the initial model and the batches, so two methods with one seed are a pair.

    python benchmarks/gossip_pga_digits.py --out benchmarks/results/gossip_pga_digits.json

Claim (Chen et al. 2021): consensus distance below gossip's at the same steps, and the averaged
model at least as accurate. The last lines say whether these figures bear it out.
"""

import os
import statistics
import time
from collections.abc import Callable
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

import decentral

RECORD_EVERY = 5  # no common factor with a period of 8: records meet every phase of it
METHODS = ("parallel_sgd", "local_sgd", "gossip_sgd", "gossip_pga")
WITH_PERIOD = ("local_sgd", "gossip_pga")
CONFIG: dict[str, Any] = {
    "task": {
        "name": "digits",
        "batch_size": 16,
        "model": {"name": "mlp", "hidden": [64]},
        "partition": {"kind": "dirichlet", "alpha": 0.1},
    },
    "topology": {"name": "ring"},
    "network": {"compute_ms": 1},
    "record": {"every": RECORD_EVERY},
}


class Settings(NamedTuple):
    """What every run shares."""

    steps: int
    workers: int
    period: int
    lr: float

    def compared(self, step: int) -> bool:
        """Whether to compare distances at `step`: after the first quarter."""
        return step > self.steps / 4

    def between(self, step: int) -> bool:
        """Whether `step` is compared and ends in no global average."""
        return self.compared(step) and step % self.period != 0


class Run(NamedTuple):
    """One method and one seed. `distance` maps recorded steps to the consensus distance."""

    accuracy: float  # of the averaged model, at the end
    accuracy_workers: float  # mean over the workers' own models, at the end
    distance: dict[int, float]


def main(
    steps: Annotated[int, typer.Option(min=20)] = 500,
    seeds: Annotated[int, typer.Option(min=2, help="Seeds 0 to SEEDS - 1.")] = 5,
    workers: Annotated[int, typer.Option(min=3)] = 16,
    period: Annotated[int, typer.Option(min=2, help="Of Gossip-PGA and Local SGD.")] = 8,
    lr: Annotated[float, typer.Option(help="Of all methods.")] = 0.1,
    out: Annotated[Path | None, typer.Option(help="Write the figures there, as JSON.")] = None,
) -> None:
    """Compare Gossip-PGA with Gossip SGD, Local SGD and Parallel SGD on skewed digits."""
    torch.set_num_threads(1)  # at this size more threads wait for each other, more so under load
    load, start = os.getloadavg()[0], time.perf_counter()
    console = Console()
    settings = Settings(steps, workers, period, lr)
    pairs = [(seed, method) for seed in range(seeds) for method in METHODS]
    runs: dict[str, list[Run]] = {method: [] for method in METHODS}
    for seed, method in track(pairs, "runs", console=console, transient=True):
        runs[method].append(run(method, seed, settings))

    figures = {method: summary(of_seeds, settings) for method, of_seeds in runs.items()}
    versus = compare(runs["gossip_pga"], runs["gossip_sgd"], settings)
    console.print(table(figures, settings, seeds))
    for line in verdict(versus, seeds):
        console.print(line, highlight=False)
    if out is not None:
        result = {
            "benchmark": "gossip_pga_digits",
            "settings": {"seeds": seeds} | settings._asdict() | CONFIG,
            "methods": figures,
            "gossip_pga_minus_gossip_sgd": versus,
            "seconds": time.perf_counter() - start,
            "machine": machine.describe(load),
        }
        machine.write(result, out)
        console.print(f"written to {out}")


def run(method: str, seed: int, settings: Settings) -> Run:
    config = CONFIG | {
        "engine": "sim",
        "seed": seed,
        "steps": settings.steps,
        "workers": settings.workers,
        "optimizer": {"name": "sgd", "lr": settings.lr},
        "algorithm": {"name": method},
    }
    if method in WITH_PERIOD:
        config["algorithm"]["period"] = settings.period
    rows = decentral.run(config).metrics.to_dict("records")
    return Run(
        accuracy=rows[-1]["eval_accuracy"],
        accuracy_workers=rows[-1]["eval_accuracy_workers"],
        distance={row["step"]: row["consensus_distance"] for row in rows},
    )


def mean_distance(run: Run, chosen: Callable[[int], bool]) -> float:
    """Mean consensus distance over the recorded steps that are chosen."""
    return statistics.mean(distance for step, distance in run.distance.items() if chosen(step))


def summary(runs: list[Run], settings: Settings) -> dict[str, Any]:
    return {
        "accuracy": spread([run.accuracy for run in runs]),
        "accuracy_workers": spread([run.accuracy_workers for run in runs]),
        "distance_between": spread([mean_distance(run, settings.between) for run in runs]),
        "distance_all": spread([mean_distance(run, settings.compared) for run in runs]),
        "accuracy_by_seed": [run.accuracy for run in runs],
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values)}


def compare(pga: list[Run], gossip: list[Run], settings: Settings) -> dict[str, Any]:
    """The paired differences, and whether each half of the claim holds for these figures."""
    accuracy = digits.paired([run.accuracy for run in pga], [run.accuracy for run in gossip])
    at = [step for step in pga[0].distance if settings.between(step)]
    lower = [
        statistics.mean(run.distance[step] for run in pga)
        < statistics.mean(run.distance[step] for run in gossip)
        for step in at
    ]
    return {
        "accuracy": accuracy,
        "steps_compared": len(at),
        "steps_with_smaller_distance": sum(lower),
        "seeds_with_smaller_mean_distance": sum(
            mean_distance(a, settings.between) < mean_distance(b, settings.between)
            for a, b in zip(pga, gossip, strict=True)
        ),
        "distance_below_at_every_step": all(lower),
        "accuracy_at_least": accuracy["mean"] >= 0,
    }


def table(figures: dict[str, Any], settings: Settings, seeds: int) -> Table:
    grid = Table(
        title=f"digits, Dirichlet 0.1, {settings.workers} workers on a ring, step {settings.steps}:"
        f" mean ± standard deviation over {seeds} seeds",
        caption="averaged, own: accuracy of the averaged model and mean of the workers' own. "
        "all: consensus distance, mean over the records after the first quarter, taken before "
        f"each averaging; between: those not at a global average (every {settings.period} steps).",
        box=box.SIMPLE_HEAD,
    )
    grid.add_column("method", no_wrap=True)
    for name in ("averaged", "own", "between", "all"):
        grid.add_column(name, justify="right", no_wrap=True)
    for method, row in figures.items():
        cells = (f"{row[key]['mean']:.3f} ± {row[key]['std']:.3f}" for key in list(row)[:4])
        grid.add_row(method, *cells)
    return grid


def verdict(versus: dict[str, Any], seeds: int) -> list[str]:
    """The claim in words, as these figures have it."""
    mean, error = versus["accuracy"]["mean"], versus["accuracy"]["standard_error"]
    steps, smaller = versus["steps_compared"], versus["steps_with_smaller_distance"]
    nearer, better = versus["distance_below_at_every_step"], versus["accuracy_at_least"]
    within = abs(mean) < 2 * error
    return [
        f"Consensus distance of Gossip-PGA below that of Gossip SGD (mean of seeds): at {smaller}"
        f" of {steps} steps; its mean over them on {versus['seeds_with_smaller_mean_distance']}"
        f" of {seeds} seeds.",
        f"Accuracy of the averaged model, Gossip-PGA minus Gossip SGD: {mean:+.4f}, standard error"
        f" {error:.4f}, {seeds} pairs" + ("; within two standard errors of 0." if within else "."),
        f"The claim {'holds' if nearer and better else 'does not hold'} for these figures:"
        f" distance {'below at every step compared' if nearer else 'not below at every step'},"
        f" mean accuracy {'at least' if better else 'less than'} gossip's.",
    ]


if __name__ == "__main__":
    typer.run(main)
