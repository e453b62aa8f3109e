"""Averaging schedules: who averages with whom at step k.

Between two global averages a worker averages with nobody (Local SGD) or with its neighbours
(gossip); a schedule says at which steps everyone averages instead. The coordinator owns it: it
asks `next_average`, runs the steps up to there, and tells the schedule what came of them.
"""

import math
from typing import Annotated, Protocol

from pydantic import Field

Period = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


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

    def observe(self, step: int, loss: float, lr: float) -> None:
        """Step `step` ended in a global average; `loss` is the workers' mean since the last, `lr`
        the learning rate of the next step. Called with step -1 before the first step."""
        ...


class Never:
    """Nobody averages globally: gossip alone (H = infinity)."""

    period = None

    def __init__(self) -> None:
        self.state: dict[str, float] = {}

    def next_average(self, step: int) -> None:
        return None

    def observe(self, step: int, loss: float, lr: float) -> None:
        assert step < 0, "a schedule without global averages has none to observe"


class Every:
    """A global average at every H-th step: where (k+1) mod H = 0, k from 0."""

    def __init__(self, period: Period):
        self.period = period
        self.state: dict[str, float] = {}

    def next_average(self, step: int) -> int:
        return step + (-(step + 1)) % self.period

    def observe(self, step: int, loss: float, lr: float) -> None:
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

    def __init__(
        self, initial_period: Period = 4, warmup: Count = 100, max_period: Period | None = None
    ):
        self.initial_period = initial_period
        self.warmup = warmup
        self.max_period = max_period
        self.state: dict[str, float] = {
            "period": initial_period,
            "last": -1,
            "initial_loss": math.nan,
        }

    @property
    def period(self) -> int:
        return int(self.state["period"])

    def next_average(self, step: int) -> int:
        return max(step, int(self.state["last"]) + self.period)

    def observe(self, step: int, loss: float, lr: float) -> None:
        if step < 0:
            return
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


class PostLocal:
    """H = 1 at first, then H: post-local SGD (Lin et al. 2020, arXiv 1808.07217).

    It changes over at step `start`, or without one at the first global average after which the
    learning rate is below its start. From then on everyone averages where (k+1) mod H = 0.
    """

    def __init__(self, period: Period, start: Count | None = None):
        self._long = period
        self._start = start
        self.state: dict[str, float] = {"local": 0, "initial_lr": math.nan}

    @property
    def period(self) -> int:
        return self._long if self.state["local"] else 1

    def next_average(self, step: int) -> int:
        return step + (-(step + 1)) % self.period

    def observe(self, step: int, loss: float, lr: float) -> None:
        if step < 0:
            self.state["initial_lr"] = lr
        if self._start is not None:
            changes = step + 1 >= self._start
        else:
            changes = lr < self.state["initial_lr"]
        if changes:
            self.state["local"] = 1


class QuadraticRule:
    """QSR: H = max(H_base, floor((alpha / lr)^2)), set at each global average from the learning
    rate of the next step (Gu et al. 2024, arXiv 2310.14423).

    While the learning rate warms up, in the first `warmup` steps, H = H_base.
    """

    def __init__(self, base_period: Period, alpha: Positive, warmup: Count = 0):
        self._base, self._alpha, self._warmup = base_period, alpha, warmup
        self.state: dict[str, float] = {"period": base_period, "last": -1}

    @property
    def period(self) -> int:
        return int(self.state["period"])

    def next_average(self, step: int) -> int:
        return max(step, int(self.state["last"]) + self.period)

    def observe(self, step: int, loss: float, lr: float) -> None:
        warm = step + 1 >= self._warmup
        self.state["last"] = step
        if warm and lr > 0:
            self.state["period"] = max(self._base, math.floor((self._alpha / lr) ** 2))
