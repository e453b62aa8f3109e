"""Does the simulated clock predict real runs? Four hosts with slow network cards, five methods.

Hosts are network namespaces on this machine, each a node of one Ray cluster, whose cards a token
bucket holds to a nominal rate. A run there is measured, record by record, and the clock predicts
it from the nominal rate, the protocol's overhead and the measured time of a local step. Nothing is
fitted. Needs root and iproute2.

    python benchmarks/clock_against_reality.py --out benchmarks/results/clock_against_reality.json

Recording takes an all-reduce of its own, which is no part of the method and not on the clock: it
is added to the prediction, except where the record falls on a global average and costs nothing.
"""

import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import machine
import numpy as np
import ranks
import typer
from ranks import hosts
from rich import box
from rich.console import Console
from rich.table import Table

HOSTS = 4
EVERY = 8  # steps a record, and the period
OVERHEAD = 0.068  # see network.overhead
METHODS: dict[str, tuple[dict[str, Any], str | None]] = {
    "parallel_sgd": ({"name": "parallel_sgd"}, None),
    "local_sgd": ({"name": "local_sgd", "period": EVERY}, None),
    "gossip, ring": ({"name": "gossip_sgd"}, "ring"),
    "gossip, one peer": ({"name": "gossip_sgd"}, "one_peer_exponential"),
    "gossip_pga, ring": ({"name": "gossip_pga", "period": EVERY}, "ring"),
}


def main(
    rate: Annotated[list[float] | None, typer.Option(help="Mbit/s; may be repeated.")] = None,
    records: Annotated[int, typer.Option(min=2, help="Measured, after one to warm up.")] = 3,
    hidden: Annotated[int, typer.Option(min=1, help="Width of the two hidden layers.")] = 1024,
    out: Annotated[Path | None, typer.Option(help="Write the figures there, as JSON.")] = None,
    inside: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Compare the clock's step times with those of runs on bandwidth-limited hosts."""
    rates = rate or [50.0, 200.0]
    if inside:
        print(json.dumps(measure(rates[0], records, hidden)))
        return
    ranks.check_hosts()
    load, start = os.getloadavg()[0], time.perf_counter()
    console = Console()
    rows = []
    with hosts.ray_hosts(HOSTS, rates[0]) as (made, environment):
        for mbit in rates:
            made.set_rate(mbit)
            command = (sys.executable, __file__, "--inside", f"--rate={mbit}")
            sizes = (f"--records={records}", f"--hidden={hidden}")
            done = made.run(0, *command, *sizes, timeout_s=1800, environment=environment)
            rows += json.loads(done.stdout.splitlines()[-1])
            console.print(table([row for row in rows if row["mbit"] == mbit], mbit))
    worst = max(rows, key=lambda row: abs(row["ratio"] - 1))
    console.print(f"farthest from 1: {worst['ratio']:.2f}, {worst['method']}, {worst['mbit']:g}")
    if out is not None:
        result = {
            "benchmark": "clock_against_reality",
            "settings": {
                "hosts": HOSTS,
                "records": records,
                "hidden": hidden,
                "period": EVERY,
                "overhead": OVERHEAD,
            },
            "runs": rows,
            "seconds": time.perf_counter() - start,
            "machine": machine.describe(load),
        }
        machine.write(result, out)
        console.print(f"written to {out}")


def measure(mbit: float, records: int, hidden: int) -> list[dict[str, Any]]:
    """On host 0: every method at one rate, on the same actors; a row each."""
    import ray

    from decentral.config import RayConfig
    from decentral.engines.ray import start_actors

    ray.init(address=f"10.77.0.1:{hosts.RAY_PORT}", log_to_driver=False)
    actors = start_actors(RayConfig(), HOSTS)
    return [
        row(name, mbit, run(algorithm, topology, mbit, records, hidden, actors))
        for name, (algorithm, topology) in METHODS.items()
    ]


def run(
    algorithm: dict[str, Any],
    topology: str | None,
    mbit: float,
    records: int,
    hidden: int,
    actors: list[Any],
) -> dict[str, Any]:
    """Seconds a step as measured and as predicted, a list over records; and what they hold."""
    from decentral.clock import Clock, clock_options
    from decentral.config import load
    from decentral.coordinator import Coordinator
    from decentral.engines.ray import RayEngine
    from decentral.experiment import build

    config = load(
        {
            "workers": HOSTS,
            "steps": EVERY * (records + 1),
            "engine": "ray",
            # A batch of 2: computing is short beside sending, for the cores may be busy.
            "task": {
                "name": "digits",
                "batch_size": 2,
                "model": {"name": "mlp", "hidden": [hidden, hidden]},
            },
            "optimizer": {"name": "sgd", "lr": 0.01},
            "algorithm": algorithm,
            "topology": {"name": topology} if topology else None,
            "network": {
                "latency_ms": 0.1,
                "bandwidth_gbps": mbit * 1e-3,
                "overhead": OVERHEAD,
            },
            "record": {"every": EVERY},
        }
    )
    experiment = build(config)
    engine = RayEngine(experiment, actors=actors)
    try:
        compute_s = float(engine.step_seconds().mean())
        rows: list[dict[str, Any]] = [r for r in Coordinator(experiment, engine).run() if r]
    finally:
        engine.close()
    size = 4 * sum(p.numel() for p in experiment.task.model.parameters())
    options = clock_options(config, None, experiment.algorithm)
    all_reduce_s = Clock(np.full(HOSTS, compute_s), **options).all_reduce_s(size)
    recording_s = 0.0 if "period" in algorithm else all_reduce_s
    pairs = list(itertools.pairwise(rows))
    return {
        "megabytes": size / 1e6,
        "compute_s": compute_s,
        "measured_s": [(b["time_s"] - a["time_s"]) / EVERY for a, b in pairs],
        "predicted_s": [
            (b["sim_time_s"] - a["sim_time_s"] + recording_s) / EVERY for a, b in pairs
        ],
    }


def row(method: str, mbit: float, figures: dict[str, Any]) -> dict[str, Any]:
    measured = statistics.median(figures["measured_s"])
    predicted = statistics.median(figures["predicted_s"])
    return {
        "method": method,
        "mbit": mbit,
        "megabytes_a_message": figures["megabytes"],
        "compute_ms": figures["compute_s"] * 1e3,
        "measured_ms": measured * 1e3,
        "measured_ms_of_each": [seconds * 1e3 for seconds in figures["measured_s"]],
        "predicted_ms": predicted * 1e3,
        "ratio": measured / predicted,
    }


def table(rows: list[dict[str, Any]], mbit: float) -> Table:
    grid = Table(
        title=f"{HOSTS} hosts at {mbit:g} Mbit/s, {rows[0]['megabytes_a_message']:.1f} MB a message"
        f", {rows[0]['compute_ms']:.0f} ms of compute: milliseconds a step",
        box=box.SIMPLE_HEAD,
    )
    for name in ("method", "measured", "from", "to", "predicted", "ratio"):
        grid.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for r in rows:
        each = r["measured_ms_of_each"]
        cells = [r["measured_ms"], min(each), max(each), r["predicted_ms"]]
        grid.add_row(r["method"], *(f"{cell:.0f}" for cell in cells), f"{r['ratio']:.2f}")
    return grid


if __name__ == "__main__":
    typer.run(main)
