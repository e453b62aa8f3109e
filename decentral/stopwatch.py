"""Where a worker's time goes: seconds in the gradient, and seconds in exchanges.

A worker of a cluster has one stopwatch for each; the simulator has the clock instead.
"""

import functools
import time
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


class Stopwatch:
    """Adds up the seconds spent inside `with stopwatch:`.

    A GPU works through a queue, so on one the seconds are those between two marks in the queue:
    what it computes and what it stands idle for, and no mark makes the host wait.
    """

    def __init__(self, device: str = "cpu"):
        self._cuda = torch.device(device).type == "cuda"
        self._seconds = self._started = 0.0
        self._marks: list[torch.cuda.Event] = []  # start, stop, start, stop, ...

    def __enter__(self) -> None:
        if self._cuda:
            self._mark()
        else:
            self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self._mark()
        else:
            self._seconds += time.perf_counter() - self._started

    def take(self) -> float:
        """The seconds since they were last taken; waits for a GPU to come that far."""
        if self._marks:
            self._marks[-1].synchronize()
            pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
            self._seconds += sum(start.elapsed_time(stop) for start, stop in pairs) * 1e-3
            self._marks = []
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _mark(self) -> None:
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        self._marks.append(mark)


class Timed(Protocol):
    stopwatch: Stopwatch


S = TypeVar("S", bound=Timed)


def timed(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """A method whose seconds go to its object's `stopwatch`."""

    @functools.wraps(method)
    def measured(self: S, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.stopwatch:
            return method(self, *args, **kwargs)

    return measured
