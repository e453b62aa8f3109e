"""A replica: the model that a worker trains, and what acts on it. Both engines run this text.

`Replica` holds one worker as a flat buffer [D], or all workers of the simulator as [n, D]; every
operation on it, and every step rule, is written for a last axis of D and any leading one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from decentral.comm import Comm, Event, accumulation_dtype


class Averaging(Enum):
    """With whom a worker averages at one step: the mixing matrix W(k) is I, W, or J = 11'/n."""

    NOBODY = "nobody"
    NEIGHBOURS = "neighbours"
    EVERYONE = "everyone"


class Gradient(Protocol):
    """Loss and gradient of the workers' own batches, at the parameters it was built over."""

    parameters: Tensor  # [..., D], trained in place
    buffers: Tensor  # [..., B], float buffers such as BatchNorm statistics; B may be 0
    counters: dict[str, Tensor]  # integer buffers, [..., *shape]
    value: Tensor  # [..., D], the gradient that the last call left

    def __call__(self, step: int) -> Tensor:
        """Draw the batch of `step`, fill `value`, and return the losses, shape [...]."""
        ...


class StepRule(Protocol):
    """One step of a method on a replica."""

    @property
    def requires(self) -> str | None:
        """What it asks of the mixing matrix, such as "doubly stochastic"."""
        ...

    def step(self, replica: "Replica") -> None: ...


@dataclass(frozen=True)
class Segment:
    """Steps start .. stop-1, all alike but the last, which may average globally and record."""

    start: int
    stop: int
    between: Averaging
    global_average: bool
    record: bool


@dataclass(frozen=True)
class Report:
    """What a segment gave, per worker: arrays of length n, or 1 from a worker of a cluster."""

    loss: np.ndarray  # sum over the steps of the segment
    deviation: np.ndarray | None  # ||x_i - xbar||^2 before the last averaging, if recorded
    bytes_sent: int  # by these workers, since the start
    events: list[Event]  # what a worker did, in order: all workers do the same
    lr: float  # at the last step


class Replica:
    """Parameters, local optimizer, step rule and its state, over a `Comm`.

    `state` is what the step rule remembers between steps: tensors shaped like the parameters.
    """

    def __init__(
        self,
        gradient: Gradient,
        rule: StepRule,
        comm: Comm,
        make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        make_scheduler: Callable[[torch.optim.Optimizer], Any] | None,
    ):
        self.x = gradient.parameters
        self.buffers = gradient.buffers
        self.counters = gradient.counters
        self.state: dict[str, Tensor] = {}
        self.comm = comm
        self.step = 0
        self.optimizer = make_optimizer([self.x])
        self.scheduler = make_scheduler(self.optimizer) if make_scheduler else None
        self._gradient = gradient
        self._rule = rule
        self._averaging = Averaging.NOBODY
        self._recording = False
        self._deviation: Tensor | None = None
        self._loss = torch.zeros(self.x.shape[:-1], dtype=torch.float64, device=self.x.device)

    # What a step rule is written with.

    def gradient(self) -> Tensor:
        """The stochastic gradient at x on this step's batch, [..., D]; overwritten by the next."""
        self._loss += self._gradient(self.step)
        self.comm.events.append(Event("compute", self.step, 0))
        return self._gradient.value

    def descend(self, direction: Tensor) -> None:
        """The local optimizer's step on x, `direction` in the place of the gradient."""
        self.x.grad = direction
        self.optimizer.step()

    def mix_(self, v: Tensor) -> None:
        """v_i <- sum_j W(k)_ij v_j, with W(k) as the schedule has it at this step."""
        if self._averaging is Averaging.NEIGHBOURS and v.numel():
            self.comm.mix_(v, self.step)
        elif self._averaging is Averaging.EVERYONE:
            self.mean_(v)

    def mean_(self, v: Tensor) -> None:
        """v_i <- (1/n) sum_j v_j, whatever the schedule says."""
        if v.numel():
            v.copy_(self.comm.mean(v, self.step))

    def average(self) -> None:
        """x_i <- sum_j W(k)_ij x_j: the model's averaging, buffers with it.

        The consensus distance is taken here, before: at a global average from the mean that is
        computed anyway.
        """
        if self._recording:
            everyone = self._averaging is Averaging.EVERYONE
            mean = self.comm.mean(self.x, self.step, counted=everyone)
            self._deviation = _squared_distance(self.x, mean)
            if everyone:
                self.x.copy_(mean)
            else:
                self.mix_(self.x)
        else:
            self.mix_(self.x)
        self.mix_(self.buffers)

    # What an engine calls.

    def run(self, segment: Segment) -> Report:
        """Run the steps of `segment`; parameters, optimizer and state move on in place."""
        self._loss.zero_()
        self._deviation = None
        lr = 0.0
        with torch.no_grad():
            for self.step in range(segment.start, segment.stop):
                last = self.step == segment.stop - 1
                self._averaging = segment.between
                if last and segment.global_average:
                    self._averaging = Averaging.EVERYONE
                self._recording = last and segment.record
                lr = float(self.optimizer.param_groups[0]["lr"])
                self._rule.step(self)
                if self.scheduler is not None:
                    self.scheduler.step()
        deviation = self._deviation
        events, self.comm.events = self.comm.events, []
        return Report(
            loss=self._loss.cpu().numpy().reshape(-1).copy(),
            deviation=None if deviation is None else deviation.cpu().numpy().reshape(-1),
            bytes_sent=self.comm.bytes_sent,
            events=events,
            lr=lr,
        )

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on: tensors and plain numbers."""
        return {
            "x": self.x,
            "buffers": self.buffers,
            "counters": self.counters,
            "state": self.state,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "bytes_sent": self.comm.bytes_sent,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state in place: whoever shares the buffers sees it."""
        self.x.copy_(state["x"])
        self.buffers.copy_(state["buffers"])
        for name, counter in self.counters.items():
            counter.copy_(state["counters"][name])
        self.state = {name: tensor.to(self.x.device) for name, tensor in state["state"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.comm.bytes_sent = state["bytes_sent"]


def consensus_distance(deviation: np.ndarray) -> float:
    """sqrt((1/n) sum_i ||x_i - xbar||^2) from the squared distances (Kong et al. 2021)."""
    return math.sqrt(float(np.mean(deviation)))


def _squared_distance(x: Tensor, mean: Tensor) -> Tensor:
    """||x_i - mean||^2 over the last axis, [...], a few rows at a time to spare memory."""
    dtype = accumulation_dtype(x.dtype)
    if x.dim() == 1:
        return (x.to(dtype) - mean.to(dtype)).square_().sum(dtype=torch.float64)
    rows = [
        (block.to(dtype) - mean.to(dtype)).square_().sum(dim=-1, dtype=torch.float64)
        for block in x.split(64)
    ]
    return torch.cat(rows)
