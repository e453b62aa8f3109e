"""What do the wrapper and a worker's replica cost beside a bare torch loop?

One worker, Local SGD between two averages, so that nothing is exchanged: an MLP on digits, batch
256, float32, SGD with momentum. Three loops on the same batches: bare torch; the same with
`decentral.wrap`; and a worker's replica, as the Ray engine runs it. They take turns, and a ratio is
the median over rounds of a loop's time over bare torch's in the same round: processor time, which
other programs on the machine touch little, and beside it the clock's.

    python benchmarks/overhead.py --out benchmarks/results/overhead.json
"""

import copy
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import machine
import segments
import torch
import torch.distributed as dist
import typer
from rich.console import Console

import decentral
from decentral.config import load
from decentral.experiment import Experiment, build
from decentral.gradients import FlatModel, ModuleGradient
from decentral.peer import PeerComm
from decentral.replica import Averaging
from decentral.tasks import fetch

STEPS = 8  # of each loop at its turn
PERIOD = 2**30  # never over
SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9}


def main(
    hidden: Annotated[int, typer.Option(min=1, help="Width of two layers.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Of all three loops.")] = 41,
    out: Annotated[Path | None, typer.Option(help="Write the figures there, as JSON.")] = None,
) -> None:
    """Time the three loops beside each other, some steps at a time, on one thread."""
    torch.set_num_threads(1)
    started = os.getloadavg()[0]
    config = {
        "workers": 1,
        "steps": 1,  # the loops say how many
        "task": {
            "name": "digits",
            "batch_size": 256,
            "model": {"name": "mlp", "hidden": [hidden, hidden]},
        },
        "optimizer": {"name": "sgd"} | SGD,
        "algorithm": {"name": "local_sgd", "period": PERIOD},
    }
    experiment = build(load(config))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    loops = {
        "bare": bare(experiment),
        "wrapper": wrapped(experiment),
        "replica": replica(experiment),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    processor: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds + 1):
        names = list(loops)
        for name in names[number % 3 :] + names[: number % 3]:
            start, cpu_start = time.perf_counter(), time.process_time()
            loops[name]()
            if number:  # the first is to warm up
                seconds[name].append((time.perf_counter() - start) / STEPS)
                processor[name].append((time.process_time() - cpu_start) / STEPS)
    dist.destroy_process_group()
    result = {
        "benchmark": "overhead",
        "settings": {"rounds": rounds} | config,
        "parameters": sum(p.numel() for p in experiment.task.model.parameters()),
        "step_ms": medians_ms(seconds),
        "step_cpu_ms": medians_ms(processor),
        "ratio": ratios(seconds),
        "cpu_ratio": ratios(processor),
        "machine": machine.describe(started),
    }
    console = Console()
    for name, ratio in result["cpu_ratio"].items():
        console.print(
            f"{name}: {ratio:.3f} times bare torch's step of {result['step_cpu_ms']['bare']:.2f} ms"
            f" of processor time ({result['ratio'][name]:.3f} by the clock), median of {rounds}"
        )
    if out is not None:
        machine.write(result, out)
        console.print(f"written to {out}")


def medians_ms(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Of each loop to bare torch, round by round."""
    bare = times["bare"]
    return {
        name: statistics.median(a / b for a, b in zip(times[name], bare, strict=True))
        for name in ("wrapper", "replica")
    }


def bare(experiment: Experiment) -> Callable[[], None]:
    model = copy.deepcopy(experiment.task.model)
    return loop(experiment, model, torch.optim.SGD(model.parameters(), **SGD))


def wrapped(experiment: Experiment) -> Callable[[], None]:
    model = copy.deepcopy(experiment.task.model)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    return loop(experiment, model, decentral.wrap(model, optimizer, "local_sgd", period=PERIOD))


def loop(
    experiment: Experiment, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> Callable[[], None]:
    """Some steps of a plain training loop."""
    task, sampler = experiment.task, experiment.sampler([0])
    step = 0

    def some() -> None:
        nonlocal step
        for _ in range(STEPS):
            inputs, target = (part[0] for part in fetch(task.train, sampler.indices(step)))
            optimizer.zero_grad()
            task.loss(model(inputs), target).backward()
            optimizer.step()
            step += 1

    return some


def replica(experiment: Experiment) -> Callable[[], None]:
    """Some steps of a worker."""
    model = FlatModel(copy.deepcopy(experiment.task.model), experiment.dtype)
    gradient = ModuleGradient(model, experiment.task, experiment.sampler([0]))
    worker = experiment.replica(gradient, PeerComm(None), torch.tensor(0))
    return segments.in_a_row(worker.run, STEPS, Averaging.NOBODY)


if __name__ == "__main__":
    typer.run(main)
