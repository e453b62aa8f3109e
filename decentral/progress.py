"""Who looks on while a run goes: nobody, or a terminal with a bar or plain lines."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from decentral.experiment import Experiment
    from decentral.records import Record

STOPPING = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what schedulers send
PLAIN_LINES = 20  # about as many lines a run where the output is not a terminal


class Watcher:
    """Looks on in silence; what a watcher may be told."""

    def say(self, line: str) -> None:
        """A line about the run."""

    def begin(self, experiment: "Experiment", step: int) -> None:
        """The workers are about to take their next step; `step` are finished."""

    def advance(self, step: int, record: "Record | None") -> None:
        """`step` steps are finished; their record, if there is one."""

    def end(self) -> None:
        """No more steps will come."""

    def wants_stop(self) -> bool:
        """Whether to stop after this segment, with a checkpoint."""
        return False


class Lines:
    """What is seen of runs under way: a bar each on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console):
        self._console = console
        self._bars: Progress | None = None

    def add(self, steps: int, step: int, name: str = "") -> "Line":
        """A line for a run of `steps`, `step` of them finished; `name` tells it from others."""
        if self._console.is_terminal and self._bars is None:
            self._bars = Progress(
                TextColumn("{task.fields[name]}step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bars.start()
        return Line(self._console, self._bars, steps, step, f"{name}  " if name else "")

    def end(self) -> None:
        """No line will move any more."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


class Line:
    """One run's."""

    def __init__(self, console: Console, bars: Progress | None, steps: int, step: int, name: str):
        self._console, self._bars, self._steps, self._name = console, bars, steps, name
        self._next_line = step
        if bars is not None:
            self._bar = bars.add_task("", total=steps, completed=step, name=escape(name))

    def say(self, line: str) -> None:
        say(self._console, self._name + line)

    def advance(self, step: int, record: "Record | None") -> None:
        """`step` steps are finished; their record, if there is one."""
        if self._bars is not None:
            self._bars.update(self._bar, completed=step)
        if record is None:
            return
        if self._bars is not None:
            line = f"loss {_figure(record['loss'])}"
            line += f"  consensus {_figure(record['consensus_distance'])}"
            self._bars.update(self._bar, description=line)
        if "eval_loss" in record or (self._bars is None and step >= self._next_line):
            self.say(record_line(record, self._steps))
            self._next_line = step + max(1, self._steps // PLAIN_LINES)


class Terminal(Watcher):
    """A progress bar on a terminal, plain lines elsewhere; Ctrl-C asks for a clean stop.

    A second Ctrl-C stops at once.
    """

    def __init__(self, console: Console):
        self._console = console
        self._lines = Lines(console)
        self._line: Line | None = None
        self._stop = False
        self._before: dict[signal.Signals, Any] = {}  # handlers

    def say(self, line: str) -> None:
        say(self._console, line)

    def begin(self, experiment: "Experiment", step: int) -> None:
        self._line = self._lines.add(experiment.config.steps, step)
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._interrupted) for s in STOPPING}

    def advance(self, step: int, record: "Record | None") -> None:
        assert self._line is not None, "begin comes first"
        self._line.advance(step, record)

    def end(self) -> None:
        self._lines.end()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def wants_stop(self) -> bool:
        return self._stop

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True
        self.say("stopping after this segment; Ctrl-C again stops at once")


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes begun meanwhile leave Ctrl-C to this one; they inherit it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's, and so is what they interrupt
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def say(console: Console, line: str) -> None:
    """Print a line as it is. Elsewhere than on a terminal rich has nothing to add but time."""
    if console.is_terminal:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    else:
        print(line, file=console.file, flush=True)


def record_line(record: "Record", steps: int) -> str:
    """A record as one line of text."""
    width = len(str(steps))
    line = f"step {record['step']:>{width}}/{steps}  loss {_figure(record['loss'])}"
    line += f"  consensus {_figure(record['consensus_distance'])}"
    if "eval_loss" in record:
        line += f"  eval loss {_figure(record['eval_loss'])}"
    if "eval_accuracy" in record:
        line += f"  accuracy {_figure(record['eval_accuracy'])}"
    if "eval_accuracy_workers" in record:
        line += f"  (workers' own {_figure(record['eval_accuracy_workers'])})"
    return line


def _figure(value: float | None) -> str:
    """Four digits; a file of records has null where a number is not finite."""
    return "nan" if value is None else f"{value:.4f}"
