"""Workers are lost, hang, and come: the run goes on as its config says, or says why it cannot."""

import os
import signal
import time
from contextlib import contextmanager

import psutil
import pytest
import ray

from decentral.checkpoints import Checkpoints
from decentral.config import load
from decentral.coordinator import Coordinator
from decentral.engines.ray import RayEngine
from decentral.errors import WorkerError
from decentral.experiment import build
from decentral.storage import Storage


@pytest.fixture(scope="module")
def cluster():
    """Room for eight workers, so that others can come while the lost ones still leave."""
    ray.init(
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=128 * 2**20,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


class Running:
    """A run on Ray, and what it said."""

    def __init__(self, config):
        self.lines = []
        self.experiment = build(load(config))
        self.engine = RayEngine(self.experiment, self.lines.append)
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
        psutil.wait_procs([psutil.Process(self.pid(worker))], 10)


@contextmanager
def running(config, **changes):
    run = Running(config | {"engine": "ray"} | changes)
    try:
        yield run
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
@pytest.mark.parametrize("worker", [0, 2])
def test_one_killed_before_an_evaluation_is_known_of_at_once(cluster, quick, monkeypatch, worker):
    with running(quick, on_worker_failure="shrink") as run:
        run.until(3)
        before(run.engine, "evaluate", lambda: os.kill(run.pid(worker), 9), monkeypatch)
        noticed = time.monotonic()
        run.end()
        print(time.monotonic() - noticed, run.lines)
        assert time.monotonic() - noticed < 5
