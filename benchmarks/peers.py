"""A step of training with gossip and with periodic averages, beside what others' packages take.

Two and four workers on this machine, a thread each, exchange through gloo; a plain loop trains an
MLP on digits with `decentral.wrap`, with decent-dp (PyPI, where it is installed), and with torch's
PeriodicModelAverager. What is compared sends as many bytes, but for the ring of four, where
decentral's workers average with both neighbours at a step and decent-dp's with one in turn:
`pairs` is what compares with that.

    pip install --no-deps decent-dp==0.2.3 loguru==0.7.3
    nice -n -15 python benchmarks/peers.py --out benchmarks/results/peers.json

All take turns; a ratio is the median over rounds of decentral's time over the other's, by the clock
and in processor time, which other programs on the machine touch less. decentral has gloo's threads
give way to the worker's, see decentral/gloo.py. The others are timed with these threads as torch
starts them, and once more with threads that give way to theirs as well.
"""

import copy
import importlib.metadata
import importlib.util
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import machine
import ranks
import torch
import torch.distributed as dist
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from segments import median_ratio
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

import decentral
from decentral import gloo
from decentral.config import load
from decentral.experiment import Experiment, build
from decentral.tasks import fetch
from tests.processes import run_on_ranks

IN_A_ROW = 8  # steps a timing: whole periods of all that is compared
PERIOD = 4
BATCH = 32
SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9}
TORCHS = "torch averager"
# decentral's method and topology, and what it is compared with.
PAIRS: list[tuple[str, str | None, str]] = [
    ("local_sgd", None, TORCHS),
    ("gossip_cta", "pairs", "decent-dp ring"),
    ("gossip_sgd", "pairs", "decent-dp ring"),
    ("gossip_cta", "ring", "decent-dp ring"),
    ("gossip_sgd", "ring", "decent-dp ring"),
    ("gossip_cta", "one_peer_exponential", "decent-dp one-peer-exp"),
    ("gossip_sgd", "one_peer_exponential", "decent-dp one-peer-exp"),
]
GIVING_WAY = ", giving way"  # of another with gloo's threads as decentral has them
NAMES = {"pairs": "hyper_hypercube"}  # of a topology
Step = Callable[[int], None]


def main(
    workers: Annotated[list[int] | None, typer.Option(min=2, help="May be repeated.")] = None,
    hidden: Annotated[
        list[int] | None, typer.Option(min=1, help="Width of the two hidden layers; repeatable.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of all, after one to warm up.")] = 11,
    out: Annotated[Path | None, typer.Option(help="Write the figures there, as JSON.")] = None,
) -> None:
    """Time a step of decentral's wrapper beside decent-dp and torch's averager, in turns."""
    load_average, start = os.getloadavg()[0], time.perf_counter()
    console = Console()
    version = None
    if importlib.util.find_spec("decent_dp") is None:
        console.print("decent-dp is not installed: torch's averager alone is compared")
    else:
        version = importlib.metadata.version("decent-dp")
    sizes = []
    for n in workers or [2, 4]:
        for width in hidden or [256, 2048]:
            measured = run_on_ranks(n, measure, n, width, rounds, timeout_s=900)
            sizes.append(size_of(n, *measured[0]))
            console.print(table(sizes[-1]))
    if out is not None:
        result = {
            "benchmark": "peers",
            "settings": {"rounds": rounds, "in_a_row": IN_A_ROW, "batch_size": BATCH}
            | {"period": PERIOD, "decent_dp": version, "threads_of_a_worker": 1},
            "sizes": sizes,
            "seconds": time.perf_counter() - start,
            "machine": machine.describe(load_average),
        }
        machine.write(result, out)
        console.print(f"written to {out}")


def measure(rank: int, n: int, width: int, rounds: int) -> tuple[int, ranks.Times]:
    """On one rank: how many parameters, and the times of a step of each."""
    config = {
        "workers": n,
        "steps": 1,  # the loops say how many
        "task": {
            "name": "digits",
            "batch_size": BATCH,
            "model": {"name": "mlp", "hidden": [width, width]},
        },
        "optimizer": {"name": "sgd"} | SGD,
        "algorithm": {"name": "local_sgd", "period": PERIOD},
    }
    experiment = build(load(config))
    acts: dict[str, Step] = {"torch alone": torch_loop(experiment, rank, None)}
    for method, topology, other in PAIRS:
        if other == TORCHS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                averager = PeriodicModelAverager(PERIOD)
            acts[other] = torch_loop(experiment, rank, averager)
        elif importlib.util.find_spec("decent_dp") is None:
            continue
        elif other not in acts:
            acts[other] = decent_dp_loop(experiment, rank, other.removeprefix("decent-dp "))
        acts[name_of(method, topology)] = wrapped_loop(experiment, rank, method, topology)
    as_torch_has_it = [other for *_, other in PAIRS if other in acts]
    for other in as_torch_has_it:
        acts[other + GIVING_WAY] = acts[other]

    def prepare(name: str) -> None:
        for loop in gloo.loops():
            policy = os.SCHED_OTHER if name in as_torch_has_it else os.SCHED_BATCH
            os.sched_setscheduler(loop, policy, os.sched_param(0))

    times = ranks.in_turns(acts, rounds, IN_A_ROW, prepare)
    parameters = sum(p.numel() for p in experiment.task.model.parameters())
    return parameters, times


def name_of(method: str, topology: str | None) -> str:
    return method if topology is None else f"{method}, {topology}"


def batches(experiment: Experiment, rank: int) -> Callable[[int], tuple[Any, Any]]:
    task, sampler = experiment.task, experiment.sampler([rank])

    def of(number: int) -> tuple[Any, Any]:
        inputs, target = (part[0] for part in fetch(task.train, sampler.indices(number)))
        return inputs, target

    return of


def torch_loop(experiment: Experiment, rank: int, averager: PeriodicModelAverager | None) -> Step:
    """A plain loop, whose models are averaged at every PERIOD-th step, or never."""
    model, batch = copy.deepcopy(experiment.task.model), batches(experiment, rank)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)

    def step(number: int) -> None:
        inputs, target = batch(number)
        optimizer.zero_grad()
        experiment.task.loss(model(inputs), target).backward()
        optimizer.step()
        if averager is not None:
            averager.average_parameters(model.parameters())

    return step


def wrapped_loop(experiment: Experiment, rank: int, method: str, topology: str | None) -> Step:
    model, batch = copy.deepcopy(experiment.task.model), batches(experiment, rank)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    graph, options = None, {"name": method, "period": PERIOD}
    if topology is not None:
        graph, options = NAMES.get(topology, topology), {"name": method}
    optimizer = decentral.wrap(model, optimizer, options, graph)

    def step(number: int) -> None:
        inputs, target = batch(number)
        optimizer.zero_grad()
        experiment.task.loss(model(inputs), target).backward()
        optimizer.step()

    return step


def decent_dp_loop(experiment: Experiment, rank: int, topology: str) -> Step:
    """It takes the optimizer's step in the hooks of the backward pass."""
    from decent_dp.ddp import (  # pyright: ignore[reportMissingImports]
        DecentralizedDataParallel,
    )

    batch = batches(experiment, rank)
    model = DecentralizedDataParallel(
        copy.deepcopy(experiment.task.model),
        lambda parameters: torch.optim.SGD([p for _, p in parameters], **SGD),
        topology=topology,
        _local_world_size=dist.get_world_size(),
    )

    def step(number: int) -> None:
        inputs, target = batch(number)
        experiment.task.loss(model(inputs), target).backward()

    return step


def size_of(n: int, parameters: int, times: ranks.Times) -> dict[str, Any]:
    """What there is to say of so many workers and parameters."""
    pairs = [(name_of(method, topology), other) for method, topology, other in PAIRS]
    return {
        "workers": n,
        "parameters": parameters,
        "ms": [
            {"of": name, "ms": statistics.median(seconds) * 1e3}
            | {"processor_ms": statistics.median(times.processor_s[name]) * 1e3 / n}
            for name, seconds in times.seconds.items()
        ],
        "ratios": [
            {"of": own, "to": other}
            | {"ratio": median_ratio(times.seconds[own], times.seconds[other])}
            | {"processor_ratio": median_ratio(times.processor_s[own], times.processor_s[other])}
            for own, first in pairs
            for other in (first, first + GIVING_WAY)
            if own in times.seconds
        ],
    }


def table(size: dict[str, Any]) -> Table:
    grid = Table(
        title=f"{size['workers']} workers, {size['parameters']:,} parameters: a step",
        box=box.SIMPLE_HEAD,
    )
    for column in ("", "ms", "beside", "ms", "ratio", "processor"):
        grid.add_column(column, justify="left" if column in ("", "beside") else "right")
    ms = {row["of"]: row["ms"] for row in size["ms"]}
    for row in size["ratios"]:
        cells = f"{ms[row['of']]:.2f}", row["to"], f"{ms[row['to']]:.2f}"
        ratios = f"{row['ratio']:.3f}", f"{row['processor_ratio']:.3f}"
        grid.add_row(row["of"], *cells, *ratios)
    grid.caption = f"torch alone, which exchanges nothing: {ms['torch alone']:.2f} ms"
    return grid


if __name__ == "__main__":
    typer.run(main)
