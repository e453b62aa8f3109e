"""One worker of a cluster: builds its part of the experiment, runs segments, reports.

A plain class over torch.distributed, without Ray: the Ray engine makes it an actor, and a test
can run it in any process.
"""

import os
import socket
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from decentral.asynchronous import AsynchronousRule
from decentral.asynchronous_peer import PeerReplica
from decentral.comm import consecutive_groups
from decentral.config import Config
from decentral.errors import StepError
from decentral.evaluation import averaged_buffers, evaluate
from decentral.experiment import build
from decentral.gradients import FlatModel, ModuleGradient
from decentral.peer import PeerComm, own_group, two_ways
from decentral.replica import Replica, Report, Segment
from decentral.storage import Storage, StorageError, Writing, Written
from decentral.timing import step_seconds
from decentral.topology import Topology


@dataclass(frozen=True)
class Surroundings:
    """Where the driver runs: a worker looks up a user's modules and relative files there too."""

    folder: str
    import_paths: list[str]

    @classmethod
    def here(cls) -> "Surroundings":
        return cls(os.getcwd(), [os.path.abspath(path) for path in sys.path])

    def enter(self) -> None:
        """Take them over, as far as this node has them."""
        if os.path.isdir(self.folder):
            os.chdir(self.folder)
        sys.path += [path for path in self.import_paths if path not in sys.path]


class Worker:
    """One worker. First `build`, then on worker 0 `listen`, then `connect`; then the rest."""

    def build(
        self,
        config: Config,
        topology: Topology | None,
        rank: int,
        surroundings: Surroundings,
    ) -> None:
        """Build worker `rank` of the run. The topology comes along, for a graph file may lie on
        the driver's node alone; the task's data is read here."""
        self.leave()
        surroundings.enter()
        torch.set_num_threads(max(1, int(config.ray.cpus_per_worker)))
        self._experiment = build(config, topology)
        self._rank = rank
        self._n = self._experiment.config.workers
        gpus = self._experiment.config.ray.gpus_per_worker
        self._device = "cuda" if gpus > 0 else "cpu"
        # NCCL refuses two ranks on one card, so workers that share one exchange through gloo.
        self._backend = "nccl" if gpus >= 1 else "gloo"
        self._model = FlatModel(self._experiment.task.model, self._experiment.dtype, self._device)
        self._store: dist.TCPStore | None = None
        self._replica: Replica | PeerReplica | None = None
        self._writing: Writing | None = None

    def step_seconds(self) -> float:
        """Measured seconds of a local step."""
        return step_seconds(self._experiment, self._device)

    def listen(self, address: str) -> int:
        """Open the store at which the workers meet, on this node's `address`; returns its port.

        Called on worker 0 alone, before all workers `connect`.
        """
        self._store = dist.TCPStore(
            address, 0, self._n, is_master=True, wait_for_workers=False, timeout=self._timeout
        )
        return self._store.port

    def connect(self, address: str, port: int, own_address: str) -> None:
        """Meet the other workers at address:port and open the process groups."""
        interface = interface_of(own_address)
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
        if self._store is None:
            self._store = dist.TCPStore(address, port, self._n, timeout=self._timeout)
        dist.init_process_group(
            self._backend,
            store=self._store,
            rank=self._rank,
            world_size=self._n,
            timeout=self._timeout,
        )
        algorithm = self._experiment.algorithm
        ways = two_ways() if self._backend == "gloo" and algorithm.needs_topology else None
        group = own_group(consecutive_groups(self._n, algorithm.schedule.groups))
        if self._backend == "nccl":
            # NCCL opens its connections at the first collective; point to point needs them.
            dist.all_reduce(torch.zeros(1, device=self._device))
        experiment = self._experiment
        sampler = experiment.sampler([self._rank])
        options = experiment.config.gradient.model_dump()
        gradient = ModuleGradient(self._model, experiment.task, sampler, **options)
        comm = PeerComm(experiment.topology, ways, group, algorithm.gossip_period)
        if isinstance(algorithm.rule, AsynchronousRule):
            assert experiment.matchings is not None, "set for asynchronous methods"
            self._replica = PeerReplica(
                gradient,
                algorithm.rule,
                comm,
                experiment.make_optimizer,
                experiment.make_scheduler,
                matchings=experiment.matchings,
                store=self._store,
                average_buffers=experiment.config.buffers == "average",
            )
        else:
            rank = torch.tensor(self._rank, device=self._device)
            self._replica = experiment.replica(gradient, comm, rank)

    def run(self, segment: Segment) -> Report:
        """Run a segment. Raises StepError if it cannot be finished."""
        replica = self._joined
        try:
            return replica.run(segment)
        except StepError:
            # Closing the connections at once tells the neighbours, and theirs in turn.
            self.leave()
            raise
        except Exception as error:
            self.leave()
            reason = "".join(traceback.format_exception_only(error)).strip()
            raise StepError(self._rank, replica.step, reason) from error

    def evaluate(self) -> dict[str, float]:
        """Own accuracy, and on worker 0 loss and accuracy of the averaged model."""
        task = self._experiment.task
        x, buffers = self._mean()
        values = {}
        if task.test is not None and self._rank == 0:
            mean = evaluate(self._model, task, x, buffers)
            values["eval_loss"] = mean.loss
            if mean.accuracy is not None:
                values["eval_accuracy"] = mean.accuracy
        if task.test is not None and task.accuracy is not None:
            own = evaluate(self._model, task, self._joined.x, self._joined.buffers)
            assert own.accuracy is not None
            values["eval_accuracy_workers"] = own.accuracy
        return values

    def average_model(self) -> dict[str, Tensor] | None:
        """The averaged model's state_dict from worker 0; all workers must call it."""
        x, buffers = self._mean()
        if self._rank != 0:
            return None
        return self._model.state_dict(x, buffers, self._joined.counters)

    def save(self, storage: Storage, folder: str) -> None:
        """Copy this worker's state, and begin to write it to a file of its own in `folder`."""
        if self._writing is not None:
            self._writing.result(wait=True)
        self._writing = Writing(storage, f"{folder}/{self._file}", self._joined.state_dict())

    def saved(self, wait: bool) -> Written | StorageError | None:
        """The file of the last `save`, or why there is none; None while it is being written."""
        if self._writing is None:
            return StorageError(f"{self._file} was not begun by this process")
        return self._writing.result(wait)

    def load(
        self, storage: Storage, folder: str, files: Mapping[str, Written]
    ) -> StorageError | None:
        """Go on from a file that a `save` wrote, or say why it cannot be."""
        try:
            storage.load(folder, self._file, files, self._joined.load_state_dict)
        except StorageError as error:
            return error
        return None

    def leave(self) -> None:
        """Close all connections to other workers."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _mean(self) -> tuple[Tensor, Tensor]:
        replica = self._joined
        means = []
        for tensor in (replica.x, replica.buffers):
            empty = tensor.numel() == 0
            means.append(
                tensor if empty else replica.comm.mean(tensor, replica.step, counted=False)
            )
        x, buffers = means
        if self._rank == 0:  # the others need no averaged model
            buffers = averaged_buffers(self._model, self._experiment, x, buffers)
        return x, buffers

    @property
    def _joined(self) -> Replica | PeerReplica:
        assert self._replica is not None, "connect comes first"
        return self._replica

    @property
    def _file(self) -> str:
        """Of a checkpoint."""
        return f"worker-{self._rank}.pt"

    @property
    def _timeout(self) -> timedelta:
        return timedelta(seconds=self._experiment.config.ray.timeout_s)


def interface_of(address: str) -> str:
    """The network interface that carries `address`.

    Left to themselves, gloo and NCCL take whatever the host name resolves to, which is often
    the loopback interface: then a group over several hosts cannot connect.
    """
    families = (socket.AF_INET, socket.AF_INET6)
    for interface, addresses in psutil.net_if_addrs().items():
        if any(a.family in families and a.address == address for a in addresses):
            return interface
    raise RuntimeError(f"no network interface of {socket.gethostname()} carries {address}")
