"""How the seconds of a local step vary, from worker to worker and step to step, for the clock.

A factor on the compute time: a draw of the `JITTERS` distribution, of mean 1, and now and then a
straggler's. It depends on (seed, worker, step) alone, so both engines and a resumed run tell the
same time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from decentral.draws import hash64, uniform_float

Share = Annotated[float, Field(gt=0, le=1)]
Sigma = Annotated[float, Field(gt=0, le=10)]  # at 10 hardly any factor is above 1e-6
Tail = Annotated[float, Field(gt=1, allow_inf_nan=False)]

# Two uniform draws in (0, 1), float64 arrays of one shape, to factors of mean 1.
Jitter = Callable[[np.ndarray, np.ndarray], np.ndarray]

_JITTER = int.from_bytes(b"jitter", "little")  # apart from other uses of the same seed


def lognormal(sigma: Sigma) -> Jitter:
    """exp(sigma z - sigma^2 / 2) with z normal: many small causes that multiply."""

    def factor(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        z = np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)  # Box and Muller 1958
        return np.exp(sigma * z - sigma**2 / 2)

    return factor


def exponential(share: Share) -> Jitter:
    """1 - share + share e with e exponential of mean 1: that share of the mean waits its turn."""
    return lambda u, v: 1 - share - share * np.log(u)


def uniform(spread: Share) -> Jitter:
    """Uniform on 1 - spread .. 1 + spread."""
    return lambda u, v: 1 + spread * (2 * u - 1)


def pareto(tail: Tail) -> Jitter:
    """(1 - 1/tail) u^(-1/tail): P(factor > x) falls as x^-tail, so rare steps are very long."""
    return lambda u, v: (1 - 1 / tail) * u ** (-1 / tail)


JITTERS: dict[str, Callable[..., Jitter]] = {
    "lognormal": lognormal,
    "exponential": exponential,
    "uniform": uniform,
    "pareto": pareto,
}


@dataclass(frozen=True)
class Variation:
    """A factor per worker and step: the jitter's, times `slowdown` with `probability`."""

    seed: int
    jitter: Jitter | None = None
    probability: float = 0.0
    slowdown: float = 1.0

    def factors(self, workers: np.ndarray, step: int) -> np.ndarray:
        """The factors of these workers at `step`, float64 of the shape of `workers`."""
        factors = np.ones(len(workers))
        key = hash64(_JITTER, self.seed, torch.from_numpy(workers), step)
        u, v, w = (uniform_float(hash64(key, draw)).numpy() for draw in range(3))
        if self.jitter is not None:
            factors *= self.jitter(u, v)
        factors[w < self.probability] *= self.slowdown
        return factors
