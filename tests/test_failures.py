"""Workers are lost, hang, and come: the run goes on as its config says, or says why it cannot."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest import mock

import numpy as np
import pandas
import psutil
import pytest
import ray
import torch
import yaml
from test_cli import call

import decentral
from decentral.checkpoints import Checkpoints
from decentral.config import load
from decentral.coordinator import RETRIES, Coordinator
from decentral.engines import Interrupted
from decentral.engines import ray as ray_engine
from decentral.engines.ray import RayEngine, start_cluster
from decentral.errors import WorkerError
from decentral.experiment import build
from decentral.peer import Patience, PeerError
from decentral.replica import Averaging, Report, Segment
from decentral.storage import Storage

# How long a worker waits for the others.


@pytest.fixture
def clock(monkeypatch):
    """The time that Patience reads: set it."""
    now = [100.0]
    monkeypatch.setattr("decentral.peer.time.perf_counter", lambda: now[0])
    return now


def test_the_first_exchange_has_the_time_that_loading_takes(clock):
    patience = Patience(factor=3.0, first_s=300.0)
    clock[0] += 50.0
    assert patience.deadline() == timedelta(seconds=300)


def test_patience_is_that_of_the_longest_of_work_and_exchange(clock):
    patience = Patience(factor=3.0, first_s=300.0)
    patience.deadline()
    clock[0] += 1.0  # the exchange
    patience.over()
    assert patience.deadline() == timedelta(seconds=10)  # 3 x 1 s is below the floor
    clock[0] += 7.0
    patience.over()
    assert patience.deadline() == timedelta(seconds=21)  # 3 x 7 s in the exchange
    patience.over()
    clock[0] += 20.0  # at work
    assert patience.deadline() == timedelta(seconds=60)
    patience.over()
    assert patience.deadline() == timedelta(seconds=21)  # a long phase of work counts once


def test_work_behind_an_exchange_is_no_wait_and_counts_for_the_next(clock):
    patience = Patience(factor=3.0, first_s=300.0)
    for _ in range(2):  # two that are under way together: the second has the first one's deadline
        assert patience.deadline() == timedelta(seconds=300)
    clock[0] += 7.0  # the gradient, behind both
    patience.wait()
    clock[0] += 1.0
    patience.over()
    patience.wait()
    patience.over()
    clock[0] += 0.5
    assert [patience.deadline() for _ in range(2)] == [timedelta(seconds=3 * 7.5)] * 2
    for _ in range(2):
        patience.wait()
        patience.over()
    assert patience.deadline() == timedelta(seconds=10)  # the longest wait was 1 s


def test_what_came_before_a_segment_is_no_work(clock):
    patience = Patience(factor=3.0, first_s=300.0)
    patience.deadline()
    patience.over()
    clock[0] += 1000.0  # an evaluation
    patience.begin()
    clock[0] += 5.0
    assert patience.deadline() == timedelta(seconds=15)


# What the coordinator makes of what an engine loses.


class Scripted:
    """An engine whose calls of `run` and `regroup` go as told; left alone, all goes well.

    A step's loss is i + 1 on worker i. `asked` are the segments, `groups` the regroupings.
    """

    def __init__(self, workers, runs=(), regroups=()):
        self.members = tuple(range(workers))
        self.asked, self.told, self.groups = [], [], []
        self._runs, self._regroups = list(runs), list(regroups)

    ahead_s = 0.0

    def run(self, segment, ahead=()):
        self.asked.append(segment)
        self.told.append([(s.start, s.stop) for s in ahead])
        if self._runs:
            lost, steps, whole = self._runs.pop(0)
            left = [worker for worker in self.members if worker not in lost]
            report = self.report(segment, steps, left, whole) if left else None
            raise Interrupted(dict.fromkeys(lost, "died"), f"lost {lost}", report, whole)
        return self.report(segment, segment.stop - segment.start, self.members, True)

    def report(self, segment, steps, members, whole):
        return Report(
            stop=segment.start + steps,
            loss=np.array([steps * (worker + 1.0) for worker in members]),
            deviation=np.full(len(members), 4.0) if segment.record and whole else None,
            moved=None,
            gradient_square=None,
            variance=None,
            bytes_sent=0,
            events=[],
            lr=0.1,
            next_lr=0.1,
        )

    def regroup(self, members, new=()):
        self.groups.append((list(members), list(new)))
        self.members = tuple(members)
        if self._regroups:
            lost = self._regroups.pop(0)
            raise Interrupted(dict.fromkeys(lost, "died"), f"lost {lost} too")

    def evaluate(self):
        return {"eval_loss": 1.0}

    def ready(self):
        return []

    def room(self):
        return 0

    def prepare(self, workers):
        assert not workers


def scripted(quick, runs=(), regroups=(), workers=3, **changes):
    """A coordinator over a Scripted engine, of which every fourth step is recorded and averages."""
    config = quick | {
        "workers": workers,
        "steps": 8,
        "on_worker_failure": "shrink",
        "record": {"every": 4},
    }
    engine: Any = Scripted(workers, runs, regroups)
    return Coordinator(build(load(config | changes)), engine), engine


def test_a_loss_is_the_mean_of_those_who_took_the_steps(quick):
    coordinator, engine = scripted(quick, runs=[([2], 3, False)])
    records = [record for record in coordinator.run() if record is not None]
    assert [(s.start, s.stop) for s in engine.asked] == [(0, 4), (3, 4), (4, 8)]
    assert engine.groups == [([0, 1], [])]
    assert [record["step"] for record in records] == [4, 8]
    assert [record["loss"] for record in records] == [1.5, 1.5]  # workers 0 and 1, each step
    assert records[0]["workers"] == 2
    assert records[0]["consensus_distance"] == 2.0


def test_steps_before_a_loss_count_with_all_who_took_them(quick):
    coordinator, _ = scripted(quick, runs=[([], 2, False), ([2], 0, False)])
    first = next(record for record in coordinator.run() if record is not None)
    assert first["loss"] == pytest.approx((2 * 2.0 + 2 * 1.5) / 4)  # three workers, then two


def test_a_segment_that_was_all_done_is_recorded_and_not_run_again(quick):
    coordinator, engine = scripted(quick, runs=[([2], 4, True)])
    records = [record for record in coordinator.run() if record is not None]
    assert [(s.start, s.stop) for s in engine.asked] == [(0, 4), (4, 8)]
    assert [record["step"] for record in records] == [4, 8]


def test_an_average_that_was_cut_short_is_made_up_for_without_a_step(quick):
    coordinator, engine = scripted(quick, runs=[([2], 4, False)])
    records = [record for record in coordinator.run() if record is not None]
    made_up = engine.asked[1]
    assert (made_up.start, made_up.stop) == (4, 4)
    assert made_up.global_average
    assert made_up.record
    assert records[0]["lr"] == 0.1
    assert records[0]["consensus_distance"] == 2.0
    assert [record["loss"] for record in records] == [1.5, 1.5]


def ahead(quick, seconds=1000.0, runs=(), **changes):
    """As `scripted`, of 24 steps that are evaluated at the twelfth, with an engine that runs ahead
    so far once it knows how long a step takes, which is after the first segment."""
    options = {"steps": 24, "record": {"every": 4, "evaluate_every": 12}} | changes
    coordinator, engine = scripted(quick, runs, **options)
    engine.ahead_s = seconds
    return coordinator, engine


def test_an_engine_is_told_what_follows_up_to_where_the_workers_are_asked(quick):
    coordinator, engine = ahead(quick)
    settled = []
    for record in coordinator.run():
        assert record is not None
        settled.append((record["step"], coordinator.settled))
    rest = [(16, 20), (20, 24)]
    assert [(s.start, s.stop) for s in engine.asked] == [(k, k + 4) for k in range(0, 24, 4)]
    assert engine.told == [[], [(8, 12)], [], rest, rest[1:], []]
    # Whoever stops, evaluates or saves does so where nobody is beyond what was reported.
    assert settled == [(4, True), (8, False), (12, True), (16, False), (20, False), (24, True)]


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": {"name": "gossip_aga"}},
        {"faults": [{"kind": "kill", "worker": 2, "step": 23}]},
        {"norm_test": {"tolerance": 0.5, "max_accumulate": 4}, "gradient": {"accumulate": 2}},
        {"checkpoint": {"every": 4}},
        {"diagnostics": {"every": 4, "gradient_norms": {}}},
    ],
)
def test_an_engine_is_told_nothing_that_may_yet_change_or_is_looked_at(quick, changes):
    coordinator, engine = ahead(quick, **changes)
    coordinator._engine.diagnose = lambda step: {}
    list(coordinator.run())
    assert len(engine.told) >= 6
    assert not any(engine.told)


def test_an_engine_goes_ahead_for_as_long_as_it_wants(quick):
    coordinator, engine = ahead(quick)
    coordinator._step_s = 0.25
    engine.ahead_s = 1.5  # six steps: until the segment that reaches them
    next(coordinator.run())
    assert engine.told == [[(4, 8)]]


def test_what_was_planned_is_planned_anew_after_a_loss(quick):
    coordinator, engine = ahead(quick, runs=[([], 4, True), ([2], 3, False)])
    coordinator._step_s = 1.0
    steps = [record["step"] for record in coordinator.run() if record is not None]
    assert steps == [4, 8, 12, 16, 20, 24]
    assert [(s.start, s.stop) for s in engine.asked][:4] == [(0, 4), (4, 8), (7, 8), (8, 12)]
    # Once a worker is missing others may come at any segment.
    assert engine.told == [[(4, 8), (8, 12)], [(8, 12)], [], [], [], [], []]


@pytest.mark.parametrize("beyond", [1, 3, 4])
def test_what_others_went_ahead_of_is_made_up_for_where_they_are(quick, beyond):
    """Worker 2 dies in the average after step 7; the others have had it, and gone on."""
    coordinator, engine = ahead(quick, runs=[([], 4, True), ([2], 4 + beyond, False)])
    coordinator._step_s = 1.0
    records = [record for record in coordinator.run() if record is not None]
    stop = 8 + beyond
    made_up = engine.asked[2]
    assert (made_up.start, made_up.stop, made_up.global_average) == (stop, stop, True)
    assert [record["step"] for record in records] == [4, stop, *range(12 + beyond // 4 * 4, 25, 4)]
    assert records[1]["loss"] == 1.5  # of those that are left, over all their steps


def test_an_average_is_made_up_for_if_any_that_was_passed_had_one(quick):
    """Worker 2 dies in the record after step 7, the others in the average after step 11."""
    algorithm = {"name": "gossip_pga", "period": 6}
    runs = [([], 4, True), ([], 2, True), ([2], 6, False)]
    coordinator, engine = ahead(quick, runs=runs, algorithm=algorithm)
    coordinator._step_s = 1.0
    next(coordinator.run())
    list(coordinator.run())
    assert [(s.start, s.stop, s.global_average) for s in engine.asked][1:5] == [
        (4, 6, True),
        (6, 8, False),
        (12, 12, True),
        (12, 16, False),
    ]


def test_another_lost_in_the_recovery_starts_it_again(quick):
    coordinator, engine = scripted(quick, runs=[([2], 1, False)], regroups=[[1]])
    assert [r["workers"] for r in coordinator.run() if r is not None] == [1, 1]
    assert engine.groups == [([0, 1], []), ([0], [])]
    assert [failure["lost"] for failure in coordinator.failures] == [[1, 2]]
    assert [failure["step"] for failure in coordinator.failures] == [1]


def test_one_that_is_lost_as_it_comes_is_not_told_to_have_come(quick):
    coordinator, engine = scripted(quick, runs=[([2], 1, False)], min_workers=1)
    coming, said = [[2]], []

    def ready():
        if coming:
            engine._regroups = [[2]]
        return coming.pop() if coming else []

    engine.ready, engine.prepare, coordinator._say = ready, lambda workers: None, said.append
    assert [r["workers"] for r in coordinator.run() if r is not None] == [2, 2]
    assert engine.groups == [([0, 1], []), ([0, 1, 2], [2]), ([0, 1], [])]
    assert not any("came" in line for line in said)


def test_attempts_without_a_step_come_to_an_end(quick):
    coordinator, engine = scripted(quick, runs=[([], 0, False)] * 100)
    with pytest.raises(WorkerError, match=f"{RETRIES} attempts to go on have failed"):
        list(coordinator.run())
    assert len(engine.groups) == RETRIES


def test_a_step_between_two_failures_is_a_new_start(quick):
    runs = [([], 1, False)] * (2 * RETRIES)
    coordinator, _ = scripted(quick, runs, steps=24, record={"every": 24})
    assert [r["step"] for r in coordinator.run() if r is not None] == [24]


@pytest.mark.parametrize(
    ("lost", "changes", "told"),
    [
        ([0, 1, 2], {}, "nobody is left"),
        ([1, 2], {"min_workers": 2}, "1 workers are left, workers.min is 2"),
        ([1], {"on_worker_failure": "stop"}, r"lost \[1\]"),
    ],
)
def test_a_run_that_cannot_go_on_says_why(quick, lost, changes, told):
    coordinator, engine = scripted(quick, runs=[(lost, 1, False)], **changes)
    with pytest.raises(WorkerError, match=told):
        list(coordinator.run())
    assert not engine.groups


def test_who_was_lost_is_told_by_number_process_node_and_step():
    engine = RayEngine.__new__(RayEngine)
    engine._actors = dict.fromkeys([1, 4, 7])
    engine._nodes = {worker: ("10.0.0.1", 100 + worker) for worker in engine._actors}
    failures = [PeerError(0, 6, 2, "closed"), PeerError(1, 5, 0, "closed")]  # ranks
    segment = Segment(0, 9, Averaging.NOBODY, False, False)
    lost = {7: "worker 7 died"}
    assert engine._told(lost, failures, segment) == "worker 7 died at step 6"
    assert engine._told({7: "worker 7 died"}, [], segment) == "worker 7 died in steps 0 to 8"
    assert engine._told({}, failures, segment) == (
        "worker 4 (process 104 on node 10.0.0.1) lost the connection to worker 1 (process 101 on"
        " node 10.0.0.1) at step 5: closed"
    )


# On Ray.


def test_a_ray_that_does_not_come_up_is_started_again_and_leaves_nothing(alone, monkeypatch):
    started = []

    def init(**options):
        of_ray, other = (
            subprocess.Popen(
                [sys.executable, "-c", "import sys; sys.stdin.read()", word], stdin=subprocess.PIPE
            )
            for word in (ray.__file__, "another")
        )
        started.append((of_ray, other))
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(WorkerError, match=r"in 3 attempts: The current node timed out"):
        start_cluster(2)
    assert len(started) == 3
    for of_ray, other in started:
        with of_ray, other:  # waits, with its standard input closed
            assert other.poll() is None
            of_ray.wait(timeout=20)
        assert (of_ray.returncode, other.returncode) == (-signal.SIGKILL, 0)


class Running:
    """A run on Ray, and what it said."""

    def __init__(self, cluster, config):
        self.lines = []
        self.experiment = build(load(config))
        actors = () if cluster is None else cluster.actors(self.experiment.config.workers)
        self.engine = RayEngine(self.experiment, self.lines.append, actors)
        self.coordinator = Coordinator(self.experiment, self.engine, self.lines.append)
        self._segments = self.coordinator.run()
        self.records = []

    def until(self, step):
        """Run on, to the end of the segment in which `step` lies."""
        while self.coordinator.step < step:
            record = next(self._segments)
            if record is not None:
                self.records.append(record)

    def end(self):
        self.until(self.experiment.config.steps)
        assert next(self._segments, "over") == "over"
        every = self.experiment.config.record.every
        assert [r["step"] for r in self.records] == list(
            range(every, self.experiment.config.steps + 1, every)
        )

    def pid(self, worker):
        return self.engine._nodes[worker][1]

    def kill(self, worker):
        os.kill(self.pid(worker), signal.SIGKILL)


@contextmanager
def running(cluster, config, **changes):
    # Segment by segment, so that the workers hear of what a test does between two before the next.
    options = {"ahead_s": 0} | changes.pop("ray", {})
    run = Running(cluster, config | {"engine": "ray", "ray": options} | changes)
    try:
        yield run
    except BaseException:
        if cluster is not None:
            cluster.forget()  # who knows what the test has left in the actors
        raise
    finally:
        run.engine.close()


def before(engine, method, act, monkeypatch):
    """Do `act` once, at the next call of a method of the engine, before it."""
    whole, acts = getattr(engine, method), [act]

    def hooked(*arguments, **options):
        while acts:
            acts.pop()()
        return whole(*arguments, **options)

    monkeypatch.setattr(engine, method, hooked)


@pytest.mark.slow
def test_shrink_goes_on_without_one_that_is_killed(cluster, quick):
    with running(cluster, quick, workers=3, on_worker_failure="shrink") as run:
        run.until(6)
        pid = run.pid(1)
        run.kill(1)
        run.end()
    assert [record["workers"] for record in run.records] == [3, 3, *[2] * 6]
    (failure,) = run.coordinator.failures
    assert failure["lost"] == [1]
    assert failure["left"] == 2
    assert failure["what"].startswith(f"worker 1 (process {pid} on node ")
    assert " died at step " in failure["what"] or " died in steps " in failure["what"]
    assert 6 <= failure["step"] <= 9
    assert failure["recovery_s"] < 10


@pytest.mark.slow
def test_replace_has_all_workers_again(cluster, quick):
    """The others go on until the new one is up, which takes a process the time to start."""
    long = {"steps": 100_000, "record": {"every": 50}}
    with running(cluster, quick, workers=3, **long) as run:
        run.until(50)
        before_it = run.pid(1)
        run.kill(1)
        run.until(100)
        assert run.records[-1]["workers"] == 2
        end = time.monotonic() + 60
        while len(run.engine.members) < 3 and time.monotonic() < end:
            run.until(run.coordinator.step + 1)
        came = run.coordinator.step
        run.until(came + 50)
        assert run.records[-1]["workers"] == 3
        assert run.pid(1) != before_it
        assert any(line.startswith("worker 1 came at step") for line in run.lines)
        assert run.records[-1]["loss"] < run.records[0]["loss"]
        steps = [record["step"] for record in run.records]
        assert steps == list(range(50, steps[-1] + 1, 50))


@pytest.mark.slow
def test_one_killed_before_an_evaluation_is_known_of_at_once(cluster, quick, monkeypatch):
    """Also by those who do not exchange with it: they hear of it from those who do. The second is
    the one that evaluates for all."""
    with running(cluster, quick, on_worker_failure="shrink") as run:
        for worker, step in ((2, 12), (0, 24)):
            run.until(step - 9)
            before(run.engine, "evaluate", functools.partial(run.kill, worker), monkeypatch)
            began = time.monotonic()
            run.until(step)
            assert time.monotonic() - began < Patience.FLOOR_S / 2
        run.end()
    assert [failure["lost"] for failure in run.coordinator.failures] == [[2], [0]]
    assert "eval_accuracy" in run.records[3]
    assert "eval_accuracy" in run.records[7]
    assert [record["workers"] for record in run.records] == [*[4] * 4, *[3] * 4]


@pytest.mark.slow
def test_one_killed_at_a_checkpoint_costs_no_later_one(cluster, quick, monkeypatch, tmp_path):
    with running(cluster, quick, workers=3, on_worker_failure="shrink") as run:
        checkpoints = Checkpoints(Storage(tmp_path), keep=3)
        run.until(6)
        before(run.engine, "save", lambda: run.kill(1), monkeypatch)
        begin = functools.partial(checkpoints.begin, run.coordinator, run.engine)
        run.coordinator.steadily(begin)
        checkpoints.finish(run.engine)
        assert checkpoints.failure is None
        assert checkpoints.newest() == 6
        run.until(12)
        run.coordinator.steadily(begin)
        checkpoints.finish(run.engine)
        assert checkpoints.newest() == 12
        run.end()
    assert run.records[-1]["workers"] == 2


@pytest.mark.slow
def test_one_killed_in_a_recovery_is_left_behind_too(cluster, quick, monkeypatch):
    """Another before the groups open, and one while they do, for which the others wait."""
    with running(cluster, quick, workers=5, on_worker_failure="shrink") as run:
        run.until(6)
        before(run.engine, "regroup", lambda: run.kill(0), monkeypatch)
        run.engine._actors[3].ask.remote(die_as_groups_open)
        run.kill(2)
        run.end()
    assert {w for failure in run.coordinator.failures for w in failure["lost"]} == {0, 2, 3}
    assert sum(failure["recovery_s"] for failure in run.coordinator.failures) < 6
    assert run.records[-1]["workers"] == 2


def die_as_groups_open(worker):
    worker._open = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


AHEAD = {"ahead_s": 1000}  # all that is left is one call, once the first segment is over


def at_step(worker, step, act):
    """Have a worker do something when its gradient at `step` is asked for."""
    gradient = worker._gradient._gradient

    def hooked(at):
        if at == step:
            act()
        return gradient(at)

    worker._gradient._gradient = hooked


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise ValueError("a bad batch")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "step", "noticed"),
    [
        ("gossip_pga", 10, 10),  # by the neighbours
        ("local_sgd", 8, 8),  # the last of a segment
        ("local_sgd", 10, 11),  # where the others wait for it
    ],
)
def test_one_that_dies_far_ahead_is_lost_at_its_step(cluster, quick, method, step, noticed):
    """What was over before is recorded of those that live, and the rest is as it is without it."""
    config = {"workers": 4, "on_worker_failure": "shrink", "record": {"every": 3}} | {
        "algorithm": {"name": method, "period": 3}
    }
    seen = {}
    for name, ray_options in {"each": {"ahead_s": 0}, "ahead": AHEAD}.items():
        with running(cluster, quick, ray=ray_options, **config) as run:
            run.engine._actors[1].ask.remote(at_step, step, die)
            run.end()
        (failure,) = run.coordinator.failures
        assert failure["lost"] == [1]
        assert f"died at step {noticed}" in failure["what"]
        seen[name] = (run.records, failure["step"])
    each, ahead = seen["each"][0], seen["ahead"][0]
    assert seen["each"][1] == seen["ahead"][1]
    assert [r["workers"] for r in each][:2] == [4, 4]
    assert [r["workers"] for r in ahead][:2] == [4, 3]  # the first is asked for by itself
    for one, other in zip(each, ahead, strict=True):
        if one["step"] > step + 3:
            for key in {"loss", "consensus_distance", "eval_loss"} & one.keys():
                assert other[key] == pytest.approx(one[key], rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gossip_pga", "local_sgd"])
def test_one_that_misses_an_average_goes_on_with_those_that_had_it(cluster, quick, method):
    """The others are ahead by then: by a step or two of gossip, by a whole period without."""
    config = {"workers": 4, "on_worker_failure": "shrink", "record": {"every": 3}} | {
        "algorithm": {"name": method, "period": 3}
    }
    with running(cluster, quick, ray=AHEAD, **config) as run:
        run.engine._actors[1].ask.remote(miss_average, 8)
        run.until(24)
        first, *others = run.engine.ask(own_model)
    (failure,) = run.coordinator.failures
    assert failure["lost"] == []
    assert "lost the connection to the others at step 8" in failure["what"]
    steps = [record["step"] for record in run.records]
    assert 9 < failure["step"] <= 12
    assert steps == [3, 6, failure["step"], *range(12 + failure["step"] // 12 * 3, 25, 3)]
    assert [record["workers"] for record in run.records] == [4] * len(steps)
    if method == "local_sgd":
        assert failure["step"] == 12
    for model in others:  # all have taken all steps, of which the last averages
        torch.testing.assert_close(model, first)


def own_model(worker):
    return worker._replica.x


def miss_average(worker, step):
    """Fail in the averages of `step`, which the others have."""
    start = worker._comm.start_mean

    def hooked(x, at, counted=True):
        averaged = start(x, at, counted)

        def finish(into=None):
            own = x.clone()
            mean = averaged(into)
            if at != step:
                return mean
            worker._comm._fail(at, None, RuntimeError("cut off"))
            return own if into is None else into.copy_(own)

        return finish

    worker._comm.start_mean = hooked


@pytest.mark.slow
def test_an_error_far_ahead_ends_the_run_after_what_was_over(cluster, quick):
    with running(cluster, quick, workers=3, ray=AHEAD, record={"every": 3}) as run:
        run.engine._actors[1].ask.remote(at_step, 13, fail)
        with pytest.raises(WorkerError, match="worker 1 failed at step 13: ValueError: a bad"):
            run.end()
    assert [record["step"] for record in run.records] == [3, 6, 9, 12]


@pytest.mark.slow
def test_workers_that_go_ahead_report_what_they_do_segment_by_segment(cluster, quick):
    config = {"workers": 3, "record": {"every": 3, "evaluate_every": 12}}
    records, calls = [], []
    for ray_options in ({"ahead_s": 0}, AHEAD):
        with running(cluster, quick, ray=ray_options, **config) as run:
            asked = mock.Mock(side_effect=run.engine._run_all)
            run.engine._run_all = asked
            run.end()
        calls.append([len(call.args[0]) for call in asked.call_args_list])
        records.append(pandas.DataFrame(run.records))
    each, ahead = records
    assert sum(calls[0]) == sum(calls[1]) == len(calls[0])
    assert len(calls[1]) == 3  # the first segment, up to the evaluation, to the end
    assert ahead.drop(columns="time_s").equals(each.drop(columns="time_s"))
    for frame in records:
        assert frame.time_s.is_monotonic_increasing
        assert frame.time_s.is_unique  # each when it was over, not when it was heard of


@pytest.mark.slow
def test_one_that_hangs_is_taken_for_lost_by_a_deadline(cluster, quick, monkeypatch):
    monkeypatch.setattr(ray_engine, "OVERDUE_S", 3.0)
    with running(cluster, quick, workers=3, on_worker_failure="shrink", ray={"patience": 1}) as run:
        run.engine.ask(set_patience, 2.0)
        run.until(6)
        pid = run.pid(1)
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        run.end()
        assert 2.0 < time.monotonic() - began < 20
    (failure,) = run.coordinator.failures
    assert failure["lost"] == [1]
    assert f"(process {pid} on node" in failure["what"]
    assert "has not answered for" in failure["what"]
    _, alive = psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], 20)
    assert not alive  # Ray ends it, once it has not heeded the order to go


def set_patience(worker, floor_s):
    worker._comm.patience.FLOOR_S = floor_s


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gossip_pga", "parallel_sgd"])
def test_workers_that_take_each_other_for_lost_reconnect(cluster, quick, method):
    algorithm = {"name": method} | ({"period": 4} if method == "gossip_pga" else {})
    with running(cluster, quick, workers=3, algorithm=algorithm, on_worker_failure="shrink") as run:
        run.until(6)
        run.engine.ask(stumble)
        run.end()
    assert [failure["lost"] for failure in run.coordinator.failures] == [[]]
    assert any("lost the connection to" in line and "reconnected" in line for line in run.lines)
    assert run.records[-1]["workers"] == 3


def stumble(worker):
    """Worker 0 is late once, and worker 1 does not wait for anybody."""
    comm = worker._comm
    if worker._number == 1:
        comm.patience.deadline = lambda: timedelta(milliseconds=1)
    if worker._number == 0:
        deadline = comm.patience.deadline

        def late():
            comm.patience.deadline = deadline
            time.sleep(1.0)
            return deadline()

        comm.patience.deadline = late


@pytest.mark.slow
def test_too_few_left_stop_the_run_and_all_is_told(
    on_shared_actors, quick, monkeypatch, tmp_path, capsys
):
    """The last worker is killed after each evaluation, until fewer than the least are there."""
    evaluate = RayEngine.evaluate

    def killing(engine):
        values = evaluate(engine)
        os.kill(engine._nodes[engine.members[-1]][1], signal.SIGKILL)
        return values

    monkeypatch.setattr(RayEngine, "evaluate", killing)
    quick |= {"workers": {"min": 2, "max": 3}, "engine": "ray", "steps": 120}
    quick |= {"record": {"every": 1, "evaluate_every": 40}, "checkpoint": {"every": 40}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(quick))
    out = tmp_path / "run"
    told = call(capsys, "run", str(tmp_path / "config.yaml"), "--out", str(out), code=1)
    assert "1 workers are left, workers.min is 2" in " ".join(told.split())
    assert Checkpoints(Storage(out / "checkpoints"), keep=1).newest() == 40
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "stopped after 80 steps" in summary["error"]
    (failure,) = summary["failures"]
    assert list(failure) == ["step", "lost", "what", "left", "recovery_s"]
    assert (failure["step"], failure["lost"], failure["left"]) == (40, [2], 2)
    assert re.match(r"worker 2 \(process \d+ on node \S+\) died", failure["what"])


# Both engines, by one script.


BY_SCRIPT = {
    "shrink": (
        {"name": "gossip_pga", "period": 4},
        {"name": "ring"},
        [{"kind": "kill", "worker": 2, "step": 7}, {"kind": "join", "worker": 2, "step": 14}],
    ),
    "replace": (
        {"name": "gradient_tracking"},
        {"name": "ring"},
        [{"kind": "kill", "worker": 0, "step": 7}],
    ),
    "cut and slow": (
        {"name": "gossip_pga", "period": 5},
        {"name": "ring"},
        [
            {"kind": "cut", "link": [0, 1], "start": 3, "stop": 15},
            {"kind": "slow", "worker": 2, "factor": 3.0, "start": 4},
        ],
    ),
    "exchanges": (
        {"name": "gradient_tracking", "gossip_period": 2},
        {"name": "random_matchings"},
        [{"kind": "lose", "probability": 0.3, "of": "exchanges"}],
    ),
    "messages": (
        {"name": "sgp"},
        {"name": "star", "weights": "push"},
        [{"kind": "lose", "probability": 0.3, "of": "messages"}],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BY_SCRIPT)
def test_engines_agree_under_faults(on_shared_actors, quick, case):
    algorithm, topology, script = BY_SCRIPT[case]
    quick |= {"algorithm": algorithm, "topology": topology, "faults": script}
    quick["workers"] = 4 if case in ("shrink", "replace") else 3
    if case == "shrink":
        quick["on_worker_failure"] = "shrink"
    if case == "replace":
        quick["optimizer"] = {"name": "adam", "lr": 0.01}
    sim, launched = (decentral.run(quick, engine=engine).metrics for engine in ("sim", "ray"))
    assert list(sim.bytes_sent) == list(launched.bytes_sent)
    assert list(sim.workers) == list(launched.workers)
    np.testing.assert_allclose(sim.sim_time_s, launched.sim_time_s, rtol=1e-12)
    for column in ("loss", "consensus_distance", "eval_loss"):
        a, b = sim[column].dropna(), launched[column].dropna()
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13, err_msg=column)
    without = decentral.run(quick, faults=[]).metrics
    assert not np.allclose(without.loss.iloc[-1], sim.loss.iloc[-1], rtol=1e-6)
    if case in ("cut and slow", "exchanges", "messages"):
        assert without.sim_time_s.iloc[-1] != sim.sim_time_s.iloc[-1]
        assert without.bytes_sent.iloc[-1] > sim.bytes_sent.iloc[-1]


@pytest.mark.slow
def test_a_run_on_ray_goes_on_with_another_number_of_workers(on_shared_actors, quick, tmp_path):
    """As the simulator's does, which has it from a loop by hand."""
    results = {}
    for engine in ("sim", "ray"):
        config = quick | {"engine": engine, "workers": 3, "checkpoint": {"every": 12}, "steps": 12}
        decentral.run(config, out=tmp_path / engine)
        results[engine] = decentral.resume(tmp_path / engine, workers=4, steps=24).metrics
        state = tmp_path / engine / "checkpoints/step-00000024/coordinator.json"
        assert json.loads(state.read_text())["members"] == [0, 1, 2, 3]
    for column in ("loss", "consensus_distance", "workers"):
        a, b = results["sim"][column], results["ray"][column]
        np.testing.assert_allclose(a, b, rtol=1e-9, err_msg=column)
