"""Points of a sweep in processes of this machine.

A process runs one point after the other, so that torch is imported once and not for each. It ends
with the driver, whatever becomes of that, and when one dies, its point alone is lost.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from multiprocessing.connection import Connection

from decentral.progress import deaf_to_interrupts
from decentral.sweep.job import Job, Outcome, record_failure, run


class Processes:
    """A Runner."""

    def __init__(self, processes: int | None, threads: int):
        self.slots = processes or max(1, (os.cpu_count() or 1) // threads)
        self._threads = threads
        self._idle: list[_Process] = []
        self._busy: dict[Connection, tuple[_Process, Job, float]] = {}

    def start(self, job: Job) -> None:
        process = self._idle.pop() if self._idle else _Process(self._threads)
        self._busy[process.connection] = process, job, time.perf_counter()
        with contextlib.suppress(OSError):  # it died while it was idle: `wait` finds it so
            process.connection.send(job)

    def wait(self, timeout_s: float) -> list[Outcome]:
        outcomes = []
        for ready in multiprocessing.connection.wait(list(self._busy), timeout_s):
            assert isinstance(ready, Connection)
            process, job, started = self._busy.pop(ready)
            try:
                error = ready.recv()
                self._idle.append(process)
            except (EOFError, OSError):
                error = f"its process died ({process.end()})"
                seconds = time.perf_counter() - started
                record_failure(job.point.config, job.directory, error, seconds)
            outcomes.append(Outcome(job, error))
        return outcomes

    def close(self) -> None:
        for process in [*self._idle, *(process for process, *_ in self._busy.values())]:
            process.kill()
        self._idle, self._busy = [], {}


class _Process:
    """One process, and the connection that jobs go to and errors, or None, come from."""

    def __init__(self, threads: int):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads), daemon=True)
        with deaf_to_interrupts():
            self._process.start()
        theirs.close()

    def end(self) -> str:
        """How it ended, in words, once it has closed its connection."""
        self.connection.close()
        self._process.join()
        code = self._process.exitcode
        assert code is not None
        if code >= 0:
            return f"exit code {code}"
        why = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{why}"

    def kill(self) -> None:
        """End it, and wait until it is gone: what it wrote stays as it is."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection, threads: int) -> None:
    """Run jobs until the driver hangs up."""
    threading.Thread(target=_end_with_driver, daemon=True).start()
    while True:
        try:
            job: Job = connection.recv()
        except EOFError:
            return
        connection.send(run(job.point.config, job.directory, threads))


def _end_with_driver() -> None:
    """A driver that was killed cannot say so, and another may be about to run the same points."""
    driver = multiprocessing.parent_process()
    assert driver is not None
    multiprocessing.connection.wait([driver.sentinel])
    os._exit(1)
