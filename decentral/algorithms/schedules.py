"""Averaging schedules: who averages with whom at step k.

Between two global averages a worker averages with nobody (Local SGD) or with its neighbours
(gossip); a schedule says at which steps everyone averages instead. The coordinator owns it: it
asks `next_average`, runs the steps up to there, and tells the schedule what came of them.
"""

import math
from typing import Protocol


class Schedule(Protocol):
    """When everyone averages. `state` holds all that a checkpoint needs, as plain numbers."""

    state: dict[str, float]

    @property
    def period(self) -> int | None:
        """H in force; None where nobody averages globally."""
        ...

    def next_average(self, step: int) -> int | None:
        """The first step >= `step` that ends in a global average; None for never."""
        ...

    def observe(self, step: int, loss: float) -> None:
        """Step `step` ended in a global average; `loss` is the workers' mean since the last."""
        ...


class Never:
    """Nobody averages globally: gossip alone (H = infinity)."""

    period = None

    def __init__(self) -> None:
        self.state: dict[str, float] = {}

    def next_average(self, step: int) -> None:
        return None

    def observe(self, step: int, loss: float) -> None:
        raise AssertionError("a schedule without global averages has none to observe")


class Every:
    """A global average at every H-th step: where (k+1) mod H = 0, k from 0."""

    def __init__(self, period: int):
        self.period = period
        self.state: dict[str, float] = {}

    def next_average(self, step: int) -> int:
        return step + (-(step + 1)) % self.period

    def observe(self, step: int, loss: float) -> None:
        pass


class Adaptive:
    """H grows as the loss falls: Gossip-AGA (Chen et al. 2021, arXiv 2105.09080, section 5).

    With F the workers' mean training loss since the last global average, at a global average
    after step k:

        k < warmup:   F_init <- (F_init + F) / 2      (the first F is F_init itself)
        otherwise:    H <- ceil(F_init / F * H_init)

    The paper takes F at the last step alone; the mean over the period has less noise and costs
    no message either. `max_period` caps H; where F is not positive, or the formula not
    finite, H stays.
    """

    def __init__(self, initial_period: int, warmup: int, max_period: int | None = None):
        self.initial_period = initial_period
        self.warmup = warmup
        self.max_period = max_period
        self.state = {"period": initial_period, "last": -1, "initial_loss": math.nan}

    @property
    def period(self) -> int:
        return int(self.state["period"])

    def next_average(self, step: int) -> int:
        return max(step, int(self.state["last"]) + self.period)

    def observe(self, step: int, loss: float) -> None:
        initial = self.state["initial_loss"]
        if math.isnan(initial):
            initial = loss
        if step < self.warmup:
            initial = (initial + loss) / 2
        elif loss > 0 and math.isfinite(initial / loss * self.initial_period):
            period = math.ceil(initial / loss * self.initial_period)
            self.state["period"] = max(1, min(period, self.max_period or period))
        self.state["initial_loss"] = initial
        self.state["last"] = step
