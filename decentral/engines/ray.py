"""The Ray engine: one actor a worker, on a local cluster of its own or one that it joins.

Ray starts the workers and carries the coordinator's calls; tensors go from worker to worker
through torch.distributed. The only module that imports ray.
"""

import logging
import math
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from torch import Tensor

from decentral import placement
from decentral.config import Config, RayConfig
from decentral.engines.worker import Surroundings, Worker
from decentral.errors import StepError, UserError, WorkerError
from decentral.experiment import Experiment
from decentral.peer import PeerError
from decentral.replica import Report, Segment
from decentral.storage import Storage, StorageError, Written, all_written
from decentral.topology import Topology

log = logging.getLogger(__name__)
T = TypeVar("T")

GRACE_S = 5.0  # after a first failure, to hear from the other workers which one was the cause


class RayEngine:
    """An Engine. `say` is told, line by line, what is being started.

    `actors`, from `start_actors`, serve several runs, one after the other: they are left alive.
    """

    def __init__(
        self,
        experiment: Experiment,
        say: Callable[[str], None] = log.info,
        actors: Sequence[Any] = (),
    ):
        self._experiment = experiment
        self._actors = list(actors)
        self._owns_actors = not actors
        self._nodes: list[tuple[str, int]] = []  # address and process id, by rank
        config = experiment.config
        self._owns_cluster = _connect(config.ray, config.workers)
        try:
            if self._owns_actors:
                _check_resources(config.ray, config.workers)
                self._actors = start_actors(config.ray, config.workers)
            self._build(say)
        except BaseException:
            self.close()
            raise

    def step_seconds(self) -> np.ndarray:
        return np.array(self._all("step_seconds"))

    def run(self, segment: Segment) -> Report:
        reports: list[Report] = self._all("run", segment, segment=segment)
        return Report(
            loss=np.concatenate([r.loss for r in reports]),
            deviation=_joined([r.deviation for r in reports]),
            moved=_joined([r.moved for r in reports]),
            gradient_square=_joined([r.gradient_square for r in reports]),
            variance=_joined([r.variance for r in reports]),
            bytes_sent=sum(r.bytes_sent for r in reports),
            events=reports[0].events,
            lr=reports[0].lr,
            next_lr=reports[0].next_lr,
        )

    def evaluate(self) -> dict[str, float]:
        values: list[dict[str, float]] = self._all("evaluate")
        result = values[0]
        if "eval_accuracy_workers" in result:
            result["eval_accuracy_workers"] = float(
                np.mean([v["eval_accuracy_workers"] for v in values])
            )
        return result

    def average_model(self) -> dict[str, Tensor]:
        return self._all("average_model")[0]

    def reach(self, storage: Storage) -> None:
        with storage.probe() as name:
            told = self.ask(_unreached, storage.address, name)
        for rank, reason in enumerate(told):
            if reason is not None:
                raise UserError(
                    f"worker {rank} on node {self.addresses[rank]} does not see what is written to"
                    f" {storage.url} ({reason}); put it on storage that all nodes share, or set"
                    " checkpoint.path=s3://bucket/run or another URL",
                    "checkpoint.path",
                )

    def save(self, storage: Storage, folder: str) -> None:
        self._all("save", storage, folder)

    def saved(self, wait: bool) -> list[Written] | None:
        return all_written(self._all("saved", wait))

    def load(self, storage: Storage, folder: str, files: Mapping[str, Written]) -> None:
        for error in self._all("load", storage, folder, files):
            if error is not None:
                raise error

    def ask(self, function: Callable[..., T], *arguments: Any) -> list[T]:
        """`function(worker, *arguments)` of each worker, by rank; all run it at the same time."""
        return self._all("ask", function, *arguments)

    @property
    def addresses(self) -> list[str]:
        """The node of each worker, by rank."""
        return [address for address, _ in self._nodes]

    def close(self) -> None:
        if self._owns_actors:
            for actor in self._actors:
                ray.kill(actor)
        self._actors = []
        if self._owns_cluster:
            self._owns_cluster = False
            ray.shutdown()

    def _build(self, say: Callable[[str], None]) -> None:
        config = self._experiment.config
        self._place(self._all("node"))
        # The clock is the driver's, and the cluster's file may lie on its node alone.
        theirs = config.model_copy(
            update={"network": config.network.model_copy(update={"file": None})}
        )
        shared = ray.put((theirs, self._experiment.topology, Surroundings.here()))
        self._each([actor.take.remote(rank, shared) for rank, actor in enumerate(self._actors)])
        addresses = self.addresses
        count = len(set(addresses))
        nodes = "1 node" if count == 1 else f"{count} nodes"
        line = f"{config.workers} workers on {nodes} of the Ray cluster"
        topology = self._experiment.topology
        if count > 1 and topology is not None and self._experiment.algorithm.needs_topology:
            line += f"; {placement.crossing(topology, addresses)}"
        say(line)
        port = self._get(self._actors[0].listen.remote(addresses[0]))
        self._each(
            [
                actor.connect.remote(addresses[0], port, address)
                for actor, address in zip(self._actors, addresses, strict=True)
            ]
        )

    def _place(self, nodes: list[tuple[str, int]]) -> None:
        """Give the ranks to the actors, which are on `nodes`: as the graph file says, or else so
        that neighbours share one."""
        config, topology = self._experiment.config, self._experiment.topology
        addresses = [address for address, _ in nodes]
        ranks = list(range(config.workers))
        if config.ray.placement == "neighbours" and len(set(addresses)) > 1:
            stated = placement.stated(topology, addresses)
            if stated is not None:
                ranks = placement.ranks(stated, addresses)
            else:
                algorithm = self._experiment.algorithm
                traffic = placement.traffic(config.workers, algorithm, topology)
                ranks = placement.order(traffic, addresses)
        self._actors = [self._actors[actor] for actor in ranks]
        self._nodes = [nodes[actor] for actor in ranks]

    def _all(self, method: str, *arguments: Any, segment: Segment | None = None) -> list[Any]:
        """Call a method of all workers and wait for all."""
        calls = [getattr(actor, method).remote(*arguments) for actor in self._actors]
        return self._each(calls, segment)

    def _get(self, call: Any) -> Any:
        return self._each([call])[0]

    def _each(self, calls: list[Any], segment: Segment | None = None) -> list[Any]:
        try:
            return ray.get(calls)
        except (RayActorError, RayTaskError):
            raise self._failure(calls, segment) from None

    def _failure(self, calls: list[Any], segment: Segment | None) -> WorkerError:
        """Which worker was the cause: a dead one, else one with an error of its own, else one
        that lost a neighbour. The others' errors only follow from it."""
        dead: dict[int, str] = {}
        errors: dict[int, Exception] = {}
        ray.wait(calls, num_returns=len(calls), timeout=GRACE_S)
        for rank, call in enumerate(calls):
            try:
                ray.get(call, timeout=0)
            except GetTimeoutError:
                continue
            except RayActorError as error:
                dead[rank] = " ".join(str(error).split())[:400]
            except RayTaskError as error:
                errors[rank] = error.cause if isinstance(error.cause, Exception) else error
        own = {r: e for r, e in errors.items() if not isinstance(e, PeerError)}
        lost = [e for e in errors.values() if isinstance(e, PeerError)]
        if dead:
            told = "; ".join(self._died(rank, lost, segment) for rank in sorted(dead))
            return WorkerError(told if self._nodes else f"{told}. Ray says: {min(dead.items())[1]}")
        if own:
            rank, error = min(own.items())
            if isinstance(error, StepError):
                return WorkerError(f"worker {rank} failed at step {error.step}: {error.reason}")
            return WorkerError(f"worker {rank} failed: {type(error).__name__}: {error}")
        first = min(lost, key=lambda e: e.step)
        whom = f"worker {first.peer}" if first.peer is not None else "the other workers"
        return WorkerError(
            f"worker {first.rank} lost the connection to {whom} at step {first.step}:"
            f" {first.reason}"
        )

    def _died(self, rank: int, lost: list[PeerError], segment: Segment | None) -> str:
        if not self._nodes:
            return f"worker {rank} died before the first step"
        address, pid = self._nodes[rank]
        where = f"worker {rank} (process {pid} on node {address}) died"
        told = [e.step for e in lost if e.peer == rank] or [e.step for e in lost]
        if told:
            return f"{where} at step {min(told)}"
        if segment is not None:
            return f"{where} in steps {segment.start} to {segment.stop - 1}"
        return where


def _joined(values: list[np.ndarray | None]) -> np.ndarray | None:
    """One array over all workers, or None if they have none."""
    there = [value for value in values if value is not None]
    return np.concatenate(there) if there else None


def _unreached(worker: Worker, address: str, name: str) -> str | None:
    """Why a worker cannot read a probe of the driver's, or None if it can."""
    try:
        if Storage(address).read(name) == name.encode():
            return None
        return "another file is there"
    except (StorageError, UserError) as error:
        return str(error)


class _Actor(Worker):
    """A Worker that knows where Ray put it."""

    def take(self, rank: int, shared: tuple[Config, Topology | None, Surroundings]) -> None:
        config, topology, surroundings = shared
        self.build(config, topology, rank, surroundings)

    def node(self) -> tuple[str, int]:
        """Address of the Ray node, and process id."""
        return ray.util.get_node_ip_address(), os.getpid()

    def ask(self, function: Callable[..., T], *arguments: Any) -> T:
        """What the function returns of this worker."""
        return function(self, *arguments)


def start_actors(config: RayConfig, workers: int) -> list[Any]:
    """As many actors, not yet built for any run, on the cluster that this process is in."""
    make = ray.remote(_Actor).options(
        num_cpus=config.cpus_per_worker, num_gpus=config.gpus_per_worker, max_restarts=0
    )
    return [make.remote() for _ in range(workers)]


def _connect(config: RayConfig, workers: int) -> bool:
    """Join a cluster, or start a local one: returns whether it is ours to shut down."""
    if ray.is_initialized():
        return False
    if config.address is not None:
        try:
            _reach(config.address)
            ray.init(address=config.address, logging_level=logging.ERROR)
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot join a Ray cluster at {config.address!r} ({error}); start one with"
                " `ray start --head`, or take ray.address away for a local one. If it is there and"
                " wants a token, set RAY_AUTH_MODE=token in the environment, or say auto",
                "ray.address",
            ) from None
        return True
    # More logical CPUs than there are: a laptop may hold more workers than it has cores.
    cpus = max(os.cpu_count() or 1, math.ceil(workers * config.cpus_per_worker))
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        logging_level=logging.ERROR,
        object_store_memory=128 * 2**20,
    )
    return True


def _reach(address: str) -> None:
    """Raise OSError or ValueError if nobody listens there: ray.init would try for minutes."""
    if address != "auto" and "://" not in address:
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=10).close()


def _check_resources(config: RayConfig, workers: int) -> None:
    """Raise UserError if the cluster cannot hold the workers; else Ray would wait for ever."""
    total = ray.cluster_resources()
    for resource, each in (("CPU", config.cpus_per_worker), ("GPU", config.gpus_per_worker)):
        there = total.get(resource, 0.0)
        if workers * each > there:
            raise UserError(
                f"{workers} workers x {each:g} {resource} asked, the cluster has {there:g};"
                f" lower workers or ray.{resource.lower()}s_per_worker, or add nodes",
                f"ray.{resource.lower()}s_per_worker",
            )
