"""What is lost when a run's driver is killed at any moment? Nothing but time.

`decentral run` of a small config is killed with SIGKILL, one time in four at a moment drawn evenly
from its whole life, start-up included, else from its training, then gone on with by `--resume`, up
to five times; the run that comes out is held against one that nobody killed: bit for bit in the
simulator, to 1e-6 on Ray. After each kill, the processes of the run's session that are left are
counted.

    python benchmarks/driver_kills.py --out benchmarks/results/driver_kills.json
"""

import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import machine
import psutil
import torch
import typer
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from decentral import records

CONFIG: dict[str, Any] = {
    "seed": 0,
    "workers": 3,
    "steps": 600,
    "task": {"name": "digits", "batch_size": 8, "model": {"name": "mlp", "hidden": [32]}},
    "optimizer": {"name": "adam", "lr": 0.003},
    "lr_schedule": {"name": "cosine", "T_max": 600},
    "algorithm": {"name": "gossip_aga", "initial_period": 3, "warmup": 30},
    "topology": {"name": "ring"},
    "network": {"compute_ms": 1},
    "record": {"every": 7, "evaluate_every": 100},
    "checkpoint": {"every": 25},
}
TOLERANCE = {"sim": 0.0, "ray": 1e-6}  # relative; gloo sums in an order of its own
KILLS_A_RUN = 5
ANY_MOMENT = 0.25  # of the kills; the others are while it trains
PATIENCE_S = 15.0  # for the run's processes to go, once the driver is dead
AGENTS = ("DashboardAgent", "RuntimeEnvAgent")  # Ray's; they look for their dead cluster a minute


def main(
    engine: Annotated[list[str] | None, typer.Option(help="sim or ray; both by default.")] = None,
    kills: Annotated[int, typer.Option(min=1, help="Of each engine's driver.")] = 30,
    steps: Annotated[int, typer.Option(min=50, help="Of a run.")] = 600,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the figures there, as JSON.")] = None,
) -> None:
    """Kill drivers at random moments, go on, and compare with a run that nobody killed."""
    started = os.getloadavg()[0]
    rows = []
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        for name in engine or ["sim", "ray"]:
            row = Killer(name, steps, Path(folder) / name, random.Random(seed)).kill(kills)
            console.print(table(row))
            rows.append(row)
    if out is not None:
        result = {
            "benchmark": "driver_kills",
            "settings": CONFIG | {"steps": steps, "seed_of_moments": seed},
            "engines": rows,
            "machine": machine.describe(started),
        }
        machine.write(result, out)
        console.print(f"written to {out}")


class Killer:
    """Runs one config over and over in `folder`, and kills it."""

    def __init__(self, engine: str, steps: int, folder: Path, moments: random.Random):
        folder.mkdir()
        self._engine, self._folder, self._moments = engine, folder, moments
        schedule = CONFIG["lr_schedule"] | {"T_max": steps}
        config = CONFIG | {"engine": engine, "steps": steps, "lr_schedule": schedule}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        self._gone_s: list[float] = []
        self._left: set[str] = set()
        self._agents = 0

    def kill(self, kills: int) -> dict[str, Any]:
        whole, out = self._folder / "whole", self._folder / "killed"
        started = time.monotonic()
        assert self._go(whole, None), "a run that nobody kills ends"
        life_s = time.monotonic() - started
        training_s = records.read(whole / "metrics.jsonl")[-1]["time_s"]
        done = runs = resumed = 0
        worst = 0.0
        while done < kills:
            runs += 1
            budget = min(KILLS_A_RUN, kills - done)
            shutil.rmtree(out, ignore_errors=True)
            over = False
            while not over:
                resumed += has_checkpoint(out)
                if not budget:
                    over = self._go(out, None)
                elif self._moments.random() < ANY_MOMENT:
                    over = self._go(out, self._moments.uniform(0, life_s))
                else:
                    over = self._go(out, self._moments.uniform(0, training_s), training=True)
                if not over:
                    done, budget = done + 1, budget - 1
            worst = max(worst, difference(whole, out))
        return {
            "engine": self._engine,
            "kills": done,
            "runs": runs,
            "resumed": resumed,
            "life_s": life_s,
            "training_s": training_s,
            "tolerance": TOLERANCE[self._engine],
            "largest_difference": worst,
            "equal": worst <= TOLERANCE[self._engine],
            "seconds_until_gone": {
                "median": statistics.median(self._gone_s),
                "max": max(self._gone_s),
            },
            "left_after_15_s": sorted(self._left),
            "kills_that_left_agents_of_ray": self._agents,
        }

    def _go(self, out: Path, moment_s: float | None, training: bool = False) -> bool:
        """Run or go on with `out`; kill it after `moment_s`, or so long after it said its first
        step. Whether it came to its end."""
        command = [sys.executable, "-m", "decentral", "run"]
        if has_checkpoint(out):
            command += ["--resume", str(out)]
        else:
            shutil.rmtree(out, ignore_errors=True)  # killed too early: nothing to go on from
            command += [str(self._folder / "config.yaml"), "--out", str(out)]
        with open(self._folder / "log", "w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                while training and process.poll() is None and "\nstep" not in self._said():
                    time.sleep(0.01)
                code = process.wait(moment_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                self._watch_them_go(process.pid)
                return False
            finally:
                if process.poll() is None:
                    process.kill()
            assert code == 0, self._said()
        return True

    def _said(self) -> str:
        return "\n" + (self._folder / "log").read_text()

    def _watch_them_go(self, session: int) -> None:
        killed = time.monotonic()
        while left := [p for p in names(session).values() if not p.endswith(AGENTS)]:
            if time.monotonic() - killed > PATIENCE_S:
                self._left |= set(left)
                break
            time.sleep(0.05)
        self._gone_s.append(time.monotonic() - killed)
        self._agents += bool(names(session))


def has_checkpoint(out: Path) -> bool:
    return any(out.glob("checkpoints/step-*/checksums.json"))


def names(session: int) -> dict[int, str]:
    """The processes of a session that live, by id."""
    found = {}
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = (process.cmdline() or [process.name()])[0]
        except (ProcessLookupError, psutil.Error):
            continue
    return found


def difference(whole: Path, other: Path) -> float:
    """The largest relative difference of two runs' records, but for wall-clock time, and models.

    Infinite where they are not of the same steps and columns.
    """
    ours, theirs = (records.read(out / "metrics.jsonl") for out in (whole, other))
    steps = [row["step"] for row in theirs]
    shapes = [
        [[key for key in row if row[key] is not None] for row in rows] for rows in (ours, theirs)
    ]
    if steps != sorted(set(steps)) or shapes[0] != shapes[1]:
        return float("inf")
    pairs = [
        (torch.tensor(a[key], dtype=torch.float64), torch.tensor(b[key], dtype=torch.float64))
        for a, b in zip(ours, theirs, strict=True)
        for key in a.keys() - {"time_s"}
        if a[key] is not None
    ]
    models = [torch.load(out / "model.pt", weights_only=True) for out in (whole, other)]
    pairs += [(value, models[1][name]) for name, value in models[0].items()]
    return max(0.0 if torch.equal(a, b) else float(relative(a, b)) for a, b in pairs)


def relative(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """||a - b|| / ||a||."""
    a, b = a.double(), b.double()
    return (a - b).norm() / a.norm().clamp_min(1e-12)


def table(row: dict[str, Any]) -> Table:
    grid = Table(title=f"{row['engine']}: {row['kills']} kills of the driver", box=box.SIMPLE_HEAD)
    grid.add_column("")
    grid.add_column("", justify="right")
    gone = row["seconds_until_gone"]
    verdict = "yes" if row["equal"] else "NO"
    figures = {
        "runs brought to their end": f"{row['runs']}",
        "gone on from a checkpoint": f"{row['resumed']} times",
        "a run that nobody kills": f"{row['life_s']:.1f} s, {row['training_s']:.1f} s of training",
        "equal to it": f"{verdict} (largest difference {row['largest_difference']:.2g})",
        "until no process is left": f"{gone['median']:.1f} s, at most {gone['max']:.1f} s",
        "left after 15 s": ", ".join(row["left_after_15_s"]) or "none",
        "kills after which Ray's own agents stayed": f"{row['kills_that_left_agents_of_ray']}",
    }
    for name, figure in figures.items():
        grid.add_row(name, figure)
    return grid


if __name__ == "__main__":
    typer.run(main)
