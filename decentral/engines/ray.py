"""The Ray engine: one actor a worker, on a local cluster of its own or one that it joins.

Ray starts the workers and carries the coordinator's calls; tensors go from worker to worker
through torch.distributed. Ray is imported here, in actor.py, and for its metrics in
loggers/ray.py, alone.
"""

import logging
import math
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import reduce
from typing import Any, NamedTuple, TypeVar

import numpy as np
import psutil
import ray
from ray._private import ray_constants
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.runtime_env import RuntimeEnv
from torch import Tensor

from decentral import placement
from decentral.actor import Actor
from decentral.config import Config, RayConfig
from decentral.engines import Interrupted
from decentral.engines.worker import Group, Outcome, Surroundings, Worker
from decentral.errors import StepError, UserError, WorkerError
from decentral.experiment import Experiment
from decentral.nursery import nursery
from decentral.peer import PeerError
from decentral.replica import Averaging, Report, Segment, followed
from decentral.storage import Storage, StorageError, Written, all_written

log = logging.getLogger(__name__)
T = TypeVar("T")

OVERDUE_S = 30.0  # that a worker has at least to answer after another one has
STARTS = 3  # attempts to start Ray
CHECK_S = 2.0  # how often to look whether the cluster has room for more workers


class _Came(NamedTuple):
    """What came of a segment: of each worker its outcome, and, of one that is cut short, those of
    the segments after it that the worker has been in. `lost`: who is gone; known with the last.
    The call that asked for the segment was made at `began`."""

    segment: Segment
    outcomes: dict[int, list[Outcome | StepError]]
    lost: dict[int, str]
    began: float


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
        self._actors: dict[int, Any] = {}  # by worker
        self._starting: dict[int, tuple[Any, Any]] = {}  # actors to come, and their `take`
        self._looked = -math.inf  # when there was room to be looked for
        self._owns_actors = not actors
        self._blank: set[int] = set()  # workers without a state yet
        self._nodes: dict[int, tuple[str, int]] = {}  # address and process id
        self._on_cpu: set[int] = set()  # workers without a GPU, where the others have some
        self._bytes: dict[int, int] = {}  # that each worker has sent; -1: those that are gone
        self._saving: tuple[int, ...] = ()  # the workers of the last checkpoint
        self._came: deque[_Came] = deque()  # of segments that are yet to be asked for
        self._settled = False  # whether a segment has come back whole since workers came
        self._slow = 0  # attempts in a row to connect them that took too long
        config = experiment.config
        self.ahead_s = config.ray.ahead_s
        self._cluster = connect(config.ray, config.workers)
        try:
            if self._owns_actors:
                fitting = _fitting(config)
                actors = start_actors(config.ray, fitting)
            self._build(list(actors), say)
        except Interrupted as interruption:
            self.close()
            raise WorkerError(f"{interruption} before the first step") from None
        except BaseException:
            self.close()
            raise

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(sorted(self._actors))

    def step_seconds(self) -> np.ndarray:
        seconds = self._all("step_seconds")
        mean = float(np.mean(list(seconds.values())))  # for workers that are yet to come
        return np.array([seconds.get(i, mean) for i in range(self._experiment.config.workers)])

    def run(self, segment: Segment, ahead: Sequence[Segment] = ()) -> Report:
        if not self._came:
            self._came.extend(self._run_all([segment, *ahead]))
        of, came, lost, began = self._came.popleft()
        assert segment == of, "what was said ahead is what is asked for"
        outcomes = {w: [o for o in each if isinstance(o, Outcome)] for w, each in came.items()}
        failures = [o.failure for each in outcomes.values() for o in each if o.failure is not None]
        errors = {w: each[-1] for w, each in came.items() if isinstance(each[-1], StepError)}
        self._check(errors, lost, failures, segment)
        reports = {w: reduce(followed, [o.report for o in each]) for w, each in outcomes.items()}
        if not lost and not failures:
            self._settled = True
            ended = began + max(each[0].after_s for each in outcomes.values())
            return replace(self._joined(reports), ended=ended)
        what = self._told(lost, failures, segment)
        if failures:
            sound = [reports[w] for w, each in outcomes.items() if each[-1].failure is None]
            reports = self._caught_up(reports, segment, lost)
            if reports:
                report = replace(
                    self._joined(reports),
                    deviation=_concatenated([r.deviation for r in sound]),
                    drift=_concatenated([r.drift for r in sound]),
                    moved=None,
                    gradient_square=None,
                    variance=None,
                )
                raise Interrupted(lost, what, report)
        joined = self._joined(reports) if reports else None
        raise Interrupted(lost, what, joined, whole=not failures)

    def _run_all(self, segments: Sequence[Segment]) -> Iterator[_Came]:
        """What comes of segments, up to the first that is cut short."""
        began = time.perf_counter()
        calls = {worker: actor.run_all.remote(segments) for worker, actor in self._actors.items()}
        ran, lost, _ = self._settle(calls)
        sound = min((sum(map(_sound, each)) for each in ran.values()), default=0)
        last = min(sound, len(segments) - 1)
        for number, segment in enumerate(segments[:last]):
            yield _Came(segment, {w: [each[number]] for w, each in ran.items()}, {}, began)
        yield _Came(segments[last], {w: each[last:] for w, each in ran.items()}, lost, began)

    def _caught_up(
        self, reports: dict[int, Report], segment: Segment, lost: dict[int, str]
    ) -> dict[int, Report]:
        """The reports of those that are left, once who was cut off earlier than others has gone
        on, alone, to where they are."""
        stop = max((report.stop for report in reports.values()), default=segment.start)
        alone = replace(
            segment,
            stop=stop,
            between=Averaging.NOBODY,
            global_average=False,
            record=False,
            watch=False,
            measure=False,
            drift=False,
        )
        behind = {
            worker: self._actors[worker].run.remote(replace(alone, start=report.stop))
            for worker, report in reports.items()
            if report.stop < stop
        }
        outcomes, more, _ = self._settle(behind, alone)
        lost |= more
        for worker, outcome in outcomes.items():
            reports[worker] = followed(reports[worker], outcome.report)
        return {worker: report for worker, report in reports.items() if worker not in lost}

    def regroup(self, members: Sequence[int], new: Sequence[int] = ()) -> None:
        for worker in list(self._actors):
            # One that came in a regrouping which was cut short is as new as before.
            if worker not in members or (worker in new and worker not in self._blank):
                self._drop(worker)
        self._settled = False
        coming = [worker for worker in new if worker not in self._actors]
        self.prepare(coming)
        for worker in coming:
            actor, taken = self._starting[worker]
            done, _ = ray.wait([taken], timeout=self._experiment.config.ray.timeout_s)
            if not done:
                raise WorkerError(f"the cluster has no room for worker {worker}; add nodes")
            del self._starting[worker]
            self._actors[worker] = actor
            self._blank.add(worker)
            self._get(worker, taken)
            self._nodes[worker] = self._get(worker, actor.node.remote())
        # Who has died since the last call must not keep the others waiting for it to connect.
        self._all("node")
        old = next(worker for worker in members if worker not in new)
        blank = self._actors[old].blank.remote() if new else None
        group = Group(tuple(members), None, again=True, new=tuple(new), slow=self._slow)
        try:
            self._connect_all(group, blank)
        except Interrupted as interruption:
            self._slow = 0 if interruption.lost else self._slow + 1
            raise
        self._slow = 0
        self._blank.clear()

    def adopt(self, members: Sequence[int]) -> None:
        spare = {w: a for w, a in self._actors.items() if w not in members}
        shared, takes = self._shared(), {}
        for worker in members:
            if worker not in self._actors:
                other, actor = spare.popitem()
                self._actors[worker] = actor
                self._on_cpu.discard(worker)
                if other in self._on_cpu:
                    self._on_cpu ^= {other, worker}
                self._nodes[worker] = self._nodes.pop(other)
                takes[worker] = actor.take.remote(worker, shared)
        for worker, actor in spare.items():  # for later
            self._starting[worker] = actor, actor.take.remote(worker, shared)
            del self._nodes[worker]
        self._actors = {worker: self._actors[worker] for worker in members}
        self._each(takes)
        self._connect_all(Group(tuple(members), None))

    def prepare(self, workers: Sequence[int]) -> None:
        shared = None
        for worker in workers:
            if worker not in self._starting:
                actor = _start_actor(self._experiment.config.ray, worker in self._on_cpu)
                shared = shared or self._shared()
                self._starting[worker] = actor, actor.take.remote(worker, shared)

    def ready(self) -> list[int]:
        calls = {taken: worker for worker, (_, taken) in self._starting.items()}
        if not calls:
            return []
        done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        there = []
        for call in done:
            try:
                ray.get(call)
                there.append(calls[call])
            except (RayActorError, RayTaskError) as error:
                log.warning("worker %d did not start: %s", calls[call], error)
                ray.kill(self._starting.pop(calls[call])[0])
        return sorted(there)

    def room(self) -> int:
        now = time.monotonic()
        if now - self._looked < CHECK_S:
            return 0
        self._looked = now
        return _holds(self._experiment.config.ray, ray.available_resources())

    def evaluate(self) -> dict[str, float]:
        values: dict[int, dict[str, float]] = self._all("evaluate")
        result = values[self.members[0]]
        if "eval_accuracy_workers" in result:
            result["eval_accuracy_workers"] = float(
                np.mean([v["eval_accuracy_workers"] for v in values.values()])
            )
        return result

    def diagnose(self, step: int) -> dict[str, float]:
        self._all("average")
        # Without the others, whose answers would set a deadline: it computes as long as it takes.
        first = self.members[0]
        return self._get(first, self._actors[first].diagnose.remote(step))

    def average_model(self) -> dict[str, Tensor]:
        return self._all("average_model")[self.members[0]]

    def reach(self, storage: Storage) -> None:
        with storage.probe() as name:
            told = self.ask(_unreached, storage.address, name)
        for worker, address, reason in zip(self.members, self.addresses, told, strict=True):
            if reason is not None:
                raise UserError(
                    f"worker {worker} on node {address} does not see what is written to"
                    f" {storage.url} ({reason}); put it on storage that all nodes share, or set"
                    " checkpoint.path=s3://bucket/run or another URL",
                    "checkpoint.path",
                )

    def save(self, storage: Storage, folder: str) -> None:
        self._all("save", storage, folder)
        self._saving = self.members

    def saved(self, wait: bool) -> list[Written] | None:
        gone = sorted(set(self._saving) - set(self.members))
        if gone:
            raise StorageError(f"worker {gone[0]} is gone, and its part with it")
        return all_written(list(self._all("saved", wait).values()))

    def load(self, storage: Storage, folder: str, files: Mapping[str, Written]) -> None:
        for error in self._all("load", storage, folder, files).values():
            if error is not None:
                raise error

    def ask(self, function: Callable[..., T], *arguments: Any) -> list[T]:
        """`function(worker, *arguments)` of each worker, in their order, all at the same time."""
        answers = self._all("ask", function, *arguments)
        return [answers[worker] for worker in self.members]

    @property
    def addresses(self) -> list[str]:
        """The node of each worker, in their order."""
        return [self._nodes[worker][0] for worker in self.members]

    def close(self) -> None:
        starting = [actor for actor, _ in self._starting.values()]
        if self._owns_actors:
            for actor in [*self._actors.values(), *starting]:
                ray.kill(actor)
        self._actors, self._starting = {}, {}
        self._cluster.close()

    def _build(self, actors: list[Any], say: Callable[[str], None]) -> None:
        experiment = self._experiment
        self._actors = dict(enumerate(actors))
        self._place(self._all("node"))
        shared = self._shared()
        self._each({w: a.take.remote(w, shared) for w, a in self._actors.items()})
        addresses = self.addresses
        count = len(set(addresses))
        nodes = "1 node" if count == 1 else f"{count} nodes"
        line = f"{len(self._actors)} workers on {nodes} of the Ray cluster"
        topology = experiment.topology_of(self.members)
        if count > 1 and topology is not None and experiment.algorithm.needs_topology:
            line += f"; {placement.crossing(topology, addresses)}"
        say(line)
        config = experiment.config.ray
        if config.gpus_per_worker and config.backend == "gloo":
            why = "some have none" if config.cpu_workers else "some share one"
            say(
                f"not each worker has a GPU of its own ({why}): they exchange through gloo and"
                " pinned host memory, not NCCL"
            )
        self._connect_all(Group(self.members, None))

    def _shared(self) -> Any:
        """What every worker is built from, in Ray's object store."""
        config = self._experiment.config
        # The clock is the driver's, and the cluster's file may lie on its node alone.
        network = config.network.model_copy(update={"file": None})
        theirs = config.model_copy(update={"network": network})
        return ray.put((theirs, self._experiment.topology, Surroundings.here()))

    def _connect_all(self, group: Group, blank: Any = None) -> None:
        """Open the process groups of the workers, and let those that are new take the mean."""
        group = group._replace(topology=self._experiment.topology_of(group.members))
        first = group.members[0]
        address = self._nodes[first][0]
        port = self._get(first, self._actors[first].listen.remote(address))
        shared = ray.put(group)
        self._each(
            {
                worker: self._actors[worker].connect.remote(
                    address,
                    port,
                    self._nodes[worker][0],
                    shared,
                    blank if worker in group.new else None,
                )
                for worker in group.members
            }
        )

    def _place(self, nodes: dict[int, tuple[str, int]]) -> None:
        """Give the workers' numbers to the actors, which are on `nodes`: as the graph file says,
        or else so that neighbours share one."""
        config = self._experiment.config
        topology = self._experiment.topology_of(self.members)
        addresses = [nodes[actor][0] for actor in range(len(nodes))]
        ranks = list(range(len(nodes)))
        if config.ray.placement == "neighbours" and len(set(addresses)) > 1:
            stated = placement.stated(topology, addresses)
            if stated is not None:
                ranks = placement.ranks(stated, addresses)
            else:
                algorithm = self._experiment.algorithm
                traffic = placement.traffic(len(nodes), algorithm, topology)
                ranks = placement.order(traffic, addresses)
        self._actors = {worker: self._actors[actor] for worker, actor in enumerate(ranks)}
        self._nodes = {worker: nodes[actor] for worker, actor in enumerate(ranks)}
        with_gpu = len(nodes) - config.ray.cpu_workers  # `start_actors` has them first
        self._on_cpu = {worker for worker, actor in enumerate(ranks) if actor >= with_gpu}

    def _drop(self, worker: int) -> None:
        """Let go of a worker, alive or not."""
        ray.kill(self._actors.pop(worker))
        self._nodes.pop(worker, None)
        self._blank.discard(worker)
        self._bytes[-1] = self._bytes.get(-1, 0) + self._bytes.pop(worker, 0)

    def _all(self, method: str, *arguments: Any) -> dict[int, Any]:
        """Call a method of all workers and wait for all: what each returned."""
        calls = {w: getattr(a, method).remote(*arguments) for w, a in self._actors.items()}
        return self._each(calls)

    def _get(self, worker: int, call: Any) -> Any:
        return self._each({worker: call})[worker]

    def _each(self, calls: dict[int, Any]) -> dict[int, Any]:
        results, lost, failures = self._settle(calls)
        if lost or failures:
            raise Interrupted(lost, self._told(lost, failures, None))
        return results

    def _settle(
        self, calls: dict[int, Any], segment: Segment | None = None
    ) -> tuple[dict[int, Any], dict[int, str], list[PeerError]]:
        """Wait for calls to workers: what they returned, which are gone and where, and which
        exchanges failed.

        Raises WorkerError where one fails by an error of its own.
        """
        config = self._experiment.config.ray
        started = time.monotonic()
        pending = list(calls.values())
        if pending:
            ray.wait(pending, num_returns=1)
            taken_s = time.monotonic() - started
            floor_s = OVERDUE_S if self._settled else config.timeout_s
            ray.wait(
                pending,
                num_returns=len(pending),
                timeout=max(floor_s, config.patience * taken_s),
            )
        results: dict[int, Any] = {}
        lost: dict[int, str] = {}
        failures: list[PeerError] = []
        errors: dict[int, Exception] = {}
        for worker, call in calls.items():
            try:
                results[worker] = ray.get(call, timeout=0)
            except GetTimeoutError:
                waited_s = time.monotonic() - started
                lost[worker] = f"has not answered for {waited_s:.0f} s"
            except RayActorError as error:
                lost[worker] = "died"
                if worker not in self._nodes:
                    lost[worker] += f": {' '.join(str(error).split())[:400]}"
            except RayTaskError as error:
                cause = error.cause if isinstance(error.cause, Exception) else error
                if isinstance(cause, PeerError):
                    failures.append(cause)
                else:
                    errors[worker] = cause
        for worker, what in lost.items():
            lost[worker] = f"{self._name(worker)} {what}"
        self._check(errors, lost, failures, segment)
        return results, lost, failures

    def _check(
        self,
        errors: Mapping[int, Exception],
        lost: dict[int, str],
        failures: list[PeerError],
        segment: Segment | None,
    ) -> None:
        """Raise WorkerError where a worker failed by an error of its own."""
        if errors and lost:
            raise WorkerError(self._told(lost, failures, segment))
        if errors:
            worker, error = min(errors.items())
            if isinstance(error, StepError):
                raise WorkerError(f"worker {worker} failed at step {error.step}: {error.reason}")
            raise WorkerError(f"worker {worker} failed: {type(error).__name__}: {error}")

    def _name(self, worker: int) -> str:
        """A worker, and where it is or was."""
        if worker not in self._nodes:
            return f"worker {worker}"
        address, pid = self._nodes[worker]
        return f"worker {worker} (process {pid} on node {address})"

    def _told(
        self, lost: dict[int, str], failures: list[PeerError], segment: Segment | None
    ) -> str:
        """What happened, in a line; `lost` is told the step. Ranks become workers' numbers."""
        members = self.members
        for worker in lost:
            steps = [f.step for f in failures if f.peer is not None and members[f.peer] == worker]
            steps = steps or [f.step for f in failures]
            if segment is not None and steps:
                lost[worker] += f" at step {min(steps)}"
            elif segment is not None and segment.stop > segment.start:
                lost[worker] += f" in steps {segment.start} to {segment.stop - 1}"
        if lost:
            return "; ".join(lost[worker] for worker in sorted(lost))
        first = min(failures, key=lambda f: f.step)
        whom = "the others" if first.peer is None else self._name(members[first.peer])
        return (
            f"{self._name(members[first.rank])} lost the connection to {whom} at step {first.step}:"
            f" {first.reason}"
        )

    def _joined(self, of: dict[int, Report]) -> Report:
        """One report over all workers that have one, in their order."""
        self._bytes |= {worker: report.bytes_sent for worker, report in of.items()}
        reports = [of[worker] for worker in sorted(of)]
        return Report(
            stop=reports[0].stop,
            loss=np.concatenate([r.loss for r in reports]),
            deviation=_concatenated([r.deviation for r in reports]),
            moved=_concatenated([r.moved for r in reports]),
            gradient_square=_concatenated([r.gradient_square for r in reports]),
            variance=_concatenated([r.variance for r in reports]),
            drift=_concatenated([r.drift for r in reports]),
            compute_s=_concatenated([r.compute_s for r in reports]),
            wait_s=_concatenated([r.wait_s for r in reports]),
            bytes_sent=sum(self._bytes.values()),
            events=reports[0].events,
            lr=reports[0].lr,
            next_lr=reports[0].next_lr,
        )


def _sound(outcome: Outcome | StepError) -> bool:
    return isinstance(outcome, Outcome) and outcome.failure is None


def _concatenated(values: list[np.ndarray | None]) -> np.ndarray | None:
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


def _fitting(config: Config) -> int:
    """How many workers to start with: all, or, of an elastic run, those that there is room for.

    Raises UserError if the cluster cannot hold them; else Ray would wait for ever.
    """
    if config.min_workers is None:
        _check_resources(config.ray, config.workers)
        return config.workers
    _check_resources(config.ray, config.min_workers)
    return min(config.workers, _holds(config.ray, ray.cluster_resources()))


def _holds(config: RayConfig, resources: Mapping[str, float]) -> int:
    """How many workers these resources are enough for."""
    each = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    return min(int(resources.get(name, 0.0) / need) for name, need in each.items() if need > 0)


def start_actors(config: RayConfig, workers: int) -> list[Any]:
    """As many actors, not yet built for any run, on the cluster that this process is in.

    The last `config.cpu_workers` are those without a GPU.
    """
    with_gpu = workers - config.cpu_workers
    return [_start_actor(config, on_cpu=actor >= with_gpu) for actor in range(workers)]


def _start_actor(config: RayConfig, on_cpu: bool) -> Any:
    gpus = 0 if on_cpu else config.gpus_per_worker
    make = ray.remote(Actor)
    return make.options(num_cpus=config.cpus_per_worker, num_gpus=gpus, max_restarts=0).remote()


def connect(config: RayConfig, workers: int, logs: bool = True) -> ExitStack:
    """Join a cluster, or start a local one: returns what leaves it, or shuts it down, on close.

    A cluster that this process is in already is left as it is. logs: whether Ray prints, to
    standard output, what its processes say.
    """
    with ExitStack() as cluster:
        if ray.is_initialized():
            pass
        elif config.address is not None:
            try:
                _reach(config.address)
                ray.init(address=config.address, logging_level=logging.ERROR, log_to_driver=logs)
            except (OSError, ValueError, RayError) as error:
                raise UserError(
                    f"cannot join a Ray cluster at {config.address!r} ({error}); start one with"
                    " `ray start --head`, or take ray.address away for a local one. If it is there"
                    " and wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the"
                    " cluster's in the environment, or say auto",
                    "ray.address",
                ) from None
            cluster.callback(ray.shutdown)
        else:
            cluster.enter_context(_token())
            # More logical CPUs than there are: a laptop may hold more workers than it has cores.
            cpus = max(os.cpu_count() or 1, math.ceil(workers * config.cpus_per_worker))
            # An older Ray, such as 2.40, runs nothing but Python.
            forks = "py_executable" in RuntimeEnv.known_fields
            executable = cluster.enter_context(nursery()) if forks else None
            start_cluster(cpus, logs, executable)
            cluster.callback(ray.shutdown)
        return cluster.pop_all()


def start_cluster(cpus: int, logs: bool = True, executable: str | None = None) -> None:
    """Start a cluster on this machine's loopback interface alone, and join it.

    executable: what runs its workers in place of Python (`nursery`).

    Raises WorkerError if it does not come up. Ray waits 30 s for its processes, which is not long
    on a machine that is busy, so there are several attempts; what one has started ends with it.
    """
    for attempt in range(1, STARTS + 1):
        before = set(psutil.Process().children())
        try:
            with _on_loopback(), _none_beforehand() if executable else nullcontext():
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                    log_to_driver=logs,
                    object_store_memory=128 * 2**20,
                    runtime_env={"py_executable": executable} if executable else None,
                )
            return
        except Exception as error:  # Ray raises that very class, among others
            ray.shutdown()
            _end_ray(set(psutil.Process().children()) - before)
            if attempt == STARTS:
                raise WorkerError(
                    f"Ray has not started in {STARTS} attempts: {error} If the machine is busy, try"
                    " again later"
                ) from None
            log.warning("Ray has not started; trying again: %s", error)


def _end_ray(processes: Collection[psutil.Process]) -> None:
    """End those among them that run something of Ray's."""
    package = os.path.dirname(ray.__file__)
    for process in processes:
        with suppress(psutil.Error):
            if any(word.startswith(package) for word in process.cmdline()):
                process.kill()


@contextmanager
def _token() -> Iterator[None]:
    """Token authentication for the cluster that is started inside.

    The token is a fresh one in the environment of this process, which Ray's processes inherit, and
    nowhere else: Ray by itself would write one to the home directory. A mode or a token that the
    user has set in the environment is kept.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() not in ("token", ""):
        yield
        return
    values = {"RAY_AUTH_MODE": "token"}
    if not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
        values["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    try:
        with _environment(values):
            _read_token_again()
            yield
    finally:
        _read_token_again()


def _read_token_again() -> None:
    """Ray reads the mode when it is imported, and the token at first use."""
    try:
        from ray._raylet import AuthenticationTokenLoader  # pyright: ignore
        from ray._raylet import Config as RaySettings  # pyright: ignore
    except ImportError:
        return  # a Ray without token authentication
    RaySettings.initialize("")  # first: while the mode says token, Ray aborts where there is none
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray's processes listen on 127.0.0.1 alone, as they do by default on macOS and Windows.

    ray.init turns a loopback `_node_ip_address` into the host's own, and then listens everywhere.
    """
    before = getattr(ray_constants, "ENABLE_RAY_CLUSTER", None)  # of Ray's own, and none of its API
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _none_beforehand() -> Iterator[None]:
    """Ray starts no workers before it is asked for any.

    Those would be outside the runtime environment that names the executable, and of no use.
    """
    name = "RAY_prestart_worker_first_driver"
    with _environment({name: os.environ.get(name, "0")}):
        yield


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables of this process's environment, while processes that inherit it are started."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _reach(address: str) -> None:
    """Raise OSError or ValueError if nobody listens there: ray.init would try for minutes."""
    if address != "auto" and "://" not in address:
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=10).close()


def _check_resources(config: RayConfig, workers: int) -> None:
    """Raise UserError if the cluster cannot hold so many workers."""
    total = ray.cluster_resources()
    for resource, each, takers in (
        ("CPU", config.cpus_per_worker, workers),
        ("GPU", config.gpus_per_worker, workers - config.cpu_workers),
    ):
        there = total.get(resource, 0.0)
        if takers * each > there:
            raise UserError(
                f"{takers} workers x {each:g} {resource} asked, the cluster has {there:g};"
                f" lower workers or ray.{resource.lower()}s_per_worker, or add nodes",
                f"ray.{resource.lower()}s_per_worker",
            )
