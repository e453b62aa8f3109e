"""Local optimizers and learning-rate schedules: torch's own, by name.

A replica's optimizer sees one flat tensor, [D] or [n, D], so it must be element-wise: each
element's update may depend on that element's own history alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler

from decentral.errors import UserError
from decentral.signature import bind, choose

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    if kind is not torch.optim.Optimizer
}

LR_SCHEDULES: dict[str, type[lr_scheduler.LRScheduler]] = {
    "constant": lr_scheduler.ConstantLR,
    "cosine": lr_scheduler.CosineAnnealingLR,
    "cosine_warm_restarts": lr_scheduler.CosineAnnealingWarmRestarts,
    "cyclic": lr_scheduler.CyclicLR,
    "exponential": lr_scheduler.ExponentialLR,
    "linear": lr_scheduler.LinearLR,
    "one_cycle": lr_scheduler.OneCycleLR,
    "polynomial": lr_scheduler.PolynomialLR,
    "step": lr_scheduler.MultiStepLR,
    "every": lr_scheduler.StepLR,
}

MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]


def optimizer(name: str, options: dict[str, Any]) -> MakeOptimizer:
    """A maker of the torch optimizer `name`; options are its keyword arguments, lr required.

    Raises UserError for an option that torch refuses and for an optimizer that is not
    element-wise.
    """
    kind = choose(OPTIMIZERS, name, "optimizer.name", "optimizer")
    bound = bind(kind, options, "optimizer", given=("params",), name=name)
    if "lr" not in bound:
        raise UserError("is required; set it, for example optimizer.lr=0.1", "optimizer.lr")
    if not bound["lr"] >= 0:
        raise UserError(f"must be at least 0; got {bound['lr']!r}", "optimizer.lr")

    def make(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return kind(parameters, **bound)

    try:
        element_wise = _is_element_wise(make)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{name} refuses its options, or to step on one flat vector of parameters: {error}",
            "optimizer",
        ) from None
    if not element_wise:
        raise UserError(
            f"{name} is not element-wise (an element's update depends on others), but all"
            " parameters of a worker are one flat vector; take one that is, such as sgd or adamw",
            "optimizer.name",
        )
    return make


def lr_schedule(name: str, options: dict[str, Any]) -> MakeScheduler:
    """A maker of the torch LR scheduler `name`; it counts steps, not epochs."""
    kind = choose(LR_SCHEDULES, name, "lr_schedule.name", "learning-rate schedule")
    bound = bind(kind, options, "lr_schedule", given=("optimizer",), name=name)

    def make(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        return kind(optimizer, **bound)

    return make


def check_schedule(make: MakeScheduler, make_optimizer: MakeOptimizer, steps: int) -> None:
    """Raise UserError if torch refuses the schedule for this optimizer or this many steps."""
    optimizer = make_optimizer([torch.zeros(1)])
    try:
        scheduler = make(optimizer)
        for _ in range(min(steps, 100_000)):
            optimizer.step()
            scheduler.step()
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"torch refuses it: {error}", "lr_schedule") from None


def _is_element_wise(make: MakeOptimizer) -> bool:
    """Whether three steps on a matrix equal three steps on each of its elements alone."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    gradients = torch.randn(3, 3, 4, dtype=torch.float64, generator=generator)

    def steps(x: Tensor, path: Tensor) -> Tensor:
        x = x.clone()
        stepper = make([x])
        for gradient in path:
            x.grad = gradient.clone()
            stepper.step()
        return x

    together = steps(start, gradients)
    alone = [
        steps(start[i, j].reshape(1), gradients[:, i, j].reshape(3, 1))
        for i in range(3)
        for j in range(4)
    ]
    return torch.allclose(together.flatten(), torch.cat(alone), rtol=1e-10, atol=1e-12)
