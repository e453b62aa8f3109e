"""How fast is the simulator? Worker-steps per second, beside one model on as many samples.

Gossip-PGA with period 8 on a ring, SGD with momentum, float32: an MLP and a CNN on digits, split
iid, batch 32, and the small GPT on random text, batch 8, all as decentral has them. Beside it one
plain torch training step of ONE model on the samples of all workers: what they cost where nobody
has a model of their own; and the simulator with its workers one by one, and with half and twice as
many at once as it takes by itself. All alternate, and a ratio is the median over rounds, so that a
busy machine slows all; the same ratios of processor time are there for a machine so busy that the
clock tells little.

    python benchmarks/simulator_rate.py --out benchmarks/results/simulator_rate.json

Also where a simulated step goes: its parts, each timed alone. Nothing here is a test of speed.
"""

import copy
import math
import os
import random
import statistics
import string
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import machine
import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from segments import median_ratio, scheduled
from torch import Tensor

from decentral.config import load
from decentral.engines.sim import Simulator
from decentral.experiment import Experiment, build
from decentral.gradients import StackedGradient
from decentral.replica import Replica
from decentral.tasks import Sampler, fetch

PERIOD = 8
SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9}
CONFIG: dict[str, Any] = {
    "steps": 1,  # the benchmark drives the engine itself
    "dtype": "float32",
    "optimizer": {"name": "sgd"} | SGD,
    "algorithm": {"name": "gossip_pga", "period": PERIOD},
    "topology": {"name": "ring"},
}
TASKS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "digits", "batch_size": 32, "model": {"name": "mlp", "hidden": [256]}},
    "cnn": {"name": "digits", "batch_size": 32, "model": {"name": "cnn"}},
    "gpt": {"name": "text", "batch_size": 8},
}
WORKER_STEPS = {"mlp": 2048, "cnn": 256, "gpt": 64}  # of each part of a round, at most 8 steps
CHARACTERS = 512  # of random text, for each worker of the largest size


def main(
    workers: Annotated[list[int] | None, typer.Option(help="n; may be given repeatedly.")] = None,
    models: Annotated[list[str] | None, typer.Option(help="Of " + ", ".join(TASKS))] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds per model and n, at most.")] = 15,
    seconds: Annotated[float, typer.Option(min=0, help="Of each; at least one round.")] = 12,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the figures there, as JSON.")] = None,
) -> None:
    """Time the simulator beside one model on as many samples. By default all, for 8, 64, 256."""
    workers, models = workers or [8, 64, 256], models or list(TASKS)
    torch.set_num_threads(threads)
    started = os.getloadavg()[0]
    console = Console(width=150)
    with tempfile.TemporaryDirectory() as folder:
        text = random_text(Path(folder), CHARACTERS * max(workers))
        with console.status("timing"):
            rows = [measure(m, n, text, repeats, seconds) for m in models for n in workers]
    console.print(table(rows, threads))
    if out is not None:
        result = {
            "benchmark": "simulator_rate",
            "settings": {"repeats": repeats, "seconds": seconds, "tasks": TASKS} | CONFIG,
            "sizes": rows,
            "machine": machine.describe(started),
        }
        machine.write(result, out)
        console.print(f"written to {out}")


def random_text(folder: Path, characters: int) -> str:
    """A file of random letters; its path."""
    drawn = random.Random(0).choices(string.ascii_letters + string.punctuation, k=characters)
    file = folder / "text.txt"
    file.write_text("".join(drawn), encoding="utf-8")
    return str(file)


def measure(model: str, n: int, text: str, repeats: int, seconds: float) -> dict[str, Any]:
    task = TASKS[model] | ({"file": text} if model == "gpt" else {})
    experiment = build(load(CONFIG | {"workers": n, "task": task}))
    steps = max(1, min(PERIOD, WORKER_STEPS[model] // n))
    stacked = Simulator(experiment)
    chunk = gradient_of(stacked).chunk
    others = {"one by one": 1, "half": math.ceil(chunk / 2), "twice": min(n, 2 * chunk)}
    halves = {
        "simulated": scheduled(stacked.run, experiment.algorithm, steps),
        "single": single_model(experiment, steps),
    }
    for name, at_once in others.items():
        simulator = Simulator(experiment)
        gradient_of(simulator).chunk = at_once
        halves[name] = scheduled(simulator.run, experiment.algorithm, steps)
    for half in halves.values():  # to warm up
        half()
    wall_s: dict[str, list[float]] = {name: [] for name in halves}
    cpu_s: dict[str, list[float]] = {name: [] for name in halves}
    began = time.monotonic()
    for number in range(repeats):
        for name in list(halves) if number % 2 == 0 else reversed(halves):
            wall, cpu = timed(halves[name])
            wall_s[name].append(wall / steps)
            cpu_s[name].append(cpu / steps)
        if time.monotonic() - began > seconds:
            break
    step_s = statistics.median(wall_s["simulated"])
    return {
        "model": model,
        "workers": n,
        "at_once": chunk,
        "parameters": sum(p.numel() for p in experiment.task.model.parameters()),
        "rounds": len(wall_s["simulated"]),
        "step_ms": step_s * 1e3,
        "step_cpu_ms": statistics.median(cpu_s["simulated"]) * 1e3,
        "worker_steps_per_s": n / step_s,
        "single_model_ms": statistics.median(wall_s["single"]) * 1e3,
        "ratio": median_ratio(wall_s["simulated"], wall_s["single"]),
        "cpu_ratio": median_ratio(cpu_s["simulated"], cpu_s["single"]),
        "one_by_one_ratio": median_ratio(wall_s["one by one"], wall_s["single"]),
        "one_by_one_cpu_ratio": median_ratio(cpu_s["one by one"], cpu_s["single"]),
        **{
            f"{name}_{of}ratio": median_ratio(times[name], times["simulated"])
            for name in ("half", "twice")
            for of, times in (("", wall_s), ("cpu_", cpu_s))
        },
        "parts_ms": parts(experiment, max(3, min(40, int(seconds / step_s / 4)))),
    }


def gradient_of(simulator: Simulator) -> StackedGradient:
    assert isinstance(simulator.replica, Replica), "the methods measured here have steps"
    gradient = simulator.replica._gradient
    assert isinstance(gradient, StackedGradient)
    return gradient


def single_model(experiment: Experiment, steps: int) -> Callable[[], None]:
    """So many steps of one model, each on all workers' samples, drawn as the simulator does."""
    model = copy.deepcopy(experiment.task.model)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    sampler = experiment.sampler(list(range(experiment.config.workers)))
    step = 0

    def half() -> None:
        nonlocal step
        for _ in range(steps):
            inputs, target = (part.flatten(0, 1) for part in draw(experiment, sampler, step))
            optimizer.zero_grad()
            experiment.task.loss(model(inputs), target).backward()
            optimizer.step()
            step += 1

    return half


def parts(experiment: Experiment, steps: int) -> dict[str, float]:
    """Median milliseconds of each part of a simulated step; the global average's by its share."""
    replica = Simulator(experiment).replica
    sampler = experiment.sampler(list(range(experiment.config.workers)))
    times: dict[str, list[float]] = {}

    def clock(name: str, part: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = part()
        times.setdefault(name, []).append(time.perf_counter() - start)
        return value

    assert isinstance(replica, Replica), "the methods measured here have steps"
    with torch.no_grad():
        for step in range(steps):
            replica.step = step
            clock("draw", lambda: draw(experiment, sampler, replica.step))
            gradient = clock("draw and gradient", replica.gradient)
            clock("optimizer", lambda: replica.descend(gradient))  # noqa: B023
            clock("neighbours", lambda: replica.comm.mix_(replica.x, replica.step))
            clock("everyone", lambda: replica.mean_(replica.x))
            replica.comm.events.clear()
    ms = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    return {
        "draw": ms["draw"],
        "gradient": ms["draw and gradient"] - ms["draw"],
        "optimizer": ms["optimizer"],
        "mix": (ms["neighbours"] * (PERIOD - 1) + ms["everyone"]) / PERIOD,
    }


def draw(experiment: Experiment, sampler: Sampler, step: int) -> tuple[Tensor, ...]:
    """The batches of all workers, [n, batch, ...]."""
    return fetch(experiment.task.train, sampler.indices(step))


def timed(half: Callable[[], None]) -> tuple[float, float]:
    """Seconds of a call: by the clock, and of processor time in all threads."""
    start, cpu_start = time.perf_counter(), time.process_time()
    half()
    return time.perf_counter() - start, time.process_time() - cpu_start


def table(rows: list[dict[str, Any]], threads: int) -> Table:
    grid = Table(
        title=f"gossip_pga, period {PERIOD}, ring; threads: {threads}",
        caption="once: workers that a pass takes at once. step: ms of a simulated step; cpu: its "
        "processor time; rate: worker-steps/s. single: ms of a plain training step of one model on "
        "the samples of all workers; ratio: step / single, median of rounds; loop: the same with "
        "workers one by one; half, twice: a step with so many at once / with as many as it takes "
        "by itself; in brackets those of processor time. Then ms of each part, timed "
        f"alone: draw, gradient, optimizer, mix (1/{PERIOD} of it a global average).",
        box=box.SIMPLE_HEAD,
    )
    names = ("model", "n", "once", "step", "cpu", "rate", "single", "ratio", "loop")
    names += ("half", "twice")
    for name in (*names, "draw", "grad", "optim", "mix"):
        grid.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        grid.add_row(
            row["model"],
            str(row["workers"]),
            str(row["at_once"]),
            f"{row['step_ms']:.2f}",
            f"{row['step_cpu_ms']:.2f}",
            f"{row['worker_steps_per_s']:,.0f}",
            f"{row['single_model_ms']:.2f}",
            f"{row['ratio']:.2f} ({row['cpu_ratio']:.2f})",
            f"{row['one_by_one_ratio']:.2f} ({row['one_by_one_cpu_ratio']:.2f})",
            f"{row['half_ratio']:.2f} ({row['half_cpu_ratio']:.2f})",
            f"{row['twice_ratio']:.2f} ({row['twice_cpu_ratio']:.2f})",
            *(f"{ms:.2f}" for ms in row["parts_ms"].values()),
        )
    return grid


if __name__ == "__main__":
    typer.run(main)
