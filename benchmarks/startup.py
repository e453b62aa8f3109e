"""How long does a run on Ray take to start, where does that go, and what does steering it cost?

A local run of eight workers is started in a process of its own, as `decentral run` does it, on
digits; the moments at which one part is over are told apart, and the processor time that each kind
of process has taken by then. Then segments of different lengths without an exchange: a straight
line through their times has the cost of a segment at zero steps, which is the coordinator's calls,
and beside it the coordinator's clock, which replays each step, and the bytes of a worker's report.
Last, a run whose steps wait for 20 ms: with a call for each segment, with those of the next seconds
in one as `ray.ahead_s` has them, and with all of them in one.

    python benchmarks/startup.py --out benchmarks/results/startup.json
"""

import json
import os
import pickle
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import machine
import psutil
import typer
from rich import box
from rich.console import Console
from rich.table import Table

CONFIG: dict[str, Any] = {
    "engine": "ray",
    "steps": 400,
    "task": {"name": "digits", "batch_size": 32},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "algorithm": {"name": "gossip_pga", "period": 8},
    "topology": {"name": "ring"},
    "network": {"compute_ms": 1},
}
STEP_MS = 20.0  # of the step that steering is held against
SOONER_S = {"segment": 0.0, "ahead": None, "all": 1e9}  # ahead_s; None: the config's own
LENGTHS = (1, 10, 100)  # steps of a segment
# What is over at each moment, in this order.
PARTS = ("imports", "checks", "ray", "processes", "experiments", "groups", "first step")


def main(
    workers: Annotated[int, typer.Option(min=1)] = 8,
    starts: Annotated[int, typer.Option(min=1, help="Of a run.")] = 3,
    segments: Annotated[int, typer.Option(min=1, help="Of each length, in each run.")] = 9,
    lengths: Annotated[list[int] | None, typer.Option(help="Steps; may be repeated.")] = None,
    steps: Annotated[int, typer.Option(min=20, help="That wait.")] = CONFIG["steps"],
    out: Annotated[Path | None, typer.Option(help="Write the figures there, as JSON.")] = None,
    inside: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Start runs, and steer them, and say where the time goes: medians over the starts."""
    lengths = sorted(lengths or LENGTHS)
    if inside:
        print(json.dumps(measure(workers, segments, lengths, steps)))
        return
    load = os.getloadavg()[0]
    sizes = [f"--workers={workers}", f"--segments={segments}", f"--steps={steps}"]
    sizes += [f"--lengths={n}" for n in lengths]
    runs = []
    for _ in range(starts):
        done = subprocess.run(
            [sys.executable, __file__, "--inside", *sizes],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    start = medians([run["start"] for run in runs])
    steering = [medians([run["steering"][i] for run in runs]) for i in range(len(lengths))]
    segment_ms = medians([{"ms": run["segment_ms"]} for run in runs])["ms"]
    for row in steering:
        calls_ms = segment_ms + row["clock_ms"]
        row["share_of_20_ms_steps"] = calls_ms / (row["steps"] * STEP_MS)
    waiting = medians([run["waiting"] for run in runs])
    for row in waiting.values():
        row["calls_share"] = segment_ms / (row["steps_a_call"] * row["step_ms"])
    console = Console()
    console.print(start_table(workers, start), steering_table(segment_ms, steering))
    console.print(waiting_table(waiting))
    if out is not None:
        result = {
            "benchmark": "startup",
            "settings": CONFIG
            | {"workers": workers, "starts": starts, "segments": segments, "steps": steps},
            "start": start,
            "segment_ms": segment_ms,
            "steering": steering,
            "waiting": waiting,
            "machine": machine.describe(load),
        }
        machine.write(result, out)
        console.print(f"written to {out}")


def measure(workers: int, segments: int, lengths: list[int], steps: int) -> dict[str, Any]:
    """Of one run, in a process that has done nothing else."""
    from decentral.imports import uncollected

    with uncollected():
        from decentral.config import load
        from decentral.coordinator import Coordinator
        from decentral.engines import ray as ray_engine
        from decentral.experiment import build
        from decentral.replica import Averaging, Segment

    moments = [psutil.Process().create_time(), time.time()]
    experiment = build(load(CONFIG | {"workers": workers, "steps": steps}))
    moments.append(time.time())

    class Told(ray_engine.RayEngine):
        """Notes when its processes are there, when they have built their experiments, and how often
        they are called."""

        calls = 0

        def _run_all(self, segments: Any) -> Any:
            self.calls += 1
            return super()._run_all(segments)

        def _place(self, nodes: Any) -> None:
            moments.append(time.time())
            super()._place(nodes)

        def _connect_all(self, group: Any, blank: Any = None) -> None:
            moments.append(time.time())
            super()._connect_all(group, blank)

    # The engine finds the cluster there, and leaves it to us.
    with ray_engine.connect(experiment.config.ray, workers):
        moments.append(time.time())
        engine = Told(experiment)
        moments.append(time.time())
        try:
            engine.run(Segment(0, 1, Averaging.NEIGHBOURS, False, False))
            moments.append(time.time())
            processor = processor_s()
            rows = steer(engine, Coordinator(experiment, engine), segments, lengths)
            engine.ask(wait_in_each_step)
            waiting = {
                name: run_whole(engine, Coordinator(experiment, engine), ahead_s)
                for name, ahead_s in SOONER_S.items()
            }
        finally:
            engine.close()
    seconds = {part: b - a for part, (a, b) in zip(PARTS, pairwise(moments), strict=True)}
    return {
        "start": {
            "seconds": moments[-1] - moments[0],
            "parts_s": seconds,
            "processor_s": processor,
        },
        "segment_ms": at_zero([(row["steps"], row["segment_ms"]) for row in rows]),
        "steering": rows,
        "waiting": waiting,
    }


def steer(
    engine: Any, coordinator: Any, segments: int, lengths: list[int]
) -> list[dict[str, float]]:
    """Run segments of these lengths in turns, once to warm up: the medians of each length."""
    from decentral.replica import Averaging, Segment

    measured: dict[int, list[tuple[float, float, int]]] = {n: [] for n in lengths}
    step = 1
    for turn in range(segments + 1):
        for n in lengths:
            began = time.perf_counter()
            report = engine.run(Segment(step, step + n, Averaging.NOBODY, False, False))
            told = time.perf_counter()
            coordinator._count_in(step, report)
            clock_s = time.perf_counter() - told
            step += n
            if turn:
                measured[n].append((told - began, clock_s, len(pickle.dumps(report))))
    rows = []
    for n, times in measured.items():
        run_s, clock_s, size = (statistics.median(column) for column in zip(*times, strict=True))
        rows.append(
            {"steps": n, "segment_ms": run_s * 1e3, "clock_ms": clock_s * 1e3, "report_bytes": size}
        )
    return rows


def wait_in_each_step(worker: Any) -> None:
    gradient = worker._gradient._gradient

    def waiting(step: Any) -> Any:
        time.sleep(STEP_MS * 1e-3)
        return gradient(step)

    worker._gradient._gradient = waiting


def run_whole(engine: Any, coordinator: Any, ahead_s: float | None) -> dict[str, float]:
    """A run from its second segment on: the first has a call of its own, whatever `ahead_s`."""
    default = coordinator._experiment.config.ray.ahead_s
    engine.ahead_s = default if ahead_s is None else ahead_s
    segments = coordinator.run()
    next(segments)
    first, began, engine.calls = coordinator.step, time.perf_counter(), 0
    for _ in segments:
        pass
    steps = coordinator.step - first
    return {
        "step_ms": (time.perf_counter() - began) / steps * 1e3,
        "calls": engine.calls,
        "steps_a_call": steps / engine.calls,
    }


def at_zero(points: list[tuple[float, float]]) -> float:
    """Where the line through the first and the last point is at 0: of short segments and long ones,
    whose steps take the same time."""
    (n, a), (m, b) = points[0], points[-1]
    return a if n == m else a - n * (b - a) / (m - n)


def processor_s() -> dict[str, float]:
    """Seconds of processor time so far: of this process, of the one that workers are forked from,
    of the workers together, of Ray's own processes."""
    own = psutil.Process()
    found = {"driver": sum(own.cpu_times()[:2])}
    for process in own.children(recursive=True):
        try:
            line = process.cmdline()
            if "decentral.nursery" in line:
                kind = "nursery"
            else:
                kind = "workers" if line[0].startswith("ray::Actor") else "ray"
            found[kind] = found.get(kind, 0.0) + sum(process.cpu_times()[:2])
        except (psutil.Error, IndexError):
            continue  # over, or about to be
    return found


def medians(runs: list[Any]) -> Any:
    """The median of each number in dictionaries of the same keys."""
    first = runs[0]
    if isinstance(first, dict):
        return {key: medians([run[key] for run in runs]) for key in first}
    return statistics.median(runs)


def start_table(workers: int, start: dict[str, Any]) -> Table:
    grid = Table(title=f"a run of {workers} workers starts", box=box.SIMPLE_HEAD)
    grid.add_column("")
    grid.add_column("s", justify="right")
    for part, seconds in start["parts_s"].items():
        grid.add_row(part, f"{seconds:.2f}")
    grid.add_row("all", f"{start['seconds']:.2f}", end_section=True)
    for kind, seconds in start["processor_s"].items():
        grid.add_row(f"processor time, {kind}", f"{seconds:.1f}")
    return grid


def steering_table(segment_ms: float, rows: list[dict[str, Any]]) -> Table:
    grid = Table(title=f"steering: {segment_ms:.2f} ms a segment, and", box=box.SIMPLE_HEAD)
    for name in ("steps", "ms, all", "ms, clock", "bytes of a report", "of steps of 20 ms"):
        grid.add_column(name, justify="right")
    for row in rows:
        grid.add_row(
            str(row["steps"]),
            f"{row['segment_ms']:.2f}",
            f"{row['clock_ms']:.2f}",
            f"{row['report_bytes']:.0f}",
            f"{row['share_of_20_ms_steps']:.2%}",
        )
    return grid


def waiting_table(waiting: dict[str, Any]) -> Table:
    grid = Table(title="steps that wait for 20 ms, a call for", box=box.SIMPLE_HEAD)
    for name in ("", "ms a step, exchanges too", "steps a call", "calls, of a step"):
        grid.add_column(name, justify="right")
    for name, row in waiting.items():
        grid.add_row(
            {"segment": "each segment", "ahead": "ray.ahead_s", "all": "all"}[name],
            f"{row['step_ms']:.2f}",
            f"{row['steps_a_call']:.1f}",
            f"{row['calls_share']:.2%}",
        )
    return grid


if __name__ == "__main__":
    typer.run(main)
