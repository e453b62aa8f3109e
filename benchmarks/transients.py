"""How long is a method behind parallel SGD? The logistic regression of Chen et al. 2021, measured.

    OMP_NUM_THREADS=1 python benchmarks/transients.py --out benchmarks/results/transients.json \
        --picture docs/paper/transients.png

Runs all points of configs/paper/logistic.yaml and logistic_periods.yaml, 50 trials of each stacked
in one simulator (trials.py), and takes the squared distance of the workers' mean model to the
optimum, in the mean over trials and over windows of steps. A method's transient stage is the last
window in which that is more than `factor` times parallel SGD's. Intervals: bootstrap over trials.
All methods draw the same batches, so noise that they share cancels in their ratio.
"""

import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import machine
import numpy as np
import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from trials import Trials, logistic_optimum

from decentral.config import Config
from decentral.sweep.spec import read_sweep
from decentral.topology import beta, build, transient_steps

CONFIGS = Path(__file__).parents[1] / "configs" / "paper"
FILES = (CONFIGS / "logistic.yaml", CONFIGS / "logistic_periods.yaml")
ORDER = ("pga-exponential", "pga-grid", "pga-ring", "local", "gossip-ring")  # what is claimed
FACTORS = (1.02, 1.1, 1.25, 1.5)  # beside the one that is asked for
RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # percent


class Law(str, Enum):
    """Whose data: each worker's of a law of its own, all of one, or first these, then those."""

    OWN = "own"
    IID = "iid"
    BOTH = "both"


@dataclass(frozen=True)
class Setting:
    """What the methods of one comparison have in common, and one of them."""

    workers: int
    iid: bool
    method: str
    period: int | None

    @classmethod
    def of(cls, method: str, config: Config) -> "Setting":
        period = config.algorithm.options.get("period")
        return cls(config.workers, config.task.options["iid"], method, period)

    @property
    def name(self) -> str:
        law = "iid" if self.iid else "own"
        return f"{self.method}-n{self.workers}-{law}-H{self.period or 0}"


def squared_distances(config: Config, trials: int, window: int) -> tuple[np.ndarray, float]:
    """||xbar - x*||^2, [trials, windows]: the mean over each window, of every tenth step; and the
    processor's seconds."""
    started = time.process_time()
    torch.set_num_threads(1)  # small tensors: threads would wait for each other
    run = Trials(config, trials)
    every = min(10, window)
    x, sign = run.task.train[:]
    optimum = logistic_optimum(x, sign)
    found = [
        ((run.run(every) - optimum) ** 2).sum(dim=1).numpy() for _ in range(config.steps // every)
    ]
    distances = np.stack(found, axis=1).reshape(trials, -1, window // every).mean(axis=2)
    return distances, time.process_time() - started


def transient(ratios: np.ndarray, factor: float, window: int) -> np.ndarray:
    """Of each row of `ratios`, [..., windows], the steps up to the end of the last window above
    `factor`: 0 where none is, infinity where the run ends with one."""
    above = ratios > factor
    last = above.shape[-1] - np.argmax(above[..., ::-1], axis=-1)
    steps = np.where(above.any(axis=-1), last * window, 0).astype(float)
    return np.where(above[..., -1], np.inf, steps)


def critical_lr(excess: np.ndarray, lrs: np.ndarray, allowed: float) -> np.ndarray:
    """The learning rate below which a method is within `allowed` of parallel SGD, [...].

    excess: ratio - 1 at the end of each stage of one learning rate, [..., stages]; `lrs` fall.
    Between the last stage above and the next one interpolated linearly; NaN where there is none
    above, or no next one.
    """
    above = excess > allowed
    stages = above.shape[-1]
    last = stages - 1 - np.argmax(above[..., ::-1], axis=-1)
    known = above.any(axis=-1) & (last < stages - 1)
    last = np.minimum(last, stages - 2)
    high = np.take_along_axis(excess, last[..., None], -1)[..., 0]
    low = np.take_along_axis(excess, last[..., None] + 1, -1)[..., 0]
    part = (high - allowed) / np.where(known, high - low, 1.0)
    return np.where(known, lrs[last] + part * (lrs[last + 1] - lrs[last]), np.nan)


def slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The exponent p of the least-squares fit log y = c + p log x; y [..., points].

    NaN where a y is not a positive number, and of fewer than two points.
    """
    if len(x) < 2:
        return np.full(y.shape[:-1], np.nan)
    usable = np.isfinite(y) & (y > 0)
    log_x, log_y = np.log(x), np.log(np.where(usable, y, 1.0))
    centred = log_x - log_x.mean()
    return np.where(usable.all(axis=-1), log_y @ centred / (centred @ centred), np.nan)


def with_interval(values: np.ndarray) -> dict[str, float | None]:
    """`values`: the estimate itself, then those of the resamples. None: no number, or endless."""
    estimate, resamples = values[0], values[1:]
    if np.isnan(resamples).mean() > 0.01:
        low = high = np.nan
    else:
        low, high = np.nanpercentile(resamples, INTERVAL, method="inverted_cdf")
    return {"estimate": finite(estimate), "low": finite(low), "high": finite(high)}


def finite(value: float | np.ndarray) -> float | None:
    """A number as JSON has them, None for any other."""
    return float(value) if np.isfinite(value) else None


class Comparison:
    """All settings, as means over the trials themselves, then over each of the resamples."""

    def __init__(self, found: dict[Setting, np.ndarray], window: int, factor: float, lr_every: int):
        trials = len(next(iter(found.values())))
        rng = np.random.default_rng(0)
        drawn = rng.multinomial(trials, np.full(trials, 1 / trials), size=RESAMPLES)
        weights = np.concatenate([np.ones((1, trials)), drawn]) / trials
        self.means = {setting: weights @ distances for setting, distances in found.items()}
        self.window, self.factor, self._lr_every = window, factor, lr_every

    def ratios(self, setting: Setting) -> np.ndarray:
        """To parallel SGD on the same problem, [1 + resamples, windows]."""
        base = next(
            mean
            for other, mean in self.means.items()
            if (other.workers, other.iid, other.method)
            == (setting.workers, setting.iid, "parallel")
        )
        return self.means[setting] / base

    def transient(self, setting: Setting, factor: float | None = None) -> np.ndarray:
        return transient(self.ratios(setting), factor or self.factor, self.window)

    def excess(self, setting: Setting) -> np.ndarray:
        """Ratio - 1 in the last half of each stage of one learning rate, [..., stages]."""
        per_stage = self._lr_every // self.window
        base, own = (
            mean.reshape(len(mean), -1, per_stage)[..., per_stage // 2 :].mean(axis=-1)
            for mean in (self.means[setting] / self.ratios(setting), self.means[setting])
        )
        return own / base - 1

    def critical_lr(self, setting: Setting, lr: float) -> np.ndarray:
        excess = self.excess(setting)
        return critical_lr(excess, lr * 0.5 ** np.arange(excess.shape[1]), self.factor - 1)


def theory(setting: Setting) -> float:
    """The order of the transient stage by Chen et al. 2021: see `transient_steps`."""
    kind, _, graph = setting.method.partition("-")
    mixing = beta(build(setting.workers, graph)) if graph else 1.0
    steps = transient_steps(mixing, setting.workers, setting.period)
    name = {"pga": "gossip_pga", "local": "local_sgd", "gossip": "gossip_sgd"}[kind]
    return steps[name].iid if setting.iid else steps[name].non_iid


def exponents(comparison: Comparison, lr: float, least: int) -> list[dict[str, Any]]:
    """Growth with the number of workers, and with the period at `least` workers.

    `halved_lr`: of the transient stage as it is here. `constant_lr`: of n / gamma^2 at the critical
    learning rate gamma, which is what the theory speaks of: T steps at gamma = sqrt(n / T).
    """
    settings = [s for s in comparison.means if s.method != "parallel"]
    groups: dict[tuple[str, bool, str, int | None], list[Setting]] = {}
    for s in settings:
        if s.period in (16, None):
            groups.setdefault((s.method, s.iid, "workers", s.period), []).append(s)
        if s.workers == least and s.method in ("pga-ring", "local"):
            groups.setdefault((s.method, s.iid, "period", None), []).append(s)
    rows = []
    for (method, iid, variable, _), group in groups.items():
        x = np.array([getattr(s, variable) for s in group], float)
        n = np.array([s.workers for s in group], float)
        steps = np.stack([comparison.transient(s) for s in group], axis=1)
        critical = np.stack([comparison.critical_lr(s, lr) for s in group], axis=1)
        rows.append(
            {
                "method": method,
                "iid": iid,
                "in": variable,
                "values": x.astype(int).tolist(),
                "halved_lr": with_interval(slope(x, steps)),
                "constant_lr": with_interval(slope(x, n / critical**2)),
                "theory": finite(slope(x, np.array([theory(s) for s in group]))),
            }
        )
    return rows


def order(comparison: Comparison, workers: int, iid: bool) -> list[dict[str, Any]]:
    """How much longer each method of `ORDER` takes than the one before it, the first than 0."""
    steps = {
        s.method: comparison.transient(s)
        for s in comparison.means
        if (s.workers, s.iid) == (workers, iid) and s.period in (16, None)
    }
    rows = []
    for before, method in pairwise(("parallel", *ORDER)):
        with np.errstate(invalid="ignore"):  # both endless: no number
            longer = with_interval(steps[method] - steps[before])
        row = {"workers": workers, "iid": iid, "method": method, "after": before, "steps": longer}
        rows.append(row)
    return rows


def points_of(
    comparison: Comparison, seconds: dict[Setting, float], lr: float, stride: int
) -> list[dict[str, Any]]:
    """Every setting's curve, one window in `stride`, and what was made of it."""
    return [
        {
            "method": setting.method,
            "workers": setting.workers,
            "iid": setting.iid,
            "period": setting.period,
            "curve": means[0][stride - 1 :: stride].tolist(),
            "transient_steps": with_interval(comparison.transient(setting)),
            "by_factor": {
                str(factor): with_interval(comparison.transient(setting, factor))["estimate"]
                for factor in FACTORS
            },
            "excess": comparison.excess(setting)[0].tolist(),
            "critical_lr": with_interval(comparison.critical_lr(setting, lr)),
            "processor_s": seconds[setting],
        }
        for setting, means in comparison.means.items()
    ]


def table(points: list[dict[str, Any]]) -> Table:
    """Transient stages with their intervals."""
    shown = Table(title="steps behind parallel SGD, 95% interval", box=box.SIMPLE)
    columns = list(dict.fromkeys((p["workers"], p["iid"]) for p in points))
    shown.add_column("method", no_wrap=True)
    for workers, iid in columns:
        shown.add_column(f"{workers} {'iid' if iid else 'own'}", justify="right", no_wrap=True)
    rows = dict.fromkeys((p["method"], p["period"]) for p in points if p["method"] != "parallel")
    for method, period in rows:
        cells = {
            (p["workers"], p["iid"]): told(p["transient_steps"])
            for p in points
            if (p["method"], p["period"]) == (method, period)
        }
        label = f"{method} H={period}" if period else method
        shown.add_row(label, *(cells.get(column, "") for column in columns))
    return shown


def told(interval: dict[str, float | None]) -> str:
    """An estimate and its interval in steps; beyond the run is an infinity sign."""
    estimate, low, high = ("∞" if v is None else f"{v:.0f}" for v in interval.values())
    return f"{estimate} ({low}-{high})"


def draw(points: list[dict[str, Any]], stride_steps: int, path: Path) -> None:
    """Curves of all methods at the period of the paper; ticks where transient stages end."""
    import matplotlib.pyplot as plt

    shown = [p for p in points if p["period"] in (16, None)]
    columns = sorted({p["workers"] for p in shown})
    rows = sorted({p["iid"] for p in shown})
    size = (4 * len(columns), 3.2 * len(rows))
    figure, grid = plt.subplots(
        len(rows), len(columns), figsize=size, layout="constrained", sharex=True, squeeze=False
    )
    for row, iid in zip(grid, rows, strict=True):
        for axis, workers in zip(row, columns, strict=True):
            for colour, method in enumerate(("parallel", *ORDER)):
                for p in shown:
                    if (p["workers"], p["iid"], p["method"]) != (workers, iid, method):
                        continue
                    steps = stride_steps * np.arange(1, len(p["curve"]) + 1)
                    axis.plot(steps, p["curve"], color=f"C{colour}", lw=1.2, label=method)
                    end = p["transient_steps"]["estimate"]
                    if method != "parallel" and end is not None:
                        axis.axvline(end, 0, 0.06, color=f"C{colour}", lw=2)
            axis.set_yscale("log")
            axis.set_title(f"{workers} workers, {'one law (iid)' if iid else 'laws of their own'}")
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
    for axis in grid[-1]:
        axis.set_xlabel("step")
    for axis in grid[:, 0]:
        axis.set_ylabel("squared distance to the optimum")
    grid[0, -1].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def measured(
    configs: dict[Setting, Config], trials: int, window: int, processes: int, keep: Path | None
) -> tuple[dict[Setting, np.ndarray], dict[Setting, float]]:
    """Squared distances, and seconds; what `keep` holds of them is not measured again."""
    found, seconds, jobs = {}, {}, {}
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for setting, config in configs.items():
            if keep is None or not (keep / f"{setting.name}.npz").exists():
                jobs[setting] = pool.submit(squared_distances, config, trials, window)
        for setting, job in track(jobs.items(), "running", console=Console(stderr=True)):
            found[setting], seconds[setting] = job.result()
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                kept = {"distances": found[setting], "seconds": seconds[setting]}
                np.savez(keep / f"{setting.name}.npz", **kept)
    for setting in configs.keys() - jobs.keys():
        assert keep is not None
        with np.load(keep / f"{setting.name}.npz") as kept:
            found[setting], seconds[setting] = kept["distances"], float(kept["seconds"])
    return {setting: found[setting] for setting in configs}, seconds


def main(
    trials: Annotated[int, typer.Option(help="Trials of every point.")] = 50,
    steps: Annotated[int, typer.Option(help="Steps, a multiple of --stage.")] = 10_000,
    stage: Annotated[int, typer.Option(help="Steps of one learning rate; then halved.")] = 1000,
    workers: Annotated[list[int] | None, typer.Option(help="Instead of 20, 50, 100.")] = None,
    periods: Annotated[bool, typer.Option(help="Other periods than 16 too.")] = True,
    law: Annotated[Law, typer.Option(help="Of the workers' data.")] = Law.BOTH,
    samples: Annotated[int, typer.Option(help="Of each worker.")] = 8000,
    batch: Annotated[int, typer.Option(help="Samples a step, of each worker.")] = 8,
    factor: Annotated[float, typer.Option(help="Behind: above so many times parallel's.")] = 1.05,
    processes: Annotated[int, typer.Option(help="Points at a time.")] = 2,
    keep: Annotated[
        Path | None, typer.Option(help="Keep points here, and go on from them.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the curves.")] = None,
) -> None:
    """Run all points and print transient stages, their order and their growth."""
    load, started = os.getloadavg()[0], time.perf_counter()
    workers = workers or [20, 50, 100]
    middle, least = workers[len(workers) // 2], min(workers)
    window = max(1, stage // 10)
    changes = {"steps": steps, "lr_schedule.step_size": stage, "task.batch_size": batch}
    laws = {Law.OWN: [False], Law.IID: [True], Law.BOTH: [False, True]}[law]
    changes |= {"task.samples_per_worker": samples, "compare.grid.task.iid": laws}
    own = [{"compare.grid.workers": workers}, {"workers": least}][: 1 + periods]
    configs = {
        Setting.of(point.method, point.config): point.config
        for file, more in zip(FILES, own, strict=False)
        for point in read_sweep(file, changes | more).points
    }
    found, seconds = measured(configs, trials, window, processes, keep)
    lr = next(iter(configs.values())).optimizer.options["lr"]
    comparison = Comparison(found, window, factor, stage)
    stride = max(1, len(next(iter(found.values()))[0]) // 100)
    points = points_of(comparison, seconds, lr, stride)
    figures = {
        "benchmark": "transients",
        "settings": {
            "trials": trials,
            "steps": steps,
            "stage": stage,
            "window": window,
            "samples_per_worker": samples,
            "batch_size": batch,
            "factor": factor,
            "curve_every": stride * window,
        },
        "points": points,
        "order": [row for iid in laws for row in order(comparison, middle, iid)],
        "exponents": exponents(comparison, lr, least),
        "seconds": time.perf_counter() - started,
        "machine": machine.describe(load),
    }
    console = Console(width=120)
    console.print(table(points))
    for row in figures["order"]:
        kind = "iid" if row["iid"] else "own"
        console.print(middle, kind, f"{row['method']} - {row['after']}:", told(row["steps"]))
    for row in figures["exponents"]:
        grown = {key: row[key] for key in ("halved_lr", "constant_lr", "theory")}
        console.print(row["method"], "iid" if row["iid"] else "own", row["in"], grown)
    if out is not None:
        machine.write(figures, out)
    if picture is not None:
        draw(points, stride * window, picture)


if __name__ == "__main__":
    typer.run(main)
