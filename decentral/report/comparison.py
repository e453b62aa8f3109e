"""Is one group better than another, or is it chance? Two-sided t tests on values per seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.05  # two-sided
POWER = 0.8
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Comparison:
    """How a group's mean differs from the baseline's.

    low, high  the 95% confidence interval of `difference`
    p          of no difference, two-sided; not corrected for other comparisons
    paired     whether by seed (Student's t on the differences), else Welch's t
    needed     seeds of each group that would show this difference, were it the true one and the
               spread as seen, in 80 of 100 experiments at the 5% level; None: more than MOST_SEEDS
    """

    difference: float
    low: float
    high: float
    p: float
    paired: bool
    needed: int | None


def compare(values: Mapping[int, float], baseline: Mapping[int, float]) -> Comparison | None:
    """Values by seed against the baseline's; paired where both have the same seeds.

    Workers, data order and split follow from the seed, so values of equal seeds vary together.
    None where there are fewer than two values of a group, one that is not finite, or no spread at
    all: there is nothing to test with.
    """
    a, b = np.array(list(values.values())), np.array(list(baseline.values()))
    if min(len(a), len(b)) < 2 or not (np.all(np.isfinite(a)) and np.all(np.isfinite(b))):
        return None
    if paired := values.keys() == baseline.keys():
        differences = a - np.array([baseline[seed] for seed in values])
        if _is_constant(differences, max(np.abs(a).max(), np.abs(b).max())):
            return None
        test: Any = stats.ttest_1samp(differences, 0.0)
        needed = _needed_paired(differences.mean(), differences.std(ddof=1))
    else:
        if _is_constant(a, np.abs(a).max()) and _is_constant(b, np.abs(b).max()):
            return None
        test = stats.ttest_ind(a, b, equal_var=False)
        needed = _needed_welch(a.mean() - b.mean(), a.var(ddof=1), b.var(ddof=1))
    interval = test.confidence_interval(1 - LEVEL)
    return Comparison(
        float(a.mean() - b.mean()),
        float(interval.low),
        float(interval.high),
        float(test.pvalue),
        paired,
        needed,
    )


def _is_constant(values: np.ndarray, size: float) -> bool:
    """Whether the values differ by no more than round-off of numbers of this size."""
    return bool(np.ptp(values) <= 1e-12 * size)


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number, so that in 95 of 100 families none is below 0.05 where
    no difference is true. Holm 1979, Scandinavian Journal of Statistics 6."""
    order = np.argsort(p)
    corrected = np.empty(len(p))
    worst = 0.0
    for place, index in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - place) * p[index]))
        corrected[index] = worst
    return corrected.tolist()


def _needed_paired(mean: float, deviation: float) -> int | None:
    """Pairs for a power of 0.8: the t statistic is noncentral t about mean sqrt(n) / deviation."""
    return _fewest(lambda n: (n - 1, abs(mean) / deviation * math.sqrt(n)))


def _needed_welch(difference: float, a: float, b: float) -> int | None:
    """Seeds of each of two groups with variances a and b, by Welch's degrees of freedom."""
    freedom = (a + b) ** 2 / (a**2 + b**2)
    return _fewest(lambda n: ((n - 1) * freedom, abs(difference) / math.sqrt((a + b) / n)))


def _fewest(statistic) -> int | None:
    """The least n from 2 on at which the test has the power; power grows with n.

    statistic: n -> (degrees of freedom, noncentrality).
    """

    def reaches(n: int) -> bool:
        freedom, centre = statistic(n)
        critical = stats.t.ppf(1 - LEVEL / 2, freedom)
        # The other tail is below a hundredth of a percent here. Beyond a centre of 30 scipy's
        # noncentral t is at its end, and the power at 1.
        return centre > 30 + critical or float(stats.nct.sf(critical, freedom, centre)) >= POWER

    low, high = 1, 2
    while not reaches(high):
        if high >= MOST_SEEDS:
            return None
        low, high = high, min(2 * high, MOST_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high
