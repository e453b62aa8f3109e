"""Steps of an engine or of a worker, so many at a call, and their times: what benchmarks share."""

import statistics
from collections.abc import Callable

from decentral.algorithms import Algorithm
from decentral.replica import Averaging, Segment


def in_a_row(
    run: Callable[[Segment], object],
    steps: int,
    between: Averaging,
    global_average: bool = False,
) -> Callable[[], None]:
    """Each call runs the next steps as one segment, which is not recorded."""
    step = 0

    def call() -> None:
        nonlocal step
        run(Segment(step, step + steps, between, global_average, record=False))
        step += steps

    return call


def scheduled(
    run: Callable[[Segment], object], algorithm: Algorithm, steps: int
) -> Callable[[], None]:
    """Each call runs the next steps with the global averages that are due, and without records."""
    step = 0

    def call() -> None:
        nonlocal step
        last = step + steps
        while step < last:
            average = algorithm.schedule.next_average(step)
            stop = last if average is None else min(last, average + 1)
            everyone = average is not None and stop == average + 1
            run(Segment(step, stop, algorithm.between, everyone, record=False))
            step = stop

    return call


def median_ratio(a: list[float], b: list[float]) -> float:
    """Of figures taken in the same round."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))
