"""What do averaging and recording cost in the simulator, beside copies of the models' buffer?

The models of n workers are one buffer [n, D]. x <- W x has to read, for each worker, itself and its
neighbours: as much as degree + 1 copies of the buffer. Both alternate, and a ratio is the median
over pairs: of processor time, which other programs on the machine touch little, and beside it the
clock's. A topology that changes from step to step is taken through its sequence, a step after the
other. Beside them the mean over workers and the consensus distance, as times of one copy.

    python benchmarks/mixing.py --out benchmarks/results/mixing.json
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import machine
import networkx as nx
import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from decentral import topology as topologies
from decentral.comm import StackedComm
from decentral.mixing import Mixing
from decentral.replica import squared_distance
from decentral.topology import Topology

NAMED: dict[str, dict[str, Any]] = {
    "ring": {},
    "torus": {},
    "exponential": {},
    "random_regular": {"degree": 4},
    "one_peer_exponential": {},
    "random_matchings": {"graph": "torus"},
}
SHORT = ("ring", "torus", "exp", "4-reg", "1-peer", "match", "file")  # in the table
LEAST_S = 2e-3  # that a half of a pair takes


def main(
    workers: Annotated[list[int] | None, typer.Option(help="n; may be given repeatedly.")] = None,
    parameters: Annotated[list[int] | None, typer.Option(help="D; the same.")] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Of mixing and copies, for each.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the figures there, as JSON.")] = None,
) -> None:
    """Without options: 64, 256, 1024 and 4096 workers, 650 and 19,210 parameters, float32."""
    workers = workers or [64, 256, 1024, 4096]
    parameters = parameters or [650, 19_210]
    torch.set_num_threads(threads)
    started = os.getloadavg()[0]
    console = Console()
    rows, means = [], []
    with console.status("timing"):
        for n in workers:
            graphs = built(n)
            for size in parameters:
                x = torch.randn(n, size)
                rows += [mixing(topology, x, pairs) for topology in graphs]
                means.append(averages(x, pairs))
    console.print(table(rows, means, pairs, threads))
    if out is not None:
        result = {
            "benchmark": "mixing",
            "settings": {"pairs": pairs, "workers": workers, "parameters": parameters},
            "mixing": rows,
            "averages": means,
            "machine": machine.describe(started),
        }
        machine.write(result, out)
        console.print(f"written to {out}")


def built(n: int) -> list[Topology]:
    """The topologies of n workers; of a file, a graph whose degrees are 2 to 2 log2(n) or so."""
    graphs = [topologies.build(n, name, **options) for name, options in NAMED.items()]
    graph = nx.barabasi_albert_graph(n, 2, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file.gml"
        nx.write_gml(graph, file)
        graphs.append(topologies.build(file=file))
    return graphs


def mixing(topology: Topology, x: Tensor, pairs: int) -> dict[str, Any]:
    """Of a topology; x on a GPU is timed by the clock alone."""
    comm = StackedComm(len(x), Mixing(topology), x.dtype, x.device.type)
    other = torch.zeros_like(x)
    step = 0

    def mix() -> None:
        nonlocal step
        comm.mix_(x, step)
        comm.events.clear()
        step += 1

    entries = sum(W.nnz for W in topology.matrices) / len(topology.matrices)
    taken = paired(mix, lambda: other.copy_(x), pairs, len(topology.matrices))
    copies = entries / len(x)
    return {
        "topology": topology.name,
        "workers": len(x),
        "parameters": x.shape[1],
        "copies": copies,
        "mix_ms": statistics.median(mixed for (_, mixed), _ in taken) * 1e3,
        "copy_ms": statistics.median(copied for _, (_, copied) in taken) * 1e3,
        "ratio": ratio(taken, 0) / copies,
        "clock_ratio": ratio(taken, 1) / copies,
    }


def averages(x: Tensor, pairs: int) -> dict[str, Any]:
    """The mean over workers, and with it each worker's distance from it, in copies."""
    other = torch.zeros_like(x)
    mean = x.mean(dim=0, keepdim=True)
    row: dict[str, Any] = {"workers": len(x), "parameters": x.shape[1]}
    acts: dict[str, Callable[[], object]] = {
        "mean": lambda: x.mean(dim=0, keepdim=True),
        "distance": lambda: squared_distance(x, mean),
    }
    for name, act in acts.items():
        row[name] = ratio(paired(act, lambda: other.copy_(x), pairs, 1), 0)
    return row


Times = tuple[float, float]  # seconds of processor time, and by the clock


def paired(
    act: Callable[[], object], copy: Callable[[], object], pairs: int, least: int
) -> list[tuple[Times, Times]]:
    """Of each pair, the times of a call of each.

    Each half of a pair is repeated for LEAST_S, and a multiple of `least` times.
    """
    halves = (act, copy)
    repeats = [least * max(1, round(LEAST_S / (least * seconds(half, 3)[0]))) for half in halves]
    taken = []
    for pair in range(pairs):
        times = {}
        for half in (0, 1) if pair % 2 == 0 else (1, 0):
            times[half] = seconds(halves[half], repeats[half])
        taken.append((times[0], times[1]))
    return taken


def ratio(taken: list[tuple[Times, Times]], by: int) -> float:
    """Of the first of each pair to the second, by processor time (0) or the clock (1)."""
    return statistics.median(act[by] / copy[by] for act, copy in taken)


def seconds(act: Callable[[], object], times: int) -> Times:
    """Mean of a call."""
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(times):
        act()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    stop, cpu_stop = time.perf_counter(), time.process_time()
    return max(1e-9, cpu_stop - cpu_start) / times, (stop - start) / times


def table(
    rows: list[dict[str, Any]], means: list[dict[str, Any]], pairs: int, threads: int
) -> Table:
    grid = Table(
        title=f"times of degree + 1 copies of the buffer: medians of {pairs} pairs; threads: "
        f"{threads}",
        caption="copy: ms of one. mean, dist(ance): times of one copy. All of processor time",
        box=box.SIMPLE_HEAD,
    )
    for name in ("n", "D", "copy", *SHORT, "mean", "dist"):
        grid.add_column(name, justify="right", no_wrap=True)
    for mean in means:
        size = mean["workers"], mean["parameters"]
        own = [row for row in rows if (row["workers"], row["parameters"]) == size]
        grid.add_row(
            *(str(number) for number in size),
            f"{statistics.median(row['copy_ms'] for row in own):.3g}",
            *(f"{row['ratio']:.2f}" for row in own),
            f"{mean['mean']:.2f}",
            f"{mean['distance']:.2f}",
        )
    return grid


if __name__ == "__main__":
    typer.run(main)
