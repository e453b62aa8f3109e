"""Asynchronous methods: workers compute without a pause, and average with one neighbour meanwhile.

The counterpart of replica.py: a rule is written for one worker's own model, and both engines run
it. `StackedReplicas`, here, is the simulator's side, which carries out an event queue's moments;
`PeerReplica`, in asynchronous_peer.py, is one worker's, which computes and exchanges for real.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from decentral.comm import Comm, StackedComm
from decentral.replica import Report, Segment, array, squared_distance


class AsynchronousRule:
    """What a method makes of a gradient and of a meeting, and what `decentral methods` says of it.

    `exchanges`: rounds per step in which each worker meets a random neighbour, if one is free.
    """

    equation: str
    source: str
    sends: str  # floats of an exchange; D parameters
    requires: str | None
    exchanges: float

    def state(self, x: Tensor) -> dict[str, Tensor]:
        """What it remembers for models x [..., D], at the start: tensors [..., *]."""
        return {}

    def adapt(self, own: "OwnModel", gradient: Tensor, time: float) -> None:
        """Take a step along a gradient, [D], that was computed at where the model was.

        `time` counts gradients begun, per worker.
        """
        raise NotImplementedError

    def meet(self, own: "OwnModel", difference: Tensor, time: float) -> None:
        """Average with a neighbour: `difference` is its x minus one's own, [D], as they met."""
        raise NotImplementedError


@dataclass
class OwnModel:
    """One worker's model: parameters x [D], the rule's state, and the local optimizer of x."""

    x: Tensor
    buffers: Tensor
    state: dict[str, Tensor]
    optimizer: torch.optim.Optimizer

    def descend(self, direction: Tensor) -> None:
        """The local optimizer's step on x, `direction` in the place of the gradient."""
        self.x.grad = direction.contiguous()
        self.optimizer.step()


class AsynchronousGradient(Protocol):
    """As `replica.Gradient`, where each worker is at a step of its own."""

    parameters: Tensor  # [..., D], where the gradients are taken: a copy of the models
    buffers: Tensor  # [..., B]
    counters: dict[str, Tensor]
    value: Tensor  # [..., D]

    def of(self, rows: Sequence[int], steps: Sequence[int]) -> Tensor:
        """Fill these rows of `value`, each with its own step's batch; their losses, [rows]."""
        ...


class Settings:
    """The options of the optimizer at each step of the run, from the learning-rate schedule.

    torch's schedulers go one way, one step at a time, but workers are at steps of their own.
    """

    def __init__(
        self,
        make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        make_scheduler: Callable[[torch.optim.Optimizer], Any] | None,
    ):
        self._optimizer = make_optimizer([torch.zeros(1)])
        self._scheduler = make_scheduler(self._optimizer) if make_scheduler else None
        self._steps = [self._now()]

    def at(self, step: int) -> list[dict[str, Any]]:
        """The options of each parameter group at `step`."""
        if self._scheduler is None:
            return self._steps[0]
        while len(self._steps) <= step:
            self._optimizer.step()
            self._scheduler.step()
            self._steps.append(self._now())
        return self._steps[step]

    def lr(self, step: int) -> float:
        """The learning rate of `step`."""
        return float(self.at(step)[0]["lr"])

    def _now(self) -> list[dict[str, Any]]:
        groups = self._optimizer.param_groups
        return [{k: v for k, v in group.items() if k != "params"} for group in groups]


class AsynchronousReplica:
    """All workers of the simulator, [n, D], or one worker, [D]: what both sides have in common.

    `x` and `buffers` hold the models; the gradient has a copy of its own, of where it is taken.
    """

    def __init__(
        self,
        gradient: AsynchronousGradient,
        rule: AsynchronousRule,
        comm: Comm,
        make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        make_scheduler: Callable[[torch.optim.Optimizer], Any] | None,
        *,
        average_buffers: bool = True,
        watches_drift: bool = False,
    ):
        self.x = gradient.parameters.clone()
        self.buffers = gradient.buffers.clone()
        self.anchor = self.x.clone() if watches_drift else None  # as in Replica
        self.counters = gradient.counters
        self.state = rule.state(self.x)
        self.comm = comm
        self.step = 0
        self._gradient = gradient
        self._rule = rule
        self._shared = self.buffers.shape[-1] if average_buffers else 0  # of the buffers, averaged
        self._settings = Settings(make_optimizer, make_scheduler)
        self._finished = torch.zeros(self.x.shape[:-1], dtype=torch.int64)  # gradients, of each
        self._loss: Tensor = torch.zeros(self.x.shape[:-1], dtype=torch.float64)
        if self.x.dim() == 1:
            rows = [(self.x, self.buffers, self.state)]
        else:
            rows = [
                (x, buffers, {name: value[i] for name, value in self.state.items()})
                for i, (x, buffers) in enumerate(zip(self.x, self.buffers, strict=True))
            ]
        self._own = [OwnModel(*row, make_optimizer([row[0]])) for row in rows]

    def run(self, segment: Segment) -> Report:
        """Run the steps of `segment`, n gradients each, and wait for all workers."""
        raise NotImplementedError

    def adapt(self, own: OwnModel, gradient: Tensor, number: int, time: float) -> None:
        """The rule's step along gradient `number` of all, with the options of its step."""
        options = self._settings.at(number // self.comm.n)
        for group, now in zip(own.optimizer.param_groups, options, strict=True):
            group.update(now)
        self._rule.adapt(own, gradient, time)

    def meet(self, own: OwnModel, difference: Tensor, time: float) -> None:
        """The rule's averaging; `difference` is of messages."""
        x, buffers = difference.split([len(own.x), self._shared])
        self._rule.meet(own, x, time)
        own.buffers[: self._shared].add_(buffers, alpha=0.5)

    def message(self, own: OwnModel) -> Tensor:
        """What a worker sends when it meets another: parameters, and buffers that are averaged."""
        return torch.cat([own.x, own.buffers[: self._shared]])

    def report(self, segment: Segment) -> Report:
        """What came of `segment`; the global average that it ends with, if any, is taken here."""
        self.step = segment.stop
        deviation = drift = None
        if segment.record or segment.global_average:
            mean = self.comm.mean(self.x, segment.stop - 1, counted=segment.global_average)
            deviation = squared_distance(self.x, mean)
            if self.anchor is not None and segment.drift:
                drift = squared_distance(self.x, self.anchor)
            if segment.global_average:
                self.x.copy_(mean)
                if self.anchor is not None:
                    self.anchor.copy_(mean)
                for value in (self.buffers[..., : self._shared], *self.state.values()):
                    if value.numel():
                        value.copy_(self.comm.mean(value, segment.stop - 1))
        events, self.comm.events = self.comm.events, []
        return Report(
            stop=segment.stop,
            loss=self._loss.numpy().reshape(-1).copy(),
            deviation=array(deviation) if segment.record else None,
            drift=array(drift),
            bytes_sent=self.comm.bytes_sent,
            events=events,
            lr=self._settings.lr(segment.stop - 1),
            next_lr=self._settings.lr(segment.stop),
        )

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on: tensors and plain numbers."""
        return {
            "x": self.x,
            "buffers": self.buffers,
            "anchor": self.anchor,
            "counters": self.counters,
            "state": self.state,
            "finished": self._finished,
            "optimizers": [own.optimizer.state_dict() for own in self._own],
            "bytes_sent": self.comm.bytes_sent,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state in place."""
        for mine, saved in (
            (self.x, state["x"]),
            (self.buffers, state["buffers"]),
            *([] if self.anchor is None else [(self.anchor, state["anchor"])]),
            (self._finished, state["finished"]),
            *((value, state["counters"][name]) for name, value in self.counters.items()),
            *((value, state["state"][name]) for name, value in self.state.items()),
        ):
            mine.copy_(saved)
        for own, saved in zip(self._own, state["optimizers"], strict=True):
            own.optimizer.load_state_dict(saved)
        self.comm.bytes_sent = state["bytes_sent"]


class StackedReplicas(AsynchronousReplica):
    """The simulator's side: it carries out the moments of a segment, in order.

    A gradient is taken where the model is when it starts, and applied when it finishes; so what
    all workers are busy with is computed at once, when the first of it is due.
    """

    comm: StackedComm

    def run(self, segment: Segment) -> Report:
        self._loss.zero_()
        waiting: list[int] = []  # started, and not computed yet
        differences: dict[int, Tensor] = {}  # of those that have met, by the first of the two
        gradient = self._gradient
        before = gradient.buffers.clone()
        with torch.no_grad():
            for kind, worker, other, time in segment.moments:
                own = self._own[worker]
                if kind == "start":
                    gradient.parameters[worker] = own.x
                    gradient.buffers[worker] = before[worker] = own.buffers
                    waiting.append(worker)
                elif kind == "finish":
                    if worker in waiting:
                        losses = gradient.of(waiting, self._finished[waiting].tolist())
                        self._loss[waiting] += losses.cpu()
                        waiting = []
                    self.adapt(own, gradient.value[worker], other, time)
                    own.buffers += gradient.buffers[worker] - before[worker]
                    self._finished[worker] += 1
                elif kind == "meet":
                    pair = self.message(own), self.message(self._own[other])
                    differences[worker] = self.comm.difference(*pair)
                else:
                    difference = differences.pop(worker)
                    self.meet(own, difference, time)
                    self.meet(self._own[other], -difference, time)
        return self.report(segment)
