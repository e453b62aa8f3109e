"""Linear mode connectivity of finished runs: the loss along the straight line between two models.

`decentral connectivity` calls it. Frankle et al. 2020 (arXiv 1912.05671): two networks without a
barrier between them lie in one basin. With `match`, one network's hidden units are renumbered
first so that the two are as near as can be found: see matching.py.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decentral.checkpoints import Checkpoints
from decentral.config import Config, SimConfig, load
from decentral.diagnostics.matching import chain_of
from decentral.engines import sim
from decentral.errors import UserError
from decentral.evaluation import evaluate, recalibrated, recalibration_batches
from decentral.experiment import Experiment, build
from decentral.gradients import FlatModel
from decentral.storage import Storage, StorageError, Written

DATA = ("test", "train")


class End(NamedTuple):
    """A model at one end of the line: what it is, parameters x [D], buffers [B]."""

    name: str
    x: Tensor
    buffers: Tensor


@dataclass(frozen=True)
class Line:
    """Loss, and accuracy where the task has one, at (1-t) a + t b for each of `at`, from 0 to 1.

    distance: ||a - b|| over the parameters. data: what the losses are means over.
    """

    ends: tuple[str, str]
    matched: bool
    data: str
    distance: float
    at: list[float]
    loss: list[float]
    accuracy: list[float] | None

    @property
    def barrier(self) -> float:
        """max_t L(t) - ((1-t) L(0) + t L(1)): how far the loss rises above its ends', which stand
        in at their share. 0 where it rises nowhere."""
        first, last = self.loss[0], self.loss[-1]
        rises = (
            loss - ((1 - t) * first + t * last) for t, loss in zip(self.at, self.loss, strict=True)
        )
        return max(0.0, *rises)

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"barrier": self.barrier}


def connectivity(
    directories: Sequence[Path],
    *,
    workers: tuple[int, int] | None = None,
    points: int = 11,
    match: bool = False,
    data: str | None = None,
) -> Line:
    """The line between the averaged models of two runs, or between two workers of one.

    Of one run: the models of `workers`, by default the first and the last, as its newest
    checkpoint has them. `points`: losses to take, two at least. data: by default the test set,
    where the task has one. BatchNorm's statistics are taken anew at every point. The task is that
    of the first run's config.

    Raises UserError for what is no finished run, or runs whose models do not go together.
    """
    if len(directories) not in (1, 2):
        raise UserError(f"takes one run directory, or two; got {len(directories)}", "DIR")
    if len(directories) == 2 and workers is not None:
        raise UserError("are of one run; name one DIR, or leave them out", "--workers")
    if data not in (None, *DATA):
        raise UserError(f"is test or train; got {data}", "--data")
    if points < 2:
        raise UserError(f"must be at least 2, the ends; got {points}", "--points")
    configs = [_config_of(directory) for directory in directories]
    experiment = build(configs[0].model_copy(update={"engine": "sim", "sim": SimConfig()}))
    model = FlatModel(experiment.task.model, experiment.dtype)
    if len(directories) == 2:
        _check_alike(*configs)
        a, b = (_averaged(directory, model) for directory in directories)
    else:
        a, b = _of_workers(directories[0], configs[0], model, workers)
    if match:
        b = _matched(model, a, b)
    return _line(experiment, model, a, b, points, match, data)


def _line(
    experiment: Experiment,
    model: FlatModel,
    a: End,
    b: End,
    points: int,
    matched: bool,
    data: str | None,
) -> Line:
    task = experiment.task
    if data is None:
        data = "train" if task.test is None else "test"
    if data == "train":
        task = replace(task, test=task.train)
    if task.test is None:
        raise UserError("the task has no test set; take --data train", "--data")
    batches = recalibration_batches(experiment.shards, experiment.config.seed)
    at = [number / (points - 1) for number in range(points)]
    found = []
    for t in at:
        x, buffers = (torch.lerp(start, end, t) for start, end in ((a.x, b.x), (a[2], b[2])))
        with torch.random.fork_rng(devices=[]):
            buffers = recalibrated(model, task, x, buffers, batches)
        found.append(evaluate(model, task, x, buffers))
    accuracies = [value.accuracy for value in found if value.accuracy is not None]
    return Line(
        ends=(a.name, b.name),
        matched=matched,
        data=data,
        distance=torch.linalg.vector_norm(a.x.double() - b.x.double()).item(),
        at=at,
        loss=[value.loss for value in found],
        accuracy=accuracies or None,
    )


def _matched(model: FlatModel, a: End, b: End) -> End:
    """b with its hidden units renumbered, as near to a as can be found."""
    chain = chain_of(model.module)
    ours, theirs = (model.parameters.views(end.x) for end in (a, b))
    places = chain.match(ours, theirs)
    x, buffers = torch.empty_like(b.x), torch.empty_like(b.buffers)
    for layout, flat, tensors in (
        (model.parameters, x, theirs),
        (model.buffers, buffers, model.buffers.views(b.buffers)),
    ):
        permuted = chain.permuted(tensors, places)
        for name, view in layout.views(flat).items():
            view.copy_(permuted[name])
    return End(b.name, x, buffers)


def _config_of(directory: Path) -> Config:
    if not (directory / "config.yaml").exists():
        raise UserError(f"{directory} is not a run directory: it has no config.yaml", "DIR")
    return load(directory / "config.yaml")


def _check_alike(one: Config, other: Config) -> None:
    """Raise UserError where the loss of one run says nothing of the other's model."""
    if (one.task.name, one.task.options) != (other.task.name, other.task.options):
        raise UserError(
            f"the runs have tasks of their own, {_task(one)} and {_task(other)}; a line joins two"
            " models of one task",
            "DIR",
        )


def _task(config: Config) -> str:
    options = "".join(f", {key}: {value}" for key, value in config.task.options.items())
    return f"{{name: {config.task.name}{options}}}"


def _averaged(directory: Path, model: FlatModel) -> End:
    """The averaged model that a finished run left."""
    path = directory / "model.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{directory} has no model.pt: its run has not finished", "DIR") from None
    except Exception as error:  # torch does not say what a file of another kind raises
        raise UserError(f"{path} holds no model that is safe to load", "DIR") from error
    try:
        x = model.parameters.flatten(state, model.dtype)
        buffers = model.buffers.flatten(state, model.dtype)
    except Exception as error:  # names, shapes, or no mapping at all
        raise UserError(f"{path} is no model of the run's task: {error}", "DIR") from error
    return End(str(directory), x, buffers)


def _of_workers(
    directory: Path, config: Config, model: FlatModel, workers: tuple[int, int] | None
) -> tuple[End, End]:
    """Two workers' own models, as the newest checkpoint of a run has them."""
    checkpoints = Checkpoints.of(config.checkpoint, directory)
    folder, files = checkpoints.newest_files()
    own = _own_files(files)
    members = sorted(own) or _read(checkpoints.storage, folder, files, sim.FILE)["members"]
    first, last = workers if workers is not None else (members[0], members[-1])
    for worker in (first, last):
        if worker not in members:
            raise UserError(
                f"{folder} has no worker {worker}; it has {', '.join(map(str, members))}",
                "--workers",
            )
    if first == last:
        raise UserError(f"a line joins two models; got worker {first} twice", "--workers")
    ends = []
    for worker in (first, last):
        state = _read(checkpoints.storage, folder, files, own.get(worker, sim.FILE))
        row = ... if own else members.index(worker)
        x, buffers = (state[name][row].to(model.dtype) for name in ("x", "buffers"))
        if x.shape != model.x.shape or buffers.shape != model.b.shape:
            raise UserError(f"{folder} holds other models than the run's task has", "DIR")
        ends.append(End(f"worker {worker} at {folder}", x, buffers))
    return ends[0], ends[1]


def _own_files(files: Mapping[str, Written]) -> dict[int, str]:
    """Of each worker its file, where the workers of a cluster wrote one each."""
    matches = (re.fullmatch(r"worker-(\d+)\.pt", name) for name in files)
    return {int(match[1]): match[0] for match in matches if match is not None}


def _read(storage: Storage, folder: str, files: Mapping[str, Written], name: str) -> dict[str, Any]:
    state: dict[str, Any] = {}
    try:
        storage.load(folder, name, files, state.update)
    except StorageError as error:
        raise UserError(f"checkpoint {folder} is damaged: {error}", "DIR") from None
    return state
