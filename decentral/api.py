"""`decentral run`, from config to result: what the command line and `decentral.run` call."""

import copy
import functools
import importlib.metadata
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from decentral import records
from decentral.checkpoints import Checkpoints
from decentral.config import Config, load
from decentral.coordinator import Coordinator
from decentral.engines import Engine
from decentral.engines.sim import Simulator
from decentral.errors import UserError, WorkerError
from decentral.experiment import Experiment, build
from decentral.loggers import Loggers
from decentral.loggers import build as build_loggers
from decentral.progress import Watcher
from decentral.records import Record, RunDirectory

if TYPE_CHECKING:
    import pandas


# In a resumed run.
MAY_CHANGE = (
    "workers",
    "min_workers",
    "on_worker_failure",
    "steps",
    "record",
    "checkpoint",
    "network",
    "sim",
    "ray",
    "loggers",
    "name",
)


@dataclass(frozen=True)
class Result:
    """What a run gave.

    `metrics` has a row per record, the columns of metrics.jsonl; `model` is the averaged model;
    `summary` the content of summary.json; `directory` None if the run was not written.
    """

    config: Config
    metrics: "pandas.DataFrame"
    model: torch.nn.Module
    summary: dict[str, Any]
    directory: Path | None


def run(
    config: str | Path | Mapping[str, Any],
    *,
    out: str | Path | None = None,
    watcher: Watcher | None = None,
    **overrides: Any,
) -> Result:
    """Run a config: a YAML file or a mapping, with overrides such as `**{"algorithm.period": 4}`.

    `out` is the run directory to make; without it nothing is written. Raises UserError, before
    anything starts, if the input is wrong, and WorkerError if a worker fails.
    """
    return execute(load(config, overrides), Path(out) if out else None, watcher or Watcher())


def resume(directory: str | Path, *, watcher: Watcher | None = None, **overrides: Any) -> Result:
    """Go on with a run from its newest sound checkpoint, in the same directory.

    Overrides may change what the checkpoint does not fix: see MAY_CHANGE.
    """
    directory = Path(directory)
    if not os.path.exists(directory / "config.yaml"):
        raise UserError(f"{directory} is not a run directory: it has no config.yaml", "--resume")
    before = load(directory / "config.yaml")
    config = load(directory / "config.yaml", overrides)
    for key in Config.model_fields:
        if key not in MAY_CHANGE and getattr(config, key) != getattr(before, key):
            raise UserError(
                f"a resumed run keeps its {key}; it may change {', '.join(MAY_CHANGE)}", key
            )
    taken = Checkpoints.of(config.checkpoint, directory).newest()
    if config.steps < taken:
        raise UserError(
            f"the resumed run has taken {taken} steps already; got {config.steps}", "steps"
        )
    return execute(config, directory, watcher or Watcher(), resumes=True)


def execute(config: Config, out: Path | None, watcher: Watcher, *, resumes: bool = False) -> Result:
    """Check everything, start the engine, run, record; whatever happens, leave nothing running."""
    started = time.perf_counter()
    experiment = build(config)
    if experiment.topology is not None and not experiment.algorithm.needs_topology:
        watcher.say(
            f"{config.algorithm.name} averages over no topology: {experiment.topology.name}"
            " serves the clock alone"
        )
    loggers = Loggers(build_loggers(config, out), watcher.say)
    rows: list[Record] = []
    status = "failed"
    failures: list[dict[str, Any]] = []
    directory = checkpoints = None
    if out is not None:
        checkpoints = Checkpoints.of(config.checkpoint, out, watcher.say)
        if not resumes:
            records.check(out)
        checkpoints.check(new=not resumes)
        directory = RunDirectory(out)

    def summary(status: str) -> dict[str, Any]:
        seconds = time.perf_counter() - started
        final = _summary(experiment, rows, status, seconds, failures)
        if checkpoints is not None and checkpoints.failure is not None:
            final["checkpoint_error"] = checkpoints.failure
        return final

    cards = [torch.cuda.current_device()] if config.sim.device == "cuda" else []
    with torch.random.fork_rng(cards):
        engine = _engine(experiment, watcher)
        try:
            if checkpoints is not None:
                engine.reach(checkpoints.storage)
            coordinator = Coordinator(experiment, engine, watcher.say)
            failures = coordinator.failures
            if checkpoints is not None and resumes:
                checkpoints.restore(coordinator, engine)
            if directory is not None:
                rows += directory.start(
                    config, experiment.shards, coordinator.step, experiment.label_counts
                )
            loggers.start(coordinator.step)
            watcher.begin(experiment, coordinator.step)
            reached = _run(
                experiment, engine, coordinator, directory, checkpoints, rows, watcher, loggers
            )
            state = coordinator.steadily(engine.average_model)
            if directory is not None and coordinator.timeline is not None:
                coordinator.timeline.write(directory.path / "timeline.json")
            status = reached
        except BaseException as error:
            if directory is not None and directory.started:
                directory.finish(summary("failed") | {"error": str(error)}, None)
            raise
        finally:
            watcher.end()
            loggers.close(status)
            engine.close()
    final = summary(status)
    if directory is not None:
        directory.finish(final, state)
    return _result(experiment, rows, state, final, out)


def _engine(experiment: Experiment, watcher: Watcher) -> Engine:
    if experiment.config.engine == "sim":
        return Simulator(experiment)
    from decentral.engines.ray import RayEngine  # ray is imported by its engine alone

    return RayEngine(experiment, watcher.say)


def _run(
    experiment: Experiment,
    engine: Engine,
    coordinator: Coordinator,
    directory: RunDirectory | None,
    checkpoints: Checkpoints | None,
    rows: list[Record],
    watcher: Watcher,
    loggers: Loggers,
) -> str:
    """Run to the end or until the user stops it: the status that summary.json gives.

    A checkpoint that is under way then is waited for, after an error too, unless a worker failed.
    """
    every = experiment.config.checkpoint.every
    try:
        for record in coordinator.run():
            if record is not None:
                rows.append(record)
                if directory is not None:
                    directory.append(record)
                loggers.log(record)
            watcher.advance(coordinator.step, record)
            stop = (
                coordinator.settled
                and watcher.wants_stop()
                and coordinator.step < experiment.config.steps
            )
            due = every is not None and coordinator.step % every == 0
            if checkpoints is not None:
                checkpoints.finish(engine, wait=False)
                if stop or due:
                    coordinator.steadily(functools.partial(checkpoints.begin, coordinator, engine))
            if stop:
                if checkpoints is not None:
                    checkpoints.finish(engine)
                    told = checkpoints.failure or f"checkpoint in {checkpoints.last}"
                    watcher.say(f"stopped at step {coordinator.step}; {told}")
                return "stopped"
        if checkpoints is not None:
            checkpoints.finish(engine)
    except WorkerError:
        raise
    except Exception:
        if checkpoints is not None:
            checkpoints.finish(engine)
        raise
    return "done"


def _summary(
    experiment: Experiment,
    rows: list[Record],
    status: str,
    seconds: float,
    failures: list[dict[str, Any]],
) -> dict[str, Any]:
    config = experiment.config
    return {
        "name": config.name,
        "status": status,
        "engine": config.engine,
        "algorithm": config.algorithm.name,
        "topology": experiment.topology.name if experiment.topology else None,
        "workers": config.workers,
        "parameters": sum(p.numel() for p in experiment.task.model.parameters() if p.requires_grad),
        "final": rows[-1] if rows else None,
        "failures": failures,
        "seconds": seconds,
        "versions": {
            "python": platform.python_version(),
            **{
                package: importlib.metadata.version(package)
                for package in ("decentral", "torch", "ray", "networkx", "numpy")
            },
        },
        "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
    }


def _result(
    experiment: Experiment,
    rows: list[Record],
    state: dict[str, torch.Tensor],
    summary: dict[str, Any],
    out: Path | None,
) -> Result:
    import pandas  # slow to import, and of no use before there is a result

    model = copy.deepcopy(experiment.task.model).to(experiment.dtype)
    model.load_state_dict(state)
    return Result(experiment.config, pandas.DataFrame(rows), model, summary, out)
