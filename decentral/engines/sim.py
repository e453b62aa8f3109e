"""The simulator: all workers in one process, stacked along the first axis of every tensor."""

import copy
import ctypes
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decentral.asynchronous import AsynchronousRule, StackedReplicas
from decentral.comm import StackedComm, consecutive_groups
from decentral.diagnostics.figures import diagnostics_of
from decentral.evaluation import accuracies, averaged_buffers, averaged_figures
from decentral.experiment import Experiment
from decentral.gradients import PASS_BYTES, FlatModel, StackedGradient
from decentral.replica import Replica, Report, Segment, rows_of
from decentral.storage import Storage, Writing, Written, all_written
from decentral.timing import step_seconds

FILE = "workers.pt"  # of a checkpoint
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


class Simulator:
    """An Engine. One Replica holds [n, D]; mixing is a matrix product."""

    ahead_s = 0.0

    def __init__(self, experiment: Experiment):
        keep_freed_memory()
        self._experiment = experiment
        self._model = FlatModel(
            copy.deepcopy(experiment.task.model), experiment.dtype, experiment.config.sim.device
        )
        self._diagnostics = diagnostics_of(experiment, experiment.config.sim.device)
        self._writing: Writing | None = None
        self._members = tuple(range(experiment.config.workers))
        self.replica = self._replicas()

    @property
    def members(self) -> tuple[int, ...]:
        return self._members

    def _replicas(self) -> Replica | StackedReplicas:
        """The members' replicas, as they are at the start."""
        experiment, config = self._experiment, self._experiment.config
        n = len(self.members)
        sampler = experiment.sampler(list(self.members), self.members)
        algorithm = experiment.algorithm
        groups = consecutive_groups(n, algorithm.schedule.groups)
        gradient = StackedGradient(
            self._model,
            experiment.task,
            sampler,
            n,
            **config.gradient.model_dump(),
            cuda_graph=config.sim.cuda_graph,
        )
        mixing = experiment.mixing(experiment.topology_of(self.members), self.members)
        comm = StackedComm(n, mixing, experiment.dtype, config.sim.device, groups)
        if isinstance(algorithm.rule, AsynchronousRule):
            return StackedReplicas(
                gradient,
                algorithm.rule,
                comm,
                experiment.make_optimizer,
                experiment.make_scheduler,
                average_buffers=config.buffers == "average",
                watches_drift=experiment.watches_drift,
            )
        workers = torch.tensor(self.members, device=config.sim.device)
        return experiment.replica(gradient, comm, workers)

    def step_seconds(self) -> np.ndarray:
        config = self._experiment.config
        return np.full(config.workers, step_seconds(self._experiment, config.sim.device))

    def run(self, segment: Segment, ahead: Sequence[Segment] = ()) -> Report:
        return self.replica.run(segment)

    def regroup(self, members: Sequence[int], new: Sequence[int] = ()) -> None:
        assert isinstance(self.replica, Replica), "asynchronous workers stay"
        before, state = self.members, self.replica.state_dict()
        device = self.replica.x.device
        place = {worker: row for row, worker in enumerate(before) if worker not in new}
        some = next(iter(place.values()))  # a newcomer has this one's counters
        rows = torch.tensor([place.get(worker, some) for worker in members], device=device)
        self._members = tuple(members)
        replica = self._replicas()
        assert isinstance(replica, Replica)
        # What is on its way while workers go or come is lost.
        replica.load_state_dict(rows_of(state, rows, len(before)) | {"history": {}})
        replica.regroup(
            replica.comm,
            torch.tensor([worker in new for worker in members], device=device) if new else None,
        )
        self.replica = replica

    def adopt(self, members: Sequence[int]) -> None:
        self._members = tuple(members)
        self.replica = self._replicas()

    def room(self) -> int:
        return 0

    def prepare(self, workers: Sequence[int]) -> None:
        pass

    def ready(self) -> list[int]:
        return []

    def evaluate(self) -> dict[str, float]:
        task = self._experiment.task
        values = averaged_figures(self._model, self._experiment, *self._mean())
        if task.test is not None and task.accuracy is not None:
            x, buffers = self.replica.x, self.replica.buffers
            each = accuracies(self._model, task, x, buffers, self.members)
            values["eval_accuracy_workers"] = each.mean().item()
        return values

    def diagnose(self, step: int) -> dict[str, float]:
        assert self._diagnostics is not None, "asked for"
        return self._diagnostics.of(step, *self._mean())

    def average_model(self) -> dict[str, Tensor]:
        first = {name: counter[0] for name, counter in self.replica.counters.items()}
        return self._model.state_dict(*self._mean(), first)

    def reach(self, storage: Storage) -> None:
        pass

    def save(self, storage: Storage, folder: str) -> None:
        state = self.replica.state_dict() | {"members": list(self.members)}
        self._writing = Writing(storage, f"{folder}/{FILE}", state)

    def saved(self, wait: bool) -> list[Written] | None:
        assert self._writing is not None, "save comes first"
        return all_written([self._writing.result(wait)])

    def load(self, storage: Storage, folder: str, files: Mapping[str, Written]) -> None:
        storage.load(folder, FILE, files, self._load)

    def _load(self, state: dict[str, Any]) -> None:
        saved = state.pop("members")
        if saved != list(self.members):
            rows = torch.tensor([saved.index(worker) for worker in self.members])
            state = rows_of(state, rows, len(saved))
        self.replica.load_state_dict(state)

    def close(self) -> None:
        pass

    def _mean(self) -> tuple[Tensor, Tensor]:
        x, buffers = self.replica.x.mean(dim=0), self.replica.buffers.mean(dim=0)
        return x, averaged_buffers(self._model, self._experiment, x, buffers)


def keep_freed_memory() -> None:
    """Let glibc keep what torch frees for the next step; elsewhere it does nothing.

    What goes back to the system at the end of a step comes again page by page, each with a fault.
    glibc gives back what lies above M_TRIM_THRESHOLD at the end of its heap, and maps by itself
    what is larger than M_MMAP_THRESHOLD, of which 32 MiB is the most (malloc.c).
    """
    if sys.platform == "linux":
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if set_option is not None:
            set_option(M_TRIM_THRESHOLD, 2 * PASS_BYTES["cpu"])
            set_option(M_MMAP_THRESHOLD, 2**25)
