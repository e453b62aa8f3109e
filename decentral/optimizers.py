"""Local optimizers and learning-rate schedules by name: torch's own, and a few beside them.

A replica's optimizer sees one flat tensor, [D] or [n, D], so it must be element-wise: each
element's update may depend on that element's own history alone.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import lr_scheduler

from decentral.errors import UserError
from decentral.lion import Lion
from decentral.signature import bind, choose

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    if kind is not torch.optim.Optimizer
} | {"lion": Lion}

FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)  # torch has such a form of them


class LinearToZero(lr_scheduler.LambdaLR):
    """lr (1 - k/steps) at its step k: zero is where the run ends, so its last step still moves.

    A run that is resumed with more steps goes on along the line of the longer run.

    Defazio et al., Optimal Linear Decay Learning Rate Schedules and Further Refinements, 2023,
    arXiv 2310.07831: the last iterate's best schedule in theory, and a match for cosine in
    practice.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int):
        self._steps = steps
        super().__init__(optimizer, self._factor)

    def _factor(self, k: int) -> float:
        return max(0.0, 1 - k / self._steps)

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """After the optimizer's: its learning rate may be that of a shorter run."""
        self.last_epoch = state_dict["last_epoch"]
        for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * self._factor(self.last_epoch)


# A parameter `steps` is given: the steps of the run that are left after the warm-up.
LR_SCHEDULES: dict[str, Callable[..., lr_scheduler.LRScheduler]] = {
    "constant": lr_scheduler.ConstantLR,
    "cosine": lr_scheduler.CosineAnnealingLR,
    "cosine_warm_restarts": lr_scheduler.CosineAnnealingWarmRestarts,
    "cyclic": lr_scheduler.CyclicLR,
    "exponential": lr_scheduler.ExponentialLR,
    "linear": lr_scheduler.LinearLR,
    "linear_to_zero": LinearToZero,
    "one_cycle": lr_scheduler.OneCycleLR,
    "polynomial": lr_scheduler.PolynomialLR,
    "step": lr_scheduler.MultiStepLR,
    "every": lr_scheduler.StepLR,
}

MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], "Scheduler"]


class Scheduler(Protocol):
    """What sets the learning rate: torch's schedulers and `WarmUp`."""

    def step(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class WarmUp:
    """lr (k+1)/steps at steps k = 0 .. steps-1; then `schedule` counts its own steps from 0.

    lr is what `schedule` begins with, so nothing jumps. torch's SequentialLR rises to the
    optimizer's own lr instead, with which constant and cyclic, for two, do not begin.
    """

    def __init__(self, schedule: Scheduler, optimizer: torch.optim.Optimizer, steps: int):
        self._schedule = schedule
        self._optimizer = optimizer
        self._steps = steps
        self._finished = 0
        self._lrs = [group["lr"] for group in optimizer.param_groups]
        self._rise()

    def step(self) -> None:
        self._finished += 1
        if self._finished > self._steps:
            self._schedule.step()
        else:
            self._rise()

    def state_dict(self) -> dict[str, Any]:
        return {"finished": self._finished, "schedule": self._schedule.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """After the optimizer's, which holds the learning rate in force."""
        self._finished = state_dict["finished"]
        self._schedule.load_state_dict(state_dict["schedule"])
        if self._finished <= self._steps:
            self._rise()

    def _rise(self) -> None:
        factor = min(1.0, (self._finished + 1) / self._steps)
        for group, lr in zip(self._optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr * factor


def optimizer(name: str, options: dict[str, Any]) -> MakeOptimizer:
    """A maker of the torch optimizer `name`; options are its keyword arguments, lr required.

    Every optimizer with a weight_decay takes the option `weight_decay_exclude` too, which is for
    `without_decay`: who makes the optimizer knows no shapes.

    Raises UserError for an option that torch refuses and for an optimizer that is not
    element-wise.
    """
    kind = choose(OPTIMIZERS, name, "optimizer.name", "optimizer")
    own = {option: value for option, value in options.items() if option != EXCLUDE}
    bound = bind(kind, own, "optimizer", given=("params",), name=name, beside=(EXCLUDE,))
    bind(_exclude, {EXCLUDE: excluded(options)}, "optimizer")
    if excluded(options) != "none" and "weight_decay" not in inspect.signature(kind).parameters:
        raise UserError(f"{name} has no weight_decay; take it away", f"optimizer.{EXCLUDE}")
    if "lr" not in bound:
        raise UserError("is required; set it, for example optimizer.lr=0.1", "optimizer.lr")
    if not bound["lr"] >= 0:
        raise UserError(f"must be at least 0; got {bound['lr']!r}", "optimizer.lr")

    light = _without_the_compiler(kind)

    def make(parameters: list[Any]) -> torch.optim.Optimizer:
        tensors = [t for of in parameters for t in (of["params"] if isinstance(of, dict) else [of])]
        form: dict[str, Any] = {"fused": True} if fuses(kind, bound, tensors) else {}
        return light(parameters, **(bound | form))

    try:
        element_wise = is_element_wise(make)
    except Exception as error:  # torch checks some options, and trips over others
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


def scaled(
    name: str,
    options: dict[str, Any],
    rule: Literal["linear", "sqrt"],
    batch: int,
    reference_batch: int,
) -> dict[str, Any]:
    """The options of an optimizer, good at `reference_batch` samples a step, at `batch` of them.

    With kappa = batch / reference_batch:

        linear    lr <- kappa lr              for SGD (Goyal et al. 2017, arXiv 1706.02677)
        sqrt      lr <- sqrt(kappa) lr        for Adam and RMSprop, with
                  1 - beta2 <- kappa (1 - beta2)    (rmsprop: alpha for beta2)
                  eps <- eps / sqrt(kappa)

    The second is of Malladi et al., On the SDEs and Scaling Rules for Adaptive Gradient
    Algorithms, NeurIPS 2022, arXiv 2205.10287. Their rule for Adam scales 1 - beta1 with kappa
    too; that leaves no momentum at kappa = 10 already where beta1 is 0.9, and here beta1 stays.
    sqrt moves nothing but lr in an optimizer other than adam, adamw, nadam, radam and rmsprop.

    Raises UserError for options that the optimizer refuses, and where kappa (1 - beta2) >= 1.
    """
    optimizer(name, options)
    kappa = batch / reference_batch
    if rule == "linear":
        return options | {"lr": options["lr"] * kappa}
    root = math.sqrt(kappa)
    options = options | {"lr": options["lr"] * root}
    if name not in ("adam", "adamw", "nadam", "radam", "rmsprop"):
        return options
    in_force = {k: p.default for k, p in inspect.signature(OPTIMIZERS[name]).parameters.items()}
    in_force |= options
    decay = in_force["alpha"] if name == "rmsprop" else in_force["betas"][1]
    scaled_decay = 1 - kappa * (1 - decay)
    if scaled_decay <= 0:
        raise UserError(
            f"the sqrt rule needs kappa (1 - beta2) < 1, where kappa is {batch} /"
            f" {reference_batch} = {kappa:g} and {name} has {decay} for beta2; take a larger"
            " reference_batch, or rule: linear",
            "scale_lr.reference_batch",
        )
    options["eps"] = in_force["eps"] / root
    if name == "rmsprop":
        return options | {"alpha": scaled_decay}
    return options | {"betas": [in_force["betas"][0], scaled_decay]}


EXCLUDE = "weight_decay_exclude"


def excluded(options: dict[str, Any]) -> Any:
    """The option weight_decay_exclude among those of an optimizer."""
    return options.get(EXCLUDE, "none")


def _exclude(weight_decay_exclude: Literal["none", "norms_and_biases"]) -> None:
    """The schema of the option that all optimizers share."""


def without_decay(make: MakeOptimizer, shapes: Sequence[Sequence[int]]) -> MakeOptimizer:
    """As `make`, but without weight decay on parameters of fewer than two dimensions.

    Those are the biases and the scales and shifts of norms. shapes: of the parameters that lie in
    the last axis of the flat tensor, one after another. The optimizer holds views of it, a group
    that decays and one that does not, and reads the flat tensor's grad when it steps: for its
    caller it is an optimizer of the one flat tensor, but its state is per view.
    """
    runs, start = [], 0  # (whether it decays, from, to): neighbours of a kind are one view
    for decays, members in groupby(shapes, key=lambda shape: len(shape) > 1):
        stop = start + sum(math.prod(shape) for shape in members)
        runs.append((decays, start, stop))
        start = stop

    def make_grouped(parameters: list[Tensor]) -> torch.optim.Optimizer:
        (flat,) = parameters
        views = [flat[..., start:stop] for _, start, stop in runs]
        decaying = [view for view, (decays, *_) in zip(views, runs, strict=True) if decays]
        others = [view for view, (decays, *_) in zip(views, runs, strict=True) if not decays]
        groups: Any = [{"params": decaying}, {"params": others, "weight_decay": 0.0}]
        optimizer = make(groups)

        def hand_over(*_: Any) -> None:
            for view, (_, start, stop) in zip(views, runs, strict=True):
                view.grad = None if flat.grad is None else flat.grad[..., start:stop]

        optimizer.register_step_pre_hook(hand_over)
        return optimizer

    return make_grouped


def lr_schedule(name: str, options: dict[str, Any], steps: int) -> MakeScheduler:
    """A maker of the LR scheduler `name` for a run of `steps`; it counts steps, not epochs.

    Every schedule takes the option `warmup`: so many steps of linear rise come first.

    Raises UserError for an unknown name or option, and for a warm-up that is not within the run.
    """
    kind = choose(LR_SCHEDULES, name, "lr_schedule.name", "learning-rate schedule")
    own = {option: value for option, value in options.items() if option != "warmup"}
    given = ("optimizer", "steps")
    bound = bind(kind, own, "lr_schedule", given, name, beside=("warmup",))
    bind(_warmup, {"warmup": options.get("warmup", 0)}, "lr_schedule")
    warmup = options.get("warmup", 0)
    if warmup >= steps:
        raise UserError(
            f"must be below steps, which is {steps}: the schedule follows it; got {warmup}",
            "lr_schedule.warmup",
        )
    if "steps" in inspect.signature(kind).parameters:
        bound["steps"] = steps - warmup

    def make(optimizer: torch.optim.Optimizer) -> Scheduler:
        schedule = kind(optimizer, **bound)
        return WarmUp(schedule, optimizer, warmup) if warmup else schedule

    return make


def _warmup(warmup: Annotated[int, Field(ge=0)]) -> None:
    """The schema of the option that all schedules share."""


def check_schedule(make: MakeScheduler, make_optimizer: MakeOptimizer, steps: int) -> None:
    """Raise UserError if torch refuses the schedule for this optimizer or this many steps."""
    optimizer = make_optimizer([torch.zeros(1)])
    try:
        scheduler = make(optimizer)
        optimizer.step()  # torch warns where none has come before; more would change nothing
        for _ in range(min(steps, 100_000)):
            scheduler.step()
    except Exception as error:  # torch checks some options, and trips over others
        raise UserError(f"torch refuses it: {error}", "lr_schedule") from None


def fuses(
    kind: type[torch.optim.Optimizer], options: Mapping[str, Any], tensors: Iterable[Tensor]
) -> bool:
    """Whether to take torch's fused form of an optimizer: one pass over memory, and not one for
    each operation.

    torch takes it on request only; here it is taken where no option asks for another form. Not for
    tensors with gaps, such as columns of a matrix: on CPUs torch 2.13 writes into the gaps. Not in
    bfloat16, where its fused SGD takes steps that are off by as much as the step.
    """
    return (
        kind in FUSED
        and options.get("foreach") is None
        and options.get("fused") is None
        and not (options.get("capturable") or options.get("differentiable"))
        and not isinstance(options.get("lr"), Tensor)
        and all(
            (t.is_cpu or t.is_cuda) and t.is_contiguous() and t.dtype != torch.bfloat16
            for t in tensors
        )
    )


def _without_the_compiler(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A torch optimizer whose steps do not import torch.compile's machinery: each process would
    spend as long on it as on torch itself.

    torch wraps `step` in what tells the compiler where a graph ends, and other methods so that the
    compiler leaves them alone. Of these the first call imports it, to be told how, unless the
    method has that in its attribute `__dynamo_disable` already.
    """
    for method in vars(torch.optim.Optimizer).values():
        wrapped = getattr(method, "__wrapped__", None)
        if wrapped is not None:
            vars(wrapped).setdefault("__dynamo_disable", wrapped)
    return type(kind.__name__, (kind,), {"step": torch.no_grad()(inspect.unwrap(kind.step))})


def is_element_wise(make: MakeOptimizer) -> bool:
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
