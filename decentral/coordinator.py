"""The coordinator: it owns the averaging schedule and the run, whichever engine carries it out.

It hands the engine a segment at a time (up to the next global average, record, evaluation or the
end), collects loss and consensus distance, tells the schedule what came of a global average,
moves the clock, and makes the records.
"""

import functools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from decentral.algorithms.parallel import Parallel
from decentral.asynchronous import AsynchronousRule
from decentral.batches import Batches, NormTest
from decentral.clock import Clock, clock_options, cluster_of, compute_scale
from decentral.config import DiagnosticsConfig
from decentral.engines import Engine, Interrupted
from decentral.errors import UserError, WorkerError
from decentral.event_queue import EventQueue
from decentral.experiment import Experiment
from decentral.records import Record
from decentral.replica import Report, Segment, consensus_distance
from decentral.timeline import Timeline

log = logging.getLogger(__name__)
T = TypeVar("T")

RETRIES = 10  # recoveries from which not one step was taken


class Coordinator:
    """Runs an experiment on an engine. `step` counts the steps finished.

    It sees to workers that are lost, and that come: `say` is told, line by line, and `failures`
    lists what was lost, when, and what was done.
    """

    def __init__(
        self, experiment: Experiment, engine: Engine, say: Callable[[str], None] = log.info
    ):
        self._experiment = experiment
        self._engine = engine
        self._say = say
        self._retries = 0  # since a step was taken
        self._away: set[int] = set()  # workers that stay away until config.faults has them back
        self._new: tuple[int, ...] = ()  # workers that have come, but have no state yet
        self.failures: list[dict[str, Any]] = []
        self._schedule = experiment.algorithm.schedule
        self._clock = clock_of(experiment, _compute_s(experiment, engine))
        self._queue = _queue(experiment, self._clock)
        self._norm_test = _norm_test(experiment)
        self._drawn = 0  # batches, by each worker
        self._schedule.observe(-1, math.nan, experiment.initial_lr)
        self._started = time.perf_counter()
        self._seconds_before = 0.0  # of the runs that this one goes on from
        self._recorded = _Mean()  # loss since the last record
        self._averaged = _Mean()  # loss since the last global average
        self._planned: deque[Segment] = deque()  # what the engine knows ahead
        self._planned_steps, self._spent_s = 0, 0.0  # of all of them, and in the engine since then
        self._step_s: float | None = None  # of the steps that were last planned, each
        self.step = 0

    def run(self) -> Iterator[Record | None]:
        """Run to the end, yielding after each segment: its record, or None if it has none.

        The caller may stop between two segments where the run is `settled`.
        """
        while self.step < self._experiment.config.steps:
            if not self._planned:
                self._follow_script()
                self._grow()
                self._plan()
            segment, report = self._run(self._planned.popleft())
            if not self._planned:
                self._step_s = self._spent_s / self._planned_steps
            record = self._record(report) if segment.record else None
            if segment.watch and report.moved is not None:
                self._watch(segment.stop - 1, report)
            if self._norm_test is not None and report.variance is not None:
                assert report.gradient_square is not None, "measured with the variance"
                self._norm_test.watch(report.variance, report.gradient_square)
            if segment.global_average:
                loss = self._averaged.take()
                self._schedule.observe(segment.stop - 1, loss, report.next_lr)
            yield record

    @property
    def settled(self) -> bool:
        """Whether all workers are at `step`, and not beyond it in what they have yet to report."""
        return not self._planned

    def _plan(self) -> None:
        """The next segment, and those that the engine may run with it."""
        segment = self._segment(self.step)
        self._planned.append(segment)
        if self._looks_ahead and self._step_s is not None:
            last = self.step + self._engine.ahead_s / max(self._step_s, 1e-9)
            while segment.stop < last and not self._ends_alone(segment.stop):
                segment = self._segment(segment.stop)
                self._planned.append(segment)
        self._planned_steps, self._spent_s = segment.stop - self.step, 0.0

    @property
    def _looks_ahead(self) -> bool:
        """Whether the segments to come follow from the step alone: whatever the last one gives."""
        config = self._experiment.config
        return not (
            self._schedule.state
            or self._norm_test is not None
            or self._queue is not None
            or self._experiment.faults.changes_members
            or len(self._engine.members) < config.workers
        )

    def _run(self, segment: Segment) -> tuple[Segment, Report]:
        """Run a segment to its end, whoever is lost on the way: the report of the last part.

        Where workers are lost ahead of it, the segment returned is as long as the others went on.
        """
        deviation = drift = None
        lr = 0.0
        while True:
            if self._queue is not None:
                moments = self._queue.run(segment.start, segment.stop)
                segment = replace(segment, moments=moments)
            ahead = tuple(self._planned)
            began = time.perf_counter()
            try:
                report, whole = self._engine.run(segment, ahead), True
            except Interrupted as interruption:
                self._planned.clear()
                report, whole = interruption.report, interruption.whole
                if report is not None:
                    self._count_in(segment.start, report)
                self.recover(interruption)
            else:
                self._count_in(segment.start, report)
            self._spent_s += time.perf_counter() - began
            if report is None:
                continue
            if deviation is None:
                deviation, drift = report.deviation, report.drift
            if report.stop > segment.start:
                lr = report.lr
            if whole:
                return segment, replace(report, deviation=deviation, drift=drift, lr=lr)
            stop = max(segment.stop, report.stop)
            over = [segment, *(other for other in ahead if other.stop <= stop)]
            segment = replace(
                segment,
                start=report.stop,
                stop=stop,
                global_average=any(each.global_average for each in over),
                record=any(each.record for each in over),
                watch=False,
                measure=False,
            )

    def _count_in(self, start: int, report: Report) -> None:
        """Take what workers did from step `start` on for done."""
        self.step = report.stop
        steps = report.stop - start
        if steps:
            self._retries = 0
        self._drawn += steps * self._count
        loss = float(np.mean(report.loss))
        self._recorded.add(loss, steps)
        self._averaged.add(loss, steps)
        if self._queue is not None:
            self._clock.now = np.full_like(self._clock.now, self._queue.time_s)
        for event in report.events:
            self._clock.advance(event)
        if self._queue is not None:
            self._queue.time_s = self._clock.time_s

    def steadily(self, act: Callable[[], T]) -> T:
        """What `act` gives, which asks something of the engine; again, where workers are lost."""
        while True:
            try:
                return act()
            except Interrupted as interruption:
                self.recover(interruption)

    def recover(self, interruption: Interrupted) -> None:
        """Go on without the workers that are lost, until others come, or stop: as the config says.

        Raises WorkerError where the run cannot go on.
        """
        policy = self._experiment.config.on_worker_failure
        asynchronous = isinstance(self._experiment.algorithm.rule, AsynchronousRule)
        noticed, lost, told = time.perf_counter(), dict(interruption.lost), [str(interruption)]
        while True:
            what = "; ".join(told)
            stopped = f"{what}; stopped after {self.step} steps"
            left = [worker for worker in self._engine.members if worker not in lost]
            if policy == "stop" or asynchronous:
                raise WorkerError(stopped)
            if not any(worker not in self._new for worker in left):
                raise WorkerError(f"{stopped}: nobody is left")
            least = self._experiment.config.min_workers or 1
            if len(left) < least:
                raise WorkerError(
                    f"{stopped}: {len(left)} workers are left, workers.min is {least}"
                )
            self._retries += 1
            if self._retries > RETRIES:
                raise WorkerError(f"{stopped}: {RETRIES} attempts to go on have failed")
            try:
                self._regroup(left, [worker for worker in self._new if worker in left])
            except Interrupted as again:
                lost |= again.lost
                told.append(str(again))
                continue
            self._note(lost, what, noticed)
            return

    def _note(self, lost: Mapping[int, str], what: str, noticed: float) -> None:
        seconds = time.perf_counter() - noticed
        self.failures.append(
            {
                "step": self.step,
                "lost": sorted(lost),
                "what": what,
                "left": len(self._engine.members),
                "recovery_s": seconds,
            }
        )
        those = f"{len(self._engine.members)} workers go on" if lost else "reconnected"
        self._say(f"{what}; {those} from step {self.step} after {seconds:.1f} s")

    def _follow_script(self) -> None:
        """Let go and come who does so before this step by config.faults."""
        if not self._experiment.faults.changes_members:
            return
        config, members = self._experiment.config, self._engine.members
        changes = self._experiment.faults.changes(self.step, members)
        killed = changes.killed
        if killed:
            told = " and ".join(str(worker) for worker in killed)
            what = f"worker {told} died before step {self.step}, as config.faults has it"
            if config.on_worker_failure == "stop":
                raise WorkerError(what)
            if not set(members) - set(killed) - set(changes.left):
                raise WorkerError(f"{what}; nobody is left")
            self._say(what)
        replaced = killed if config.on_worker_failure == "replace" else ()
        self._away = (self._away | {*killed, *changes.left}) - {*replaced, *changes.joined}
        stay = set(members) - set(killed) - set(changes.left)
        new = sorted({*replaced, *changes.joined})
        if new or len(stay) < len(members):
            try:
                self._regroup(sorted({*stay, *new}), new)
            except Interrupted as interruption:
                self.recover(interruption)

    def _grow(self) -> None:
        """Take in workers that are up, and start others in the place of lost ones, or more, where
        the config says so and the cluster has room."""
        config, members = self._experiment.config, self._engine.members
        wanted = config.on_worker_failure == "replace" or config.min_workers is not None
        if not wanted or len(members) == config.workers:
            return
        absent = sorted(set(range(config.workers)) - set(members) - self._away)
        if not absent:
            return
        new = self._engine.ready()
        if new:
            try:
                self._regroup(sorted([*members, *new]), new)
            except Interrupted as interruption:
                self.recover(interruption)
            came = " and ".join(str(worker) for worker in new if worker in self._engine.members)
            if came:
                self._say(f"worker {came} came at step {self.step}, from the mean of the others")
        self._engine.prepare(absent[: self._engine.room()])

    def _regroup(self, members: Sequence[int], new: Sequence[int] = ()) -> None:
        try:
            topology = self._experiment.topology_of(members)
        except UserError as error:
            raise WorkerError(
                f"{len(members)} workers are left, for whom there is no topology: {error}"
            ) from None
        self._new = tuple(new)  # also of a regrouping that is cut short
        self._engine.regroup(members, new)
        self._new = ()
        self._clock.regroup(members, topology)
        if self._norm_test is not None and self._norm_test.together > 1:
            self._norm_test.together = len(members)

    def _segment(self, start: int) -> Segment:
        """From `start` to the nearest step that ends one: all but the last step are alike."""
        config = self._experiment.config
        average = self._schedule.next_average(start)
        watch = self._schedule.next_watch(start)
        test = self._norm_test.next_watch(start) if self._norm_test is not None else None
        ends = {config.steps, _multiple_after(start, config.record.every)}
        ends |= {step + 1 for step in (average, watch, test) if step is not None}
        change = self._experiment.faults.next_change(start + 1, self._engine.members)
        if change is not None:
            ends.add(change)
        ends |= {_multiple_after(start, every) for every in self._periods}
        stop = min(ends)
        diagnostics = config.diagnostics
        diagnoses = diagnostics is not None and stop % diagnostics.every == 0
        return Segment(
            start=start,
            stop=stop,
            between=self._experiment.algorithm.between,
            global_average=average is not None and stop == average + 1,
            record=diagnoses or self._evaluates(stop) or stop % config.record.every == 0,
            # A global average shows all there is to see, and takes it away.
            watch=watch is not None and stop == watch + 1 and stop - 1 != average,
            measure=test is not None and stop == test + 1,
            drift=diagnoses and diagnostics is not None and diagnostics.drift,
            batches=None if test is None else Batches(self._count, start, self._drawn),
            load=self._count / config.gradient.accumulate,
        )

    @property
    def _periods(self) -> list[int]:
        """After multiples of these steps the workers are asked for something of their state."""
        config = self._experiment.config
        diagnostics = config.diagnostics
        periods = (
            config.record.evaluate_every,
            config.checkpoint.every,
            None if diagnostics is None else diagnostics.every,
        )
        return [every for every in periods if every is not None]

    def _ends_alone(self, step: int) -> bool:
        """Whether the workers are to be at `step`, and not beyond it, when it is reported."""
        return step == self._experiment.config.steps or any(
            step % every == 0 for every in self._periods
        )

    @property
    def _count(self) -> int:
        """The batches that a step takes."""
        if self._norm_test is not None:
            return self._norm_test.state["batches"]
        return self._experiment.config.gradient.accumulate

    def _watch(self, step: int, report: Report) -> None:
        assert report.moved is not None, "watched"
        assert report.gradient_square is not None, "and the gradients"
        topology = self._experiment.topology_of(self._engine.members)
        assert topology is not None, "what moved, moved over a graph"
        turn = step // self._experiment.algorithm.gossip_period
        distance = np.sqrt(np.mean(report.moved)) * topology.disagreement(turn)
        norm = np.sqrt(np.mean(report.gradient_square))
        self._schedule.watch(step, float(distance), float(norm), report.lr)

    def _evaluates(self, step: int) -> bool:
        config = self._experiment.config
        every = config.record.evaluate_every
        return step == config.steps or (every is not None and step % every == 0)

    def _record(self, report: Report) -> Record:
        assert report.deviation is not None, "a segment that records measures the deviation"
        config = self._experiment.config
        record: Record = {
            "step": self.step,
            "loss": self._recorded.take(),
            "consensus_distance": consensus_distance(report.deviation),
            "period": self._schedule.period,
            "lr": report.lr,
            "bytes_sent": report.bytes_sent,
            "time_s": self._seconds_before + (report.ended or time.perf_counter()) - self._started,
            "sim_time_s": self._clock.time_s,
            # Those whose figures are in it: one that died may have taken some with it.
            "workers": min(len(self._engine.members), len(report.deviation)),
        }
        if self._norm_test is not None:
            record["batch_size"] = self._count * config.task.batch_size
        if self._evaluates(self.step):
            record.update(self.steadily(self._engine.evaluate))
        diagnostics = config.diagnostics
        if diagnostics is not None and self.step % diagnostics.every == 0:
            record.update(self._diagnosed(diagnostics, report))
        return record

    def _diagnosed(self, diagnostics: DiagnosticsConfig, report: Report) -> Record:
        """What config.diagnostics asks for; of the workers' models, as they were in `report`."""
        record: Record = {}
        if diagnostics.of_the_model:
            diagnose = functools.partial(self._engine.diagnose, self.step)
            record.update(self.steadily(diagnose))
        if diagnostics.curvature:
            record["two_over_lr"] = 2 / report.lr if report.lr else math.inf
        if report.drift is not None:
            distances = np.sqrt(report.drift)
            record["drift_mean"] = float(distances.mean())
            record["drift_max"] = float(distances.max())
        return record

    @property
    def timeline(self) -> Timeline | None:
        """What the workers did when, if the config asks for it."""
        return self._clock.timeline

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to go on from `step`, as plain numbers and lists."""
        return {
            "step": self.step,
            "members": list(self._engine.members),
            "away": sorted(self._away),
            "schedule": dict(self._schedule.state),
            "clock": self._clock.now.tolist(),
            "batches": self._norm_test.state["batches"] if self._norm_test is not None else None,
            "drawn": self._drawn,
            "queue": self._queue.state() if self._queue is not None else None,
            "seconds": self._seconds_before + time.perf_counter() - self._started,
            "recorded": self._recorded.state(),
            "averaged": self._averaged.state(),
        }

    def restore(self, state: dict[str, Any], load: Callable[[], None]) -> None:
        """Go on from a `state`; `load` has the engine's workers do so.

        A run that has more workers now takes the others in as it does newcomers; one that has
        fewer goes on without the last. Who was absent is absent still.
        """
        workers, before = self._experiment.config.workers, len(state["clock"])
        members = [worker for worker in state["members"] if worker < workers]
        members = members[: len(self._engine.members)]
        if list(self._engine.members) != members:
            self._engine.adopt(members)
        load()
        self.step = state["step"]
        self._away = {worker for worker in state["away"] if worker < workers}
        self._clock.now[: min(before, workers)] = state["clock"][:workers]
        self._clock.regroup(members, self._experiment.topology_of(members))
        if before != workers or len(members) < len(state["members"]):
            self._say(f"{len(members)} of {len(state['members'])} workers go on as they were")
        if before < workers:
            self._regroup([*members, *range(before, workers)], range(before, workers))
            self._say(f"{workers - before} workers come to them, from their mean")
        elif len(members) < len(state["members"]):
            self._regroup(members)  # what held for all of them together is begun anew
        self._schedule.state.update(state["schedule"])
        if self._norm_test is not None:
            self._norm_test.state["batches"] = state["batches"]
        self._drawn = state["drawn"]
        if self._queue is not None:
            self._queue.restore(state["queue"])
        self._seconds_before = state["seconds"]
        self._recorded = _Mean(**state["recorded"])
        self._averaged = _Mean(**state["averaged"])


class _Mean:
    """Mean training loss over workers and steps, since it was last taken."""

    def __init__(self, total: float = 0.0, steps: int = 0):
        self._total, self._steps = total, steps

    def add(self, loss: float, steps: int) -> None:
        """`loss`: the mean of the workers' sums over `steps` steps."""
        self._total += loss
        self._steps += steps

    def take(self) -> float:
        mean = self._total / self._steps if self._steps else math.nan
        self._total, self._steps = 0.0, 0
        return mean

    def state(self) -> dict[str, Any]:
        return {"total": self._total, "steps": self._steps}


def _compute_s(experiment: Experiment, engine: Engine) -> np.ndarray:
    config = experiment.config
    if config.network.compute_ms is None:
        return engine.step_seconds()
    return np.full(config.workers, config.network.compute_ms * 1e-3)


def clock_of(experiment: Experiment, compute_s: np.ndarray) -> Clock:
    """The clock of a run whose workers, were they alike, would take `compute_s` a step, [n]."""
    config, topology = experiment.config, experiment.topology
    return Clock(
        compute_s * compute_scale(cluster_of(config, topology), config.workers),
        topology=topology,
        **clock_options(config, topology, experiment.algorithm),
    )


def _norm_test(experiment: Experiment) -> NormTest | None:
    config = experiment.config
    test = config.norm_test
    if test is None:
        return None
    together = config.workers if isinstance(experiment.algorithm.rule, Parallel) else 1
    batches = config.gradient.accumulate
    return NormTest(test.tolerance, test.every, test.max_accumulate, batches, together)


def _queue(experiment: Experiment, clock: Clock) -> EventQueue | None:
    rule = experiment.algorithm.rule
    if experiment.matchings is None:
        return None
    assert isinstance(rule, AsynchronousRule)
    size = experiment.message_size

    def link_s(i: int, j: int) -> float:
        return max(clock.link_s(i, j, size), clock.link_s(j, i, size))

    return EventQueue(
        experiment.matchings, rule.exchanges, clock.compute_s_of, link_s, clock.timeline
    )


def _multiple_after(step: int, every: int) -> int:
    """The first multiple of `every` after `step`."""
    return step - step % every + every
