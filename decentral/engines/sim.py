"""The simulator: all workers in one process, stacked along the first axis of every tensor."""

import copy
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from decentral.asynchronous import AsynchronousRule, StackedReplicas
from decentral.comm import StackedComm, consecutive_groups
from decentral.evaluation import averaged_buffers, evaluate, evaluate_each
from decentral.experiment import Experiment
from decentral.gradients import FlatModel, StackedGradient
from decentral.replica import Report, Segment
from decentral.storage import Storage, Writing, Written, all_written
from decentral.timing import step_seconds

FILE = "workers.pt"  # of a checkpoint


class Simulator:
    """An Engine. One Replica holds [n, D]; mixing is a matrix product."""

    def __init__(self, experiment: Experiment):
        config = experiment.config
        self._experiment = experiment
        self._model = FlatModel(
            copy.deepcopy(experiment.task.model), experiment.dtype, config.sim.device
        )
        n = config.workers
        sampler = experiment.sampler(list(range(n)))
        matrices = experiment.topology.matrices if experiment.topology else ()
        algorithm = experiment.algorithm
        groups = consecutive_groups(n, algorithm.schedule.groups)
        gradient = StackedGradient(
            self._model, experiment.task, sampler, n, **config.gradient.model_dump()
        )
        comm = StackedComm(
            n, matrices, experiment.dtype, config.sim.device, groups, algorithm.gossip_period
        )
        if isinstance(algorithm.rule, AsynchronousRule):
            self.replica = StackedReplicas(
                gradient,
                algorithm.rule,
                comm,
                experiment.make_optimizer,
                experiment.make_scheduler,
                average_buffers=config.buffers == "average",
            )
        else:
            workers = torch.arange(n, device=config.sim.device)
            self.replica = experiment.replica(gradient, comm, workers)
        self._writing: Writing | None = None

    def step_seconds(self) -> np.ndarray:
        config = self._experiment.config
        return np.full(config.workers, step_seconds(self._experiment, config.sim.device))

    def run(self, segment: Segment) -> Report:
        return self.replica.run(segment)

    def evaluate(self) -> dict[str, float]:
        task = self._experiment.task
        if task.test is None:
            return {}
        mean = evaluate(self._model, task, *self._mean())
        values = {"eval_loss": mean.loss}
        if mean.accuracy is not None:
            values["eval_accuracy"] = mean.accuracy
            each = evaluate_each(self._model, task, self.replica.x, self.replica.buffers)[1]
            assert each is not None
            values["eval_accuracy_workers"] = each.mean().item()
        return values

    def average_model(self) -> dict[str, Tensor]:
        first = {name: counter[0] for name, counter in self.replica.counters.items()}
        return self._model.state_dict(*self._mean(), first)

    def reach(self, storage: Storage) -> None:
        pass

    def save(self, storage: Storage, folder: str) -> None:
        self._writing = Writing(storage, f"{folder}/{FILE}", self.replica.state_dict())

    def saved(self, wait: bool) -> list[Written] | None:
        assert self._writing is not None, "save comes first"
        return all_written([self._writing.result(wait)])

    def load(self, storage: Storage, folder: str, files: Mapping[str, Written]) -> None:
        storage.load(folder, FILE, files, self.replica.load_state_dict)

    def close(self) -> None:
        pass

    def _mean(self) -> tuple[Tensor, Tensor]:
        x, buffers = self.replica.x.mean(dim=0), self.replica.buffers.mean(dim=0)
        return x, averaged_buffers(self._model, self._experiment, x, buffers)
