"""One worker of a cluster: builds its part of the experiment, runs segments, reports.

A plain class over torch.distributed, without Ray: the Ray engine makes it an actor, and a test
can run it in any process.
"""

import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from decentral.asynchronous import AsynchronousRule
from decentral.asynchronous_peer import PeerReplica
from decentral.comm import consecutive_groups
from decentral.config import Config
from decentral.diagnostics.figures import diagnostics_of
from decentral.errors import StepError
from decentral.evaluation import accuracies, averaged_buffers, averaged_figures
from decentral.experiment import build
from decentral.gradients import FlatModel, ModuleGradient
from decentral.peer import Patience, PeerComm, PeerError, own_group
from decentral.replica import Replica, Report, Segment, filled
from decentral.storage import Storage, StorageError, Writing, Written
from decentral.tasks import Sampler
from decentral.timing import step_seconds
from decentral.topology import Topology

# For workers that are up and running to open their groups, and a tenth of a second more for each:
# one that dies meanwhile keeps the others waiting so long. NCCL needs seconds for itself.
RECONNECT_S = {"gloo": 2.0, "nccl": 15.0}


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


class Group(NamedTuple):
    """Workers that exchange with each other: what each is told when it connects.

    members: by number; their places in it are their ranks, and the nodes of `topology`. again:
    they go on from where they were, but for those in `new`, which start from the others' mean.
    slow: attempts in a row that failed though nobody was lost; each doubles the time for the next.
    """

    members: tuple[int, ...]
    topology: Topology | None
    again: bool = False
    new: tuple[int, ...] = ()
    slow: int = 0


class Outcome(NamedTuple):
    """What came of a segment; `failure`: an exchange that failed in it, after which it stopped.

    after_s: the call that asked for it began so long before.
    """

    report: Report
    failure: PeerError | None
    after_s: float = 0.0


class Worker:
    """One worker. First `build`, then on one of them `listen`, then `connect`; then the rest.

    After a failed exchange, or where workers leave or come, `listen` and `connect` come again.
    """

    def build(
        self,
        config: Config,
        topology: Topology | None,
        number: int,
        surroundings: Surroundings,
        device: str = "cpu",
    ) -> None:
        """Build worker `number` of the run. The topology comes along, for a graph file may lie on
        the driver's node alone; the task's data is read here."""
        self._comm: PeerComm | None = None
        self.leave()
        surroundings.enter()
        torch.set_num_threads(max(1, int(config.ray.cpus_per_worker)))
        self._experiment = build(config, topology)
        self._number = number
        self.device = device
        self._backend = config.ray.backend
        self._model = FlatModel(self._experiment.task.model, self._experiment.dtype, device)
        self._diagnostics = diagnostics_of(self._experiment, device)
        self._averaged: tuple[Tensor, Tensor] | None = None
        self._store: dist.TCPStore | None = None
        self._replica: Replica | PeerReplica | None = None
        self._writing: Writing | None = None

    def step_seconds(self) -> float:
        """Measured seconds of a local step."""
        return step_seconds(self._experiment, self.device)

    def listen(self, address: str) -> int:
        """Open a store at which the workers meet, on this node's `address`; returns its port.

        Called on the first member alone, before all `connect`.
        """
        self._store, port = open_store(address, self._timeout)
        return port

    def connect(
        self,
        address: str,
        port: int,
        own_address: str,
        group: Group,
        blank: dict[str, Any] | None = None,
    ) -> None:
        """Meet the other members of `group` at address:port, where the first of them listens.

        `blank`, for one that comes to others, is what it remembers before it has their mean: see
        Replica.blank.
        """
        self.leave()
        interface = interface_of(own_address)
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # so that its waits have deadlines, as gloo's
        try:
            own = self._open(address, port, group)
        except (RuntimeError, TimeoutError) as error:
            self.leave()
            rank = group.members.index(self._number)
            step = 0 if self._replica is None else self._replica.step
            raise PeerError(rank, step, None, f"{type(error).__name__}: {error}") from error
        experiment = self._experiment
        patience = Patience(experiment.config.ray.patience, self._timeout.total_seconds())
        mixing = experiment.mixing(group.topology, group.members)
        comm = PeerComm(mixing, own, patience, self.device)
        self._comm = comm
        sampler = experiment.sampler([self._number], group.members)
        if self._replica is None or not group.again:
            self._replica = self._start(comm, sampler)
        else:
            self._gradient.sampler = sampler
        if blank is not None:
            self._replica.load_state_dict(filled(blank))
        if group.again:
            assert isinstance(self._replica, Replica), "asynchronous workers stay"
            new = torch.tensor(self._number in group.new, device=self.device)
            with self._leaving_if_lost():
                self._replica.regroup(comm, new if group.new else None)

    def _open(self, address: str, port: int, group: Group) -> dist.ProcessGroup | None:
        """Open the process groups: that of all, and PeerComm's `own_group`."""
        algorithm = self._experiment.algorithm
        rank, n = group.members.index(self._number), len(group.members)
        timeout = self._timeout  # others may still be loading
        if group.again:
            seconds = (RECONNECT_S[self._backend] + n / 10) * 2**group.slow
            timeout = min(timeout, timedelta(seconds=seconds))
        if rank > 0:
            self._store = dist.TCPStore(address, port, timeout=timeout)
        # Groups meet under a number that each process counts up by itself, and that only a group
        # which was opened and closed sets back: after a failure workers would never meet again.
        dist.distributed_c10d._world.group_count = 0
        dist.init_process_group(
            self._backend, store=self._store, rank=rank, world_size=n, timeout=timeout
        )
        own = own_group(consecutive_groups(n, algorithm.schedule.groups), timeout)
        if self._backend == "nccl":
            # NCCL opens its connections at the first collective; point to point needs them.
            dist.all_reduce(torch.zeros(1, device=self.device))
        return own

    def _start(self, comm: PeerComm, sampler: Sampler) -> Replica | PeerReplica:
        """The replica, as it is at the start of the run."""
        experiment, algorithm = self._experiment, self._experiment.algorithm
        config = experiment.config
        self._gradient = ModuleGradient(
            self._model,
            experiment.task,
            sampler,
            **config.gradient.model_dump(),
            compiled=config.ray.compile,
            readers=config.ray.readers,
        )
        self._gradient.slowdown = experiment.faults.slowdown_of(self._number)
        if isinstance(algorithm.rule, AsynchronousRule):
            assert experiment.matchings is not None, "set for asynchronous methods"
            assert self._store is not None, "connect has opened it"
            return PeerReplica(
                self._gradient,
                algorithm.rule,
                comm,
                experiment.make_optimizer,
                experiment.make_scheduler,
                matchings=experiment.matchings,
                store=self._store,
                average_buffers=experiment.config.buffers == "average",
                watches_drift=experiment.watches_drift,
            )
        number = torch.tensor(self._number, device=self.device)
        return experiment.replica(self._gradient, comm, number)

    def run(self, segment: Segment) -> Outcome:
        """Run a segment, or, where an exchange fails, the steps up to and with the one it was in.

        Raises StepError for an error of the step's own.
        """
        replica, comm = self._joined, self._comm
        assert comm is not None, "connect comes first"
        comm.carries_on = True
        comm.patience.begin()
        try:
            for stopwatch in (self._gradient.stopwatch, comm.stopwatch):
                stopwatch.take()  # what an evaluation took is no step's
            report = replica.run(segment)
            compute_s = np.array([self._gradient.stopwatch.take()])
            wait_s = np.array([comm.stopwatch.take()])
            report = replace(report, compute_s=compute_s, wait_s=wait_s)
        except StepError:
            # Closing the connections at once tells the neighbours, and theirs in turn.
            self.leave()
            raise
        except Exception as error:
            self.leave()
            reason = "".join(traceback.format_exception_only(error)).strip()
            raise StepError(self._number, replica.step, reason) from error
        finally:
            comm.carries_on = False
        if comm.failure is not None:
            self.leave()
        return Outcome(report, comm.failure)

    def run_all(self, segments: Sequence[Segment]) -> list[Outcome | StepError]:
        """Run segments one after the other, up to one that is cut short, or the step's own error.

        The workers do not wait for each other in between, but for what each exchange waits for.
        """
        began = time.perf_counter()
        outcomes: list[Outcome | StepError] = []
        for segment in segments:
            try:
                outcome = self.run(segment)
            except StepError as error:
                outcomes.append(error)
                break
            outcomes.append(outcome._replace(after_s=time.perf_counter() - began))
            if outcome.failure is not None:
                break
        return outcomes

    def blank(self) -> dict[str, Any]:
        """What one that comes to these workers takes for its state, before it has their mean."""
        replica = self._joined
        assert isinstance(replica, Replica), "asynchronous workers stay"
        return replica.blank()

    def evaluate(self) -> dict[str, float]:
        """Own accuracy, and on the first member the figures of the averaged model."""
        task = self._experiment.task
        x, buffers = self._mean()
        values = {}
        if self._is_first:
            values = averaged_figures(self._model, self._experiment, x, buffers)
        if task.test is not None and task.accuracy is not None:
            own = self._joined.x.unsqueeze(0), self._joined.buffers.unsqueeze(0)
            (accuracy,) = accuracies(self._model, task, *own, [self._number])
            values["eval_accuracy_workers"] = accuracy.item()
        return values

    def average(self) -> None:
        """Take the averaged model on the first member, for `diagnose`; all must call it."""
        averaged = self._mean()
        self._averaged = averaged if self._is_first else None

    def diagnose(self, step: int) -> dict[str, float]:
        """The figures of the averaged model that `average` has left here."""
        assert self._averaged is not None, "average comes first"
        assert self._diagnostics is not None, "asked for"
        averaged, self._averaged = self._averaged, None
        return self._diagnostics.of(step, *averaged)

    def average_model(self) -> dict[str, Tensor] | None:
        """The averaged model's state_dict from the first member; all must call it."""
        x, buffers = self._mean()
        if not self._is_first:
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
        if self._comm is not None:
            self._comm.let_go()
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def _leaving_if_lost(self) -> Iterator[None]:
        """Close the connections at once if an exchange fails: it tells the others."""
        try:
            yield
        except PeerError as error:
            # The variables of the call that failed hold its process group, and so its connections.
            traceback.clear_frames(error.__traceback__)
            self.leave()
            raise

    def _mean(self) -> tuple[Tensor, Tensor]:
        replica = self._joined
        with self._leaving_if_lost():
            x, buffers = (
                replica.comm.mean(tensor, replica.step, counted=False) if tensor.numel() else tensor
                for tensor in (replica.x, replica.buffers)
            )
        if self._is_first:  # the others need no averaged model
            buffers = averaged_buffers(self._model, self._experiment, x, buffers)
        return x, buffers

    @property
    def _is_first(self) -> bool:
        return dist.get_rank() == 0

    @property
    def _joined(self) -> Replica | PeerReplica:
        assert self._replica is not None, "connect comes first"
        return self._replica

    @property
    def _file(self) -> str:
        """Of a checkpoint."""
        return f"worker-{self._number}.pt"

    @property
    def _timeout(self) -> timedelta:
        return timedelta(seconds=self._experiment.config.ray.timeout_s)


def open_store(address: str, timeout: timedelta) -> tuple[dist.TCPStore, int]:
    """A store at which processes meet, on this node's `address` alone, and its port."""
    # Left to itself the store listens on every interface. The socket becomes its own to close.
    listening = listen(address)
    port = listening.getsockname()[1]
    store = dist.TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timeout,
        master_listen_fd=listening.detach(),
    )
    return store, port


def listen(address: str) -> socket.socket:
    """A socket that listens on this node's `address`, at a free port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, 0), family=family)


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
