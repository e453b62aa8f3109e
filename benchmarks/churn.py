"""Does the mean stay what the weights promise, while workers come and go and messages are lost?

Gossip SGD in the simulator, float64, on a quadratic whose optimum is known: 16 workers on a ring
and on a random regular graph, 100,000 steps. Each worker leaves with probability 0.005 a step
and returns with 0.095, so that 5% are away on average. Of the exchanges 5% are lost; in another
run, 5% of the single messages.

At every mixing and every change of membership the live mean is held to what it must be, by hand:

    exchanges lost    W' is doubly stochastic:  mean' = mean
    messages lost     mean' - mean = (1/n) sum_ij W_ij b_ij (x_i - x_j), b_ij a coin with chance p:
                      0 in expectation, variance p (1 - p) / n^2 sum_ij W_ij^2 (x_i - x_j)^2; the
                      sum over steps is a martingale, so divided by the root of the summed variances
                      it has mean 0 and variance 1
    L of n leave      mean' = mean - sum over leavers (x_l - mean) / (n - L)
    workers come      they have the mean of those that stay: no change

    python benchmarks/churn.py --out benchmarks/results/churn.json
"""

import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import machine
import numpy as np
import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from decentral.config import load
from decentral.coordinator import Coordinator
from decentral.engines.sim import Simulator
from decentral.experiment import Experiment, build
from decentral.replica import Replica

WORKERS = 16
LOST = 0.05
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "ring": {"name": "ring"},
    "random_regular": {"name": "random_regular", "degree": 4},
}
CHURN = {"rare": (0.005, 0.095)}  # leave, return
RUNS = [("rare", "exchanges"), ("rare", "messages")]
CONFIG: dict[str, Any] = {
    "workers": WORKERS,
    "engine": "sim",
    "dtype": "float64",
    "task": {"name": "quadratic", "batch_size": 1, "dim": 10},
    "optimizer": {"name": "sgd", "lr": 0.01},
    "algorithm": {"name": "gossip_sgd"},
    "network": {"compute_ms": 1.0},
    "record": {"every": 10_000},
}


def main(
    steps: Annotated[int, typer.Option(min=10, help="Of each run.")] = 100_000,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the figures there, as JSON.")] = None,
) -> None:
    """Run under churn and losses, and hold the live mean to its closed forms at every step."""
    started = os.getloadavg()[0]
    console = Console()
    runs = [(topology, *run, steps) for run in RUNS for topology in TOPOLOGIES]
    with console.status("running"), ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        rows = list(pool.map(measure, *zip(*runs, strict=True)))
    console.print(table(rows, steps))
    if out is not None:
        result = {
            "benchmark": "churn",
            "settings": {"steps": steps, "lost": LOST, "churn": CHURN} | CONFIG,
            "runs": rows,
            "machine": machine.describe(started),
        }
        machine.write(result, out)
        console.print(f"written to {out}")


def measure(topology: str, churn: str | None, lost: str | None, steps: int) -> dict[str, Any]:
    """A run, and how far the live mean was from what it must be: the largest errors, relative to
    the largest parameter. Without churn and losses for None."""
    torch.set_num_threads(1)
    script: list[dict[str, Any]] = []
    if churn is not None:
        leave, back = CHURN[churn]
        script.append({"kind": "churn", "leave": leave, "return": back})
    if lost is not None:
        script.append({"kind": "lose", "probability": LOST, "of": lost})
    config = CONFIG | {"steps": steps, "topology": TOPOLOGIES[topology], "faults": script}
    experiment = build(load(config))
    engine = WatchedSimulator(experiment, steps)
    began = time.perf_counter()
    for _ in Coordinator(experiment, engine).run():
        pass
    kept = lost != "messages"
    return {
        "topology": topology,
        "churn": churn,
        "lost": lost,
        "steps": engine.mixings,
        "changes": engine.changes,
        "left": engine.left,
        "came": engine.came,
        "away": engine.away / steps / WORKERS,
        "mixing_error": engine.mixing_error if kept else None,
        "change_error": engine.change_error,
        "drift": None if kept else engine.drift.norm().item(),
        "drift_deviations": None if kept else engine.deviations,
        "distance_to_optimum": math.sqrt(engine.square_distance / engine.settled),
        "ms_a_step": (time.perf_counter() - began) / steps * 1e3,
    }


class WatchedSimulator(Simulator):
    """A simulator that holds the live mean to its closed forms, at each mixing and each change.

    drift: the sum of all that mixings moved the mean by, [D]. variance: that of `drift`, where
    single messages are lost. square_distance: of the mean to the optimum, summed over the steps
    after the first tenth, which are `settled`.
    """

    def __init__(self, experiment: Experiment, steps: int):
        assert experiment.task.optimum is not None, "a quadratic has one"
        self._optimum, self._steps = experiment.task.optimum, steps
        self.mixings = self.changes = self.left = self.came = self.away = self.settled = 0
        self.mixing_error = self.change_error = self.square_distance = 0.0
        self.drift = torch.zeros_like(self._optimum)
        self.variance = torch.zeros_like(self._optimum)
        super().__init__(experiment)

    @property
    def deviations(self) -> float:
        """The drift in standard deviations, the root mean square over coordinates."""
        return (self.drift.square() / self.variance).mean().sqrt().item()

    def _replicas(self) -> Replica:
        replica = super()._replicas()
        assert isinstance(replica, Replica)
        topology = self._experiment.topology_of(self.members)
        assert topology is not None
        links = topology.matrices[0].tocoo()  # a self weight counts for nothing: x_i - x_i
        receiver, sender = torch.from_numpy(links.row), torch.from_numpy(links.col)
        square = torch.from_numpy(links.data).square().unsqueeze(-1)
        mix_ = replica.comm.mix_

        def watched(x: Tensor, step: int) -> None:
            message = x.clone()
            mix_(x, step)
            moved = x.mean(0) - message.mean(0)
            self.mixings += 1
            self.away += WORKERS - len(message)
            self.mixing_error = max(self.mixing_error, relative(moved, message))
            self.drift += moved
            apart = (message[receiver] - message[sender]).square()
            self.variance += LOST * (1 - LOST) * (square * apart).sum(0) / len(message) ** 2
            if step >= self._steps // 10:
                self.settled += 1
                self.square_distance += float((x.mean(0) - self._optimum).square().sum())

        replica.comm.mix_ = watched
        return replica

    def regroup(self, members: Sequence[int], new: Sequence[int] = ()) -> None:
        before = dict(zip(self.members, self.replica.x.clone(), strict=True))
        x = torch.stack(list(before.values()))
        mean = x.mean(0)
        super().regroup(members, new)
        leavers = [before[worker] for worker in before if worker not in members]
        stay = len(before) - len(leavers)
        expected = mean - sum((one - mean for one in leavers), torch.zeros_like(mean)) / stay
        errors = [relative(self.replica.x.mean(0) - expected, x)]
        for worker, row in zip(self.members, self.replica.x, strict=True):
            errors.append(relative(row - (expected if worker in new else before[worker]), x))
        self.change_error = max(self.change_error, *errors)
        self.changes += 1
        self.left += len(leavers)
        self.came += len(new)


def relative(error: Tensor, x: Tensor) -> float:
    """The largest entry of an error, to the largest of x."""
    return float(error.abs().max() / max(float(x.abs().max()), np.finfo(float).tiny))


def table(rows: list[dict[str, Any]], steps: int) -> Table:
    grid = Table(
        title=f"gossip_sgd, {WORKERS} workers, {steps} steps",
        caption="away: mean share of the workers. mixing, change: largest error of the live mean at"
        " a mixing and at a change of membership, relative to the largest parameter. drift: by lost"
        " messages, and in its standard deviations. optimum: distance of the live mean to it, root"
        " mean square.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    columns = ("topology", "churn", "lost", "changes", "away", "mixing", "change", "drift", "sd")
    for name in (*columns, "far", "ms"):
        grid.add_column(name, no_wrap=True)
    for row in rows:
        kept = row["drift"] is None
        grid.add_row(
            row["topology"],
            row["churn"] or "none",
            row["lost"] or "nothing",
            str(row["changes"]),
            f"{row['away']:.3f}",
            f"{row['mixing_error']:.1e}" if kept else "",
            f"{row['change_error']:.1e}",
            "" if kept else f"{row['drift']:.3f}",
            "" if kept else f"{row['drift_deviations']:.2f}",
            f"{row['distance_to_optimum']:.4f}",
            f"{row['ms_a_step']:.2f}",
        )
    return grid


if __name__ == "__main__":
    typer.run(main)
