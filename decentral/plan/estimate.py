"""A candidate's step on the simulated clock, what it is spent on, and what the theory says.

No model is trained: the clock is told what the workers of each method do, step by step, with
messages of the size asked for. It is the clock of a run, so a run on that config takes as long.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from decentral import topology as topologies
from decentral.algorithms.parallel import Parallel
from decentral.algorithms.schedules import Every, Schedule
from decentral.asynchronous import AsynchronousRule
from decentral.clock import Clock
from decentral.comm import Event, all_reduce_bytes
from decentral.config import load
from decentral.coordinator import clock_of
from decentral.errors import UserError
from decentral.event_queue import EventQueue, Matchings, Remembered, rounds
from decentral.experiment import Experiment, build
from decentral.plan.candidates import METHODS, Candidate
from decentral.plan.cluster import Cluster
from decentral.signature import choose
from decentral.topology import Topology
from decentral.topology.theory import Transient

TERMS = ("compute", "neighbours", "all_reduce", "latency")  # the middle two: their bandwidth
AGA_MEAN_PERIOD = 11  # 9% of steps global: Chen et al. 2021 on ImageNet, with a first period of 4
SETTLED = 64  # steps after which the clock has settled to its pace, or n if that is fewer
MEETINGS, MEETINGS_STEPS = 1000, 16  # gradients, and steps at least, that random pairs average over
NEARLY = 0.1  # a step so much longer than the shortest is as good, if it saves steps


@dataclass(frozen=True)
class Estimate:
    """What a candidate costs.

    step_s     mean seconds of a step, once workers who wait for each other have found their pace
    step_bytes bytes that a worker sends in a step, on average
    terms      seconds of a step that each of TERMS takes by itself, were the others nothing: their
               sum is step_s, or differs where some of it is hidden or workers are unequal
    beta       of the topology; None where nobody gossips
    transient  order of the steps before linear speed-up; None where no theory is at hand
    """

    candidate: Candidate
    step_s: float
    step_bytes: float
    terms: dict[str, float]
    beta: float | None
    transient: Transient | None

    @property
    def dominated_by(self) -> str:
        """The term that takes longest."""
        return max(self.terms, key=lambda term: self.terms[term])


@dataclass(frozen=True)
class Work:
    """What there is to do, as far as it is known.

    data     "iid" or "non_iid": whose orders of the transient stage count
    steps    of training, for all methods
    epochs   to the target, by method; an epoch is `samples`, a step takes `batch` over all workers
    """

    data: str = "iid"
    steps: int | None = None
    epochs: Mapping[str, float] | None = None
    samples: int | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        choose(dict.fromkeys(Transient._fields), self.data, "--data", "kind of data")
        for method in self.epochs or {}:
            if method not in METHODS:
                allowed = ", ".join(METHODS)
                raise UserError(f"no plan has a method {method!r}; allowed: {allowed}", "--epochs")
        for option, value in (("--samples", self.samples), ("--batch", self.batch)):
            if self.epochs and value is None:
                raise UserError("epochs become steps by --samples and --batch; give both", option)

    def seconds(self, estimate: Estimate) -> float | None:
        """Until the work is done; None where nothing says how many steps that takes."""
        if self.epochs:
            epochs = self.epochs.get(estimate.candidate.method)
            assert self.samples is not None
            assert self.batch is not None
            if epochs is None:
                return None
            return epochs * self.samples / self.batch * estimate.step_s
        return None if self.steps is None else self.steps * estimate.step_s

    def stage(self, estimate: Estimate) -> float:
        """Order of the transient stage; infinite where none is known."""
        if estimate.transient is None:
            return math.inf
        return getattr(estimate.transient, self.data)

    def too_short(self, estimate: Estimate) -> bool:
        """Whether the steps may end before the transient stage does."""
        return self.steps is not None and self.stage(estimate) > self.steps


def rank(estimates: Sequence[Estimate], work: Work) -> list[Estimate]:
    """The best first.

    epochs known  by the time that they take; methods without come after, as with nothing known
    steps known   those whose transient stage fits into the steps come first; by the time they take
    nothing known those whose step is at most 10% longer than the shortest come first, the shortest
                  transient stage leading; then the others, by the time of a step

    In the last, methods that no theory is at hand for come last, whatever their step takes.
    """
    known = [e.step_s for e in estimates if e.transient is not None]
    fastest = min(known, default=0.0)

    def unknown(estimate: Estimate) -> tuple[float, ...]:
        if estimate.transient is None:
            return 2, estimate.step_s, math.inf
        if estimate.step_s <= (1 + NEARLY) * fastest:
            return 0, work.stage(estimate), estimate.step_s
        return 1, estimate.step_s, work.stage(estimate)

    def key(estimate: Estimate) -> tuple[float, ...]:
        seconds = work.seconds(estimate)
        if seconds is None:
            return 2, *unknown(estimate)
        return float(work.too_short(estimate)), seconds, work.stage(estimate)

    return sorted(estimates, key=key)


def estimate(candidate: Candidate, cluster: Cluster, size: int) -> Estimate:
    """What a candidate costs on a cluster, with a model of `size` bytes.

    gossip_aga is reckoned with a global average every AGA_MEAN_PERIOD steps: when its averages
    come depends on the loss. Raises UserError where the method cannot use the topology.
    """
    experiment = _experiment(candidate, cluster)
    n, topology = cluster.workers, experiment.topology
    schedule = experiment.algorithm.schedule
    period = candidate.period
    if candidate.method == "gossip_aga":
        period = AGA_MEAN_PERIOD
        schedule = Every(period)
    clock = clock_of(experiment, np.full(n, cluster.network["compute_ms"] * 1e-3))
    lap = math.lcm(period or 1, topology.period if topology else 1)
    steps = lap * math.ceil(min(n, SETTLED) / lap)
    rule = experiment.algorithm.rule
    if isinstance(rule, AsynchronousRule):
        assert topology is not None
        matchings = Remembered(topology.graphs[0], experiment.config.seed)
        steps = max(MEETINGS_STEPS, math.ceil(MEETINGS / n))
        pace = _asynchronous(matchings, rule.exchanges, clock, size)
        sent = _bytes_asynchronous(matchings, rule.exchanges, steps, size)
    else:
        pace = _synchronous(experiment, schedule, clock, size)
        sent = _bytes(experiment, schedule, lap, size)

    def step_s(**parts: bool) -> float:
        return (pace(2 * steps, **parts) - pace(steps, **parts)) / steps

    latency_s = step_s(latency=True)
    terms = dict.fromkeys(TERMS, 0.0) | {
        "compute": step_s(compute=True),
        "neighbours": step_s(latency=True, neighbours=True) - latency_s,
        "all_reduce": step_s(latency=True, everyone=True) - latency_s,
        "latency": latency_s,
    }
    everything = step_s(compute=True, latency=True, neighbours=True, everyone=True)
    beta, norm, graphs = _mixing(topology) if topology is not None else (None, None, 1)
    transient = _transient(candidate.method, n, period, norm, graphs)
    return Estimate(candidate, everything, sent, terms, beta, transient)


Pace = Callable[..., float]  # steps, and which parts count -> seconds from the start


def _synchronous(experiment: Experiment, schedule: Schedule, clock: Clock, size: int) -> Pace:
    def seconds(
        steps: int,
        compute: bool = False,
        latency: bool = False,
        neighbours: bool = False,
        everyone: bool = False,
    ) -> float:
        clock.now = np.zeros_like(clock.now)
        sizes = {"neighbours": neighbours * size, "everyone": everyone * size}
        for event in _events(experiment, schedule, steps):
            if event.kind == "compute":
                if compute:
                    clock.advance(event)
            elif latency:
                clock.advance(event._replace(size=sizes[event.kind]))
        return clock.time_s

    return seconds


def _events(experiment: Experiment, schedule: Schedule, steps: int) -> Iterator[Event]:
    """What all workers do: they compute, then average with everyone, their neighbours or nobody."""
    algorithm = experiment.algorithm
    always = isinstance(algorithm.rule, Parallel)
    for step in range(steps):
        yield Event("compute", step, 0)
        if always or schedule.next_average(step) == step:
            yield Event("everyone", step, 0)
        elif algorithm.needs_topology:
            yield Event("neighbours", step, 0)


def _asynchronous(matchings: Matchings, exchanges: float, clock: Clock, size: int) -> Pace:
    """Whoever is late delays nobody but whom it meets: the event queue knows."""

    def seconds(
        steps: int,
        compute: bool = False,
        latency: bool = False,
        neighbours: bool = False,
        everyone: bool = False,
    ) -> float:
        bytes_ = neighbours * size

        def compute_s(worker: int, step: int) -> float:
            return compute * clock.compute_s_of(worker, step)

        def link_s(i: int, j: int) -> float:
            return latency * max(clock.link_s(i, j, bytes_), clock.link_s(j, i, bytes_))

        queue = EventQueue(matchings, exchanges, compute_s, link_s)
        queue.run(0, steps)
        return queue.time_s

    return seconds


def _bytes(experiment: Experiment, schedule: Schedule, lap: int, size: int) -> float:
    """Sent by a worker in a step, on average: as `StackedComm` counts."""
    n, topology = experiment.config.workers, experiment.topology
    sent = 0
    for event in _events(experiment, schedule, lap):
        if event.kind == "everyone":
            sent += all_reduce_bytes(size, n)
        elif event.kind == "neighbours":
            assert topology is not None
            W = topology.matrix(event.step)
            sent += (W.nnz - np.count_nonzero(W.diagonal())) * size
    return sent / lap / n


def _bytes_asynchronous(matchings: Matchings, exchanges: float, steps: int, size: int) -> float:
    """Two messages for each pair that meets."""
    workers = np.arange(matchings.n)
    turns = rounds(matchings.n * steps, matchings.n, exchanges)
    paired = sum(np.count_nonzero(matchings.partners(turn) != workers) for turn in range(turns))
    return paired * size / steps / matchings.n


def _transient(
    method: str, n: int, period: int | None, norm: float | None, graphs: int
) -> Transient | None:
    if method == "parallel_sgd":
        return Transient(0.0, 0.0)
    row = "gossip_pga" if method == "gossip_aga" else method
    return topologies.transient_steps(norm or 0.0, n, period, graphs).get(row)


def _experiment(candidate: Candidate, cluster: Cluster) -> Experiment:
    """The candidate's method and topology, checked; the task is the least that there is."""
    task: dict[str, Any] = {"name": "quadratic", "dim": 1, "samples_per_worker": 1}
    config = {
        "workers": cluster.workers,
        "steps": 1,
        "task": task,
        "optimizer": {"name": "sgd", "lr": 0.1},
        "network": cluster.section,
        **candidate.config,
    }
    return build(load(config), _topology(candidate.topology, cluster.workers))


@cache
def _topology(topology: str | None, n: int) -> Topology | None:
    if topology is None:
        return None
    named = topology in topologies.GENERATORS
    return topologies.build(n, topology if named else None, None if named else topology)


@cache
def _mixing(topology: Topology) -> tuple[float, float, int]:
    """Its beta, and the better of its two rates, for the theory: see `describe`."""
    beta = topologies.beta(topology)
    at_random = topologies.beta_random(topology) if topology.period > 1 else None
    return beta, *topologies.better_rate(topology, beta, at_random)
