"""The methods: presets over a step rule and an averaging schedule, in one table.

A step rule is a class in a file of its own here, written against a `Replica`, so that the same
lines run on stacked workers in the simulator and on one worker of a cluster. Rules are
stateless: what they remember lives in `replica.state`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from decentral.algorithms.adapt_then_combine import AdaptThenCombine
from decentral.algorithms.parallel import Parallel
from decentral.algorithms.schedules import Adaptive, Every, Never, Schedule
from decentral.replica import Averaging, StepRule

Period = Annotated[int, Field(gt=0)]


@dataclass(frozen=True)
class Algorithm:
    """A step rule, what the workers do between global averages, and when those come."""

    rule: StepRule
    between: Averaging
    schedule: Schedule

    @property
    def needs_topology(self) -> bool:
        return self.between is Averaging.NEIGHBOURS


def parallel_sgd() -> Algorithm:
    """Gradients averaged over all workers at every step: the baseline."""
    return Algorithm(Parallel(), Averaging.NOBODY, Never())


def local_sgd(period: Period) -> Algorithm:
    """Each worker alone; all average their models every `period` steps."""
    return Algorithm(AdaptThenCombine(), Averaging.NOBODY, Every(period))


def gossip_sgd() -> Algorithm:
    """Each worker averages with its neighbours at every step."""
    return Algorithm(AdaptThenCombine(), Averaging.NEIGHBOURS, Never())


def gossip_pga(period: Period) -> Algorithm:
    """Gossip, with a global average instead of the gossip at every `period`-th step."""
    return Algorithm(AdaptThenCombine(), Averaging.NEIGHBOURS, Every(period))


def gossip_aga(
    initial_period: Period = 4,
    warmup: Annotated[int, Field(ge=0)] = 100,
    max_period: Period | None = None,
) -> Algorithm:
    """Gossip-PGA whose period grows as the loss falls; fixed during `warmup` steps."""
    schedule = Adaptive(initial_period, warmup, max_period)
    return Algorithm(AdaptThenCombine(), Averaging.NEIGHBOURS, schedule)


PRESETS: dict[str, Callable[..., Algorithm]] = {
    "parallel_sgd": parallel_sgd,
    "local_sgd": local_sgd,
    "gossip_sgd": gossip_sgd,
    "gossip_pga": gossip_pga,
    "gossip_aga": gossip_aga,
}
