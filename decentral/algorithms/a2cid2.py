"""A2CiD2: asynchronous pairwise averaging, accelerated by a continuous momentum."""

import math

import torch
from torch import Tensor

from decentral.asynchronous import AsynchronousRule, OwnModel


class A2CiD2(AsynchronousRule):
    """As AD-PSGD, and each worker's model x is drawn to a second one, y, between events.

        between events:             dx = eta (y - x) dt,    dy = eta (x - y) dt
        on a meeting of i and j:    x_i <- x_i + (x_j - x_i) / 2
                                    y_i <- y_i + alpha (x_j - x_i)
        on a gradient:              both by the local optimizer's step, -gamma g

    Over t the first line is x - y <- exp(-2 eta t) (x - y) with x + y kept. Time counts gradients
    begun, per worker. The paper's eta = 1 / (2 sqrt(chi1 chi2)), alpha = sqrt(chi1 / chi2) / 2
    come from the rates of the exchanges, see `acceleration` in event_queue.py, and are what holds
    unless both are given. On badly connected graphs, such as a ring, consensus takes
    sqrt(chi1 chi2) instead of chi1. Eta 0 and alpha 1/2 are AD-PSGD. State: D floats and a time.

    Source: Nabli et al. 2023 (arXiv 2306.08289), algorithm 1.
    """

    equation = "as AD-PSGD on x;  y <- y + alpha (x_j - x_i);  d(x - y) = -2 eta (x - y) dt"
    source = "Nabli et al. 2023, arXiv 2306.08289"
    sends = "D to one neighbour, in each round of exchanges"
    requires = "undirected, static"
    holds = "2 D + 1"

    def __init__(self, exchanges: float, eta: float | None = None, alpha: float | None = None):
        self.exchanges, self.eta, self.alpha = exchanges, eta, alpha

    def accelerated(self, chi1: float, chi2: float) -> "A2CiD2":
        """With the paper's eta and alpha, for what was not given."""
        eta = 1 / (2 * math.sqrt(chi1 * chi2)) if self.eta is None else self.eta
        alpha = math.sqrt(chi1 / chi2) / 2 if self.alpha is None else self.alpha
        return A2CiD2(self.exchanges, eta, alpha)

    def state(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": x.clone(), "time": torch.zeros_like(x[..., :1], dtype=torch.float64)}

    def adapt(self, own: OwnModel, gradient: Tensor, time: float) -> None:
        self._flow(own, time)
        before = own.x.clone()
        own.descend(gradient)
        own.state["y"] += own.x - before

    def meet(self, own: OwnModel, difference: Tensor, time: float) -> None:
        assert self.alpha is not None, "set by `accelerated`"
        self._flow(own, time)
        own.x.add_(difference, alpha=0.5)
        own.state["y"].add_(difference, alpha=self.alpha)

    def _flow(self, own: OwnModel, time: float) -> None:
        """Let x and y draw near each other for the time since the last event."""
        assert self.eta is not None, "set by `accelerated`"
        x, y, last = own.x, own.state["y"], own.state["time"]
        decay = math.exp(-2 * self.eta * (time - last.item()))
        half = (x - y).mul_((1 - decay) / 2)
        x -= half
        y += half
        last.fill_(time)
