"""Do runs on Ray go on when workers are killed at any moment, and how soon?

Runs of digits, of several methods, sizes and both policies in turn, lose workers to SIGKILL at
random moments of their training: in steps, evaluations, checkpoints and recoveries; one alone, two
at once, or one while the others recover from the loss of another. Each is held against the same run
in the simulator, undisturbed. Exits with 1 if one does not come to its end, lacks a record, or is
clearly worse.

    python benchmarks/soak.py --kills 50 --out benchmarks/results/soak.json
"""

import json
import os
import random
import re
import signal
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import machine
import psutil
import ray
import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

import decentral
from decentral import records
from decentral.progress import Watcher

CONFIG: dict[str, Any] = {
    "engine": "ray",
    "task": {
        "name": "digits",
        "batch_size": 32,
        "model": {"name": "mlp", "hidden": [256]},
        "partition": {"kind": "dirichlet", "alpha": 1.0},
    },
    "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    "network": {"compute_ms": 2},
    "record": {"every": 10, "evaluate_every": 20},
    "checkpoint": {"every": 20, "keep": 1},
}
METHODS: dict[str, dict[str, Any]] = {
    "gossip_pga": {"algorithm": {"period": 8}, "topology": {"name": "ring"}},
    "gossip_sgd": {"algorithm": {}, "topology": {"name": "ring"}},
    "local_sgd": {"algorithm": {"period": 8}},
    "parallel_sgd": {"algorithm": {}},
}
WORKERS = (4, 5, 6)
POLICIES = ("replace", "shrink")
SEEDS = 3
KILLS_A_RUN = 5
STAY = 2  # workers that a kill leaves at least
PAUSE_S = (2.0, 5.0)  # between kills
WAYS = {"alone": 0.5, "two at once": 0.25, "one after another": 0.25}  # and their shares
SEEN_S = 2.0  # before a record, a kill that it may not show yet
AFTER_S = 2.0  # at most, from the first to the second of two, one after another
WORSE = 0.03  # accuracy that a method may lose in the mean; a worker's data goes with it


def main(
    kills: Annotated[int, typer.Option(min=1, help="Of workers, over all runs.")] = 50,
    steps: Annotated[int, typer.Option(min=20, help="Of a run.")] = 2500,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the figures there, as JSON.")] = None,
) -> None:
    """Kill workers at random moments, and see whether and how soon the others go on."""
    started = os.getloadavg()[0]
    torch.set_num_threads(1)  # as each worker has; more would spin, where others need the cores
    console = Console()
    moments = random.Random(seed)
    runs: list[Run] = []
    while (done := sum(len(run.kills) for run in runs)) < kills:
        runs.append(Run.numbered(len(runs), steps))
        runs[-1].go(min(KILLS_A_RUN, kills - done), moments, console)
        if not runs[-1].kills:
            raise typer.BadParameter(
                f"a run of {steps} was over before a kill; take more", param_hint="--steps"
            )
    summary = summarised(runs)
    console.print(table(summary))
    if out is not None:
        result = {
            "benchmark": "soak",
            "settings": CONFIG | {"methods": METHODS, "steps": steps, "seed_of_moments": seed},
            **summary,
            "each": [run.row() for run in runs],
            "machine": machine.describe(started),
        }
        result["machine"]["versions"]["ray"] = ray.__version__
        machine.write(result, out)
        console.print(f"written to {out}")
    if not summary["holds"]:
        raise typer.Exit(1)


@dataclass
class Run:
    """One run, and what became of it."""

    method: str
    policy: str
    workers: int
    seed: int
    steps: int
    kills: list[tuple[int, float]] = field(default_factory=list)  # process and moment
    segments: list[tuple[int, float]] = field(default_factory=list)  # its end and the moment
    failures: list[dict[str, Any]] = field(default_factory=list)
    came: int = 0  # in the place of others
    error: str | None = None
    whole: bool = False
    left: int = 0  # processes of workers, after the end
    accuracy: float = 0.0
    undisturbed: float = 0.0

    @classmethod
    def numbered(cls, number: int, steps: int) -> "Run":
        """Methods in turn, and with each of their runs another seed, policy and size."""
        turn, place = divmod(number, len(METHODS))
        return cls(
            method=list(METHODS)[place],
            policy=POLICIES[(place + turn) % len(POLICIES)],
            workers=WORKERS[(place + turn) % len(WORKERS)],
            seed=turn % SEEDS,
            steps=steps,
        )

    def go(self, kills: int, moments: random.Random, console: Console) -> None:
        name = f"{self.method}, {self.policy}, {self.workers} workers"
        config = self.config()
        undisturbed = decentral.run(config, engine="sim")
        self.undisturbed = undisturbed.summary["final"]["eval_accuracy"]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            killer = Killer(self, kills, moments, lambda line: console.print(f"{name}: {line}"))
            try:
                decentral.run(config, out=out, watcher=killer, checkpoint=CONFIG["checkpoint"])
            except decentral.WorkerError as error:
                self.error = str(error)
                console.print(f"{name}: failed: {error}")
            finally:
                killer.stop()
            rows = records.read(out / "metrics.jsonl")
            summary = json.loads((out / "summary.json").read_text())
        self.failures = summary["failures"]
        self.whole = has_every_record([row["step"] for row in rows], self.steps)
        self.accuracy = rows[-1].get("eval_accuracy") or 0.0
        self.left = len(actors())
        console.print(
            f"{name}: accuracy {self.accuracy:.3f}, undisturbed {self.undisturbed:.3f};"
            f" {len(self.kills)} kills, {self.came} replaced"
        )

    def config(self) -> dict[str, Any]:
        parts = METHODS[self.method]
        return (
            {key: value for key, value in CONFIG.items() if key != "checkpoint"}
            | parts
            | {
                "algorithm": {"name": self.method} | parts["algorithm"],
                "workers": self.workers,
                "seed": self.seed,
                "steps": self.steps,
                "on_worker_failure": self.policy,
            }
        )

    def recoveries_s(self) -> list[float]:
        """From each kill of a worker that took part to the end of the first segment after it."""
        times = []
        for failure in self.failures:
            gone = [int(pid) for pid in re.findall(r"process (\d+)", failure["what"])]
            moments = [moment for pid, moment in self.kills if pid in gone]
            after = [moment for step, moment in self.segments if step > failure["step"]]
            if after:
                times += [after[0] - moment for moment in moments]
        return times

    def row(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "policy": self.policy,
            "workers": self.workers,
            "seed": self.seed,
            "kills": len(self.kills),
            "recoveries": len(self.failures),
            "replaced": self.came,
            "recovery_s": self.recoveries_s(),
            "accuracy": self.accuracy,
            "undisturbed": self.undisturbed,
            "error": self.error,
            "whole": self.whole,
            "left": self.left,
        }


class Killer(Watcher):
    """Looks on while a run goes, and kills its workers from a thread of its own."""

    def __init__(self, run: Run, kills: int, moments: random.Random, say: Any):
        self._run, self._kills, self._moments, self._print = run, kills, moments, say
        self._workers, self._recorded = run.workers, 0.0  # by the last record, and its moment
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._kill_them)

    def begin(self, experiment: Any, step: int) -> None:
        self._began = time.time()
        self._thread.start()

    def say(self, line: str) -> None:
        self._print(line)
        self._run.came += len(re.findall(r"\d+", line.partition(" came ")[0])) * (" came " in line)

    def advance(self, step: int, record: Any) -> None:
        self._run.segments.append((step, time.time()))
        if record is not None:
            self._workers, self._recorded = record["workers"], time.time()

    def stop(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _kill_them(self) -> None:
        ways, shares = list(WAYS), list(WAYS.values())
        while len(self._run.kills) < self._kills:
            if self._over.wait(self._moments.uniform(*PAUSE_S)):
                return
            (way,) = self._moments.choices(ways, shares)
            self._kill()
            if way != "alone" and len(self._run.kills) < self._kills:
                pause_s = self._moments.uniform(0, AFTER_S) if way == "one after another" else 0.0
                if self._over.wait(pause_s):
                    return
                self._kill()

    def _kill(self) -> None:
        """One of the processes of workers, also of one that is only starting."""
        now = time.time()
        unseen = [m for _, m in self._run.kills if m > self._recorded - SEEN_S]
        if self._workers - len(unseen) <= STAY:
            return
        pid = self._moments.choice(actors())
        self._run.kills.append((pid, now))
        os.kill(pid, signal.SIGKILL)
        self._print(f"killed process {pid} {now - self._began:.1f} s after the start")


def has_every_record(told: list[int], steps: int) -> bool:
    """One for each ten steps, and the last: a death that cuts an average short may delay one."""
    ends = [*range(10, steps, 10), steps]
    return len(told) == len(ends) and all(
        end <= step <= min(end + 9, steps) for end, step in zip(ends, told, strict=True)
    )


def actors() -> list[int]:
    """The processes of workers that descend from this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Actor"):
                found.append(process.pid)
        except psutil.Error:
            continue
    return sorted(found)


def summarised(runs: list[Run]) -> dict[str, Any]:
    recoveries_s = [s for run in runs for s in run.recoveries_s()]
    methods = []
    for method in METHODS:
        own = [run for run in runs if run.method == method]
        if own:
            methods.append(
                {
                    "method": method,
                    "accuracy": spread([run.accuracy for run in own]),
                    "undisturbed": spread([run.undisturbed for run in own]),
                    "difference": spread([run.accuracy - run.undisturbed for run in own]),
                }
            )
    ended = sum(run.error is None for run in runs)
    whole = sum(run.whole for run in runs)
    left = sum(run.left for run in runs)
    good = all(row["difference"]["mean"] > -WORSE for row in methods)
    return {
        "kills": sum(len(run.kills) for run in runs),
        "runs": len(runs),
        "runs_that_ended": ended,
        "runs_whole": whole,  # every record is there, in order, once
        "recoveries": sum(len(run.failures) for run in runs),
        "replaced": sum(run.came for run in runs),
        "processes_left": left,
        "seconds_from_kill_to_next_segment_done": {
            "measured": len(recoveries_s),
            "median": statistics.median(recoveries_s) if recoveries_s else None,
            "worst": max(recoveries_s, default=None),
        },
        "methods": methods,
        "holds": ended == whole == len(runs) and not left and good,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Mean, and standard deviation over the runs."""
    return {"mean": statistics.fmean(values), "deviation": statistics.pstdev(values)}


def table(summary: dict[str, Any]) -> Table:
    grid = Table(title=f"{summary['kills']} kills of workers", box=box.SIMPLE_HEAD)
    grid.add_column("")
    grid.add_column("", justify="right")
    seconds = summary["seconds_from_kill_to_next_segment_done"]
    figures = {
        "runs brought to their end": f"{summary['runs_that_ended']} of {summary['runs']}",
        "every record there, once": f"{summary['runs_whole']} of {summary['runs']}",
        "recoveries": f"{summary['recoveries']}",
        "workers that came in place of others": f"{summary['replaced']}",
        "processes left": f"{summary['processes_left']}",
    }
    if seconds["measured"]:
        figures["from a kill to the end of the next segment"] = (
            f"{seconds['median']:.1f} s, at most {seconds['worst']:.1f} s"
        )
    for row in summary["methods"]:
        figures[f"accuracy, {row['method']}"] = (
            f"{row['accuracy']['mean']:.3f} ± {row['accuracy']['deviation']:.3f}, undisturbed"
            f" {row['undisturbed']['mean']:.3f} ± {row['undisturbed']['deviation']:.3f}"
        )
    figures["all holds"] = "yes" if summary["holds"] else "NO"
    for name, figure in figures.items():
        grid.add_row(name, figure)
    return grid


if __name__ == "__main__":
    typer.run(main)
