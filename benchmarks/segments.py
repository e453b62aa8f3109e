"""Steps of an engine or of a worker, so many at a call, and their times: what benchmarks share."""

import statistics
from collections.abc import Callable

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


def median_ratio(a: list[float], b: list[float]) -> float:
    """Of figures taken in the same round."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))
