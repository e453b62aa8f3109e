"""How does the simulator scale to ten thousand workers, and what do its records cost?

Scale: gossip SGD on the paper's logistic regression, dimension 10, batch 32, plain SGD, float32, on
a ring and an exponential graph. Beside it one plain torch step of ONE model on the same n x 32
samples, drawn by the same sampler; and, drawn beforehand, that step alone. All three take turns.

Records: steps through the coordinator, with a record every 10 (the default), written to a run
directory, and lines of progress, beside the same steps of the bare engine. The evaluation, which a
run has at its end, is timed apart.

    python benchmarks/scale.py --out benchmarks/results/scale.json

Ratios are medians over rounds, of processor time, which other programs on the machine touch little.
"""

import copy
import io
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import machine
import segments
import torch
import typer
from rich.console import Console
from rich.table import Table
from segments import median_ratio

from decentral.config import load
from decentral.coordinator import Coordinator
from decentral.engines.sim import Simulator
from decentral.experiment import Experiment, build
from decentral.progress import Terminal
from decentral.records import RunDirectory
from decentral.replica import Averaging
from decentral.tasks import fetch

TOPOLOGIES = ("ring", "exponential")
LOGISTIC: dict[str, Any] = {
    "steps": 1,  # the benchmark drives the engine itself
    "task": {"name": "logistic", "samples_per_worker": 320, "batch_size": 32},
    "optimizer": {"name": "sgd", "lr": 0.01},
    "algorithm": {"name": "gossip_sgd"},
}
EPOCH = 10  # steps in which a worker has drawn each of its samples once
TURN = 40  # steps, of four records and, on digits, five global averages
RECORDED: dict[str, dict[str, Any]] = {
    "digits": {
        "task": {"name": "digits", "batch_size": 32, "model": {"name": "mlp", "hidden": [256]}},
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
        "algorithm": {"name": "gossip_pga", "period": 8},
        "topology": {"name": "ring"},
    },
    "logistic": LOGISTIC | {"topology": {"name": "ring"}},
}


def main(
    workers: Annotated[list[int] | None, typer.Option(help="n; may be given repeatedly.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of all that takes turns.")] = 7,
    recorded: Annotated[
        int, typer.Option(min=1, help=f"Steps with records, to whole turns of {TURN}.")
    ] = 2000,
    digits: Annotated[int, typer.Option(help="Workers on digits, with records.")] = 64,
    logistic: Annotated[int, typer.Option(help="Workers on logistic, with records.")] = 1000,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the figures there, as JSON.")] = None,
) -> None:
    """Without --workers: 256, 1024 and 10,000."""
    torch.set_num_threads(threads)
    started = os.getloadavg()[0]
    console = Console()
    with console.status("timing"):
        rows = [
            scaled(n, topology, rounds)
            for n in workers or [256, 1024, 10_000]
            for topology in TOPOLOGIES
        ]
        records = [
            overhead(name, n, recorded, rounds)
            for name, n in (("digits", digits), ("logistic", logistic))
        ]
    console.print(table("a step; single: one model on as many samples", rows))
    console.print(table("records, of the bare engine's time", records))
    if out is not None:
        result = {
            "benchmark": "scale",
            "settings": {"rounds": rounds, "config": LOGISTIC, "recorded": RECORDED},
            "scale": rows,
            "records": records,
            "machine": machine.describe(started),
        }
        machine.write(result, out)
        console.print(f"written to {out}")


class Unevaluated(Simulator):
    """An engine whose models nobody looks at."""

    def evaluate(self) -> dict[str, float]:
        return {}


def scaled(n: int, topology: str, rounds: int) -> dict[str, Any]:
    """Times of an epoch of steps, by step."""
    experiment = build(load(LOGISTIC | {"workers": n, "topology": {"name": topology}}))
    acts = {
        "step": segments.in_a_row(Simulator(experiment).run, EPOCH, Averaging.NEIGHBOURS),
        "single": single_model(experiment, draws=True),
        "single_without_drawing": single_model(experiment, draws=False),
    }
    taken = turns(acts, rounds)
    medians = {name: statistics.median(times) / EPOCH for name, times in taken.items()}
    return {
        "workers": n,
        "topology": topology,
        **{f"{name}_ms": seconds * 1e3 for name, seconds in medians.items()},
        "us_per_worker_step": medians["step"] / n * 1e6,
        "ratio": median_ratio(taken["step"], taken["single"]),
        "ratio_without_drawing": median_ratio(taken["step"], taken["single_without_drawing"]),
    }


def single_model(experiment: Experiment, draws: bool) -> Callable[[], None]:
    """An epoch of steps of one model on all workers' samples."""
    task = experiment.task
    model = copy.deepcopy(task.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LOGISTIC["optimizer"]["lr"])
    sampler = experiment.sampler(list(range(experiment.config.workers)))
    step, batch = 0, fetch(task.train, sampler.indices(0))

    def epoch() -> None:
        nonlocal step, batch
        for _ in range(EPOCH):
            if draws:
                batch = fetch(task.train, sampler.indices(step))
            inputs, target = (part.flatten(0, 1) for part in batch)
            optimizer.zero_grad()
            task.loss(model(inputs), target).backward()
            optimizer.step()
            step += 1

    return epoch


def overhead(name: str, n: int, steps: int, rounds: int) -> dict[str, Any]:
    """Of steps with records to bare ones: the time beyond them. And an evaluation.

    The two take turns of a few steps, for no machine is as fast a second later.
    """
    steps = max(2, steps // TURN) * TURN
    config = load(RECORDED[name] | {"workers": n, "steps": steps, "network": {"compute_ms": 1.0}})
    experiment = build(config)
    simulator, evaluated = Simulator(experiment), Simulator(experiment)
    bare = segments.scheduled(simulator.run, experiment.algorithm, TURN)
    coordinator = Coordinator(experiment, Unevaluated(experiment))
    run = coordinator.run()
    watcher = Terminal(Console(file=io.StringIO()))

    def recorded() -> None:
        last = coordinator.step + TURN
        while coordinator.step < last:
            record = next(run)
            if record is not None:
                directory.append(record)
            watcher.advance(coordinator.step, record)

    def evaluate() -> None:
        evaluated.evaluate()

    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(Path(folder))
        directory.start(config, experiment.shards, 0)
        watcher.begin(experiment, 0)
        taken = turns({"bare": bare, "recorded": recorded}, steps // TURN - 1)
        watcher.end()
        directory.finish({}, None)
    # By itself: what comes after it is the faster for the memory that it leaves.
    evaluation_s = statistics.median(turns({"evaluation": evaluate}, rounds)["evaluation"])
    step_s = statistics.median(taken["bare"]) / TURN
    return {
        "task": name,
        "workers": n,
        "steps": steps,
        "step_ms": step_s * 1e3,
        "records": median_ratio(taken["recorded"], taken["bare"]) - 1,
        "evaluation_ms": evaluation_s * 1e3,
        "evaluation_in_steps": evaluation_s / step_s,
    }


def turns(acts: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each, round by round; before them a round to warm up.

    In an order that is drawn, so that none comes behind the same one each time.
    """
    taken: dict[str, list[float]] = {name: [] for name in acts}
    for number in range(rounds + 1):
        for name in random.Random(number).sample([*acts], len(acts)):
            taken[name].append(seconds(acts[name]))
    return {name: times[1:] for name, times in taken.items()}


def seconds(act: Callable[[], object]) -> float:
    start = time.process_time()
    act()
    return time.process_time() - start


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    grid = Table(title=title)
    for name in rows[0]:
        grid.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        grid.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    return grid


if __name__ == "__main__":
    typer.run(main)
