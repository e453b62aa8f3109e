"""Steps of an engine or of a worker, so many at a call: what benchmarks time."""

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
