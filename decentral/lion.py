"""Lion, the one optimizer here that torch does not bring: see OPTIMIZERS in optimizers.py."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum: every element moves by lr, whatever its gradient's size.

        c <- beta1 m + (1 - beta1) g
        x <- x - lr (sign(c) + weight_decay x)
        m <- beta2 m + (1 - beta2) g

    A good lr is 3 to 10 times below AdamW's, and weight_decay as many times above it. It keeps
    one tensor of state where AdamW keeps two. betas in [0, 1); lr and weight_decay at least 0.

    Raises ValueError for a value out of range.

    Chen et al., Symbolic Discovery of Optimization Algorithms, NeurIPS 2023, arXiv 2302.06675,
    Algorithm 2.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: Sequence[float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ):
        if not lr >= 0:
            raise ValueError(f"lr must be at least 0; got {lr!r}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1); got {betas!r}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0; got {weight_decay!r}")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient; `closure` as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for x in group["params"]:
                if x.grad is None:
                    continue
                if "exp_avg" not in self.state[x]:
                    self.state[x]["exp_avg"] = torch.zeros_like(x)
                m = self.state[x]["exp_avg"]
                sign = m.lerp(x.grad, 1 - beta1).sign_()
                x.mul_(1 - lr * group["weight_decay"]).sub_(sign, alpha=lr)
                m.lerp_(x.grad, 1 - beta2)
        return loss
