"""A training loop of one's own, averaged: `wrap` goes around a torch optimizer.

    dist.init_process_group("gloo")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = decentral.wrap(model, optimizer, "gossip_pga", topology="ring", period=8)

Each process of a torch.distributed group is a worker, whoever started it. The loop stays as it
is: zero_grad, backward, step. A step is a step of a `Replica`, as on a worker of the Ray engine,
with the gradient that backward left in the place of a task's.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from decentral.algorithms import Algorithm
from decentral.algorithms.outer import SlowMo
from decentral.algorithms.schedules import Adaptive
from decentral.asynchronous import AsynchronousRule
from decentral.batches import Batches
from decentral.comm import consecutive_groups
from decentral.config import load
from decentral.errors import UserError
from decentral.experiment import algorithm_of, common_key, topology_of, worker_keys
from decentral.gradients import Layout
from decentral.mixing import Mixing
from decentral.optimizers import FUSED, fuses
from decentral.peer import Patience, PeerComm, own_group
from decentral.replica import Replica, Segment, squared_distance
from decentral.topology import Topology


def wrap(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    algorithm: str | Mapping[str, Any],
    topology: str | Mapping[str, Any] | None = None,
    *,
    buffers: Literal["average", "local"] = "average",
    seed: int = 0,
    timeout_s: float = 600.0,
    **options: Any,
) -> "AveragingOptimizer":
    """An optimizer that averages `model` with the other workers' in each step.

    Every process of the default group calls it, with the same arguments but for the data, before
    its first step; all start from the model of rank 0. `optimizer` must have all parameters of the
    model that train, and be used through the returned one from here on.

    algorithm, options: as in a config: "gossip_pga", period=8, or {"name": ..., "period": ...}.
    topology: a name, or as in a config: {"name": "torus"}, {"file": "wan12.gml"}.
    buffers: float ones, such as BatchNorm's statistics, are averaged with the parameters, or stay
        each worker's own; integer ones stay.
    seed: of methods that draw.
    timeout_s: how long a worker waits for others before PeerError; longer than one of them may be
        busy between two steps, with an evaluation or a checkpoint.

    Raises UserError for what does not fit, before anything is exchanged.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise UserError(
            "wrap needs the group of workers; call torch.distributed.init_process_group first,"
            " under torchrun or what else starts the processes"
        )
    if buffers not in ("average", "local"):
        raise UserError(f"must be average or local; got {buffers!r}", "buffers")
    if not timeout_s > 0:
        raise UserError(f"must be above 0 seconds; got {timeout_s!r}", "timeout_s")
    parameters = _parameters(model, optimizer)
    _check_optimizer(optimizer)
    chosen, graph = _method(optimizer, algorithm, options, topology, seed)
    device = next(iter(parameters.values())).device
    own = own_group(consecutive_groups(dist.get_world_size(), chosen.schedule.groups))
    mixing = None
    if graph is not None:
        mixing = Mixing(
            graph,
            turn_steps=chosen.gossip_period,
            sender_keeps=chosen.rule.requires == "column-stochastic",
        )
    comm = PeerComm(mixing, own, _Deadline(timeout_s), str(device))
    gradient = _LeftGradient(model, parameters)
    for tensor in (gradient.parameters, gradient.buffers, *gradient.counters.values()):
        _take_from_first(tensor)
    return AveragingOptimizer(
        optimizer, gradient, chosen, comm, graph, seed=seed, average_buffers=buffers == "average"
    )


class AveragingOptimizer(torch.optim.Optimizer):
    """What `wrap` returns. Its `param_groups` are those of the optimizer that it went around, so
    LR schedulers, clipping and GradScaler act as on that one.

    A parameter without a gradient has a zero one. A step with a GradScaler that finds an infinity
    on any worker is no step on all of them; to agree costs an all-reduce of a number each time.
    """

    _step_supports_amp_scaling = True  # so that GradScaler calls `step` on every worker

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        gradient: "_LeftGradient",
        algorithm: Algorithm,
        comm: PeerComm,
        topology: Topology | None,
        *,
        seed: int,
        average_buffers: bool,
    ):
        self._closed = False
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._closed = True
        self.param_groups = optimizer.param_groups
        assert not isinstance(algorithm.rule, AsynchronousRule), "refused by wrap"
        self._stepper = _Stepper(optimizer, gradient)
        device = gradient.parameters.device
        self._replica = Replica(
            gradient,
            algorithm.rule,
            comm,
            lambda flat: cast(torch.optim.Optimizer, self._stepper),
            None,
            worker_keys(seed, torch.tensor(comm.rank)).to(device),
            common_key(seed).to(device),
            outer=algorithm.outer,
            wire=algorithm.wire,
            gossip_period=algorithm.gossip_period,
            group_period=algorithm.schedule.group_period,
            average_buffers=average_buffers,
        )
        self.state = optimizer.state
        self._gradient, self._algorithm = gradient, algorithm
        self._comm, self._topology = comm, topology
        self._one_lr = getattr(algorithm.rule, "plain_sgd", False) or isinstance(
            algorithm.outer, SlowMo
        )
        self._needs_loss = isinstance(algorithm.schedule, Adaptive)
        self._overlaps = getattr(algorithm.rule, "overlaps", False)
        self._next: Segment | None = None  # a step whose averaging is under way
        self._steps = 0  # finished
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._since = 0  # steps in it: since the last global average
        # The schedule hears of an average when the learning rate of the next step is known.
        self._averaged: tuple[int, float] | None = (-1, math.nan)

    @property
    def steps(self) -> int:
        """How many are finished; one that a GradScaler skips is none."""
        return self._steps

    @property
    def period(self) -> int | None:
        """H in force; None where nobody averages globally, or not after so many steps."""
        return self._algorithm.schedule.period

    @property
    def bytes_sent(self) -> int:
        """By this worker, for the method."""
        return self._comm.bytes_sent

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float | Tensor] | None = None,
        *,
        loss: float | Tensor | None = None,
    ) -> float | Tensor | None:
        """A step of the method with the gradient that backward has left; all workers take it.

        Where the method averages what a step begins with (gossip_cta), that of the next step is
        under way when this returns. What is done to the parameters before the next step, beside
        `load_state_dict`, then counts as this worker's own part of that step.

        loss: of this step's batch, which gossip_aga needs; `closure` computes and returns it.

        Raises PeerError, with this worker, the step and who failed it, if an exchange fails.
        """
        if self._comm.failure is not None:
            raise self._comm.failure
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_step(loss)
        self._gradient.check()
        if self._overflows():
            return loss
        if loss is not None:
            self._loss += loss.detach() if isinstance(loss, Tensor) else loss
        segment, self._next = self._next or self._next_segment(), None
        self._take(segment)
        # After a global average the schedule has yet to hear of the next learning rate.
        if self._overlaps and self._averaged is None:
            self._next = self._next_segment()
            self._replica.begin(self._next)
        return loss

    def _check_step(self, loss: float | Tensor | None) -> None:
        if self._needs_loss and loss is None:
            raise UserError(
                "this method's period follows the loss, and none came; call"
                " optimizer.step(loss=loss)",
                "loss",
            )
        lrs = {float(group["lr"]) for group in self.param_groups} if self._one_lr else set()
        if len(lrs) > 1:
            raise UserError(
                f"this method reckons with one learning rate, but the groups have {sorted(lrs)};"
                " give all the same",
                "optimizer.lr",
            )

    def _overflows(self) -> bool:
        """Whether a GradScaler found an infinity on any worker; unscales the gradient if not."""
        found = getattr(self, "found_inf", None)  # set by GradScaler while it calls `step`
        if found is None:
            return False
        if self._comm.mean((found > 0).double(), self._steps, counted=False) > 0:
            return True
        scale = getattr(self, "grad_scale", None)  # None where the gradients are unscaled
        if scale is not None:
            self._gradient.divide(scale)
        return False

    def _next_segment(self) -> Segment:
        """Of one step: as the coordinator of a run has it."""
        schedule, step = self._algorithm.schedule, self._steps
        if self._averaged is not None:
            schedule.observe(*self._averaged, self._replica.lr)
            self._averaged = None
        average = schedule.next_average(step) == step
        return Segment(
            start=step,
            stop=step + 1,
            between=self._algorithm.between,
            global_average=average,
            record=False,
            watch=schedule.next_watch(step) == step and not average,
        )

    def _take(self, segment: Segment) -> None:
        step, replica = segment.start, self._replica
        if segment.watch:
            report = replica.run(segment)
            if report.moved is not None:
                self._watch(step, report.moved, report.gradient_square)
        else:
            replica.take(segment, step)
        self._comm.events.clear()  # for a clock that nobody reads here
        self._comm.stopwatch.take()
        self._steps, self._since = step + 1, self._since + 1
        if segment.global_average:
            loss = math.nan
            if self._needs_loss:
                mean = self._comm.mean(self._loss / self._since, step, counted=False)
                loss = float(mean)
            self._averaged = step, loss
            self._loss.zero_()
            self._since = 0

    def _watch(self, step: int, moved: np.ndarray, square: np.ndarray | None) -> None:
        assert square is not None, "a watched step has both"
        assert self._topology is not None, "what moved, moved over a graph"
        seen = torch.from_numpy(np.concatenate([moved, square]))
        far, norm = self._comm.mean(seen, step, counted=False).sqrt().tolist()
        turn = step // self._algorithm.gossip_period
        distance = far * self._topology.disagreement(turn)
        self._algorithm.schedule.watch(step, distance, norm, self._replica.lr)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the model is the mean of the workers' models, float buffers too: to evaluate
        or save. All workers enter it; each leaves it with its own model as it was."""
        replica = self._replica
        mine = [tensor for tensor in (replica.x, replica.buffers) if tensor.numel()]
        own = [tensor.clone() for tensor in mine]
        with torch.no_grad():
            for tensor in mine:
                tensor.copy_(self._comm.mean(tensor, self._steps, counted=False))
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, before in zip(mine, own, strict=True):
                    tensor.copy_(before)

    @torch.no_grad()
    def consensus_distance(self) -> float:
        """sqrt((1/n) sum_i ||x_i - xbar||^2) of the models as they are; all workers call it.

        After a global average it is 0, but for rounding.
        """
        x = self._replica.x
        mean = self._comm.mean(x, self._steps, counted=False)
        square = squared_distance(x, mean)
        return math.sqrt(float(self._comm.mean(square, self._steps, counted=False)))

    def state_dict(self) -> dict[str, Any]:
        """Of this worker: of the optimizer, as its own is, and of method and schedule. The model is
        not in it.

        Tensors and plain numbers, which torch.load(weights_only=True) takes.
        """
        return self._stepper.optimizer.state_dict() | {
            "decentral": {
                "workers": self._comm.n,
                "steps": self._steps,
                "method": self._replica.state,
                "schedule": dict(self._algorithm.schedule.state),
                "averaged": self._averaged,
                "loss": self._loss,
                "since": self._since,
                "bytes_sent": self._comm.bytes_sent,
            }
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from this worker's own `state_dict`; the model's is loaded by itself.

        Raises UserError for one of another number of workers, or of a bare optimizer.
        """
        own = state_dict.get("decentral")
        if own is None:
            raise UserError("this is the state of a bare optimizer; load one that was wrapped")
        if own["workers"] != self._comm.n:
            raise UserError(
                f"this is the state of one of {own['workers']} workers, and there are"
                f" {self._comm.n}; start as many"
            )
        self._replica.leave_off()
        self._next = None
        self._stepper.load_state_dict({k: v for k, v in state_dict.items() if k != "decentral"})
        self.state = self._stepper.optimizer.state
        device = self._replica.x.device
        self._replica.state = {
            name: tensor.to(device, copy=True) for name, tensor in own["method"].items()
        }
        self._algorithm.schedule.state.update(own["schedule"])
        self._steps, self._since, self._averaged = own["steps"], own["since"], own["averaged"]
        self._loss.copy_(own["loss"])
        self._comm.bytes_sent = own["bytes_sent"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._closed:
            raise UserError("the parameters are fixed once wrapped; add groups before wrap")
        super().add_param_group(param_group)


class _Stepper:
    """The user's optimizer, for a replica: on the module's own parameters, which are the flat x.

    It steps along the gradient that backward left, or, where a rule has set x.grad, along that.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, gradient: "_LeftGradient"):
        self.optimizer, self._gradient = optimizer, gradient
        self._unwrapped = inspect.unwrap(type(optimizer).step)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def step(self) -> None:
        direction = self._gradient.parameters.grad
        if direction is None:
            self._step()
        else:
            with self._gradient.replaced(direction):
                self._step()

    def _step(self) -> None:
        """In torch's fused form, where a group asks for none: see `fuses`."""
        fused = [group for group in self.param_groups if self._fuses(group)]
        before = [group["fused"] for group in fused]
        for group in fused:
            group["fused"] = True
        try:
            self._bare_step()
        finally:
            for group, own in zip(fused, before, strict=True):
                group["fused"] = own

    def _bare_step(self) -> None:
        """Without what torch puts around a step, where nobody needs it: for profilers and hooks it
        is around the wrapper's own already, and takes longer than the step of a small model."""
        optimizer = self.optimizer
        needs_it = (
            type(optimizer) not in FUSED
            or optimizer.defaults["differentiable"]
            or "step" in vars(optimizer)  # a learning-rate scheduler's, from before `wrap`
            or optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
        )
        if needs_it:
            optimizer.step()
        else:
            self._unwrapped(optimizer)

    def _fuses(self, group: Mapping[str, Any]) -> bool:
        """Not on GPUs, where torch then keeps Adam's state in another place."""
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        on_cpu = all(gradient.is_cpu for gradient in gradients)  # as the parameters, and as dense
        return on_cpu and fuses(type(self.optimizer), group, gradients)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        groups = self.param_groups
        self.optimizer.load_state_dict(state)
        # torch makes new groups; the old ones are what schedulers and the user hold.
        for group, loaded in zip(groups, self.param_groups, strict=True):
            group.update({key: value for key, value in loaded.items() if key != "params"})
        self.optimizer.param_groups = groups


class _LeftGradient:
    """A `Gradient` for Replica: what backward has left in the parameters' grad.

    The module's parameters and float buffers become views of flat ones. Its gradients stay where
    they are, and are copied to a flat one for the rules that look at it.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]):
        first = next(iter(parameters.values()))
        floating = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
        self._layout, buffers = Layout(parameters), Layout(floating)
        dtype = next((b.dtype for b in floating.values()), first.dtype)
        self.parameters = self._layout.flatten(dict(parameters), first.dtype).to(first.device)
        self.buffers = buffers.flatten(floating, dtype).to(first.device)
        self.counters = {n: b for n, b in model.named_buffers() if not b.is_floating_point()}
        self.batches, self.measures = Batches(1), False
        self.variance: Tensor | None = None
        self._loss = torch.zeros((), dtype=torch.float64, device=first.device)
        self._flat: Tensor | None = None  # from the first time that it is asked for
        self._collected = False
        self._placed: list[tuple[str, nn.Parameter, int]] = []
        for name, view in self._layout.views(self.parameters).items():
            parameters[name].data = view
            self._placed.append((name, parameters[name], view.data_ptr()))
        for name, view in buffers.views(self.buffers).items():
            floating[name].data = view

    def check(self) -> None:
        """A step begins: every parameter is where it was put, and has a gradient."""
        self._collected = False
        for name, parameter, address in self._placed:
            if parameter.data_ptr() != address:
                raise UserError(
                    f"the parameter {name} is elsewhere than where wrap has put it; move or cast"
                    " the model before wrap, and load into it without assign=True"
                )
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    @property
    def value(self) -> Tensor:
        if self._flat is None:
            self._flat = torch.empty_like(self.parameters)
        if not self._collected:
            views = self._layout.views(self._flat).values()
            torch._foreach_copy_([*views], [gradient.to_dense() for gradient in self._left()])
            self._collected = True
        return self._flat

    def divide(self, scale: Tensor) -> None:
        torch._foreach_div_(self._left(), scale)

    @contextlib.contextmanager
    def replaced(self, direction: Tensor) -> Iterator[None]:
        """Within it the parameters' gradients are views of `direction`, [D]."""
        left, views = self._left(), self._layout.views(direction)
        for (_, parameter, _), view in zip(self._placed, views.values(), strict=True):
            parameter.grad = view
        try:
            yield
        finally:
            for (_, parameter, _), own in zip(self._placed, left, strict=True):
                parameter.grad = own

    def _left(self) -> list[Tensor]:
        gradients = [parameter.grad for _, parameter, _ in self._placed]
        return [gradient for gradient in gradients if gradient is not None]

    def __call__(self, step: int) -> Tensor:
        self.parameters.grad = None  # the parameters have theirs
        return self._loss  # the loop's own to count

    def losses(self, step: int) -> Tensor:
        raise AssertionError("methods without gradients are refused")


class _Deadline(Patience):
    """The same for every exchange: between two steps of a user's loop anything may come."""

    def __init__(self, timeout_s: float):
        super().__init__(1.0, timeout_s)
        self._timeout = timedelta(seconds=timeout_s)

    def deadline(self) -> timedelta:
        return self._timeout


def _method(
    optimizer: torch.optim.Optimizer,
    algorithm: str | Mapping[str, Any],
    options: Mapping[str, Any],
    topology: str | Mapping[str, Any] | None,
    seed: int,
) -> tuple[Algorithm, Topology | None]:
    """Algorithm and topology, checked as those of a config."""
    chosen = {"name": algorithm} if isinstance(algorithm, str) else dict(algorithm)
    momentum = max((group.get("momentum", 0) for group in optimizer.param_groups), default=0)
    config = load(
        {
            "workers": dist.get_world_size(),
            "steps": 1,  # the loop's to say, as is what follows
            "seed": seed,
            "task": {"name": "none"},
            "optimizer": {"name": type(optimizer).__name__.lower(), "momentum": momentum},
            "algorithm": chosen | dict(options),
            "topology": {"name": topology} if isinstance(topology, str) else topology,
        }
    )
    parts = algorithm_of(config)
    name = config.algorithm.name
    if isinstance(parts.rule, AsynchronousRule):
        raise UserError(
            f"in {name} workers exchange while they compute, which a loop of one's own cannot; take"
            " gossip_sgd, or `decentral run`",
            "algorithm.name",
        )
    if parts.evaluations:
        raise UserError(
            f"{name} asks for losses at points of its own, not for a gradient; take a method with"
            " gradients, or `decentral run`",
            "algorithm.name",
        )
    return parts, topology_of(config, parts)


def _trained(group: Mapping[str, Any]) -> list[nn.Parameter]:
    return [parameter for parameter in group["params"] if parameter.requires_grad]


def _parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """What trains, by name, group by group; in one dtype and on one device."""
    if isinstance(model, DistributedDataParallel):
        raise UserError("DistributedDataParallel averages by itself; wrap the module inside it")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters: dict[str, nn.Parameter] = {}
    for group in optimizer.param_groups:
        for parameter in _trained(group):
            if id(parameter) not in names:
                raise UserError(
                    f"the optimizer has a parameter of shape {tuple(parameter.shape)} that is none"
                    " of the model's; wrap an optimizer of this model alone"
                )
            parameters[names[id(parameter)]] = parameter
    left = [n for n, p in model.named_parameters() if p.requires_grad and n not in parameters]
    if left:
        raise UserError(
            f"the parameter {left[0]} trains but is not in the optimizer, so nobody would average"
            " it; add it, or freeze it with requires_grad_(False)"
        )
    if not parameters:
        raise UserError("the optimizer has no parameter that trains")
    buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    for kind, tensors in (("parameters", parameters), ("float buffers", buffers)):
        kinds = {(tensor.dtype, tensor.device) for tensor in tensors.values()}
        if len(kinds) > 1:
            told = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise UserError(
                f"the {kind} go in one buffer, so they share a dtype and a device; got {told}"
            )
    return parameters


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    name = type(optimizer).__name__
    if isinstance(optimizer, AveragingOptimizer):
        raise UserError("the optimizer is wrapped already; wrap it once")
    if optimizer.state:
        raise UserError(
            f"{name} has taken steps already; wrap it before its first, and load a checkpoint after"
        )

    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UserError(
            f"{name} asks for the loss at points of its own, while a step here has one gradient;"
            " take one that steps along the gradient, such as SGD or AdamW"
        )


def _on_host(device: torch.device) -> bool:
    return device.type == "cpu" or dist.get_backend() == "gloo"


def _take_from_first(tensor: Tensor) -> None:
    """Overwrite with rank 0's."""
    if tensor.numel():
        sent = tensor.cpu() if _on_host(tensor.device) else tensor.contiguous()
        dist.broadcast(sent.view(torch.uint8) if sent.dtype == torch.bool else sent, 0)
        tensor.copy_(sent)
