"""Does the exchange hide behind the gradient? Hosts at 200 Mbit/s, where both take as long.

Hosts are network namespaces on this machine, whose cards a token bucket holds to a rate in each
direction; a worker on each trains an MLP on digits by combine-then-adapt. Beside its gradient alone
and its exchange alone, a step is timed on a worker's replica, as the Ray engine runs it, through
the wrapper, and in the order that hides nothing: gradient first, then the exchange. The batch is
chosen so that gradient and exchange take about as long: what hides least. Needs root and iproute2.

    nice -n -15 python benchmarks/overlap.py --out benchmarks/results/overlap.json

A step that hides the shorter of the two whole takes 1.0 times the longer one. Of the hosts, who all
compute on this machine, there should be no more than it has cores: else nothing is left for those
who move the messages.
"""

import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import machine
import ranks
import torch
import torch.distributed as dist
import typer
from ranks import hosts
from rich import box
from rich.console import Console
from rich.table import Table
from segments import median_ratio

import decentral
from decentral.config import load
from decentral.experiment import Experiment, build
from decentral.gradients import FlatModel, ModuleGradient
from decentral.peer import PeerComm
from decentral.replica import Averaging, Replica, Segment
from decentral.tasks import fetch

IN_A_ROW = 4  # steps a timing: whole periods of the topology
TOPOLOGY = "one_peer_exponential"  # a message each way at a step
SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9}


class GradientFirst:
    """Combine-then-adapt in the order that hides nothing."""

    equation = "x <- W x - gamma g(x)"
    source, sends, requires = "combine_then_adapt.py", "D to each neighbour", "doubly stochastic"

    def step(self, replica: Replica) -> None:
        gradient = replica.gradient()
        replica.average()
        replica.descend(gradient)


def main(
    workers: Annotated[
        list[int] | None, typer.Option(min=2, help="One on each host; may be repeated.")
    ] = None,
    rate: Annotated[float, typer.Option(help="Mbit/s.")] = 200.0,
    hidden: Annotated[int, typer.Option(min=1, help="Width of the two hidden layers.")] = 1024,
    rounds: Annotated[int, typer.Option(min=1, help="Of all, after one to warm up.")] = 9,
    out: Annotated[Path | None, typer.Option(help="Write the figures there, as JSON.")] = None,
    rank: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Time steps that hide the exchange, and what they are made of, between slow hosts."""
    numbers = workers or [2, 4]
    if rank is not None:
        print(json.dumps(measure(rank, numbers[0], hidden, rounds)))
        return
    ranks.check_hosts()
    load_average, start = os.getloadavg()[0], time.perf_counter()
    console = Console()
    rows = []
    for n in numbers:
        with hosts.hosts(n, rate) as made:
            options = (f"--workers={n}", f"--hidden={hidden}", f"--rounds={rounds}")
            rows.append(row(n, ranks.on_hosts(made, __file__, *options)))
        console.print(table(rows[-1], rate))
    if out is not None:
        result = {
            "benchmark": "overlap",
            "settings": {"mbit": rate, "hidden": hidden, "rounds": rounds}
            | {"in_a_row": IN_A_ROW, "topology": TOPOLOGY}
            | {"network": "namespaces, tbf, reno, MTU 1500", "threads_of_a_worker": 1},
            "hosts": rows,
            "seconds": time.perf_counter() - start,
            "machine": machine.describe(load_average),
        }
        machine.write(result, out)
        console.print(f"written to {out}")


def row(n: int, measured: dict[str, Any]) -> dict[str, Any]:
    """What there is to say of n workers; a ratio is to the longer of gradient and exchange."""
    seconds = measured.pop("seconds")
    longer = max(("gradient", "exchange"), key=lambda name: statistics.median(seconds[name]))
    return {
        "workers": n,
        **measured,
        "ms": {name: statistics.median(times) * 1e3 for name, times in seconds.items()},
        "ratio_to_the_longer": {
            name: median_ratio(times, seconds[longer])
            for name, times in seconds.items()
            if name not in ("gradient", "exchange")
        },
        "ms_of_each": {name: [s * 1e3 for s in times] for name, times in seconds.items()},
    }


def measure(rank: int, workers: int, hidden: int, rounds: int) -> dict[str, Any]:
    """On one host: seconds of each until the last rank is done, round by round; and what of."""
    ranks.join(rank, workers)
    batch = 64
    for _ in range(3):  # nearer each time, for a gradient's time is not in proportion
        experiment = experiment_of(workers, hidden, batch)
        gradient, exchange = alone(experiment, rank)
        acts = {"gradient": gradient, "exchange": exchange}
        seconds = ranks.in_turns(acts, 3, IN_A_ROW).seconds
        times = {name: statistics.median(values) for name, values in seconds.items()}
        batch = max(1, round(batch * times["exchange"] / times["gradient"]))
    experiment = experiment_of(workers, hidden, batch)
    gradient, exchange = alone(experiment, rank)
    acts = {
        "gradient": gradient,
        "exchange": exchange,
        "gradient first": replica(experiment, rank, GradientFirst()),
        "replica": replica(experiment, rank),
        "wrapper": wrapped(experiment, rank),
    }
    seconds = ranks.in_turns(acts, rounds, IN_A_ROW).seconds
    parameters = sum(p.numel() for p in experiment.task.model.parameters())
    dist.destroy_process_group()
    return {"batch_size": batch, "megabytes_a_message": 4e-6 * parameters, "seconds": seconds}


def experiment_of(workers: int, hidden: int, batch: int) -> Experiment:
    config = {
        "workers": workers,
        "steps": 1,  # the loops say how many
        "task": {
            "name": "digits",
            "batch_size": batch,
            "model": {"name": "mlp", "hidden": [hidden, hidden]},
        },
        "optimizer": {"name": "sgd"} | SGD,
        "algorithm": {"name": "gossip_cta"},
        "topology": {"name": TOPOLOGY},
    }
    return build(load(config))


def alone(
    experiment: Experiment, rank: int
) -> tuple[Callable[[int], object], Callable[[int], object]]:
    """A local step, with nothing exchanged; and an exchange, with nothing computed."""
    comm = PeerComm(experiment.mixing())
    x = torch.cat([p.detach().flatten() for p in experiment.task.model.parameters()])
    local = replica(experiment, rank, between=Averaging.NOBODY)
    return local, lambda step: comm.mix_(x, step)


def replica(
    experiment: Experiment,
    rank: int,
    rule: Any = None,
    between: Averaging = Averaging.NEIGHBOURS,
) -> Callable[[int], None]:
    """A step of a worker, by another rule than the experiment's where there is one."""
    if rule is not None:
        experiment = replace(experiment, algorithm=replace(experiment.algorithm, rule=rule))
    model = FlatModel(copy.deepcopy(experiment.task.model), experiment.dtype)
    gradient = ModuleGradient(model, experiment.task, experiment.sampler([rank]))
    worker = experiment.replica(gradient, PeerComm(experiment.mixing()), torch.tensor(rank))

    def step(number: int) -> None:
        worker.run(Segment(number, number + 1, between, False, record=False))

    return step


def wrapped(experiment: Experiment, rank: int) -> Callable[[int], None]:
    """A step of a plain training loop, averaged by the wrapper."""
    task, sampler = experiment.task, experiment.sampler([rank])
    model = copy.deepcopy(task.model)
    bare = torch.optim.SGD(model.parameters(), **SGD)
    optimizer = decentral.wrap(model, bare, "gossip_cta", TOPOLOGY)

    def step(number: int) -> None:
        inputs, target = (part[0] for part in fetch(task.train, sampler.indices(number)))
        optimizer.zero_grad()
        task.loss(model(inputs), target).backward()
        optimizer.step()

    return step


def table(row: dict[str, Any], mbit: float) -> Table:
    grid = Table(
        title=f"{row['workers']} hosts at {mbit:g} Mbit/s each way,"
        f" {row['megabytes_a_message']:.1f} MB a message, batch {row['batch_size']}",
        box=box.SIMPLE_HEAD,
    )
    for column in ("", "ms", "of the longer"):
        grid.add_column(column, justify="right" if column else "left")
    for name, ms in row["ms"].items():
        ratio = row["ratio_to_the_longer"].get(name)
        grid.add_row(name, f"{ms:.0f}", "" if ratio is None else f"{ratio:.3f}")
    return grid


if __name__ == "__main__":
    typer.run(main)
