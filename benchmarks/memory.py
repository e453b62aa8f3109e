"""How much memory does the simulator take? Peak resident memory, in buffers of all workers' models.

An MLP of a million parameters on digits, batch 1, gossip SGD with momentum on a ring, float32: some
steps, a record among them. A buffer is n x D floats; parameters, gradient and momentum are one
each, whatever else is at a time comes on top.

    python benchmarks/memory.py --out benchmarks/results/memory.json

Linux, where a process' peak can be asked for.
"""

import os
import resource
import time
from pathlib import Path
from typing import Annotated, Any

import machine
import psutil
import torch
import typer
from rich.console import Console

from decentral.config import load
from decentral.engines.sim import Simulator
from decentral.experiment import build
from decentral.replica import Averaging, Segment

HIDDEN = 964


def main(
    workers: Annotated[int, typer.Option(min=2)] = 1024,
    hidden: Annotated[int, typer.Option(min=1, help="Width of two layers.")] = HIDDEN,
    steps: Annotated[int, typer.Option(min=1)] = 3,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    out: Annotated[Path | None, typer.Option(help="Write the figures there, as JSON.")] = None,
) -> None:
    """Take some steps and tell the peak."""
    started = os.getloadavg()[0]
    config: dict[str, Any] = {
        "workers": workers,
        "steps": steps,
        "dtype": dtype,
        "task": {
            "name": "digits",
            "batch_size": 1,
            "model": {"name": "mlp", "hidden": [hidden, hidden]},
        },
        "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9},
        "algorithm": {"name": "gossip_sgd"},
        "topology": {"name": "ring"},
    }
    experiment = build(load(config))
    before = psutil.Process().memory_info().rss
    simulator = Simulator(experiment)
    times = []
    for step in range(steps):
        start = time.perf_counter()
        simulator.run(Segment(step, step + 1, Averaging.NEIGHBOURS, False, record=step % 2 == 1))
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    parameters = sum(p.numel() for p in experiment.task.model.parameters())
    buffer = workers * parameters * experiment.dtype.itemsize
    result = {
        "benchmark": "memory",
        "settings": config,
        "parameters": parameters,
        "buffer_gib": buffer / 2**30,
        "peak_gib": peak / 2**30,
        "buffers": (peak - before) / buffer,
        "step_s": min(times),
        "machine": machine.describe(started),
    }
    console = Console()
    console.print(
        f"{workers} workers x {parameters:,} parameters in {dtype}: peak {peak / 2**30:.2f} GiB,"
        f" {result['buffers']:.2f} buffers of {buffer / 2**30:.2f} GiB beside the process itself;"
        f" a step {min(times):.2f} s; threads: {torch.get_num_threads()}"
    )
    if out is not None:
        machine.write(result, out)
        console.print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
