"""Which candidate reaches a target first: short runs in the simulator, the slow ones dropped early.

A race on the simulated clock. All arms (a candidate with a learning rate) get the same simulated
time, the better half twice as much, and so on until one is there. Then the other seeds decide
between those who came first.
"""

import math
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple, TypeVar

import torch

from decentral.checkpoints import Checkpoints
from decentral.config import Config, load
from decentral.coordinator import Coordinator
from decentral.engines.sim import Simulator
from decentral.errors import UserError
from decentral.experiment import build
from decentral.plan.candidates import Candidate
from decentral.plan.estimate import Estimate
from decentral.progress import deaf_to_interrupts
from decentral.storage import Storage

FIRST_SHARE = 1 / 16  # of max_steps, of the candidate with the shortest step: the first budget
FEWEST = 4  # arms are not halved below, until one is there
CLOSE = 1.5  # times the first arrival: arms that came by then are tried with the other seeds
FINALISTS = 4
A = TypeVar("A", bound=Hashable)


class Target(NamedTuple):
    """A value of the averaged model's evaluation that is to be reached."""

    metric: str  # "accuracy" or "loss"
    value: float

    @classmethod
    def parse(cls, text: str) -> "Target":
        """From `accuracy=0.95` or `loss=0.2`. Raises UserError for anything else."""
        metric, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if metric not in ("accuracy", "loss") or not math.isfinite(value):
            raise UserError(f"is accuracy=0.95 or loss=0.2, say; got {text!r}", "--target")
        return cls(metric, value)

    def shortfall(self, record: Mapping[str, Any]) -> float:
        """How far a record is from the target: <= 0 where it is reached, infinite for NaN."""
        if f"eval_{self.metric}" not in record:
            raise UserError(
                f"the task evaluates no {self.metric}: its test data give none; take another"
                " metric, or another task",
                "--target",
            )
        value = record[f"eval_{self.metric}"]
        short = self.value - value if self.metric == "accuracy" else value - self.value
        return math.inf if math.isnan(short) else short


class Arm(NamedTuple):
    """One run of the race; what it is a run of, and the simulated seconds of one step."""

    candidate: Candidate
    lr: float
    seed: int
    step_s: float


class Progress(NamedTuple):
    """How far an arm has come. `shortfall`: None before the first evaluation; `over`: no steps
    left, or at the target; `steps`: taken so far."""

    shortfall: float | None = None
    reached_s: float | None = None
    over: bool = False
    steps: int = 0


class Found(NamedTuple):
    """What the search knows of a candidate, at its best learning rate.

    times_s  simulated seconds to the target, a value a seed; None where it was not reached
    steps    that the longest of its runs took; shortfall: of its first seed, at the end
    dropped  whether it was left behind before its steps were over
    """

    candidate: Candidate
    lr: float
    times_s: tuple[float | None, ...]
    steps: int
    shortfall: float | None
    dropped: bool

    @property
    def time_s(self) -> float | None:
        """Mean over the seeds tried; None where one of them did not get there."""
        there = [time_s for time_s in self.times_s if time_s is not None]
        return mean(there) if there and len(there) == len(self.times_s) else None

    @property
    def spread_s(self) -> float | None:
        """Standard deviation over seeds, where there are several."""
        there = [time_s for time_s in self.times_s if time_s is not None]
        return stdev(there) if self.time_s is not None and len(there) > 1 else None


Advance = Callable[[Sequence[A], float], list[Progress]]  # up to a simulated time


def race(
    arms: Sequence[A], advance: Advance[A], budget_s: float, say: Callable[[str], None] = print
) -> dict[A, Progress]:
    """Successive halving on the simulated clock, until an arm reaches the target or all are over.

    `advance(arms, budget_s)` brings arms to at most this time. Of those that have been evaluated
    by then the better half goes on, at least FEWEST, with twice the time; arms whose step takes
    longer than that wait, at no cost. If nobody gets there, those that were dropped go on.
    """
    latest: dict[A, Progress] = {arm: Progress() for arm in arms}
    alive, dropped = list(arms), list[A]()
    while alive:
        latest.update(zip(alive, advance(alive, budget_s), strict=True))
        there = [arm for arm in alive if latest[arm].reached_s is not None]
        say(f"up to {budget_s:.3g} s simulated: {len(alive)} runs, {len(there)} at the target")
        if there:
            break
        going = [arm for arm in alive if not latest[arm].over]
        unseen = [arm for arm in going if latest[arm].shortfall is None]
        seen = [arm for arm in going if latest[arm].shortfall is not None]
        seen.sort(key=lambda arm: latest[arm].shortfall or 0.0)
        keep = max(FEWEST - len(unseen), math.ceil(len(seen) / 2), 0)
        dropped += seen[keep:]
        alive = seen[:keep] + unseen
        if not alive:
            alive, dropped = dropped, []
        budget_s *= 2
    return latest


def search(
    base: Mapping[str, Any],
    estimates: Sequence[Estimate],
    target: Target,
    *,
    lrs: Sequence[float],
    seeds: int = 3,
    max_steps: int = 400,
    every: int = 5,
    jobs: int | None = None,
    prune: bool = True,
    say: Callable[[str], None] = print,
) -> tuple[list[Found], int]:
    """Candidates by the simulated time to the target, and the steps of a worker that it took.

    `base` is a config without algorithm and topology. The target is looked at `every` so many
    steps, and a run ends after `max_steps`. `prune` leaves out the candidates that others beat in
    both the time of a step and the transient stage. First come those that reached the target with
    all seeds, then the others by how near they came.
    """
    kept = undominated(estimates) if prune else list(estimates)
    say(f"{len(kept)} of {len(estimates)} candidates, {len(lrs)} learning rates each")
    arms = [Arm(e.candidate, lr, 0, e.step_s) for e in kept for lr in lrs]
    first_s = max(FIRST_SHARE * max_steps, every) * min(arm.step_s for arm in arms)
    with _Runner.open(base, target, max_steps, every, jobs) as runner:
        latest = race(arms, runner.advance, first_s, say)
        reached = {a: t for a in arms if (t := latest[a].reached_s) is not None}
        if reached:
            first = min(reached.values())
            order = sorted(reached, key=lambda arm: reached[arm])[:FINALISTS]
            close = [arm for arm in order if reached[arm] <= CLOSE * first]
            more = [arm._replace(seed=seed) for arm in close for seed in range(1, seeds)]
            say(f"{len(close)} close: {seeds - 1} more seeds each")
            latest |= zip(more, runner.advance(more, 2 * CLOSE * first), strict=True)
    return _found(latest), sum(progress.steps for progress in latest.values())


def grid(
    base: Mapping[str, Any],
    estimates: Sequence[Estimate],
    target: Target,
    *,
    lrs: Sequence[float],
    seeds: int = 3,
    max_steps: int = 400,
    every: int = 5,
    jobs: int | None = None,
) -> tuple[list[Found], int]:
    """What `search` saves: every candidate, learning rate and seed, to the target or the end."""
    arms = [
        Arm(e.candidate, lr, seed, e.step_s)
        for e in estimates
        for lr in lrs
        for seed in range(seeds)
    ]
    with _Runner.open(base, target, max_steps, every, jobs) as runner:
        latest = dict(zip(arms, runner.advance(arms, math.inf), strict=True))
    return _found(latest), sum(progress.steps for progress in latest.values())


def undominated(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Those that no other beats, or equals, in step time and both orders of the transient stage
    while it is better in one. Where no theory is at hand a candidate stays."""

    def figures(estimate: Estimate) -> tuple[float, ...] | None:
        return None if estimate.transient is None else (estimate.step_s, *estimate.transient)

    known = [f for estimate in estimates if (f := figures(estimate)) is not None]

    def beaten(own: tuple[float, ...] | None) -> bool:
        return own is not None and any(
            other != own and all(a <= b for a, b in zip(other, own, strict=True)) for other in known
        )

    return [estimate for estimate in estimates if not beaten(figures(estimate))]


def _found(latest: Mapping[Arm, Progress]) -> list[Found]:
    """A row per candidate, from all its arms; the best first."""
    rows: dict[tuple[Candidate, float], dict[int, Progress]] = {}
    for arm, progress in latest.items():
        rows.setdefault((arm.candidate, arm.lr), {})[arm.seed] = progress
    best: dict[Candidate, Found] = {}
    for (candidate, lr), by_seed in rows.items():
        times = tuple(by_seed[seed].reached_s for seed in sorted(by_seed))
        steps = max(progress.steps for progress in by_seed.values())
        dropped = not by_seed[0].over
        row = Found(candidate, lr, times, steps, by_seed[0].shortfall, dropped)
        if candidate not in best or _order(row) < _order(best[candidate]):
            best[candidate] = row
    return sorted(best.values(), key=_order)


def _order(row: Found) -> tuple[float, ...]:
    """By time where all seeds tried got there, and among those with more seeds first."""
    if row.time_s is not None:
        return 0, -len(row.times_s), row.time_s
    return (
        1,
        -sum(t is not None for t in row.times_s),
        (math.inf if row.shortfall is None else row.shortfall),
    )


class _Job(NamedTuple):
    config: Config
    folder: str  # of its checkpoints
    target: Target
    until: int  # steps


class _Runner:
    """Brings arms forward, in processes of its own where there are cores; each goes on from its
    checkpoint."""

    def __init__(
        self,
        configs: Callable[[Arm], Config],
        folder: Path,
        target: Target,
        every: int,
        run: Callable[[list[_Job]], list[Progress]],
    ):
        self._configs, self._folder, self._target = configs, folder, target
        self._every, self._run = every, run
        self._latest: dict[Arm, Progress] = {}

    @classmethod
    @contextmanager
    def open(
        cls,
        base: Mapping[str, Any],
        target: Target,
        max_steps: int,
        every: int,
        jobs: int | None,
    ) -> "Iterator[_Runner]":
        def configs(arm: Arm) -> Config:
            return config_of(base, arm.candidate, arm.lr, max_steps, arm.seed, every)

        jobs = jobs or os.cpu_count() or 1
        with tempfile.TemporaryDirectory() as folder:
            if jobs == 1:
                yield cls(configs, Path(folder), target, every, lambda js: [_go_on(j) for j in js])
                return
            context = multiprocessing.get_context("spawn")
            with deaf_to_interrupts():
                pool = context.Pool(jobs, torch.set_num_threads, (1,))  # the others have the cores
            with pool:  # leaving it, by Ctrl-C too, ends the processes

                def run(todo: list[_Job]) -> list[Progress]:
                    return pool.map_async(_go_on, todo, chunksize=1).get(2**31)

                yield cls(configs, Path(folder), target, every, run)

    def advance(self, arms: Sequence[Arm], budget_s: float) -> list[Progress]:
        """Up to a simulated time, in whole evaluations; an arm that cannot make one stays."""
        jobs: dict[Arm, _Job] = {}
        for arm in arms:
            before = self._latest.setdefault(arm, Progress())
            config = self._configs(arm)
            affordable = budget_s / arm.step_s + 1e-9
            until = config.steps
            if affordable < until:
                until = math.floor(affordable / self._every) * self._every
            if not before.over and until > before.steps:
                name = f"{arm.candidate}-{arm.lr}-{arm.seed}".replace(os.sep, "_")
                jobs[arm] = _Job(config, str(self._folder / name), self._target, until)
        self._latest.update(zip(jobs, self._run(list(jobs.values())), strict=True))
        return [self._latest[arm] for arm in arms]


def config_of(
    base: Mapping[str, Any], candidate: Candidate, lr: float, steps: int, seed: int, every: int
) -> Config:
    """The config of a candidate's run: what `decentral run` takes."""
    optimizer = {"name": "sgd", **base.get("optimizer", {}), "lr": lr}
    record = {**base.get("record", {}), "every": every, "evaluate_every": every}
    own = {"steps": steps, "seed": seed, "optimizer": optimizer, "record": record}
    return load({"name": "plan", **base, **own, **candidate.config})


def _go_on(job: _Job) -> Progress:
    """Go on with a run to a step, or to the target, and leave a checkpoint."""
    experiment = build(job.config)
    short = time_s = None
    with torch.random.fork_rng(devices=[]):
        engine = Simulator(experiment)
        coordinator = Coordinator(experiment, engine)
        folder = Path(job.folder)
        checkpoints = Checkpoints(Storage(folder), keep=1)
        if folder.exists():
            checkpoints.restore(coordinator, engine)
        for record in coordinator.run():
            if record is not None:
                short, time_s = job.target.shortfall(record), record["sim_time_s"]
                if short <= 0:
                    return Progress(short, time_s, True, coordinator.step)
            if coordinator.step >= job.until:
                break
        over = coordinator.step >= job.config.steps
        if not over:
            checkpoints.begin(coordinator, engine)
            checkpoints.finish(engine)
            if checkpoints.failure is not None:
                raise OSError(checkpoints.failure)
    return Progress(short, None, over, coordinator.step)
