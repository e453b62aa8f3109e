"""Outer optimizers: what a global average of the models is taken for, beyond the new model.

After a global average xbar, with x_old the model after the last one (the start, at first):

    plain     x <- xbar
    SlowMo    u <- beta u + (x_old - xbar) / gamma;   x <- x_old - alpha gamma u
    DiLoCo    the outer gradient d = x_old - xbar in Nesterov's SGD: u <- beta u + d;
              x <- x_old - lr (d + beta u)

All workers have the same xbar, x_old and u, so nothing more is sent. Held: 2 D floats.
"""

from collections.abc import Callable
from typing import Annotated

from pydantic import Field
from torch import Tensor

from decentral.replica import Outer

Momentum = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


class SlowMo:
    """Slow momentum (Wang et al. 2020, arXiv 1910.00643): alpha 1, beta 0.4 to 0.7 as a rule.

    With beta 0 and alpha 1 it is the plain average.
    """

    equation = "u <- beta u + (x_old - xbar) / gamma;  x <- x_old - alpha gamma u"

    def __init__(self, beta: Momentum = 0.5, alpha: Positive = 1.0):
        self.beta, self.alpha = beta, alpha

    def step(self, x: Tensor, state: dict[str, Tensor], lr: float) -> None:
        old, momentum = state["outer_model"], state["outer_momentum"]
        momentum.mul_(self.beta).add_((old - x) / lr)
        x.copy_(old).sub_(momentum, alpha=self.alpha * lr)
        old.copy_(x)


class DiLoCo:
    """Outer Nesterov (Douillard et al. 2023, arXiv 2311.08105): lr 0.7, momentum 0.9, H 50 to 500.

    With lr 1 and momentum 0 it is the plain average.
    """

    equation = "d = x_old - xbar;  u <- beta u + d;  x <- x_old - lr (d + beta u)"

    def __init__(self, lr: Positive = 0.7, momentum: Momentum = 0.9):
        self.lr, self.momentum = lr, momentum

    def step(self, x: Tensor, state: dict[str, Tensor], lr: float) -> None:
        old, momentum = state["outer_model"], state["outer_momentum"]
        outer_gradient = old - x
        momentum.mul_(self.momentum).add_(outer_gradient)
        x.copy_(old).sub_(outer_gradient + self.momentum * momentum, alpha=self.lr)
        old.copy_(x)


OUTER: dict[str, Callable[..., Outer]] = {"slowmo": SlowMo, "diloco": DiLoCo}
